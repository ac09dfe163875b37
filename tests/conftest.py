"""Settings every test shares. They are made before jax and jlora are imported.

Environment:
    JLORA_TEST_PLATFORM  the platform to test on: cpu (the default), cuda or tpu
    JLORA_TYPECHECK      0 leaves out the checks of types and shapes at run time
    JLORA_TEST_CACHE     0 leaves out the compilation cache in .cache/jax
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = os.environ.get("JLORA_TEST_PLATFORM", "cpu")

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose its platform")

# A device's tests compare with the CPU, so that stays at hand.
os.environ["JAX_PLATFORMS"] = "cpu" if PLATFORM == "cpu" else f"{PLATFORM},cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if PLATFORM == "cpu":
    # Most of the tests' time is LLVM's, and code it did not polish computes the same.
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
if PLATFORM == "cuda":
    # jax runs before the first engine is made, so the engine cannot choose its memory any more.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
if PLATFORM != "tpu":
    # libtpu is there as a compiler only: it need not look for a TPU's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "standard")

if os.environ.get("JLORA_TEST_CACHE", "1") != "0":
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # A limit also makes jax lock the cache, which several test processes share.
    jax.config.update("jax_compilation_cache_max_size", 2**30)

if os.environ.get("JLORA_TYPECHECK", "1") != "0" and importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    import tests.typecheck  # noqa: F401  (the hook looks it up by name)

    # Where arrays are; elsewhere jlora's own checks must see bad input.
    ARRAY_MODULES = ["kernels", "model", "engine.adapter_pool", "engine.runner", "engine.sampler"]
    install_import_hook(
        [f"jlora.{name}" for name in [*ARRAY_MODULES, "engine.state"]], "tests.typecheck.check"
    )

if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # The first example of a test may compile, so none has a deadline.
    settings.register_profile(
        "jlora",
        deadline=None,
        derandomize="CI" in os.environ,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("jlora")


def _has_device(platform: str) -> bool:
    """Whether the tests run on this platform and jax sees a device of it."""
    if platform != PLATFORM:
        return False
    try:
        return bool(jax.devices(platform))
    except RuntimeError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu or tpu unless such a device is tested."""
    for marker, platform in (("gpu", "cuda"), ("tpu", "tpu")):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not _has_device(platform):
            reason = f"no {marker.upper()} is tested here (platform: {PLATFORM})"
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
