"""Processes on one machine serve a model together over jax.distributed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jlora import LLM
from jlora.engine.channel import Channel
from tests.engine.host_process import serve
from tests.engine.tools import SMALL, make_adapters
from tests.reference import make_adapter, make_model, special_kinds

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
CACHE = {  # as in conftest.py
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}
ENDS_WITHIN = 20  # seconds, after another host has been killed


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A model whose heads four devices can share, and adapters of ranks 4, 8 and 20."""
    folder = tmp_path_factory.mktemp("hosts")
    make_model("llama3", folder / "model", num_attention_heads=8)
    return SimpleNamespace(
        model=folder / "model", adapters=make_adapters(folder / "model", folder), folder=folder
    )


def start(process: int, count: int, devices: int, port: int, job: dict[str, Any]) -> Any:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FLAGS}",
        "HF_HUB_OFFLINE": "1",
        **CACHE,
        "PYTHONPATH": str(ROOT),
    }
    told = json.dumps({"process": process, "count": count, "port": port, **job})
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engine.host_process", told],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(count: int, devices: int, *jobs: dict[str, Any]) -> list[Any]:
    """devices: of each. jobs: of all, or of each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [start(one, count, devices, port, jobs[one % len(jobs)]) for one in range(count)]


def ended(processes: list[Any], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; none is left running."""
    try:
        outputs = [one.communicate(timeout=seconds) for one in processes]
    finally:
        for one in processes:
            one.kill()
    return [(one.returncode, *texts) for one, texts in zip(processes, outputs, strict=True)]


def job_of(files: SimpleNamespace, until_killed: bool = False, **options: Any) -> dict[str, Any]:
    sizes = {name: value for name, value in SMALL.items() if name != "use_tqdm"}
    told = {"model": str(files.model), "skip_tokenizer_init": True, **sizes, **options}
    adapters = [str(path) for path in files.adapters]
    return {"options": told, "adapters": adapters, "until_killed": until_killed}


def assert_same(said: dict[str, Any], alone: dict[str, Any]) -> None:
    """The same tokens, and the same scores but for the order in which devices are summed."""
    assert said["unfinished"] == alone["unfinished"] == 0
    for when in ("answers", "reloaded"):
        assert said[when]["tokens"] == alone[when]["tokens"]
        np.testing.assert_allclose(said[when]["scores"], alone[when]["scores"], atol=1e-4)


def answers_of_one(job: dict[str, Any]) -> dict[str, Any]:
    """Of an engine in this process, which has two devices."""
    llm = LLM(**job["options"], use_tqdm=False)
    return json.loads(json.dumps(serve(llm, job["adapters"])))


def killed_amid_answers(
    files: SimpleNamespace, victim: int, how: signal.Signals, count: int = 2, **options: Any
) -> tuple[dict[str, Any], list[tuple[int, str, str]]]:
    """What hosts answer, and how the others end when one is sent a signal while they run."""
    job = job_of(files, until_killed=True, tensor_parallel_size=count, **options)
    processes = start_all(count, 1, job)
    try:
        said = next(line for line in processes[0].stdout if line.startswith("{"))
        time.sleep(0.5)  # all are amid the next answers
        processes[victim].send_signal(how)
        others = [one for one in processes if one is not processes[victim]]
        return json.loads(said), ended(others, ENDS_WITHIN)
    finally:
        for one in processes:
            one.kill()
            one.communicate()


def test_two_processes_answer_as_one_until_one_is_killed(files):
    """Three adapters and the base over two slots, a reload and an abort."""
    said, ((code, _, errors),) = killed_amid_answers(files, 1, signal.SIGKILL)
    assert code == 1
    assert "HostError: host 1 of 2 has ended without a word" in errors
    assert_same(said, answers_of_one(job_of(files, tensor_parallel_size=2)))


@pytest.mark.slow
def test_four_processes_answer_as_one_until_one_is_killed(files):
    said, ends = killed_amid_answers(files, 2, signal.SIGKILL, count=4)
    assert len(ends) == 3
    for code, _, errors in ends:
        assert code == 1
        assert "HostError: host 2 of 4 has ended without a word" in errors
    assert_same(said, answers_of_one(job_of(files, tensor_parallel_size=2)))


@pytest.mark.slow
def test_whole_experts_on_two_hosts(tmp_path):
    make_model("qwen3-moe", tmp_path / "model", num_attention_heads=8)
    kinds = special_kinds("qwen3-moe")
    paths = [tmp_path / name for name in ("experts", "experts-up", "all-linear")]
    for path in paths:
        make_adapter(tmp_path / "model", path, **kinds[path.name])
    told = SimpleNamespace(model=tmp_path / "model", adapters=paths)
    whole = {"lora_expert_blocks": 4, "max_lora_rank": 32, "enable_expert_parallel": True}
    job = job_of(told, tensor_parallel_size=4, **whole)
    (code, said, errors), (other, _, their_errors) = ended(start_all(2, 2, job))
    assert (code, other) == (0, 0), errors + their_errors
    alone = answers_of_one(job_of(told, tensor_parallel_size=1, **whole))
    assert_same(json.loads(said.splitlines()[-1]), alone)


@pytest.mark.slow
def test_the_first_host_is_killed(files):
    _, ((code, _, errors),) = killed_amid_answers(files, 0, signal.SIGKILL)
    assert code != 0  # 1, or jax's own end of the process comes first
    assert "host 0 of 2 has ended without a word" in errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_hangs_ends_the_other(files, victim):
    _, ((code, _, errors),) = killed_amid_answers(files, victim, signal.SIGSTOP, host_timeout=5)
    assert code == 1
    assert f"HostError: host {victim} of 2 has given no sign of life for 5 s" in errors


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
def test_every_kind_of_adapter_on_two_hosts_of_two_devices(files, eager):
    kinds = special_kinds("llama3")
    names = ["dora", "dora-vocabulary", "lora-bias", "saved-both", "tokens-apart", "added-targeted"]
    paths = [files.folder / name for name in names]
    for seed, (name, path) in enumerate(zip(names, paths, strict=True)):
        make_adapter(files.model, path, seed=seed, **kinds[name])
    job = job_of(
        SimpleNamespace(model=files.model, adapters=paths),
        tensor_parallel_size=4,
        enforce_eager=eager,
        max_cpu_loras=6,
        enable_lora_dora=True,
        enable_lora_bias=True,
        enable_lora_embeddings=True,
        max_lora_token_rows=8,
        max_lora_full_weights=2,
        lora_extra_vocab_size=4,
    )
    (code, said, errors), (other, ending, their_errors) = ended(start_all(2, 2, job))
    assert (code, other) == (0, 0), errors + their_errors
    assert ending.splitlines()[-1] == "the leader has ended"
    ((code, alone, errors),) = ended([start(0, 1, 4, 0, job)])
    assert code == 0, errors
    assert_same(*(json.loads(text.splitlines()[-1]) for text in (said, alone)))


@pytest.mark.slow
def test_other_arguments_are_refused_by_name(files):
    both = [job_of(files, tensor_parallel_size=2, block_size=size) for size in (8, 16)]
    for code, _, errors in ended(start_all(2, 1, *both), 120):
        assert code == 1
        assert "block_size=16, not 8" in errors


@pytest.mark.slow
def test_all_devices_must_be_used(files):
    job = job_of(files, tensor_parallel_size=1)
    (_, _, errors), _ = ended(start_all(2, 1, job), 120)
    assert "tensor_parallel_size=1, but 2 processes have 2 cpu devices together" in errors


def test_a_message_arrives_as_it_was_sent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = Channel(socket.create_connection(server.getsockname()))
        there = Channel(server.accept()[0])
    arrays = [
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.float32(1.5).reshape(()),
        np.zeros((0, 4), np.float16),
        np.ones((300, 100), ml_dtypes.bfloat16),
    ]
    here.send("step", [1, "two", None, [3.5]], arrays)
    op, arguments, received = there.receive()
    assert (op, arguments) == ("step", [1, "two", None, [3.5]])
    for sent, got in zip(arrays, received, strict=True):
        assert (sent.dtype, sent.shape) == (got.dtype, got.shape)
        np.testing.assert_array_equal(sent, got)
    here.close()
    with pytest.raises(OSError, match="closed"):
        there.receive()
    there.close()
