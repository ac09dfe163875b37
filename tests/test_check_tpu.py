"""scripts/check_tpu.py where no TPU is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_tpu.py"


def run(*arguments: str, platforms: str = "", devices: int = 1) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    environment |= {"JAX_PLATFORMS": platforms} if platforms else {}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_says_that_no_tpu_is_there():
    done = run(platforms="cpu")
    assert done.returncode != 0
    assert "FAIL  devices" in done.stdout and "no TPU here" in done.stdout
    assert "lora_shrink" not in done.stdout


def test_kernels_on_a_cpu():
    done = run("--cpu", "--only", "devices", "write_kv", "lora_shrink", "bandwidth")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["pass"] * 4
    assert lines[-1] == "all checks passed (no TPU was there)"


@pytest.mark.slow
def test_several_devices():
    done = run("--cpu", "--only", "several", devices=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 devices answer as one" in done.stdout


def test_nothing_that_ran_is_no_success():
    done = run("--only", "gmm", platforms="cpu")
    assert done.returncode != 0 and "no TPU here" in done.stdout
    done = run("--cpu", "--only", "lora_shrnk")
    assert done.returncode != 0 and "no such checks: lora_shrnk" in done.stderr


def test_what_a_bare_assert_says(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import check_tpu

    for error, said in ((AssertionError(), "raise error"), (ValueError("\n\nx\ny"), "x")):
        with pytest.raises(type(error)) as caught:
            raise error
        assert said in check_tpu.said(caught.value)


@pytest.mark.slow
def test_everything_on_a_cpu():
    done = run("--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
