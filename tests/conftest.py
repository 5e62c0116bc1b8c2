"""Eight CPU devices for every test, so that one-device and many-device runs can be compared in one process."""

import atexit
import os
import shutil
import tempfile

import jax

# Programs of tests run once or twice: what the compiler would take to make them fast is not earned back.
CHEAP = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {CHEAP}"
# Nothing is read from, or left in, the cache of whoever runs the tests.
os.environ["WKD_JAX_CACHE"] = tempfile.mkdtemp(prefix="wkd_jax_tests_")
atexit.register(shutil.rmtree, os.environ["WKD_JAX_CACHE"], ignore_errors=True)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", cache)
    # Small programs too: many tests, in several processes, compile the same ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
