"""Every objective with a way to rebuild the text from its examples: the table that the laws are tested over.

A new objective adds one `Row`. `rebuild` gets the examples of one document, in order, and returns its tokens.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from lm.batch import Document, Example
from lm.objectives import (
    ALBERT,
    BART,
    BERT,
    GLM,
    MASS,
    ROBERTA,
    UL2,
    UL2R_DENOISERS,
    Causal,
    Component,
    Deshuffle,
    DropTokens,
    FillInTheMiddle,
    MaskedLM,
    MaskedToText,
    Mixture,
    NextSentence,
    NGrams,
    Objective,
    PrefixLM,
    ReplacedTokenDetection,
    SentenceBlanks,
    SentenceOrder,
    SpanCorruption,
    SpanNoise,
    SuffixBlank,
    SuffixNoise,
    TextToText,
    TokenNoise,
)
from lm.objectives.masking import Replacement
from tests.objectives.vocabulary import SPECIALS


def split(example: Example) -> tuple[list[int], list[int]]:
    """Returns source and target, without the eos of both."""
    if example.encoder_inputs is None:
        is_target = example.weights > 0
        source, target = example.targets[~is_target].tolist(), example.targets[is_target].tolist()
    else:
        source, target = example.encoder_inputs.tolist(), example.targets.tolist()
    return _without_eos(source), _without_eos(target)


def _without_eos(tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == SPECIALS.eos else tokens


def causal(examples, document):
    return [t for e in examples for t in e.targets.tolist()][:-1]


def prefix(examples, document):
    return [t for e in examples for part in split(e) for t in part]


def spans(examples, document):
    return [t for e in examples for t in fill_spans(*split(e))]


def fill_spans(source, target):
    pieces: dict[int, list[int]] = {}
    for token in target:
        if token in SPECIALS.sentinels:
            current = pieces.setdefault(token, [])
        else:
            current.append(token)
    assert [t for t in source if t in SPECIALS.sentinels] == [k for k, v in pieces.items() if v], "sentinels in order"
    return [t for token in source for t in (pieces[token] if token in SPECIALS.sentinels else [token])]


def denoisers(examples, document):
    text = []
    for example in examples:
        source, target = split(example)
        assert source[0] in SPECIALS.modes
        source = source[1:]
        text += fill_spans(source, target) if set(source) & set(SPECIALS.sentinels) else source + target
    return text


def target(examples, document):
    return [t for e in examples for t in split(e)[1]]


def framed_target(examples, document):
    return [t for e in examples for t in split(e)[1][1:]]


def merge(examples, document):
    """Returns the document's tokens if each of its stretches is a merge of a source and a target, else nothing."""
    start = 0
    for example in examples:
        source, dropped = split(example)
        size = len(source) + len(dropped)
        if not is_merge(source, dropped, document.tokens[start : start + size].tolist()):
            return []
        start += size
    return document.tokens[:start].tolist()


def is_merge(first, second, text):
    reachable = {0}  # How many of the first's tokens are used.
    for done, token in enumerate(text):
        reachable = {i + 1 for i in reachable if i < len(first) and first[i] == token} | {
            i for i in reachable if done - i < len(second) and second[done - i] == token
        }
    return len(first) in reachable


def fragment(examples, document):
    text = []
    for example in examples:
        source, hidden = split(example)
        places = [k for k, t in enumerate(source) if t == SPECIALS.mask]
        assert len(places) == len(hidden)
        assert places == list(range(places[0], places[-1] + 1))
        if example.positions is not None:
            assert example.positions.tolist() == places
        for place, token in zip(places, hidden, strict=True):
            source[place] = token
        text += source
    return text


def middles(examples, document):
    text = []
    stream = [t for e in examples for t in e.targets.tolist()]
    pre, suf, mid = SPECIALS.fim
    while stream:
        if stream[0] != pre:
            token = stream.pop(0)
            text += [] if token == SPECIALS.eos else [token]
            continue
        end, at = stream.index(SPECIALS.eos), stream.index(mid)
        head, tail, stream = stream[1:at], stream[at + 1 : end], stream[end + 1 :]
        if head[0] == suf:
            text += tail + head[1:]  # SPM: the prefix comes with the middle.
        else:
            cut = head.index(suf)
            text += head[:cut] + tail + head[cut + 1 :]
    return text


def blanks(examples, document):
    text = []
    for e in examples:
        spans: dict[int, list[int]] = {}
        for k in np.flatnonzero(~e.bidirectional):
            if e.targets[k] != SPECIALS.eop:
                assert e.block_positions[k] == len(spans.setdefault(int(e.positions[k]), [])) + 1
                spans[int(e.positions[k])].append(int(e.targets[k]))
        part_a = e.inputs[e.bidirectional].tolist()
        assert e.positions[e.bidirectional].tolist() == list(range(len(part_a)))
        assert [k for k, t in enumerate(part_a) if t == SPECIALS.mask] == sorted(spans)
        text += [t for k, token in enumerate(part_a) for t in spans.get(k, [token])]
    return text


def unmasked(examples, document):
    """Fills hidden tokens in where they stand; drops CLS and SEP, undoes a swap."""
    text = []
    for e in examples:
        filled = np.where(e.weights > 0, e.targets, e.inputs)
        np.testing.assert_array_equal(filled, e.targets)
        is_text = ~np.isin(filled, [SPECIALS.cls, SPECIALS.sep])
        if e.token_types is None:
            text += filled[is_text].tolist()
        else:
            first, second = (filled[is_text & (e.token_types == k)].tolist() for k in (0, 1))
            text += second + first if e.label_targets[0] else first + second
    return text


def mixed(rebuilds):
    def rebuild(examples, document):
        assert len({int(c) for e in examples for c in e.components}) == 1
        return rebuilds[int(examples[0].components[0])](examples, document)

    return rebuild


@dataclasses.dataclass(frozen=True)
class Row:
    """One objective under the laws.

    Attributes:
      name: of the test.
      objective: as its users have it.
      rebuild: from the examples of a document to its tokens.
      plain: the same without noise that hides what happened (random or kept tokens, trimmed or random texts).
      copies: whether the source shows most of what is predicted by design (leaks are then sought in the target only).
      stacks: 1, 2 or both.
    """

    name: str
    objective: Objective
    rebuild: Callable[[list[Example], Document], list[int]]
    plain: Objective | None = None
    copies: bool = False
    stacks: tuple[int, ...] = (1,)

    @property
    def readable(self) -> Objective:
        return self.plain or self.objective


BOTH = (1, 2)
MASK_ONLY = Replacement(mask_rate=1.0, random_rate=0.0)
WHOLE_BART = BART(random_rate=0.0)
MIXTURE = Mixture(
    components=(
        Component(name="lm", objective=Causal(), weight=2),
        Component(name="prefix", objective=PrefixLM()),
        Component(name="spans", objective=SpanCorruption()),
        Component(name="ul2", objective=UL2(denoisers=UL2R_DENOISERS)),
        Component(name="mlm", objective=MaskedLM(replacement=MASK_ONLY)),
        Component(name="glm", objective=GLM()),
        Component(name="fim", objective=FillInTheMiddle()),
    )
)

ROWS = [
    Row("causal", Causal(), causal),
    Row("prefix", PrefixLM(), prefix, stacks=BOTH),
    Row("prefix_causal", PrefixLM(format=TextToText(prefix="causal", source_eos=False)), prefix),
    Row("spans_t5", SpanCorruption(), spans, stacks=BOTH),
    Row("spans_free", SpanCorruption(noise=SpanNoise(noise_density=0.3, free_edges=True)), spans, stacks=BOTH),
    Row("spans_iid", SpanCorruption(noise=TokenNoise()), spans, stacks=BOTH),
    Row("spans_suffix", SpanCorruption(noise=SuffixNoise()), spans, stacks=BOTH),
    Row("ul2", UL2(), denoisers, stacks=BOTH),
    Row("ul2r", UL2(denoisers=UL2R_DENOISERS), denoisers, stacks=BOTH),
    Row("bert_style", MaskedToText(), target, copies=True, stacks=BOTH),
    Row("mass_style", MaskedToText(random_rate=0.0), target, copies=True, stacks=BOTH),
    Row("drop", DropTokens(), merge, stacks=BOTH),
    Row("deshuffle", Deshuffle(), target, copies=True, stacks=BOTH),
    Row("mass", MASS(), fragment, plain=MASS(random_rate=0.0, keep_rate=0.0), stacks=BOTH),
    Row("bart", BART(), framed_target, copies=True, stacks=BOTH),
    Row("bart_deletion", BART(mean_span_length=None, replace="delete"), framed_target, copies=True, stacks=BOTH),
    Row("bart_rotation", BART(mask_rate=0.0, rotate_rate=1.0), framed_target, copies=True, stacks=BOTH),
    Row("bart_tokens", BART(replace="token", whole_words=False), framed_target, copies=True, stacks=BOTH),
    Row("fim", FillInTheMiddle(), middles),
    Row("fim_psm", FillInTheMiddle(rate=1.0, spm_rate=0.0), middles),
    Row("fim_spm_tokens", FillInTheMiddle(rate=1.0, spm_rate=1.0, unit="token"), middles),
    Row("fim_document", FillInTheMiddle(level="document", loss_on_marks=False), middles),
    Row("glm", GLM(), blanks),
    Row("glm_sentences", GLM(blanks=SentenceBlanks()), blanks),
    Row("glm_suffix", GLM(blanks=SuffixBlank()), blanks),
    Row("roberta", ROBERTA, unmasked, plain=MaskedLM(replacement=MASK_ONLY)),
    Row(
        "mlm_words",
        MaskedLM(unit=NGrams(longest=1)),
        unmasked,
        plain=MaskedLM(unit=NGrams(longest=1), replacement=MASK_ONLY, rate=0.5),
    ),
    Row(
        "bert",
        BERT,
        unmasked,
        plain=MaskedLM(texts=NextSentence(random_rate=0.0, short_rate=0.0), replacement=MASK_ONLY),
    ),
    Row(
        "albert",
        ALBERT,
        unmasked,
        plain=MaskedLM(texts=SentenceOrder(short_rate=0.0), unit=NGrams(longest=3), replacement=MASK_ONLY),
    ),
    Row("electra", ReplacedTokenDetection(), unmasked, plain=ReplacedTokenDetection(keep_rate=0.0)),
    Row("mixture", MIXTURE, mixed([causal, prefix, spans, *[denoisers] * 4, unmasked, blanks, middles])),
    Row(
        "mixture_two_stacks",
        Mixture(
            components=(
                Component(name="spans", objective=SpanCorruption()),
                Component(name="bart", objective=BART()),
            )
        ),
        mixed([spans, framed_target]),
        copies=True,
        stacks=(2,),
    ),
]
