"""The demo that ships: every adapter does its task, on inputs nobody has seen, in one batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import jlora
from jlora import LLM, LoRARequest, SamplingParams
from jlora.cli import main
from jlora.demo_tasks import ADAPTER_TASKS, BASE_TASK, prompt

ASSETS = Path(jlora.__file__).parent / "demo_assets"
EACH = 100


@pytest.fixture(scope="module")
def answers():
    """Answers to fresh random inputs, by task: (input, answer) pairs, from a shuffled batch."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"inputs of seed {seed}")
    rng = random.Random(seed)
    jobs = [(task, task.sample(rng)) for task in (BASE_TASK, *ADAPTER_TASKS) for _ in range(EACH)]
    rng.shuffle(jobs)
    ids = {task.name: index for index, task in enumerate(ADAPTER_TASKS, start=1)}
    llm = LLM(
        str(ASSETS / "base"),
        enable_lora=True,
        max_loras=4,  # fewer than there are adapters
        max_cpu_loras=6,
        max_lora_rank=32,
        max_model_len=128,
        max_num_seqs=64,
        max_num_batched_tokens=128,
        enforce_eager=True,
        use_tqdm=False,
    )
    outputs = llm.generate(
        [prompt(text) for _, text in jobs],
        SamplingParams(temperature=0, max_tokens=48),
        lora_request=[
            LoRARequest(task.name, ids[task.name], str(ASSETS / "adapters" / task.name))
            if task.name in ids
            else None
            for task, _ in jobs
        ],
        use_tqdm=False,
    )
    found: dict[str, list[tuple[str, str]]] = {}
    for (task, text), output in zip(jobs, outputs, strict=True):
        found.setdefault(task.name, []).append((text, output.outputs[0].text))
    return found


def test_every_task_is_solved(answers):
    for task in (BASE_TASK, *ADAPTER_TASKS):
        wrong = [(text, got) for text, got in answers[task.name] if got != task.answer(text)]
        assert len(wrong) <= 0.05 * EACH, (task.name, wrong[:5])


def test_adapters_are_of_different_ranks_and_kinds():
    from jlora.manager.peft import read_config

    kinds = [read_config(ASSETS / "adapters" / task.name, task.name) for task in ADAPTER_TASKS]
    assert len(kinds) >= 6
    assert len({kind.r for kind in kinds}) >= 3
    assert any(kind.use_rslora for kind in kinds)
    assert any(kind.rank_pattern and kind.alpha_pattern for kind in kinds)
    assert any(
        set(kind.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"} for kind in kinds
    )
    assert any(kind.r == 32 for kind in kinds)


def test_command_shows_every_adapter(capsys):
    assert main(["demo", "hello world"]) == 0
    shown = capsys.readouterr().out
    for expected in ("HELLO WORLD", "dlrow olleh", "uryyb jbeyq", "ehllo dlorw", "tokens a second"):
        assert expected in shown
