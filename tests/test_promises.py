"""What the documents say is held by a test is held by one that exists."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# `tests/room/test_file.py::test_name[case]`, `tests/room/test_file.py`, `tests/room` and `python -m tests.program`
NAMED = re.compile(r"`(tests/[\w./-]+)(?:::(\w+)(?:\[[^\]]*\])?)?`|`python -m (tests[\w.]+)")
# Issue 5 by its sections: what docs/reliability.md must have a promise for, by a word of the test or the program.
SUBJECTS = (
    *("test_soak", "tests.soak", "test_checkpoints", "test_a_full_disk", "test_two_runs_in_one_folder"),
    *("test_launch", "test_diagnosis", "test_spikes", "test_a_step_is_computed_twice", "test_replay", "test_watchdog"),
    *("test_timeline", "test_artefacts", "test_fuzz", "tests.fuzz"),
)


def _tests(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document):
    for file, name, program in NAMED.findall(document.read_text(encoding="utf-8")):
        path = ROOT / (file or program.replace(".", "/") + ".py")
        if program and not path.exists():
            path = path.with_suffix("") / "__main__.py"
        assert path.exists(), f"{document.name} names {file or program}"
        assert not name or name in _tests(path), f"{document.name} names {file}::{name}"


def test_every_promise_names_what_holds_it():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    promises = [row for row in rows if len(row) == 2 and not re.match(r"\s*(promise\b|---)", row[0])]
    assert len(promises) > 20
    for promise, held in promises:
        assert NAMED.search(held), promise
        assert "..." not in held, promise
    together = " ".join(held for _, held in promises)
    assert [subject for subject in SUBJECTS if subject not in together] == []
