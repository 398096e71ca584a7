"""Layouts: both directions of an equation agree, and read as what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.interop.layouts import LayoutError, parse_layout

EQUATIONS = {
    "A B -> A B": ["AB"],
    "Y X -> X Y": ["AB"],
    "(N H) D -> D N H": ["DNH"],
    "D (N H) -> N H D": ["NHD"],
    "D (*N H) -> D N H": ["DNH", "DKH", "DKH"],
    "(*N H) -> N H": ["NH", "KH", "KH"],
    "*F D -> D F": ["DF", "DG"],
    "(N *H) R -> R N H": ["RNH", "RNV"],
    "(N A B2) D -> D N (B A)": ["DNE"],
    "A1 V -> (A V)": ["V"],
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(EQUATIONS)), st.data())
def test_merge_undoes_split(equation, data):
    sizes = {letter: data.draw(st.integers(1, 4), label=letter) for letter in "ABDFGHKNRVXY"} | {"E": 6}
    shapes = [tuple(sizes[letter] for letter in letters) for letters in EQUATIONS[equation]]
    layout = parse_layout(equation)
    shape = layout.their_shape(shapes)
    theirs = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    ours = layout.split(theirs, shapes)
    assert [leaf.shape for leaf in ours] == shapes
    assert sorted(np.concatenate([leaf.ravel() for leaf in ours])) == sorted(theirs.ravel())
    np.testing.assert_array_equal(layout.merge(ours), theirs)


def test_equations_say_what_the_checkpoints_do():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 5))  # torch: outputs first, heads slowest
    (kernel,) = parse_layout("(N H) D -> D N H").split(weight, [(5, 2, 3)])
    np.testing.assert_array_equal(kernel[:, 1, 2], weight[5])
    fused = rng.normal(size=(5, 18))  # GPT-2: queries, keys and values side by side
    query, key, value = parse_layout("D (*N H) -> D N H").split(fused, [(5, 2, 3)] * 3)
    np.testing.assert_array_equal(np.concatenate([x.reshape(5, 6) for x in (query, key, value)], axis=1), fused)
    pairs = rng.normal(size=(4, 1))  # GGUF: a rotated pair side by side; ours is half a head apart
    (kernel,) = parse_layout("(N A B2) D -> D N (B A)").split(pairs, [(1, 1, 4)])
    np.testing.assert_array_equal(kernel[0, 0], pairs[[0, 2, 1, 3], 0])


def test_wrong_shapes_are_named():
    with pytest.raises(LayoutError, match=r"has shape \[6, 4\], but the config asks for \[6, 5\]"):
        parse_layout("(N H) D -> D N H").split(np.zeros((6, 4)), [(5, 2, 3)])
    with pytest.raises(LayoutError, match="which does not divide"):
        parse_layout("(N A B2) D -> D N (B A)").their_shape([(1, 1, 3)])
    with pytest.raises(LayoutError, match="not of the shape"):
        parse_layout("A B -> B A").their_shape([(1, 1, 3)])


@pytest.mark.parametrize("equation", ["A B", "A B -> A", "A -> A B"])
def test_bad_equations_are_refused(equation):
    with pytest.raises(ValueError, match="same letters"):
        parse_layout(equation)
