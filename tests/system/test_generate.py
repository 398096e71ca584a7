"""python -m lm.generate on a run that python -m lm.train made."""

import subprocess
import sys

import pytest

from tests.system.runs import ROOT, run, tiny_flags, write_corpus

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    source = write_corpus(folder / "corpus", 20)
    fields = {"objective": "FillInTheMiddle", "checkpoint.every": 6, "evaluation.every": 6}
    flags = tiny_flags(source, num_steps=6, **fields)
    status, _, errors = run("lm.train", *flags, f"--workdir={folder / 'run'}")
    assert status == 0, errors[-2000:]
    return folder / "run"


def test_streamed_and_batched_text_are_the_same(workdir):
    flags = (f"--workdir={workdir}", "--max_tokens=12", "--seed=5")
    status, streamed, errors = run("lm.generate", *flags, "--prompt=The statement")
    assert status == 0, errors[-2000:]
    assert streamed.startswith("The statement")
    assert len(streamed) > len("The statement\n")
    file = workdir / "prompts.txt"
    file.write_text("The statement\n\nnaïve\n", encoding="utf-8")
    with file.open() as lines:
        done = subprocess.run(
            [sys.executable, "-m", "lm.generate", *flags, "--prompt_file=-", "--batch_size=3"],
            cwd=ROOT, stdin=lines, capture_output=True, text=True, check=True,
        )  # fmt: skip
    first, second = done.stdout.removeprefix("--- 1 of 2\n").split("--- 2 of 2\n")
    assert first == streamed
    assert second.startswith("naïve")


def test_what_is_made_stands_between_prompt_and_suffix(workdir):
    flags = (f"--workdir={workdir}", "--max_tokens=12", "--prompt=The statement", "--num_samples=2", "--temperature=2")
    status, filled, errors = run("lm.generate", *flags, "--suffix= ends.")
    assert status == 0, errors[-2000:]
    first, second = filled.removeprefix("--- 1 of 2\n").split("--- 2 of 2\n")
    assert first != second
    for sample in (first, second):
        assert sample.startswith("The statement")
        assert sample.endswith(" ends.\n")
        assert len(sample) > len("The statement ends.\n")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "give --workdir"),
        (("--workdir=nowhere",), "is not the folder of a run"),
        (("--workdir={workdir}", "--temperature=-1"), "temperature"),
        (("--workdir={workdir}", "--max_tokens=9999", "--prompt=a"), "max_length"),
        (("--workdir={workdir}", "--prompt_file=nowhere"), "nowhere"),
        (("--workdir={workdir}", "--mode=S"), "no mode 'S' to prompt in"),
    ],
)
def test_what_can_be_mended_ends_in_a_sentence(workdir, flags, sentence):
    status, out, errors = run("lm.generate", *[flag.format(workdir=workdir) for flag in flags])
    assert status == 2
    assert out == ""
    assert sentence in errors.splitlines()[-1]
    assert "Traceback" not in errors
