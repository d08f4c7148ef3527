"""Makes JAX strict for all tests: eight virtual devices, no silent rank promotion, a cache."""

import os
from pathlib import Path

# Before JAX starts. One intra-op pool for eight devices on few cores.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("CNNLAB_CACHE", str(ROOT / ".cache" / "xla-tests"))

from cnnlab import backend

backend.keep_heap()
backend.limit_unrolling()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ["CNNLAB_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture
def root() -> Path:
    """The top of the checkout."""
    return ROOT
