"""Filling in: a prompt and its suffix stand as the objective itself lays out that text with that blank."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lm import parallel
from lm.batch import Document, Lengths
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import DecodingError, Sampling, build_decoder, choose_frame, encode_prompts
from lm.document import PLAIN, Context
from lm.objectives import BART, GLM, UL2, Causal, Component, FillInTheMiddle, Mixture, PrefixLM, SpanCorruption
from lm.objectives.fim import SPM
from lm.objectives.glm import arrange_blanks
from lm.objectives.noise import NoiseSize
from lm.objectives.ul2 import Denoiser, suffix

BYTES = ByteTokenizer(3)
SPECIALS = BYTES.specials
TEXT, MIDDLE = "one two", " three"


@pytest.fixture(autouse=True)
def _mesh():
    mesh = parallel.build_mesh(parallel.MeshConfig(), jax.devices()[:1])
    with parallel.use(mesh, parallel.DEFAULT_RULES):
        yield


@dataclasses.dataclass(frozen=True)
class Blank:
    """Corrupts one run at a known place."""

    start: int
    stop: int

    def sizes(self, length):
        return NoiseSize(self.stop - self.start, length - self.stop + self.start, 1, True)

    def sample(self, length, rng):
        return (np.arange(length) >= self.start) & (np.arange(length) < self.stop)


def stacks(encoder_depth):
    """What the functions under test read of a model."""
    config = SimpleNamespace(encoder_depth=encoder_depth, decoder_depth=1)
    return SimpleNamespace(config=config)


def prompt(frame, behind, encoder_depth=0):
    """Returns the prompts, and the tokens of the only one."""
    made = encode_prompts(stacks(encoder_depth), BYTES, [TEXT], [0], frame, behind)
    return made, made.tokens[0, : made.lengths[0]].tolist()


def whole(behind):
    return BYTES.encode(TEXT + MIDDLE + behind)


@pytest.mark.parametrize("behind", ["", " four"])
@pytest.mark.parametrize("mode", [None, "R", "X"])
def test_spans(mode, behind):
    """T5 and UL2's R and X: the first sentinel in the source and before the answer, then the second or eos."""
    noise = Blank(len(TEXT), len(TEXT + MIDDLE))
    objective = SpanCorruption(noise=noise) if mode is None else UL2(denoisers=(Denoiser(mode=mode, noise=noise),))
    frame = choose_frame(objective.traits, mode=mode, fill_in=True)
    assert choose_frame(objective.traits) == frame
    document = Document("0", None, whole(behind))
    context = Context(BYTES, Lengths(64, 64), 0, 0, 0, lambda rng: document)
    (example,) = objective.examples(document, context)
    made, begin = prompt(frame, behind, encoder_depth=1)
    assert made.encoder_tokens[0, : made.encoder_lengths[0]].tolist() == example.encoder_inputs.tolist()
    assert begin == [SPECIALS.bos, SPECIALS.sentinels[0]] == example.inputs[:2].tolist()
    # The answer, and what follows it in training ends it.
    stops = build_decoder(stacks(1), BYTES, frame, Sampling()).stop_ids
    middle = BYTES.encode(MIDDLE).tolist()
    assert example.targets[1 : 1 + len(middle)].tolist() == middle
    assert example.targets[1 + len(middle)] == (SPECIALS.sentinels[1] if behind else SPECIALS.eos)
    assert example.targets[1 + len(middle)] in stops
    # In one stack the same comes one after the other.
    (example,) = objective.examples(document, dataclasses.replace(context, lengths=Lengths(128)))
    made, tokens = prompt(frame, behind)
    assert tokens == example.inputs[: len(tokens)].tolist()
    assert made.sources.tolist() == [example.bidirectional.sum()]


@pytest.mark.parametrize("unit", ["character", "token"])
@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_the_middle(spm_rate, unit):
    behind = " four"
    objective = FillInTheMiddle(rate=1.0, spm_rate=spm_rate, unit=unit)
    tokens = whole(behind)
    cuts = (np.array([len(TEXT), len(TEXT + MIDDLE)]) + 0.5) / (len(tokens) + 1)
    stream = objective.rearrange(tokens, np.append(cuts, 0.5), BYTES)
    _, tokens = prompt(choose_frame(objective.traits, fill_in=True), behind)
    assert [*tokens, *BYTES.encode(MIDDLE), SPECIALS.eos] == [SPECIALS.bos, *stream]


def test_a_plain_prompt_stays_plain_where_plain_texts_were_trained_on():
    frame = choose_frame(FillInTheMiddle().traits)
    assert prompt(frame, "")[1] == prompt(PLAIN, "")[1] == [SPECIALS.bos, *BYTES.encode(TEXT)]
    pre, suf, mid = SPECIALS.fim
    always = choose_frame(FillInTheMiddle(rate=1.0).traits)
    assert prompt(always, "")[1] == [SPECIALS.bos, pre, *BYTES.encode(TEXT), suf, mid]
    assert choose_frame(FillInTheMiddle(rate=1.0, spm_rate=1.0).traits) == SPM


@pytest.mark.parametrize("behind", ["", " four"])
def test_a_blank(behind):
    frame = choose_frame(GLM().traits, fill_in=True)
    place = np.array([[len(TEXT), len(TEXT + MIDDLE)]])
    example = arrange_blanks(whole(behind), place, np.zeros(1, np.int64), SPECIALS)
    made, tokens = prompt(frame, behind)
    assert tokens == example.inputs[: len(tokens)].tolist()
    assert made.sources.tolist() == [example.bidirectional.sum()]
    assert made.gaps.tolist() == [len(TEXT)] == [example.positions[-1]]


MIXTURE = Mixture(
    components=(
        Component(name="lm", objective=Causal()),
        Component(name="fim", objective=FillInTheMiddle()),
        Component(name="ul2", objective=UL2()),
    )
)


def test_the_first_frame_that_fills_in_is_chosen():
    assert choose_frame(UL2().traits).mode == "S"
    assert choose_frame(UL2().traits, fill_in=True).mode == "R"
    assert choose_frame(UL2().traits, mode="X", fill_in=True).mode == "X"
    assert choose_frame(MIXTURE.traits) == PLAIN
    assert choose_frame(MIXTURE.traits, fill_in=True).after == ("fim[2]",)
    assert choose_frame(MIXTURE.traits, "ul2", fill_in=True).mode == "R"


@pytest.mark.parametrize(
    ("objective", "component", "mode", "words"),
    [
        (Causal(), None, None, "never fills in before a suffix: give a prompt alone"),
        (PrefixLM(), None, None, "never fills in"),
        (BART(), None, None, "never fills in"),
        (FillInTheMiddle(rate=0.0), None, None, "never fills in"),
        (UL2(), None, "S", "never fills in before a suffix in mode 'S'"),
        (UL2(denoisers=(suffix(0.5),)), None, None, "never fills in"),
        (MIXTURE, "lm", None, "never fills in"),
    ],
)
def test_what_never_fills_in_says_so_in_one_sentence(objective, component, mode, words):
    with pytest.raises(DecodingError, match=words) as error:
        choose_frame(objective.traits, component, mode, fill_in=True)
    assert len(str(error.value).splitlines()) == 1


def test_a_suffix_is_never_dropped_or_misplaced():
    with pytest.raises(DecodingError, match="no place for a suffix"):
        prompt(PLAIN, "x")
    few = SimpleNamespace(specials=dataclasses.replace(SPECIALS, fim=()), encode=BYTES.encode)
    with pytest.raises(DecodingError, match=r"no 'fim\[0\]' token"):
        encode_prompts(stacks(0), few, [TEXT], [0], choose_frame(FillInTheMiddle().traits, fill_in=True), "x")
