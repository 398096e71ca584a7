"""Known answer: Bavarian et al. 2022, section 3, on 'abcdefgh' with cuts at 2 and 5."""

import numpy as np
import pytest

from lm.batch import Document, Lengths, SpecialTokens
from lm.objectives import Causal, FillInTheMiddle
from lm.objectives.fim import find_cut
from tests.objectives.vocabulary import (
    SENTENCES,
    SPECIALS,
    TEXT_START,
    VOCABULARY,
    Characters,
    make_context,
    make_distinct,
    make_document,
)

PRE, SUF, MID = "<10>", "<11>", "<12>"
DRAW = np.array([5.5 / 9, 2.5 / 9, 0.4])  # Cuts at 5 and 2 of the nine places in 'abcdefgh'.


@pytest.mark.parametrize("unit", ["character", "token"])
def test_the_worked_example(unit):
    tokens = VOCABULARY.encode("abcdefgh")
    psm = FillInTheMiddle(spm_rate=0.0, unit=unit).rearrange(tokens, DRAW, VOCABULARY)
    assert VOCABULARY.decode(psm) == f"{PRE}ab{SUF}fgh{MID}cde<2>"
    spm = FillInTheMiddle(spm_rate=1.0, unit=unit).rearrange(tokens, DRAW, VOCABULARY)
    assert VOCABULARY.decode(spm) == f"{PRE}{SUF}fgh{MID}abcde<2>"


def test_rate_zero_is_causal():
    for length in (1, 30, 63, 64, 65, 128, 200):
        document = make_distinct(length)
        for level in ("context", "document"):
            plain = FillInTheMiddle(rate=0.0, level=level).examples(document, make_context())
            causal = Causal().examples(document, make_context())
            assert [e.inputs.tolist() for e in plain] == [e.inputs.tolist() for e in causal]
            assert [e.targets.tolist() for e in plain] == [e.targets.tolist() for e in causal]


def test_shares_and_orders():
    transformed = spm = 0
    for index in range(1500):
        (example,) = FillInTheMiddle(spm_rate=0.25).examples(make_distinct(20), make_context(index=index))
        transformed += example.targets[0] == SPECIALS.fim[0]
        spm += tuple(example.targets[:2]) == SPECIALS.fim[:2]
    assert abs(transformed / 1500 - 0.5) < 0.04
    assert abs(spm / transformed - 0.25 - 0.75 / 21) < 0.06  # PSM with an empty prefix looks the same.


def test_a_long_document_keeps_every_triple_whole():
    document = make_document(SENTENCES * 4)
    for index in range(20):
        examples = FillInTheMiddle(rate=1.0).examples(document, make_context(index=index))
        for e in examples:
            assert all((e.targets == mark).sum() == 1 for mark in SPECIALS.fim)
            assert e.targets[-1] == SPECIALS.eos
            assert e.inputs[0] == SPECIALS.bos
        assert {len(e.targets) for e in examples[:-1]} == {64}


def test_document_level_cuts_after_transforming():
    examples = FillInTheMiddle(rate=1.0, level="document").examples(make_distinct(150), make_context())
    targets = np.concatenate([e.targets for e in examples])
    assert all((targets == mark).sum() == 1 for mark in SPECIALS.fim)
    assert [len(e.targets) for e in examples] == [64, 64, 26]


def test_loss_on_marks_is_a_choice_and_eos_always_counts():
    (example,) = FillInTheMiddle(rate=1.0, loss_on_marks=False).examples(make_distinct(20), make_context())
    np.testing.assert_array_equal(example.weights == 0, np.isin(example.targets, SPECIALS.fim))
    assert example.weights[-1] == 1
    (example,) = FillInTheMiddle(rate=1.0).examples(make_distinct(20), make_context())
    assert example.weights.all()


class Digrams(Characters):
    """Encodes greedily in pairs of letters where it can: cutting a text between characters adds tokens."""

    FIRST = VOCABULARY.size

    @property
    def size(self):
        return self.FIRST + 26 * 26

    @property
    def token_bytes(self):
        return np.append(super().token_bytes, np.full(26 * 26, 2))

    def encode(self, text):
        ids, k = [], 0
        while k < len(text):
            pair = text[k : k + 2]
            if len(pair) == 2 and pair.isascii() and pair.isalpha() and pair.islower():
                ids.append(self.FIRST + (ord(pair[0]) - 97) * 26 + ord(pair[1]) - 97)
                k += 2
            else:
                ids += super().encode(text[k]).tolist()
                k += 1
        return np.array(ids, np.int32)

    def decode(self, ids):
        def one(i):
            if i < self.FIRST:
                return super(Digrams, self).decode([i])
            first, second = divmod(i - self.FIRST, 26)
            return chr(97 + first) + chr(97 + second)

        return "".join(one(int(i)) for i in ids)


def test_parts_that_grow_when_encoded_anew_still_fit():
    vocabulary = Digrams()
    text = "thequickbrownfoxjumpsoverthelazydog" * 10
    document = Document("a", text, vocabulary.encode(text))
    for index in range(20):
        examples = FillInTheMiddle(rate=1.0, spm_rate=0.0).examples(
            document, make_context(index=index, vocabulary=vocabulary)
        )
        rebuilt = ""
        for e in examples:
            assert len(e.targets) <= 64
            assert e.targets[-1] == SPECIALS.eos
            shown = vocabulary.decode(e.targets[1:-1])
            prefix, rest = shown.split(SUF)
            suffix, middle = rest.split(MID)
            rebuilt += prefix + middle + suffix
        assert rebuilt == text


class ByteVocabulary(Characters):
    """One id per byte of UTF-8."""

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + TEXT_START

    def decode(self, ids):
        return (np.asarray(ids) - TEXT_START).astype(np.uint8).tobytes().decode(errors="replace")


def test_no_character_is_torn_apart():
    vocabulary = ByteVocabulary()
    text = "aé漢😀" * 30
    tokens = vocabulary.encode(text)
    for limit in range(5, 40):
        size = find_cut(tokens, limit, vocabulary)
        assert limit - 3 <= size <= limit
        assert "\ufffd" not in vocabulary.decode(tokens[:size]) + vocabulary.decode(tokens[size:])
    for index in range(10):
        examples = FillInTheMiddle(rate=0.5).examples(
            Document("a", text, tokens), make_context(index=index, vocabulary=vocabulary)
        )
        stream = np.concatenate([e.targets[e.targets >= TEXT_START] for e in examples])
        assert sorted(stream) == sorted(tokens)


def test_missing_marks_are_named():
    problems = FillInTheMiddle().problems(SpecialTokens(pad=0, bos=1, eos=2, fim=(3, 4)), Lengths(64))
    assert len(problems) == 1
    assert "fim" in problems[0]
    assert "too short" in FillInTheMiddle().problems(SPECIALS, Lengths(8))[0]
    assert "rate" in FillInTheMiddle(rate=2.0).problems(SPECIALS, Lengths(64))[0]
