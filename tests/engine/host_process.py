"""One of several processes that serve a model together; see test_hosts.py.

`python -m tests.engine.host_process JOB`, where JOB is a JSON object: process, count, port (of the
coordinator), options (of EngineArgs), adapters (folders), until_killed.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import jax

from jlora import LLM, EngineArgs, LoRARequest, SamplingParams, follow

if TYPE_CHECKING:
    from jlora import LLMEngine


def requests_for(adapters: list[str]) -> list[LoRARequest]:
    return [LoRARequest(f"a{index}", index, path) for index, path in enumerate(adapters, start=1)]


def answers(llm: LLM, adapters: list[str], tokens: int) -> dict[str, Any]:
    """Tokens and their scores for the base and every adapter in turn; half of them are drawn."""
    prompts, params, loras = [], [], []
    for index in range(8):
        length = 5 + 9 * index
        prompts.append({"prompt_token_ids": [3 + (7 * index + at) % 90 for at in range(length)]})
        params.append(
            SamplingParams(
                max_tokens=tokens,
                ignore_eos=True,
                temperature=0.8 * (index % 2),
                seed=index,
                logprobs=1,
            )
        )
        loras.append([None, *requests_for(adapters)][index % (len(adapters) + 1)])
    outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    told = [output.outputs[0] for output in outputs]
    scores = [
        [step[token].logprob for token, step in zip(one.token_ids, one.logprobs or (), strict=True)]
        for one in told
    ]
    return {"tokens": [list(one.token_ids) for one in told], "scores": scores}


def aborted(engine: LLMEngine) -> int:
    """How many requests are left when one has been aborted while it ran."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=1)
    engine.add_request("gone", {"prompt_token_ids": [5, 6, 7]}, params)
    for _ in range(3):
        engine.step()
    engine.abort_request("gone")
    return engine.get_num_unfinished_requests()


def serve(llm: LLM, adapters: list[str]) -> dict[str, Any]:
    """What an engine says, also after an adapter has been reloaded and a request aborted."""
    engine = llm.llm_engine
    said = {"answers": answers(llm, adapters, 8), "unfinished": aborted(engine)}
    engine.remove_lora(1)
    engine.add_lora(requests_for(swapped(adapters))[0])
    return {**said, "reloaded": answers(llm, swapped(adapters), 4)}


def swapped(adapters: list[str]) -> list[str]:
    """With another under the first id."""
    return [adapters[1], *adapters[1:]]


def main(job: dict[str, Any]) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if job["count"] > 1:
        jax.distributed.initialize(f"127.0.0.1:{job['port']}", job["count"], job["process"])
    if job["process"] > 0:
        follow(EngineArgs(**job["options"]))
        print("the leader has ended", flush=True)
        return
    llm = LLM(**job["options"], use_tqdm=False)
    print(json.dumps(serve(llm, job["adapters"])), flush=True)
    while job["until_killed"]:
        answers(llm, swapped(job["adapters"]), 40)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
