"""The engine behind an event loop: streams beside each other, and none hurts another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from jlora import AsyncLLMEngine, LoRARequest, RequestOutputKind, SamplingParams
from jlora.manager import AdapterState
from tests.engine.test_engine import GREEDY, PROMPT, adapter, answer, greedy, tokens


@pytest.fixture
def serve(llm) -> Callable[[Callable[[AsyncLLMEngine], Coroutine]], object]:
    """Runs a coroutine function with an async engine, at most a minute."""

    def run(function):
        engine = AsyncLLMEngine(llm.llm_engine)

        async def main():
            return await asyncio.wait_for(function(engine), 60)

        try:
            return asyncio.run(main())
        finally:
            engine.shutdown()

    return run


async def last(engine, prompt, params, name, lora=None):
    """The last output of a request."""
    outputs = [one async for one in engine.generate(prompt, params, name, lora_request=lora)]
    return outputs[-1]


def test_streams_beside_each_other(llm, files, serve):
    loras = [None, adapter(files, 0), adapter(files, 1), adapter(files, 2), None]
    prompts = [tokens(length, length) for length in (3, 20, 40, 7, 30)]
    expected = llm.generate(prompts, GREEDY, lora_request=loras, use_tqdm=False)

    async def main(engine):
        return await asyncio.gather(
            *(
                last(engine, prompt, GREEDY, str(index), lora)
                for index, (prompt, lora) in enumerate(zip(prompts, loras, strict=True))
            )
        )

    for found, one in zip(serve(main), expected, strict=True):
        assert found.outputs[0].token_ids == one.outputs[0].token_ids


def test_outputs_come_one_by_one_and_requests_join_at_any_time(serve):
    async def main(engine):
        counts, joined = [], None
        async for output in engine.generate(PROMPT, GREEDY, "first"):
            counts.append(len(output.outputs[0].token_ids))
            if len(counts) == 3:
                joined = asyncio.create_task(last(engine, PROMPT, GREEDY, "second"))
        second = await joined
        third = await last(engine, PROMPT, GREEDY, "third")  # after the loop had come to rest
        return counts, second, third

    counts, second, third = serve(main)
    assert counts == list(range(1, 9))
    assert second.outputs[0].token_ids == third.outputs[0].token_ids


def test_deltas(llm, serve):
    async def main(engine):
        params = greedy(output_kind=RequestOutputKind.DELTA)
        return [output async for output in engine.generate(PROMPT, params, "r")]

    text = "".join(output.outputs[0].text for output in serve(main))
    assert text == answer(llm).outputs[0].text


def test_leaving_a_stream_aborts_its_request(llm, serve):
    async def main(engine):
        stream = engine.generate(tokens(30), greedy(max_tokens=50), "left")
        async for _ in stream:
            break
        await stream.aclose()
        other = await last(engine, PROMPT, GREEDY, "left")  # the name is free again
        return other

    assert serve(main).outputs[0].token_ids == answer(llm).outputs[0].token_ids


def test_cancelled_task_aborts_its_request(llm, serve):
    async def main(engine):
        task = asyncio.create_task(last(engine, tokens(30), greedy(max_tokens=60), "cancelled"))
        stays = asyncio.create_task(last(engine, PROMPT, GREEDY, "stays"))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await stays

    assert serve(main).outputs[0].token_ids == answer(llm).outputs[0].token_ids


def test_abort_ends_the_stream(llm, serve):
    async def main(engine):
        outputs = []
        async for output in engine.generate(tokens(30), greedy(max_tokens=60), "r"):
            outputs.append(output)
            if len(outputs) == 2:
                await engine.abort("r")
        await engine.abort("never heard of")
        return outputs

    outputs = serve(main)
    assert 2 <= len(outputs) < 60
    assert not outputs[-1].finished


def test_wrong_request_hurts_nobody(llm, serve):
    async def main(engine):
        right = asyncio.create_task(last(engine, PROMPT, GREEDY, "right"))
        wrong = [
            last(engine, {"prompt_token_ids": [-5]}, GREEDY, "a"),
            last(engine, PROMPT, SamplingParams(logprobs=50), "b"),
            last(engine, PROMPT, GREEDY, "c", LoRARequest("gone", 8, "/nowhere/at/all")),
        ]
        errors = await asyncio.gather(*wrong, return_exceptions=True)
        return errors, await right

    errors, right = serve(main)
    assert [type(error).__name__ for error in errors] == [
        "ValueError",
        "ValueError",
        "AdapterError",
    ]
    assert all(word in str(error) for word, error in zip(("-5", "50", "gone"), errors, strict=True))
    assert right.outputs[0].token_ids == answer(llm).outputs[0].token_ids


def test_same_request_id_twice(llm, serve):
    async def main(engine):
        first = asyncio.create_task(last(engine, PROMPT, GREEDY, "r"))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="request r is running already"):
            await last(engine, PROMPT, GREEDY, "r")
        return await first

    assert serve(main).outputs[0].token_ids == answer(llm).outputs[0].token_ids


def test_error_in_a_step_reaches_every_stream_and_the_engine_serves_on(llm, serve, monkeypatch):
    real, calls = llm.llm_engine.runner.dispatch, iter(range(100))

    def broken(*arguments):
        if next(calls) == 2:
            raise RuntimeError("the device is on fire")
        return real(*arguments)

    monkeypatch.setattr(llm.llm_engine.runner, "dispatch", broken)

    async def main(engine):
        streams = [last(engine, tokens(5, seed), GREEDY, str(seed)) for seed in range(3)]
        errors = await asyncio.gather(*streams, return_exceptions=True)
        return errors, await last(engine, PROMPT, GREEDY, "after")

    errors, after = serve(main)
    assert [str(error) for error in errors] == ["the device is on fire"] * 3
    assert after.outputs[0].token_ids == answer(llm).outputs[0].token_ids


def test_adapters(files, serve):
    async def main(engine):
        assert await engine.add_lora(adapter(files, 0))
        assert not await engine.add_lora(adapter(files, 0))
        assert await engine.pin_lora(1)
        assert await engine.list_loras() == {1}
        assert (await engine.lora_statuses())[1].state is AdapterState.PINNED
        assert (await engine.lora_stats()).loads.count >= 1
        with pytest.raises(ValueError, match="7 is not registered"):
            await engine.pin_lora(7)
        assert await engine.remove_lora(1)
        assert await engine.reset_prefix_cache()
        return await engine.get_tokenizer()

    assert serve(main).eos_token == "</s>"
