"""What the tests of the TPU kernels share."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.kernels import tpu_compile


@pytest.fixture
def races(capfd):
    """Interpret parameters that watch for races between copies and reads; there must be none."""
    yield pltpu.InterpretParams(detect_races=True)
    pltpu.reset_tpu_interpret_mode_state()  # what a kernel that raised leaves behind
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.fixture(params=tpu_compile.TOPOLOGIES)
def chip(request):
    pytest.importorskip("libtpu")
    return request.param
