"""Worker processes do not outlive a program that is killed."""

import os
import signal
import subprocess
import sys
import time

PROGRAM = """
import multiprocessing, sys, time
from lm.data import Bytes, DataConfig, load_tokenizer, train_batches
from tests.data.objective import Chunks

if __name__ == "__main__":
    source, folder = sys.argv[1:]
    config = DataConfig(source=source, sequence_length=32, num_workers=1)
    batches = train_batches(config, Chunks(), load_tokenizer(Bytes(), config, folder), 2)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(300)
"""


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_a_killed_program(corpus, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), corpus, str(tmp_path / "tokenizer")]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as program:
        workers = program.stdout.readline().split()
        assert workers
        program.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(_is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    survivors = [pid for pid in workers if _is_alive(pid)]
    for pid in survivors:
        os.kill(int(pid), signal.SIGKILL)
    assert not survivors
