"""Every file in configs/ is loaded, checked and round-tripped; published parameter counts are exact."""

import importlib
import json
import pathlib

import jax
import pytest

from configs import deepseek_v3, gpt2, llama3, mixtral, qwen3_moe, switch
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
        # The released checkpoints; Jiang et al. 2024 say 47B, Qwen3's report 30.5B and 235B, DeepSeek-V3's 671B.
        (mixtral, "8x7b", 46_702_792_704),
        (mixtral, "8x22b", 140_630_071_296),
        (qwen3_moe, "30b", 30_532_122_624),
        (qwen3_moe, "235b", 235_093_634_560),
        (deepseek_v3, "671b", 671_026_419_200),
        (switch, "base_8", 619_339_008),
        # Fedus et al. 2022, table 9, say 7.4B, 26.3B and 1,571B.
        (switch, "base_128", 7_415_217_408),
        (switch, "large_128", 26_309_291_008),
        (switch, "c_2048", 1_571_308_972_448),
    ],
)
def test_published_parameter_counts(module, variant, count):
    model = module.get_model(variant)
    assert model.num_parameters() == count
    # Counted without allocating: the same from the shapes of what init would make.
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.build().axes()))


@pytest.mark.parametrize(
    ("module", "variant", "billions"),
    [
        # Jiang et al. 2024, section 1; Mistral's announcement of 8x22B; Qwen3's and DeepSeek-V3's reports.
        (mixtral, "8x7b", 12.9),
        (mixtral, "8x22b", 39.2),
        (qwen3_moe, "30b", 3.35),
        (qwen3_moe, "235b", 22.2),
        (deepseek_v3, "671b", 37.6),
        # As T5-Base, which it is matched to (Fedus et al. 2022, table 9: 0.223B).
        (switch, "base_8", 0.223),
    ],
)
def test_published_active_parameters(module, variant, billions):
    assert module.get_model(variant).num_active_parameters() / 1e9 == pytest.approx(billions, rel=5e-3)


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
