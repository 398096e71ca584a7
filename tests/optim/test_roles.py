"""What each kind of leaf is."""

import jax
import jax.numpy as jnp
import pytest

from lm.optim import Role, role_of, roles_of

LEAVES = {
    ("embed", "heads", "head_dim"): Role("matrix", (), (0,), (1, 2)),
    ("layers", "embed", "kv_heads", "head_dim"): Role("matrix", (0,), (1,), (2, 3)),
    ("layers", "heads", "head_dim", "embed"): Role("matrix", (0,), (1, 2), (3,)),
    ("embed", "mlp"): Role("matrix", (), (0,), (1,)),
    ("layers", "experts", "embed", "mlp"): Role("matrix", (0, 1), (2,), (3,)),
    ("layers", "embed", None, "mlp"): Role("matrix", (0, 2), (1,), (3,)),
    ("layers", "embed", "experts"): Role("matrix", (0,), (1,), (2,)),
    ("embed", "latent"): Role("matrix", (), (0,), (1,)),
    ("latent", "heads", "head_dim"): Role("matrix", (), (0,), (1, 2)),
    ("vocab", "embed"): Role("table", (), (0,), (1,)),
    ("embed", "vocab"): Role("table", (), (0,), (1,)),
    ("positions", "embed"): Role("table", (), (0,), (1,)),
    ("layers", "buckets", "heads"): Role("table", (0,), (1,), (2,)),
    ("embed", "classes"): Role("table", (), (0,), (1,)),
    ("norm",): Role("vector", (), (0,), ()),
    ("layers", "norm"): Role("vector", (0,), (1,), ()),
    ("layers", "heads", "head_dim"): Role("vector", (0,), (1, 2), ()),
    ("layers", "experts", "mlp"): Role("vector", (0, 1), (2,), ()),
    ("vocab",): Role("vector", (), (0,), ()),
    (): Role("vector", (), (), ()),
}


@pytest.mark.parametrize("axes", LEAVES, ids=str)
def test_role_of(axes):
    role = role_of(axes)
    assert role == LEAVES[axes]
    assert sorted(role.stacked + role.rows + role.columns) == list(range(len(axes)))


def test_three_sides_are_an_error():
    with pytest.raises(ValueError, match="common name"):
        role_of(("embed", "mlp", "latent"))


def test_wrong_number_of_names_names_the_leaf():
    with pytest.raises(ValueError, match="mlp/up"):
        roles_of({"mlp": {"up": jnp.zeros((2, 3))}}, {"mlp": {"up": ("embed",)}})


def test_roles_of_keeps_the_structure():
    params = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    roles = roles_of(params, {"a": {"kernel": ("embed", "mlp")}, "b": ("norm",)})
    assert roles["a"]["kernel"].kind == "matrix"
    assert roles["b"].kind == "vector"
