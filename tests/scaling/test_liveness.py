"""What is written to memory, until when it lives, and the bytes moved, on programs small enough to count by hand."""

from lm.scaling.liveness import Operation, measure

# Arrays 0 and 1 are given; every array has 100 bytes but for those named.
SIZES = [100] * 10


def test_a_chain_of_elementwise_operations_needs_no_memory_between():
    chain = [Operation("mul", (0,), (2,)), Operation("add", (2,), (3,)), Operation("exp", (3,), (4,))]
    # One read, one written.
    assert measure(chain, SIZES, kept=[4], results=[4]) == (100, 200)


def test_what_a_product_reads_is_written_and_then_let_go():
    program = [
        Operation("mul", (0,), (2,)),
        Operation("dot_general", (2, 1), (3,)),
        Operation("dot_general", (3, 1), (4,)),
    ]
    # 2 and 3, then 3 and 4.
    assert measure(program, SIZES, kept=[4], results=[4]) == (200, 200 + 300 + 300)


def test_an_array_lives_until_its_last_reader():
    program = [
        Operation("dot_general", (0, 1), (2,)),
        Operation("dot_general", (2, 1), (3,)),
        Operation("dot_general", (3, 1), (4,)),
        Operation("dot_general", (4, 2), (5,)),
    ]
    assert measure(program, SIZES, kept=[5], results=[5])[0] == 300


def test_results_in_place_of_arguments_take_no_room():
    program = [Operation("dot_general", (0, 1), (2,)), Operation("add", (2, 0), (3,))]
    assert measure(program, SIZES, kept=[], results=[3])[0] == 100


def test_views_and_broadcasts_are_no_copies():
    program = [
        Operation("broadcast_in_dim", (0,), (2,)),
        Operation("reshape", (2,), (3,)),
        Operation("dot_general", (3, 1), (4,)),
    ]
    assert measure(program, SIZES, kept=[4], results=[4])[0] == 100


def test_a_product_that_is_only_rounded_is_written_rounded():
    sizes = [100, 100, 400, 200, 100]
    program = [
        Operation("dot_general", (0, 1), (2,)),
        Operation("convert_element_type", (2,), (3,)),
        Operation("dot_general", (3, 1), (4,)),
    ]
    assert measure(program, sizes, kept=[4], results=[4])[0] == 300


def test_the_inside_of_a_loop_counts_while_it_runs():
    program = [Operation("dot_general", (0, 1), (2,)), Operation("scan", (2,), (3,), inside=1000)]
    assert measure(program, SIZES, kept=[3], results=[3])[0] == 1200
