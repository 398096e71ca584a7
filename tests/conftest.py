"""One process, eight virtual CPU devices, a persistent compilation cache, strict jax settings."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Cheap code generation: tests check values and programs, never speed.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax

CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
