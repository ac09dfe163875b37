"""What goes wrong inside a step hurts the requests of that step only, and is said."""

from __future__ import annotations

import asyncio
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora import AdapterError, AsyncLLMEngine, LoRARequest, SamplingParams
from tests.engine.test_engine import adapter, answer, greedy, run, tokens
from tests.engine.tools import small_llm


def break_dispatch(monkeypatch, llm, error):
    """The next dispatch raises; those after it do not."""
    runner = llm.llm_engine.runner
    real = runner.dispatch

    def dispatch(*arguments):
        monkeypatch.setattr(runner, "dispatch", real)
        raise error

    monkeypatch.setattr(runner, "dispatch", dispatch)


def test_an_interrupt_leaves_no_pages_that_nobody_wrote(llm, monkeypatch):
    right = answer(llm, tokens(40)).outputs[0].token_ids
    llm.llm_engine.reset_prefix_cache()
    break_dispatch(monkeypatch, llm, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        answer(llm, tokens(40))
    again = answer(llm, tokens(40))
    assert again.num_cached_tokens == 0
    assert again.outputs[0].token_ids == right


def test_a_step_loop_ends_after_a_failed_step(llm, monkeypatch):
    engine = llm.llm_engine
    engine.add_request("a", tokens(20), greedy(max_tokens=4))
    break_dispatch(monkeypatch, llm, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    engine.add_request("b", tokens(20), greedy(max_tokens=4))
    outputs = {output.request_id: output.outputs[0] for output in run(engine)}
    assert outputs["a"].finish_reason == "abort"
    assert "out of memory" in outputs["a"].stop_reason
    assert outputs["b"].finish_reason == "length"


def test_a_write_that_fails_ends_those_that_wait_for_it(llm, files, monkeypatch):
    """And the step's; what comes after finds everything free."""
    engine, lora = llm.llm_engine, adapter(files, 0)
    engine.remove_lora(lora.lora_int_id)
    engine.add_lora(lora)
    engine.lora.manager.deactivate_adapter(lora.lora_int_id)
    right = answer(llm, tokens(20), greedy(max_tokens=4), lora).outputs[0].token_ids
    engine.lora.manager.deactivate_adapter(lora.lora_int_id)
    engine.add_request("runs", tokens(20), greedy(max_tokens=100))
    engine.step()
    pool = engine.runner.pool
    real = pool.write_blocks

    def write_blocks(blocks):
        monkeypatch.setattr(pool, "write_blocks", real)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pool, "write_blocks", write_blocks)
    engine.add_request("waits", tokens(20), greedy(max_tokens=4), lora_request=lora)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine)
    assert engine.lora.manager.users(lora.lora_int_id) == 0
    outputs = {output.request_id: output.outputs[0] for output in run(engine)}
    assert {one.finish_reason for one in outputs.values()} == {"abort"}
    assert all("out of memory" in one.stop_reason for one in outputs.values())
    assert set(outputs) == {"runs", "waits"}
    again = answer(llm, tokens(20), greedy(max_tokens=4), lora).outputs[0].token_ids
    assert again == right


def test_any_error_while_an_adapter_is_fetched_fails_its_request_only(llm, files, monkeypatch):
    engine = llm.llm_engine
    engine.add_request("bad", tokens(20), greedy(), lora_request=adapter(files, 0))
    engine.add_request("good", tokens(20), greedy())

    def acquire(request, adapter_id):
        raise PermissionError("not yours")

    monkeypatch.setattr(engine.lora, "acquire", acquire)
    outputs = {output.request_id: output.outputs[0] for output in run(engine)}
    assert (outputs["bad"].finish_reason, outputs["bad"].stop_reason) == ("abort", "not yours")
    assert outputs["good"].finish_reason != "abort"


def test_numbers_that_overflow_the_pool_are_refused(llm, files, tmp_path):
    """Finite in the file, infinite with the scale: as 0 times infinity it would spread."""
    folder = shutil.copytree(files.adapters[0], tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = np.full_like(tensors[name], 10)
    save_file(tensors, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3e38}))
    with pytest.raises(AdapterError, match=r"above 3\.40282e"):
        answer(llm, tokens(5), lora_request=LoRARequest("a", 1, str(folder)))


def test_float16_pool_takes_no_more_than_float16(files, tmp_path):
    folder = shutil.copytree(files.adapters[0], tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = {name: np.sign(tensor) * 30000 for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    doubled = {**config, "lora_alpha": 3 * config["r"]}
    (folder / "adapter_config.json").write_text(json.dumps(doubled))
    llm = small_llm(files.model, lora_dtype="float16")
    with pytest.raises(AdapterError, match="not a finite float16 number"):
        answer(llm, tokens(5), lora_request=LoRARequest("a", 1, str(folder)))


def test_aborting_several_streams_ends_them(llm):
    engine = AsyncLLMEngine(llm.llm_engine)

    async def listen(name):
        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        return [one async for one in engine.generate(tokens(5), params, name)]

    async def main():
        streams = [asyncio.create_task(listen(name)) for name in "ab"]
        while engine.engine.get_num_unfinished_requests() < 2:
            await asyncio.sleep(0)
        await engine.abort(["a", "b", "unknown"])
        return await asyncio.wait_for(asyncio.gather(*streams), 60)

    try:
        for outputs in asyncio.run(main()):
            assert not any(output.finished for output in outputs)
    finally:
        engine.shutdown()


def test_no_logprobs_at_all(files):
    llm = small_llm(files.model, enable_lora=False, max_logprobs=0)
    output = answer(llm, tokens(5), greedy(logprobs=0, prompt_logprobs=0))
    assert [len(entry) for entry in output.prompt_logprobs[1:]] == [1] * 4


def test_waiting_adapters_are_asked_once_a_step(llm, files, monkeypatch):
    """However many requests wait for them."""
    engine, asked = llm.llm_engine, []
    real = engine.lora.acquire

    def acquire(request, adapter_id):
        asked.append(adapter_id)
        return None if adapter_id == 2 else real(request, adapter_id)

    monkeypatch.setattr(engine.lora, "acquire", acquire)
    engine.add_request("runs", tokens(5), greedy(max_tokens=3), lora_request=adapter(files, 0))
    for index in range(20):
        lora = LoRARequest("b", 2, str(files.adapters[1]))
        engine.add_request(f"waits-{index}", tokens(5), greedy(), lora_request=lora)
    while 2 not in asked:  # not before its copy is on the device
        asked.clear()
        engine.step()
        assert asked in ([1], [2], [1, 2], [])
    engine.abort_request([f"waits-{index}" for index in range(20)])
    run(engine)
