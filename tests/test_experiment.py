"""Every clash of settings is found at once, before any device is touched, in a sentence that names both."""

import dataclasses

import pytest

from configs import albert, bart, bert, gpt2, roberta, t5
from lm.data import Bytes, SentencePiece
from lm.data.tokenizers import ByteTokenizer
from lm.evaluation import cells
from lm.experiment import suit
from lm.models import Auto, MultiHead, Plain
from lm.objectives import BERT, GLM, ROBERTA, Causal, Component, Mixture, PrefixLM, SpanCorruption


def changed(name, architecture, section=None, **changes):
    run = cells.make_cell(name, architecture)
    if section is None:
        return dataclasses.replace(run, **changes)
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **changes)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalKernel(Plain):
    """A kernel that cannot let positions see ahead, as some fused ones."""

    causal_only = True


KERNEL = MultiHead(kernel=CausalKernel())
CLASHES = [
    # (run, words of the only sentence)
    (changed("SpanCorruption", "EncoderDecoder", "data", encoder_length=None), ["EncoderDecoder", "encoder_length"]),
    (changed("Causal", "Decoder", "data", encoder_length=32), ["Decoder", "no second stack", "encoder_length 32"]),
    (changed("Causal", "Decoder", "data", sequence_length=65), ["sequence_length 65", "max_length 64"]),
    (changed("SpanCorruption", "EncoderDecoder", "data", encoder_length=65), ["encoder_length 65", "max_length 64"]),
    (changed("MaskedLM (BERT)", "Encoder", "model", num_classes=0), ["MaskedLM", "2 classes", "num_classes"]),
    (changed("MaskedLM (BERT)", "Encoder", "model", num_token_types=1), ["pair", "num_token_types is 1"]),
    (changed("MaskedLM (ROBERTA)", "Encoder", "model", num_classes=2), ["no label", "num_classes"]),
    (changed("GLM", "Decoder", "model", num_block_positions=8), ["GLM", "num_block_positions is 8", "64"]),
    (changed("Causal", "Decoder", "model", num_block_positions=64), ["Causal", "num_block_positions", "set it to 0"]),
    (changed("PrefixLM", "Decoder", "model", attention=KERNEL), ["PrefixLM", "ahead", "CausalKernel"]),
    (
        changed("PrefixLM", "Decoder", "model", attention=MultiHead(kernel=Auto())),
        ["PrefixLM", "ahead", "Auto", "Chunked or Plain"],
    ),
    (changed("MaskedLM (ROBERTA)", "Encoder", "model", attention=KERNEL), ["Encoder", "CausalKernel"]),
    (changed("SpanCorruption", "EncoderDecoder", "model", attention=KERNEL), ["EncoderDecoder", "CausalKernel"]),
    (changed("Causal", "Decoder", "model", vocab_size=310), ["vocab_size 310", "311"]),
    (
        changed("SpanCorruption", "Decoder", "data", tokenizer=Bytes(num_sentinels=1)),
        ["sentinels", "the tokenizer has 1"],
    ),
    (
        changed("Causal", "Decoder", "data", tokenizer=SentencePiece(vocab_size=500)),
        ["vocab_size 311", "500 ids"],
    ),
]


@pytest.mark.parametrize(("run", "words"), CLASHES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_clash_is_told_in_one_sentence(run, words):
    (line,) = run.problems()
    assert line.startswith("config.")
    for word in words:
        assert word in line


def test_a_causal_kernel_serves_a_causal_model():
    assert changed("Causal", "Decoder", "model", attention=KERNEL).problems() == []


@pytest.mark.parametrize("name", ["seed", "num_steps", "batch_size"])
def test_a_number_that_the_devices_cannot_count_is_refused(name):
    run = dataclasses.replace(changed("Causal", "Decoder", "model"), **{name: 10**400})
    assert any(line.startswith(f"config.{name} ") and "32 bits" in line for line in run.problems())


def test_every_clash_is_listed_at_once():
    run = changed("MaskedLM (BERT)", "Encoder", "model", num_classes=0, num_token_types=0, vocab_size=100)
    run = dataclasses.replace(run, batch_size=0, data=dataclasses.replace(run.data, encoder_length=8))
    found = "\n".join(run.problems())
    for word in ("batch_size", "num_classes", "num_token_types", "vocab_size", "encoder_length"):
        assert f"{word}" in found
    assert len(run.problems()) == 5


def test_a_switch_of_the_objective_on_the_command_line_names_the_model():
    assert changed("Causal", "Decoder", objective=ROBERTA).problems() == []
    run = changed("MaskedLM (ROBERTA)", "Encoder", objective=Causal())
    assert run.problems() == [
        "config.objective Causal makes examples that model Encoder cannot read: use --config.model=Decoder"
    ]


def test_a_component_of_a_mixture_is_named():
    mixture = Mixture(
        components=(
            Component(name="lm", objective=Causal()),
            Component(name="spans", objective=SpanCorruption()),
        )
    )
    run = changed("Causal", "Decoder", objective=mixture)
    assert run.problems() == []
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=Bytes(num_sentinels=1)))
    (line,) = run.problems()
    assert "component spans" in line


@pytest.mark.parametrize("objective", [BERT, GLM(), PrefixLM(), SpanCorruption()])
def test_an_unknown_tokenizer_is_asked_later(objective):
    """A stored tokenizer is read when the run starts; what can be known before is still checked."""
    from lm.data import Saved

    run = changed("Causal", "Decoder", "data", tokenizer=Saved(directory="nowhere"))
    run = dataclasses.replace(run, objective=objective)
    assert any("nowhere" in line for line in run.problems())
    assert not any("the tokenizer" in line for line in run.problems())


@pytest.mark.parametrize(
    ("preset", "lacking", "objective"),
    [
        (gpt2, {}, "Causal"),
        (t5, {"mask": None}, "SpanCorruption"),
        (bart, {"sentinels": ()}, "BART"),
        (roberta, {}, "MaskedLM"),
        (bert, {}, "MaskedLM"),
        (albert, {}, "MaskedLM"),
    ],
)
def test_a_ported_model_gets_an_objective_that_trains_it(preset, lacking, objective):
    start = preset.get_config("tiny")
    specials = dataclasses.replace(ByteTokenizer(100).specials, **lacking)
    found = suit(start.model, start.data, specials)
    assert type(found.objective).__name__ == objective
    assert found.objective.traits.label_rule == start.objective.traits.label_rule
    assert not found.clashes()
    assert not found.objective.problems(specials, found.data.lengths)
