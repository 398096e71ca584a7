"""Eight virtual CPU devices, a persistent compilation cache, strict jax settings; shared fixtures; order of tests."""

import gc
import importlib.metadata
import itertools
import os
import pathlib
import pydoc_data.topics

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Cheap code generation: tests check values and programs, never speed. Eight virtual devices on a busy machine may
# wait long for each other; XLA's own limit of 40 seconds would end the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
    + " --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older code generator compiles these tiny programs in a quarter of the time; jax 0.11 has no such flag.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

from tests.apart import is_apart
from tests.apart import pytest_configure as pytest_configure

CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Two programs of eight devices each in flight can starve each other of threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)


# Looking takes a hundredth of a second.
LOOK_EVERY = 20
TESTS_DONE = itertools.count()


@pytest.fixture(autouse=True)
def few_live_programs():
    """Lets go of compiled programs before their memory maps reach the system's limit, which ends the process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(TESTS_DONE) % LOOK_EVERY == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(list(pydoc_data.topics.topics.values())[:30]):
        (folder / f"{number:03}.txt").write_text(text[:500], encoding="utf-8")
    return f"{folder}/*.txt"


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """The folder of a run of six steps."""
    from lm.evaluation.heldout import make_evaluate
    from lm.training.loop import train
    from tests.training.experiments import tiny

    workdir = tmp_path_factory.mktemp("runs") / "trained"
    assert train(tiny(corpus), str(workdir), make_evaluate)
    return workdir


# Cheap rooms first, so that a slip shows in seconds; what starts processes or trains comes last.
ORDER = ("test_", "objectives", "data", "optim", "parallel", "training", "evaluation", "decoding", "models", "interop")
LAST = ("test_cells.py", "benchmarks", "system")


def pytest_collection_modifyitems(items):
    here = pathlib.Path(__file__).parent

    def rank(item):
        if is_apart(item):
            return len(ORDER) + len(LAST) + 1
        room = item.path.relative_to(here).parts[0]
        if room in LAST:
            return len(ORDER) + 1 + LAST.index(room)
        return next((number for number, name in enumerate(ORDER) if room.startswith(name)), len(ORDER))

    items.sort(key=rank)
