"""A stack of layers as a pipeline: each stage has some layers, and pieces of a batch follow each other through them.

The interleaved (circular) schedule of Narayanan et al. 2021, section 2.2, forward; its backward is the
transpose that differentiation makes of it. Knows no layer. Law: the result, its gradients and every
sum over the batch are those of the layers one after the other; an idle stage's work counts nowhere.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.parallel.axes import constrain, current, inside, is_divided

STAGE = "stage"


def num_pieces(rows: int) -> int:
    """Returns into how many pieces a batch of `rows` is cut for the stages; 0 is for no pipeline.

    A batch that is too small to be cut (an evaluation's, a prompt's) goes through the layers one after the other.
    """
    if not is_divided():
        return 0
    mesh, rules = current()
    stages = mesh.shape[STAGE]
    if stages == 1:
        return 0
    pieces = math.gcd(rows, rules.pipeline.pieces(stages))
    return pieces if rules.pipeline.repeats == 1 or pieces >= stages else 0


def run_pipeline(
    layers: Callable[..., tuple[jax.Array, Any]], weights: Any, x: jax.Array, rows: Any, shared: Any
) -> tuple[jax.Array, Any]:
    """Applies a stack of layers, divided over the stages of the mesh in force.

    Args:
      layers: (weights of some layers, x, rows, shared) -> (x, sums), those layers applied to some rows of the batch;
        the sums have a leading axis of layers, and those of pieces of a batch add up to those of the batch.
      weights: arrays with a leading axis of all layers.
      x: [B, T, D].
      rows: what else is of each row; arrays with a leading axis B.
      shared: what is of all rows.

    Raises:
      ValueError: the number of layers is no multiple of stages x repeats.
    """
    mesh, rules = current()
    stages, repeats, pieces = mesh.shape[STAGE], rules.pipeline.repeats, num_pieces(len(x))
    depth = len(jax.tree.leaves(weights)[0])
    if depth % (stages * repeats):
        raise ValueError(uneven(depth, stages, repeats))

    def cut(leaf: jax.Array) -> jax.Array:
        # Neighbouring rows go to different pieces, so that no row leaves its device.
        return jnp.swapaxes(leaf.reshape(len(leaf) // pieces, pieces, *leaf.shape[1:]), 0, 1)

    def deal(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(repeats, stages, depth // (stages * repeats), *leaf.shape[1:])

    whole, staged = PartitionSpec(), PartitionSpec(None, STAGE)
    with inside(frozenset({STAGE})):
        x_MBTD = constrain(cut(x), None, "batch", "residual_length", "activation_embed")
        run = jax.shard_map(
            Schedule(layers, stages, repeats, pieces).run,
            in_specs=(staged, whole, whole, whole, PartitionSpec(STAGE)),
            out_specs=(PartitionSpec(STAGE), staged),
            axis_names={STAGE},
            check_vma=False,
        )
        # A stage's number comes as data: with other axes left to the compiler, asking for it is not supported.
        y, sums = run(jax.tree.map(deal, weights), x_MBTD, jax.tree.map(cut, rows), shared, jnp.arange(stages))
    # Results end on the first stage.
    y = jnp.swapaxes(y[0], 0, 1).reshape(x.shape)
    y = constrain(y, "batch", "residual_length", "activation_embed")
    return y, jax.tree.map(lambda leaf: leaf.reshape(depth, *leaf.shape[3:]), sums)


def uneven(depth: int, stages: int, repeats: int) -> str:
    """Returns the sentence that layers do not divide over the stages."""
    return (
        f"config.mesh.stage {stages} with config.sharding.pipeline.repeats {repeats} does not divide {depth} layers:"
        f" make their product a divisor of {depth}"
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one stage does, turn by turn.

    Piece p's round r is the stage's work number r * pieces + p, and stage s does its work k in turn k + s.

    Attributes:
      layers: as of `run_pipeline`.
      stages: number of stages.
      repeats: number of rounds.
      pieces: number of pieces.
    """

    layers: Callable[..., tuple[jax.Array, Any]]
    stages: int
    repeats: int
    pieces: int

    def run(self, weights: Any, x: jax.Array, rows: Any, shared: Any, stage: jax.Array) -> tuple[jax.Array, Any]:
        """Runs all turns of one stage.

        Args:
          weights: the stage's, with leading axes of rounds, 1, and layers.
          x: the pieces, [pieces, B, T, D].
          rows: of the pieces.
          shared: of all rows.
          stage: i32[1], the stage's number.

        Returns:
          The pieces as they leave the last stage, [1, pieces, B, T, D], on the first stage (elsewhere anything); and
          the sums of the stage's layers, with leading axes of rounds, 1, and layers.
        """
        first = stage[0] == 0

        def at(tree: Any, index: jax.Array | int) -> Any:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), tree)

        def work(repeat: jax.Array | int, piece: jax.Array | int, x: jax.Array) -> tuple[jax.Array, Any]:
            own = jax.tree.map(lambda leaf: leaf[0], at(weights, repeat))
            return self.layers(own, x, at(rows, piece), shared)

        def turn(carry: Any, time: jax.Array) -> tuple[Any, None]:
            arrived, x, totals = carry
            number = time - stage[0]
            busy = (number >= 0) & (number < self.pieces * self.repeats)
            repeat = jnp.clip(number // self.pieces, 0, self.repeats - 1)
            piece = number % self.pieces
            y, sums = work(repeat, piece, jnp.where(first, at(x, piece), arrived))
            totals = jax.tree.map(lambda all, one: all.at[repeat].add(jnp.where(busy, one, 0)), totals, sums)
            ring = [(s, (s + 1) % self.stages) for s in range(self.stages)]
            arrived = jax.lax.ppermute(y, STAGE, ring)
            # What the last stage did comes to the first one, which keeps it for the next round or for good.
            done = time - (self.stages - 1)
            slot = done % self.pieces
            kept = jnp.where(first & (done >= 0), arrived, at(x, slot))
            return (arrived, x.at[slot].set(kept), totals), None

        _, shapes = jax.eval_shape(lambda: work(0, 0, x[0]))
        totals = jax.tree.map(lambda s: jnp.zeros((self.repeats, *s.shape), s.dtype), shapes)
        turns = jnp.arange(self.pieces * self.repeats + self.stages - 1)
        # An idle stage works on a piece all the same, so that nothing it computes is less finite than the rest.
        (_, x, totals), _ = jax.lax.scan(turn, (x[0], x, totals), turns)
        return x[None], jax.tree.map(lambda leaf: leaf[:, None], totals)
