"""Runs laid side by side: where each was at each evaluation, the table, and the program."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from lm import report
from lm.config import UserError
from lm.evaluation.comparison import Facts, draw_comparison, held_out, load_facts, progress, write_table
from lm.evaluation.curves import draw_curves, load_history


def write_run(folder, flops, figure):
    """Four steps logged every second one after the first; step 1 has no speed, since it compiles."""
    folder.mkdir()
    train = [{"step": s, "split": "train", "total_flops": flops * s, "total_tokens": 100 * s} for s in (1, 2, 4)]
    for line in train[1:]:
        line["seconds_per_step"] = 60.0
    validation = [{"step": s, "split": "validation", "nll": 2.0, "bits_per_byte": figure + 4 - s} for s in (3, 4)]
    lines = "".join(json.dumps(line) + "\n" for line in train + validation)
    (folder / "metrics.jsonl").write_text(lines)
    config = {"type": "Experiment", "model": {"type": "Decoder"}, "objective": {"type": "Causal"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps({"starts": [{"parameters": 1234}]}))
    return folder


def test_progress_known_answer(tmp_path):
    history = load_history(write_run(tmp_path / "a", 1e3, 1.0))
    assert progress(history, "total_flops")[1].tolist() == [0, 1e3, 2e3, 4e3]
    assert progress(history, "minutes")[1].tolist() == [0, 1, 2, 4]
    places, figures = held_out(history, "bits_per_byte", "total_tokens")
    # Step 3 lies half way between the lines of steps 2 and 4.
    assert places.tolist() == [300, 400]
    assert figures.tolist() == [2.0, 1.0]


def test_table_is_in_the_order_of_the_figure(tmp_path):
    folders = [write_run(tmp_path / "worse", 1e3, 2.0), write_run(tmp_path / "better", 1e3, 1.0)]
    facts = [load_facts(folder) for folder in folders]
    assert facts == [Facts("Decoder", "Causal", 1234)] * 2
    lines = write_table([load_history(folder) for folder in folders], facts).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| better | Decoder | Causal | 1,234 | 4 | 4.00e+03 | 400 | 4.0 | 2.0000 | 1.0000 |")
    assert lines[3].startswith("| worse |")


def test_a_run_without_evaluation_has_an_empty_cell(tmp_path):
    folder = write_run(tmp_path / "bare", 1e3, 1.0)
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "validation" not in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.json").unlink()
    history = load_history(folder)
    assert write_table([history], [load_facts(folder)]).splitlines()[-1].endswith("|  |  |")
    draw_comparison([history], tmp_path / "empty.png")
    assert len(held_out(history, "bits_per_byte", "minutes")[0]) == 0


def test_program_writes_picture_and_table(tmp_path, capsys):
    folders = [write_run(tmp_path / name, flops, 1.0) for name, flops in (("a", 1e3), ("b", 2e3))]
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    with flagsaver.flagsaver((report._OUTPUT, str(tmp_path / "curves.png"))):
        assert report.main([str(folder) for folder in folders]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "curves.md").read_text()
    assert table in capsys.readouterr().out
    with flagsaver.flagsaver((report._VALUE, "nonsense")), pytest.raises(Exception, match="there are step"):
        report.main([str(folder) for folder in folders])


def test_minutes_without_any_speed_are_zero(tmp_path):
    folder = write_run(tmp_path / "a", 1e3, 1.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds_per_step", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not np.any(progress(load_history(folder), "minutes")[1])


def test_words_are_no_figures_and_a_line_without_unigrams_is_drawn(tmp_path):
    folder = write_run(tmp_path / "a", 1e3, 1.0)
    history = load_history(folder)
    draw_curves([history], tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    with flagsaver.flagsaver((report._VALUE, "split")), pytest.raises(UserError, match="=split is not in "):
        report.main([str(folder)])


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_damaged_record_is_told_and_a_strange_one_is_shown_without(tmp_path, name):
    folder = write_run(tmp_path / "a", 1e3, 1.0)
    for strange in ("[]", '{"model": 1, "objective": {"type": []}, "starts": [{"parameters": "x"}]}', '{"starts": []}'):
        (folder / name).write_text(strange)
        assert (load_facts(folder).model == "?") == (name == "config.json")
        assert (load_facts(folder).parameters is None) == (name == "run.json")
    (folder / name).write_text('{"starts":')
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_facts(folder)
