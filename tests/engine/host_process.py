"""One process of several that serve a model together: `python -m tests.engine.host_process`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from jlora.config import EngineArgs
from jlora.request import LoRARequest, SamplingParams


def answers(llm: Any, adapters: list[str], tokens: int) -> list[list[int]]:
    """Of prompts with every adapter in turn and with none, some of them sampled."""
    requests = [None, *(LoRARequest(f"a{i}", i + 1, one) for i, one in enumerate(adapters))]
    prompts = [
        {"prompt_token_ids": [3 + (7 * i + j) % 90 for j in range(5 + 9 * i)]} for i in range(8)
    ]
    params = [
        SamplingParams(
            max_tokens=tokens,
            ignore_eos=True,
            temperature=0.8 * (i % 2),
            seed=i,
            logprobs=i % 3 or None,
        )
        for i in range(8)
    ]
    loras = [requests[i % len(requests)] for i in range(8)]
    outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


def serve(options: dict[str, Any], adapters: list[str]) -> dict[str, Any]:
    """What an engine says: answers, answers after a reload, and what an abort leaves."""
    from jlora import LLM

    llm = LLM(**options, use_tqdm=False)
    engine, said = llm.llm_engine, {"first": answers(llm, adapters, 12)}
    swapped = [LoRARequest("a0", 1, adapters[1], load_inplace=True)]
    engine.remove_lora(1)
    engine.add_lora(swapped[0])
    said["swapped"] = answers(llm, [adapters[1], *adapters[1:]], 6)
    engine.add_request("gone", {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=40))
    for _ in range(3):
        engine.step()
    engine.abort_request("gone")
    said["after"] = answers(llm, [adapters[1], *adapters[1:]], 6)
    said["unfinished"] = engine.get_num_unfinished_requests()
    return said


def main() -> None:
    """argv: a JSON object with process, count, port, mode, options, adapters."""
    told = json.loads(sys.argv[1])
    import jax

    from jlora import LLM, follow

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if told["count"] > 1:
        jax.distributed.initialize(f"127.0.0.1:{told['port']}", told["count"], told["process"])
    if told["process"] > 0:
        return follow(EngineArgs(**told["options"]))
    if told["mode"] == "serve":
        print(json.dumps(serve(told["options"], told["adapters"])), flush=True)
        return None
    llm = LLM(**told["options"], use_tqdm=False)
    print("ready", flush=True)
    while True:  # until a process is killed
        answers(llm, told["adapters"], 40)
        print("more", os.getpid(), flush=True)


if __name__ == "__main__":
    main()
