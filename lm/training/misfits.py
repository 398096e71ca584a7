"""What a sound checkpoint holds in another shape than a config makes, read from its metadata alone.

Knows names, shapes and dtypes and no values. Law: a checkpoint of another config is told in one sentence that names
the field; it is never called damaged.
"""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lm.config import say_first
from lm.training.state import TrainState, Tree


def find_misfits(item: Any, like: Tree) -> list[str]:
    """Returns a clause for each parameter that a checkpoint's item lacks, has too much, or has in another shape."""
    theirs, ours = ({name: shape for name, (shape, _) in _leaves(tree).items()} for tree in (_stored(item), like))
    shapes = [(name, theirs.get(name), ours.get(name)) for name in [*ours, *[n for n in theirs if n not in ours]]]
    return [_say_misfit(*each) for each in shapes if each[1] != each[2]]


def find_change(folder: pathlib.Path, like: TrainState) -> str:
    """Returns in a sentence why a run cannot go on from a checkpoint with its config; empty if it can.

    An average that is kept no longer is no reason: it is left behind.

    Args:
      folder: of the checkpoint, `checkpoints/STEP` of a workdir.
      like: the state that the config makes.
    """
    step, state = folder.name, _stored(folder / "state")
    remedy = "cannot change within a run; start another, in another --workdir"
    weights = f"{remedy}, with --config.init_from={folder.parent.parent}"
    if misfits := find_misfits(folder / "params", like.params):
        return f"the checkpoint of step {step} {say_first(misfits)}: config.model {remedy}"
    if _leaves(state.get("opt_state")) != _leaves(like.opt_state):
        return (
            f"the optimizer's state of step {step} has another shape than config.optimizer makes: optimizer.rule, its "
            "block and momentum, what is frozen, and whether there is a clip_norm, a weight_decay or an average "
            f"{weights}"
        )
    average = folder / "average"
    if like.average is not None and (not average.is_dir() or find_misfits(average, like.average)):
        return f"step {step} has no average of the parameters as config.optimizer.average makes it, which {weights}"
    if _leaves(state.get("spikes")) != _leaves(like.spikes):
        return f"step {step} has other figures than config.health.spikes makes: whether it keeps them {weights}"
    return ""


def _stored(item: Any) -> Tree:
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.metadata(item).tree


def _leaves(tree: Tree) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _say_misfit(name: str, theirs: tuple[int, ...] | None, ours: tuple[int, ...] | None) -> str:
    if theirs is None:
        return f"lacks this model's parameter {name}"
    if ours is None:
        return f"holds the parameter {name}, which this model has not"
    return f"holds the parameter {name} with shape {list(theirs)}, which in this model has {list(ours)}"
