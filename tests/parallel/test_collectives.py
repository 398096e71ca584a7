"""What is read from a program's text: kinds, bytes, turns of loops; and the collectives of each way of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lm import parallel
from lm.models import Plain, Ring, Ulysses
from lm.models.attention import Layout, Scoring, Side
from lm.models.context_parallel import attend
from lm.parallel import Traffic

# As XLA writes it: a loop of 3 turns around an all-gather, a call, and an asynchronous permutation.
TEXT = """HloModule jit_f

%body.1 (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %ag = f32[8,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %ag)
}

%called.2 (p: bf16[4]) -> bf16[4] {
  ROOT %ar = bf16[4]{0} all-reduce(%p), channel_id=2, to_apply=%add
}

ENTRY %main.3 (x: f32[2,16]) -> f32[8,16] {
  %w = (s32[], f32[8,16]{1,0}) while(%t0), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %c1 = bf16[4]{0} call(%y), to_apply=%called.2
  %c2 = bf16[4]{0} call(%c1), to_apply=%called.2
  %a2a = (f32[1,8]{1,0}, f32[1,8]{1,0}) all-to-all(%u, %v), channel_id=4
  %s = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%z), channel_id=3
  ROOT %d = f32[5]{0} collective-permute-done(%s)
}
"""

# A loop of 24 that says how often it runs, one of 8 whose condition does, a branch, a started gather and a tuple.
TPU_TEXT = """HloModule step

%body (p: f32[8]) -> f32[8] {
  %g = f32[32,8]{1,0} all-gather(%p), dimensions={0}
  ROOT %r = f32[8] bitcast(%g)
}

%condition (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8), metadata={op_name="while"}
  ROOT %c = pred[] compare(%i, %limit), direction=LT
}

%other (p: f32[8]) -> f32[8] {
  %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %d = bf16[16,8]{1,0} all-gather-done(%s)
}

%chosen (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8] collective-permute(%p), source_target_pairs={{0,1}}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%a), condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %v = (s32[], f32[8]) while(%a), condition=%condition, body=%other
  %b = f32[8] conditional(%i, %a), branch_computations={%chosen}
  ROOT %t = (f32[8]{0}, f32[], /*index=2*/f32[4]{0}) all-reduce(%b, %b, %b), to_apply=%add
}
"""


def test_known_answer():
    assert parallel.count_collectives(TEXT) == {
        "all-gather": Traffic(3, 3 * 8 * 16 * 4),
        "all-reduce": Traffic(2, 2 * 4 * 2),
        "all-to-all": Traffic(1, 2 * 8 * 4),
        "collective-permute": Traffic(1, 5 * 4),
    }
    assert parallel.list_collectives(TEXT)[0].dimensions == [(8, 16)]


def test_a_loop_that_does_not_say_turns_as_often_as_its_condition_does():
    assert parallel.count_collectives(TPU_TEXT) == {
        "all-gather": Traffic(24 + 8, 24 * 32 * 8 * 4 + 8 * 16 * 8 * 2),
        "all-reduce": Traffic(1, 4 * (8 + 1 + 4)),
        "collective-permute": Traffic(1, 32),
    }


def test_what_is_started_is_its_results():
    text = (
        "ENTRY %m (a: f32[8]) -> f32[8] {\n %s = ((f32[8], bf16[4]), (f32[32], bf16[16])) all-gather-start(%a, %b)\n}"
    )
    assert parallel.count_collectives(text) == {"all-gather": Traffic(1, 4 * 32 + 2 * 16)}


def count_attention(way, size, causal=True):
    """Counts the collectives of attention, forward alone and with its gradient."""
    rng = np.random.default_rng(0)
    arrays = tuple(rng.normal(size=(2, 16, 4, 8)).astype(np.float32) for _ in range(3))
    ids = np.ones((2, 16), np.int32)
    places = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    side = Side(ids, places, ids > 1, places[0])
    mesh = parallel.build_mesh(parallel.MeshConfig(data=1, context=size), jax.devices()[:size])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        place = jax.sharding.NamedSharding(mesh, P(None, "context"))
        arrays = jax.device_put(arrays, place)

        def mean(arrays, side):
            return attend(way, Plain(), arrays, Layout(side, side, causal), Scoring(scale=0.3))

        def compiled(function):
            return jax.jit(function).lower(arrays, side).compile().as_text()

        forward = parallel.count_collectives(compiled(mean))
        both = parallel.count_collectives(compiled(jax.grad(lambda arrays, side: jnp.sum(mean(arrays, side) ** 2))))
    return forward, both


def counts(found):
    return {kind: traffic.count for kind, traffic in found.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_sends_keys_on_and_nothing_else(size):
    forward, both = count_attention(Ring(zigzag=False), size)
    # Keys with values, and where they stand, to the next device, size - 1 times.
    assert counts(forward) == {"collective-permute": 2 * (size - 1)}
    local = 2 * 16 // size * 4
    assert forward["collective-permute"].bytes == (size - 1) * 4 * (local * 16 + 4 * 2 * 16 // size)
    # The same once more, since no stretch that came by was kept, with the gradients of keys with values, which go on to
    # where they began. One turn is no loop, and XLA sends what is the same both ways once.
    assert counts(both) == {"collective-permute": 2 * 2 if size == 2 else (2 + 3) * (size - 1) + 1}


def test_dealing_costs_two_permutations_of_each_array_more():
    forward, both = count_attention(Ring(), 4)
    # Queries, keys with values, where they stand, and the result.
    assert counts(forward) == {"collective-permute": 2 * 3 + 2 * 4}
    # Where they stand has no gradient.
    assert counts(both) == {"collective-permute": (2 + 3) * 3 + 1 + 2 * (4 + 3)}
    # A sequence read both ways is as it is.
    assert counts(count_attention(Ring(), 4, causal=False)[0]) == {"collective-permute": 2 * 3}


def test_an_exchange_is_three_of_arrays_and_one_of_places():
    forward, both = count_attention(Ulysses(), 4)
    # Queries, keys with values, and the result.
    assert counts(forward) == {"all-to-all": 3, "all-gather": 1}
    assert forward["all-gather"].bytes <= 4 * 4 * 2 * 16
    assert counts(both) == {"all-to-all": 6, "all-gather": 1}


def test_one_device_has_nobody_to_talk_to():
    forward, both = count_attention(Ring(), 1)
    assert forward == both == {}
