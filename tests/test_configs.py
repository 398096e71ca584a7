"""Every file in configs/ is loaded, checked and round-tripped; published parameter counts are exact."""

import importlib
import json
import pathlib

import jax
import pytest

from configs import gpt2, llama3
from lm import config as configs
from lm.experiment import Experiment

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_is_valid_and_round_trips(path):
    config = configs.load(str(path))
    assert isinstance(config, Experiment)
    assert config.problems() == []
    assert configs.check_types(config, Experiment) == []
    assert configs.from_json(Experiment, json.loads(json.dumps(configs.to_json(config)))) == config


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_unknown_variant_is_refused(path):
    with pytest.raises(configs.ConfigError, match="unknown variant 'nonsense'"):
        configs.load(f"{path}:nonsense")


@pytest.mark.parametrize(
    ("module", "variant", "count"),
    [
        # Radford et al. 2019 say 117M, 345M, 762M, 1542M; these are the released checkpoints' counts.
        (gpt2, "small", 124_439_808),
        (gpt2, "medium", 354_823_168),
        (gpt2, "large", 774_030_080),
        (gpt2, "xl", 1_557_611_200),
        # The released checkpoints of Llama 3.2 1B, Llama 3 8B and 70B.
        (llama3, "1b", 1_235_814_400),
        (llama3, "8b", 8_030_261_248),
        (llama3, "70b", 70_553_706_496),
    ],
)
def test_published_parameter_counts(module, variant, count):
    model = module.get_model(variant)
    assert model.num_parameters() == count
    # Counted without allocating: the same from the shapes of what init would make.
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.build().axes()))


def test_every_field_is_documented():
    undocumented = []

    def visit(cls):
        texts = configs.field_help(cls)
        undocumented.extend(f"{cls.__name__}.{name}" for name in configs.field_types(cls) if name not in texts)
        for hint in configs.field_types(cls).values():
            for option in configs.members(hint):
                if option not in seen:
                    seen.add(option)
                    visit(option)

    seen = {Experiment}
    visit(Experiment)
    assert undocumented == []


def test_every_field_is_read():
    """A field that no code reads lies to its reader: its name must occur as an attribute somewhere in lm/."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "lm").rglob("*.py"))
    unread, seen = [], set()

    def visit(cls):
        seen.add(cls)
        for name, hint in configs.field_types(cls).items():
            if f".{name}" not in text and f'"{name}"' not in text:
                unread.append(f"{cls.__name__}.{name}")
            for option in configs.members(hint):
                if option not in seen:
                    visit(option)

    visit(Experiment)
    assert unread == []


def test_modules_import_alone():
    for path in FILES:
        importlib.import_module(f"configs.{path.stem}")
