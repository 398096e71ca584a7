from lm.objectives import Deshuffle
from tests.objectives.vocabulary import make_context, make_distinct


def test_the_source_is_a_permutation():
    document = make_distinct(60)
    orders = set()
    for index in range(5):
        (example,) = Deshuffle().examples(document, make_context(64, 64, index=index))
        assert sorted(example.encoder_inputs[:-1]) == document.tokens.tolist()
        assert example.targets[:-1].tolist() == document.tokens.tolist()
        orders.add(tuple(example.encoder_inputs))
    assert len(orders) == 5
