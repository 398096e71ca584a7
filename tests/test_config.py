"""Typed configs: round trip through JSON, overrides, and errors that name the nearest field."""

import dataclasses
import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import config as configs
from lm.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
    """A circle.

    Attributes:
      radius: how far it reaches, in
        metres.
    """

    radius: float = 1.0
    colour: str = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    """A square.

    Attributes:
      side: length of a side.
      colour: of the paint.
    """

    side: int = 2
    colour: str = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture.

    Attributes:
      shape: what is on it.
      sizes: in pixels.
    """

    shape: Circle | Square = Circle()
    shapes: tuple[Circle | Square, ...] = (Circle(), Square())
    sizes: tuple[int, ...] = (1, 2)
    mode: Literal["dark", "light"] = "dark"
    framed: bool = False
    title: str | None = None
    scale: float = 1.0


def test_json_round_trip():
    picture = Picture(shape=Square(side=7), title="x", sizes=())
    data = json.loads(json.dumps(configs.to_json(picture)))
    assert configs.from_json(Picture, data) == picture


@given(
    st.builds(
        Picture,
        shape=st.builds(Circle, radius=st.floats(allow_nan=False)) | st.builds(Square, side=st.integers()),
        sizes=st.lists(st.integers()).map(tuple),
        framed=st.booleans(),
        title=st.none() | st.text(),
        mode=st.sampled_from(["dark", "light"]),
    )
)
def test_json_round_trip_of_anything(picture):
    assert configs.from_json(Picture, json.loads(json.dumps(configs.to_json(picture)))) == picture


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["type", "shape", "sizes", "x"]), inner),
    )
)
def test_any_json_is_read_or_refused_in_words(data):
    try:
        assert isinstance(configs.from_json(Picture, data), Picture)
    except ConfigError as error:
        assert str(error).startswith("config")


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("shape.radius", "2.5", Picture(shape=Circle(radius=2.5))),
        ("sizes", "3,4", Picture(sizes=(3, 4))),
        ("sizes", "1e3", Picture(sizes=(1000,))),
        ("sizes", "9" * 400, Picture(sizes=(10**400 - 1,))),
        ("mode", "light", Picture(mode="light")),
        ("framed", "true", Picture(framed=True)),
        ("title", "none", Picture(title=None)),
        ("title", "8", Picture(title="8")),
        ("shape", "Square", Picture(shape=Square(colour="red"))),
        ("shapes.1.side", "9", Picture(shapes=(Circle(), Square(side=9)))),
    ],
)
def test_override(path, text, expected):
    assert configs.override(Picture(), {path: text}) == expected


def test_override_switches_the_class_before_its_fields():
    changed = configs.override(Picture(), {"shape.side": "5", "shape": "Square"})
    assert changed.shape == Square(side=5, colour="red")


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("shap", "Circle", "did you mean shape?"),
        ("shape.radios", "1", "did you mean radius?"),
        ("shape.radius", "wide", "is not float"),
        ("shape", "Sqare", "did you mean Square?"),
        ("mode", "lihgt", "did you mean light?"),
        ("framed", "maybe", "is not bool"),
        ("sizes", "1,b", "is not comma-separated int"),
        ("scale.x", "1", "has no field 'x'"),
        ("shapes.4.side", "1", "not an index below 2"),
    ],
)
def test_override_errors_name_the_field_and_the_nearest(path, text, words):
    with pytest.raises(ConfigError, match=r"config\." + path.split(".")[0]) as caught:
        configs.override(Picture(), {path: text})
    assert words in str(caught.value)


def test_help_reads_the_docstring():
    texts = {path: text for path, _, _, text in configs.leaves(Picture())}
    assert texts["shape.radius"] == "how far it reaches, in metres."
    assert texts["sizes"] == "in pixels."


def test_differences_name_each_leaf():
    old, new = Picture(), Picture(shape=Circle(radius=3.0), sizes=(1, 2, 3))
    lines = configs.differences(configs.to_json(old), configs.to_json(new))
    assert lines == ["config.shape.radius: 1.0 -> 3.0", "config.sizes: [1, 2] -> [1, 2, 3]"]


def test_wrong_types_in_a_config_file_are_found():
    wrong = Picture(sizes="12", framed=1)
    assert len(configs.check_types(wrong, Picture)) == 1
    assert configs.check_types(Picture(), Picture) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config():\n  return 3\n", "returned int, not a dataclass"),
        ("x = 1\n", "has no function get_config"),
        ("def get_config(:\n", "invalid syntax"),
        ("def get_config(variant=''):\n  return {'a': 1}[variant]\n", "unknown variant 'b'"),
    ],
)
def test_load_errors(tmp_path, text, words):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        configs.load(f"{file}:b" if "variant" in words else str(file))


def test_load_names_the_nearest_file(tmp_path):
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*quickstart\.py"):
        configs.load(str(tmp_path / "quikstart.py"))
