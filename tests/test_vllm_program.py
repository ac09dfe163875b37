"""Programs as they are written for vLLM's LoRA interface; only their imports are changed."""

from __future__ import annotations

import pytest

from jlora import LLM, AdapterInUseError, EngineArgs, LLMEngine, RequestOutput, SamplingParams
from jlora.request import LoRARequest
from tests.engine.tools import make_adapters, make_text_model
from tests.reference import Comparison, Reference, compare

LIMITS = {"enforce_eager": True, "max_model_len": 128, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and adapters of ranks 4, 8, 16 and 2."""
    folder = tmp_path_factory.mktemp("vllm")
    make_text_model(folder / "model")
    make_adapters(folder / "model", folder, ranks=(4, 8, 16, 2))
    return folder


# -- examples/offline_inference/multilora_inference.py -----------------------------------------


def create_test_prompts(lora_path: str) -> list[tuple[str, SamplingParams, LoRARequest | None]]:
    return [
        (
            "A robot may not injure a human being",
            SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1, max_tokens=12),
            None,
        ),
        (
            "To be or not to be,",
            SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2, max_tokens=12),
            None,
        ),
        (
            "[user] Write a SQL query [/user] [assistant]",
            SamplingParams(
                temperature=0.0, logprobs=1, prompt_logprobs=1, max_tokens=12, stop_token_ids=[303]
            ),
            LoRARequest("sql-lora", 1, lora_path),
        ),
        (
            "[user] Write a SQL query [/user] [assistant]",
            SamplingParams(
                temperature=0.0, logprobs=1, prompt_logprobs=1, max_tokens=12, stop_token_ids=[303]
            ),
            LoRARequest("sql-lora2", 2, lora_path),
        ),
    ]


def process_requests(
    engine: LLMEngine,
    test_prompts: list[tuple[str, SamplingParams, LoRARequest | None]],
) -> dict[str, RequestOutput]:
    """Continuously process a list of prompts and handle the outputs."""
    request_id = 0
    finished = {}

    while test_prompts or engine.has_unfinished_requests():
        if test_prompts:
            prompt, sampling_params, lora_request = test_prompts.pop(0)
            engine.add_request(str(request_id), prompt, sampling_params, lora_request=lora_request)
            request_id += 1

        request_outputs: list[RequestOutput] = engine.step()

        for request_output in request_outputs:
            if request_output.finished:
                print(request_output)
                finished[request_output.request_id] = request_output
    return finished


def initialize_engine(model: str, **limits) -> LLMEngine:
    engine_args = EngineArgs(
        model=model,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=8,
        max_cpu_loras=2,
        max_num_seqs=8,
        **limits,
    )
    return LLMEngine.from_engine_args(engine_args)


def test_multilora_inference(folder):
    engine = initialize_engine(str(folder / "model"), **LIMITS)
    lora_path = str(folder / "adapter-8")
    finished = process_requests(engine, create_test_prompts(lora_path))
    assert sorted(finished) == ["0", "1", "2", "3"]
    reference, found = Reference(folder / "model", {"sql": folder / "adapter-8"}), Comparison()
    for request_id, adapter in (("0", None), ("2", "sql"), ("3", "sql")):
        output = finished[request_id]
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        one = output.outputs[0]
        compare(found, reference, output.prompt_token_ids, adapter, one.token_ids, one.logprobs)
    assert found.differences == []
    assert found.worst_logprob < 1e-4
    assert len(finished["1"].outputs[0].token_ids) <= 12
    assert engine.list_loras() == {1, 2}


# -- the quick start of docs/features/lora.md --------------------------------------------------


def test_lora_quick_start(folder):
    sql_lora_path = str(folder / "adapter-8")
    llm = LLM(model=str(folder / "model"), enable_lora=True, max_num_seqs=8, **LIMITS)
    sampling_params = SamplingParams(temperature=0, max_tokens=16, stop=["[/assistant]"])
    prompts = ["[user] one [/user] [assistant]", "[user] another [/user] [assistant]"]
    outputs = llm.generate(
        prompts, sampling_params, lora_request=LoRARequest("sql_adapter", 1, sql_lora_path)
    )
    assert [output.prompt for output in outputs] == prompts
    assert all(output.outputs[0].text for output in outputs)
    base = llm.generate(prompts, sampling_params)
    assert [output.outputs[0].text for output in base] != [o.outputs[0].text for o in outputs]
    check_batched_loras(llm, folder)


def check_batched_loras(llm, folder):
    """A list of adapters, one a prompt."""
    lora = LoRARequest(lora_name="sql", lora_int_id=1, lora_path=str(folder / "adapter-8"))
    params = SamplingParams(temperature=0, max_tokens=6)
    one, two = llm.generate(["hello"] * 2, params, lora_request=[lora, None], use_tqdm=False)
    assert one.lora_request is lora and two.lora_request is None
    assert one.outputs[0].token_ids != two.outputs[0].token_ids


# -- tests/lora/test_add_lora.py, test_lora_functions.py, test_worker.py ------------------------


@pytest.fixture(scope="module")
def shared(folder):
    engine_args = EngineArgs(
        model=str(folder / "model"),
        enable_lora=True,
        max_loras=2,
        max_lora_rank=16,
        max_cpu_loras=3,
        max_num_seqs=4,
        **LIMITS,
    )
    return LLMEngine.from_engine_args(engine_args)


@pytest.fixture
def llm_engine(shared):
    yield shared
    for lora_id in shared.list_loras():
        shared.remove_lora(lora_id)


@pytest.fixture
def make_lora(folder):
    ranks = (4, 8, 16, 2)
    return lambda i: LoRARequest(f"lora{i}", i, str(folder / f"adapter-{ranks[i - 1]}"))


def run_check(fn, args, expected):
    assert fn(args) == expected


def test_lora_functions_sync(llm_engine, make_lora):
    assert llm_engine.add_lora(make_lora(1))
    assert llm_engine.list_loras() == {1}
    run_check(llm_engine.add_lora, make_lora(2), True)
    assert llm_engine.list_loras() == {1, 2}
    # Pin LoRA 1 and test that it is not removed on subsequent adds.
    run_check(llm_engine.pin_lora, 1, True)
    run_check(llm_engine.add_lora, make_lora(3), True)
    run_check(llm_engine.add_lora, make_lora(4), True)
    assert llm_engine.list_loras() == {1, 3, 4}  # 2 was used least recently
    # Remove LoRA 1 and continue adding.
    run_check(llm_engine.remove_lora, 1, True)
    run_check(llm_engine.remove_lora, 1, False)
    run_check(llm_engine.add_lora, make_lora(2), True)
    run_check(llm_engine.add_lora, make_lora(2), False)
    assert llm_engine.list_loras() == {2, 3, 4}
    run_check(llm_engine.remove_lora, 4, True)
    assert llm_engine.list_loras() == {2, 3}


def test_running_makes_an_adapter_recent(llm_engine, make_lora):
    for i in (1, 2, 3):
        llm_engine.add_lora(make_lora(i))
    llm_engine.add_request("r", "a", SamplingParams(max_tokens=2), lora_request=make_lora(1))
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
    llm_engine.add_lora(make_lora(4))
    assert llm_engine.list_loras() == {1, 3, 4}


def test_all_pinned_is_a_clear_error(llm_engine, make_lora):
    for i in (1, 2):
        llm_engine.add_lora(make_lora(i))
        llm_engine.pin_lora(i)
    with pytest.raises(AdapterInUseError, match=r"'lora3'.*all 2 slots hold pinned"):
        llm_engine.add_lora(make_lora(3))
    assert llm_engine.list_loras() == {1, 2}


def test_pin_of_an_unknown_adapter(llm_engine):
    with pytest.raises(ValueError, match="9 is not registered"):
        llm_engine.pin_lora(9)


@pytest.mark.parametrize("name", ["beam_search", "embed", "encode", "score", "classify"])
def test_what_is_out_of_scope_is_refused_by_name(name):
    with pytest.raises(AttributeError, match=f"LLM.{name} is not supported"):
        getattr(LLM.__new__(LLM), name)


@pytest.mark.parametrize(
    ("option", "value"), [("speculative_config", {}), ("guided_decoding_backend", "auto")]
)
def test_unsupported_engine_arguments_are_named(option, value):
    with pytest.raises(TypeError, match=option):
        LLM("model", **{option: value})


def test_structured_output_is_refused_by_name():
    with pytest.raises(TypeError, match="structured_outputs"):
        SamplingParams(structured_outputs={"json": {}})
