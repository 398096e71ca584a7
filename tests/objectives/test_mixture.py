import collections

import numpy as np

from lm.batch import Lengths
from lm.objectives import (
    ALBERT,
    BERT,
    GLM,
    UL2,
    UL2R_DENOISERS,
    Causal,
    Component,
    MaskedLM,
    Mixture,
    PrefixLM,
    SpanCorruption,
    SpanNoise,
)
from tests.objectives.test_laws import same
from tests.objectives.vocabulary import SPECIALS, make_context, make_distinct

# A published recipe for decoders (Garcia et al. 2023, section 2.2).
DECODER = Mixture(
    components=(
        Component(name="lm", objective=Causal(), weight=0.6),
        Component(name="prefix", objective=PrefixLM(), weight=0.2),
        Component(name="r", objective=SpanCorruption(), weight=0.1),
        Component(
            name="x",
            objective=SpanCorruption(noise=SpanNoise(noise_density=0.5, mean_span_length=32)),
            weight=0.1,
        ),
    )
)


def test_shares_of_documents_follow_the_weights():
    counts = collections.Counter(DECODER.choose(make_context(index=index)) for index in range(5000))
    np.testing.assert_allclose([counts[k] / 5000 for k in range(4)], [0.6, 0.2, 0.1, 0.1], atol=0.025)


def test_a_component_makes_what_it_would_make_alone():
    for index in range(30):
        context, document = make_context(index=index), make_distinct(100)
        chosen = DECODER.choose(context)
        alone = DECODER.components[chosen].objective.examples(document, context)
        mixed = DECODER.examples(document, context)
        for one, other in zip(alone, mixed, strict=True):
            assert (other.components == chosen).all()
            np.testing.assert_array_equal(one.inputs, other.inputs)
            np.testing.assert_array_equal(one.targets, other.targets)
            np.testing.assert_array_equal(one.weights, other.weights)


def test_names_count_the_components_of_a_component():
    mixture = Mixture(
        components=(
            Component(name="lm", objective=Causal()),
            Component(name="ul2", objective=UL2(denoisers=UL2R_DENOISERS)),
            Component(name="glm", objective=GLM()),
        )
    )
    names = mixture.traits.component_names
    assert names == ("lm", "ul2/S(0.5)", "ul2/R(3,0.15)", "ul2/X(32,0.15)", "ul2/X(3,0.5)", "glm")
    seen = set()
    for index in range(200):
        for e in mixture.examples(make_distinct(40), make_context(index=index)):
            (component,) = set(e.components.tolist())
            seen.add(component)
            assert (names[component] == "glm") == bool(e.block_positions.any())
            assert names[component].startswith("ul2") == (e.inputs[1] in SPECIALS.modes)
    assert seen == set(range(6))


def test_fields_that_a_component_lacks_are_zero():
    mixture = Mixture(components=(Component(name="bert", objective=BERT), Component(name="mlm", objective=MaskedLM())))
    assert mixture.traits.fields == {"token_types", "label_targets", "label_weights", "components"}
    assert mixture.traits.num_labels == 2
    for index in range(30):
        for e in mixture.examples(make_distinct(100), make_context(index=index)):
            assert e.label_weights.sum() == (e.components[0] == 0)


def test_one_pooled_head_answers_one_question():
    bert, albert = Component(name="nsp", objective=BERT), Component(name="sop", objective=ALBERT)
    mixture = Mixture(components=(bert, albert))
    (problem,) = mixture.problems(SPECIALS, Lengths(64))
    assert "nsp: NextSentence, sop: SentenceOrder" in problem
    twice = (bert, Component(name="again", objective=BERT), Component(name="mlm", objective=MaskedLM()))
    assert Mixture(components=twice).problems(SPECIALS, Lengths(64)) == []


def test_what_the_components_need_together():
    traits = DECODER.traits
    assert traits.layouts == {"decoder"}
    assert traits.bidirectional
    assert traits.autoregressive
    assert not traits.originals
    with_mlm = Mixture(components=(*DECODER.components, Component(name="mlm", objective=MaskedLM())))
    assert with_mlm.traits.layouts == {"decoder"}
    assert not with_mlm.traits.autoregressive


def test_problems_name_the_component():
    def problems(*components, lengths=None):
        return Mixture(components=components).problems(SPECIALS, lengths or Lengths(64))

    lm = Component(name="lm", objective=Causal())
    assert problems(lm) == []
    assert "names of their own" in problems(lm, lm)[0]
    assert "at least one" in problems()[0]
    assert "at least one" in problems(Component(name="lm", objective=Causal(), weight=0.0))[0]
    bad = Component(name="spans", objective=SpanCorruption(noise=SpanNoise(noise_density=2.0)))
    assert problems(lm, bad)[0].startswith("component spans: noise_density")
    spans = Component(name="spans", objective=SpanCorruption())
    assert "unset it" in problems(lm, spans, lengths=Lengths(64, 64))[0]
    from lm.objectives import ReplacedTokenDetection

    electra = Component(name="electra", objective=ReplacedTokenDetection())
    assert "no layout in common" in problems(lm, electra)[0]
    nested = Component(name="nested", objective=Mixture(components=(lm,)))
    assert "is a mixture" in problems(nested)[0]


def test_the_draw_is_independent_of_what_is_drawn_with_it():
    # Were choice and corruption drawn from one stream, a component would only see some of the prefixes.
    prefixes = []
    for index in range(800):
        context = make_context(tokens=256, index=index)
        if DECODER.choose(context) == 1:
            (example,) = DECODER.examples(make_distinct(100), context)
            prefixes.append((example.weights == 0).sum() - 1)
    assert min(prefixes) < 8
    assert max(prefixes) > 92
    same(*(DECODER.examples(make_distinct(20), make_context())[0] for _ in range(2)))
