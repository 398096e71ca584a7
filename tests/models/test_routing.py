"""Routers: known answers of the balance losses, selection by groups and bias, and what padding may not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models import routing
from lm.models.routing import BiasBalancing, ExpertGroups, Router, Routing

# As whole programs: one for each of their operations and shapes would take the most of this file's time.
route = jax.jit(Router.route, static_argnums=(0, 3))
tally, z_loss, routing_metrics = jax.jit(routing.tally), jax.jit(routing.z_loss), jax.jit(routing.routing_metrics)
load_balance_loss = jax.jit(routing.load_balance_loss, static_argnames="per_row")


def _routing(experts, probabilities, valid=None):
    experts = jnp.asarray(experts, jnp.int32)
    probabilities = jnp.asarray(probabilities, jnp.float32)
    valid = jnp.ones(experts.shape[:2], bool) if valid is None else jnp.asarray(valid)
    return Routing(probabilities, experts, jnp.ones(experts.shape, jnp.float32), valid)


def _tally(routed, logits=None, dropped=0.0):
    logits = jnp.zeros(routed.probabilities_BTE.shape) if logits is None else logits
    return tally(routed, logits, jnp.float32(dropped))


def _mean(pair):
    return float(pair.sum / pair.weight)


def _load(pair):
    return np.asarray(pair.sum / pair.weight)


def _balance(routed, *, per_row=False):
    return _mean(load_balance_loss(_tally(routed), per_row=per_row))


# The project's notes on objectives, section 1.4: uniform top-1 -> 1.0, uniform top-k -> k, collapsed -> E.
@pytest.mark.parametrize("num_selected", [1, 2, 4])
def test_load_balance_of_uniform_routing_is_the_number_selected(num_selected):
    num_experts, length = 8, 16
    experts = (np.arange(length)[:, None] * num_selected + np.arange(num_selected)) % num_experts
    routed = _routing(experts[None], np.full((1, length, num_experts), 1 / num_experts))
    assert _balance(routed) == pytest.approx(num_selected)
    assert _balance(routed, per_row=True) == pytest.approx(num_selected)


def test_load_balance_of_collapsed_routing_is_the_number_of_experts():
    probabilities = np.zeros((2, 6, 8))
    probabilities[..., 3] = 1.0
    assert _balance(_routing(np.full((2, 6, 1), 3), probabilities)) == pytest.approx(8.0)


def test_load_balance_per_row_sees_rows_that_cancel_in_the_batch():
    probabilities = np.zeros((2, 4, 2))
    probabilities[0, :, 0] = probabilities[1, :, 1] = 1.0
    routed = _routing(np.asarray([[[0]] * 4, [[1]] * 4]), probabilities)
    assert _balance(routed) == pytest.approx(1.0)
    assert _balance(routed, per_row=True) == pytest.approx(2.0)


def test_losses_and_metrics_leave_padding_out():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 4)).astype(np.float32)
    valid = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
    changed = np.where(valid[..., None], logits, 9.0 * rng.normal(size=logits.shape)).astype(np.float32)

    def measure(logits):
        logits = jnp.asarray(logits)
        routed = route(Router(), logits, None, 2, jnp.asarray(valid))
        tally = _tally(routed, logits)
        return [
            load_balance_loss(tally, per_row=False),
            load_balance_loss(tally, per_row=True),
            z_loss(tally),
            routing_metrics(tally),
        ]

    jax.tree.map(np.testing.assert_array_equal, measure(logits), measure(changed))


def test_load_balance_is_the_switch_transformers_of_transformers():
    """Equals E * sum f p over all tokens, computed in float64 (Fedus et al. 2022, equations 4 to 6)."""
    logits = np.random.default_rng(1).normal(size=(3, 7, 5)).astype(np.float32)
    routed = route(Router(), jnp.asarray(logits), None, 1, jnp.ones((3, 7), bool))
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(-1, keepdims=True)
    fractions = np.bincount(exact.argmax(-1).ravel(), minlength=5) / 21
    assert _balance(routed) == pytest.approx(5 * np.sum(fractions * exact.mean((0, 1))), rel=1e-6)


def test_z_loss_of_equal_logits_is_the_squared_logarithm_of_their_number():
    pair = z_loss(_tally(_routing(np.zeros((2, 3, 1)), np.full((2, 3, 8), 1 / 8))))
    assert _mean(pair) == pytest.approx(np.log(8) ** 2)


def test_metrics_of_collapsed_and_uniform_routing():
    uniform = _routing(np.arange(4)[None, :, None], np.full((1, 4, 4), 0.25))
    found = routing_metrics(_tally(uniform, dropped=1.0))
    assert _mean(found["router/max_load"]) == pytest.approx(1.0)
    assert _mean(found["router/entropy"]) == pytest.approx(np.log(4))
    assert _mean(found["router/min_load"]) == pytest.approx(1.0)
    assert _mean(found["router/drop_rate"]) == pytest.approx(0.25)
    np.testing.assert_allclose(_load(found["router/load_of_4"]), [0.25] * 4)
    collapsed = _routing(np.zeros((1, 4, 1)), np.eye(4)[None, [0, 0, 0, 0]])
    found = routing_metrics(_tally(collapsed))
    assert _mean(found["router/max_load"]) == pytest.approx(4.0)
    assert _mean(found["router/min_load"]) == pytest.approx(0.0)
    assert _mean(found["router/entropy"]) == pytest.approx(0.0)
    np.testing.assert_allclose(_load(found["router/load_of_4"]), [1, 0, 0, 0])


def test_load_of_each_expert_leaves_padding_out_and_is_left_out_where_it_would_be_endless():
    experts = np.array([[[0, 1], [0, 2], [3, 2], [3, 3]]])
    routed = _routing(experts, np.full((1, 4, 4), 0.25))._replace(valid_BT=jnp.asarray([[True, True, True, False]]))
    found = routing_metrics(_tally(routed))
    np.testing.assert_allclose(_load(found["router/load_of_4"]), np.array([2, 1, 2, 1]) / 6)
    many = _routing(np.zeros((1, 4, 1)), np.full((1, 4, 65), 1 / 65))
    found = routing_metrics(_tally(many))
    assert set(found) == {"router/max_load", "router/min_load", "router/entropy", "router/drop_rate"}


def test_tallies_of_pieces_add_up_to_that_of_the_batch():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(4, 5, 3)), jnp.float32)
    valid = jnp.asarray(np.random.default_rng(3).random((4, 5)) < 0.8)

    def measure(rows):
        return _tally(route(Router(), logits[rows], None, 2, valid[rows]), logits[rows], 1.0)

    pieces = jax.tree.map(jnp.add, measure(slice(0, 1)), measure(slice(1, 4)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), pieces, measure(slice(0, 4))._replace(dropped=2.0)
    )


def test_weights_of_the_selected():
    logits = jnp.log(jnp.asarray([[[0.4, 0.1, 0.3, 0.2]]]))
    valid = jnp.ones((1, 1), bool)
    plain = route(Router(), logits, None, 2, valid)
    np.testing.assert_array_equal(plain.experts_BTJ, [[[0, 2]]])
    np.testing.assert_allclose(plain.gates_BTJ, [[[0.4, 0.3]]], rtol=1e-6)
    renormalised = route(Router(normalize=True, scale=2.0), logits, None, 2, valid)
    np.testing.assert_allclose(renormalised.gates_BTJ, [[[2 * 4 / 7, 2 * 3 / 7]]], rtol=1e-6)
    sigmoid = route(Router(score="sigmoid"), logits, None, 1, valid)
    np.testing.assert_allclose(sigmoid.gates_BTJ, [[[0.4 / 1.4]]], rtol=1e-6)


def test_bias_selects_but_does_not_weigh():
    logits, valid = jnp.asarray([[[1.0, 0.0, -1.0]]]), jnp.ones((1, 1), bool)
    router = Router(score="sigmoid", balancing=BiasBalancing())

    def gates(bias):
        return route(router, logits, bias, 1, valid).gates_BTJ

    bias = jnp.asarray([0.0, 0.0, 10.0])
    np.testing.assert_array_equal(route(router, logits, bias, 1, valid).experts_BTJ, [[[2]]])
    np.testing.assert_allclose(gates(bias), [[[jax.nn.sigmoid(-1.0)]]])
    np.testing.assert_array_equal(jax.jacrev(gates)(bias), np.zeros((1, 1, 1, 3)))


def test_balancing_moves_the_bias_against_the_load():
    counts = jnp.asarray([[6.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    new = BiasBalancing(step=0.5).update(jnp.zeros((2, 3)), counts)
    np.testing.assert_array_equal(new, [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])


def test_balancing_evens_out_a_skewed_router():
    """Over steps the largest load comes near the mean, where it was far above it."""
    rng = np.random.default_rng(0)
    router, skew = Router(score="sigmoid", balancing=BiasBalancing(step=0.02)), jnp.linspace(-1.5, 1.5, 8)
    logits = jnp.asarray(rng.normal(size=(4, 64, 8)), jnp.float32) + skew[None, None]

    @jax.jit
    def step(bias):
        routed = route(router, logits, bias, 2, jnp.ones((4, 64), bool))
        counts = _tally(routed).counts_E
        return router.balancing.update(bias, counts), jnp.max(counts) / jnp.mean(counts)

    bias, first = step(jnp.zeros(8))
    for _ in range(60):
        bias, last = step(bias)
    assert first > 2.0
    assert last < 1.25


@pytest.mark.parametrize("score", ["best", "best_two"])
def test_groups_limit_where_a_token_goes(score):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 9, 12)), jnp.float32)
    groups = ExpertGroups(num_groups=4, num_selected=2, score=score)
    routed = route(Router(score="sigmoid", groups=groups), logits, None, 4, jnp.ones((2, 9), bool))
    scores = np.sort(np.asarray(jax.nn.sigmoid(logits)).reshape(2, 9, 4, 3), axis=-1)
    value = scores[..., -1] if score == "best" else scores[..., -2:].sum(-1)
    allowed = np.argsort(-value, axis=-1)[..., :2]
    chosen = np.asarray(routed.experts_BTJ) // 3
    assert all(set(chosen[b, t]) <= set(allowed[b, t]) for b in range(2) for t in range(9))


def test_jitter_is_in_training_only_and_bounded():
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    router = Router(jitter=0.1)
    np.testing.assert_array_equal(router.disturb(x, None), np.ones((2, 3, 4), np.float32))
    disturbed = np.asarray(router.disturb(x, jax.random.key(0)))
    assert disturbed.dtype == np.float32
    assert 0.9 <= disturbed.min() < disturbed.max() <= 1.1


@pytest.mark.parametrize(
    ("router", "field"),
    [
        (Router(jitter=1.0), "router.jitter"),
        (Router(groups=ExpertGroups(num_groups=3)), "groups.num_groups"),
        (Router(groups=ExpertGroups(num_groups=4, num_selected=5)), "groups.num_selected"),
        (Router(groups=ExpertGroups(num_groups=4, num_selected=1)), "groups.num_selected"),
        (Router(groups=ExpertGroups(num_groups=8, num_selected=8)), "groups.score"),
    ],
)
def test_problems_name_the_field(router, field):
    assert any(field in problem for problem in router.problems(8, 4))
