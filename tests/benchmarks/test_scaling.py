"""The tables of docs/scale.md are what the plan says today, and its commands are those of the tables."""

import pytest

from benchmarks import scaling

# The rest are traced by `python -m benchmarks.scaling`, whose tables the document holds.
QUICK = ["BERT-large", "Llama 3 8B"]


@pytest.fixture(scope="module")
def document():
    return scaling.DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", QUICK)
def test_a_large_run_is_as_the_table_says(name, document):
    assert scaling.run_row(name) in document.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in scaling.RUNS if name not in QUICK])
def test_the_other_large_runs_too(name, document):
    assert scaling.run_row(name) in document.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(scaling.PUBLISHED))
def test_published_figures_are_below_the_roof(name, document):
    row = scaling.published_row(name)
    assert row in document.splitlines()
    assert int(row.split(" | ")[5].removesuffix("%")) < 100


def test_every_command_stands_in_the_document(document):
    for arguments in scaling.RUNS.values():
        assert f"python -m lm.plan {arguments}" in document


def test_large_runs_fit():
    assert all(scaling.plan(scaling.RUNS[name]).fits for name in QUICK)


def test_more_chips_hide_less():
    few, many = (scaling.point("llama3.py:8b", "v5p", chips, 2048) for chips in (256, 8192))
    assert few.communication_seconds / few.compute_seconds < many.communication_seconds / many.compute_seconds


def test_a_table_is_replaced_between_its_head_and_what_follows():
    before = "a\n<!-- t -->\n| h |\n|---|\n| old |\n\nb\n"
    assert scaling.replace(before, "t", ["| new |"]) == "a\n<!-- t -->\n| h |\n|---|\n| new |\n\nb\n"
