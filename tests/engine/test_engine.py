"""The engine as its users see it: answers, ends, caches, errors. See tests/engine/conftest.py."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from jlora import (
    AdapterError,
    EngineArgs,
    LLMEngine,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
)
from jlora.engine.inputs import InputProcessor, generation_config
from jlora.model import load_hf_config, model_config
from tests.engine.tools import SMALL, small_llm
from tests.reference import Comparison, Reference, compare, make_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = "the quick brown fox jumps over the lazy dog"


def greedy(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **changes})


def tokens(length: int, seed: int = 0) -> dict:
    return {"prompt_token_ids": np.random.default_rng(seed).integers(3, 300, length).tolist()}


def adapter(files, index: int) -> LoRARequest:
    return LoRARequest(f"adapter {index}", index + 1, str(files.adapters[index]))


def answer(llm, prompt=PROMPT, params=GREEDY, lora_request=None):
    (output,) = llm.generate(prompt, params, lora_request=lora_request, use_tqdm=False)
    return output


def run(engine) -> list:
    """Steps until all is done; every output."""
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


@pytest.fixture(scope="module")
def reference(files) -> Reference:
    return Reference(files.model, {str(i): path for i, path in enumerate(files.adapters)})


# -- ends --------------------------------------------------------------------------------------


def test_output_tells_everything(llm, files):
    given = adapter(files, 0)
    output = answer(llm, PROMPT, greedy(logprobs=1), given)
    one = output.outputs[0]
    assert output.prompt == PROMPT
    assert output.prompt_token_ids == llm.get_tokenizer().encode(PROMPT)
    assert output.finished and one.finished()
    assert output.lora_request == one.lora_request == given
    assert one.text == llm.get_tokenizer().decode(one.token_ids)
    assert one.cumulative_logprob == pytest.approx(
        sum(row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True))
    )
    assert (one.index, one.finish_reason, one.stop_reason) == (0, "length", None)
    times = output.metrics
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time
    assert times.first_token_time <= times.finished_time


def test_max_tokens(llm):
    for count in (1, 2, 7):
        one = answer(llm, params=greedy(max_tokens=count)).outputs[0]
        assert (len(one.token_ids), one.finish_reason) == (count, "length")


@pytest.mark.parametrize("max_tokens", [None, 500])
@pytest.mark.parametrize("length", [95, 90, 1])
def test_max_model_len_ends_an_answer(llm, length, max_tokens):
    one = answer(llm, tokens(length), greedy(max_tokens=max_tokens)).outputs[0]
    assert (len(one.token_ids), one.finish_reason) == (96 - length, "length")


def test_stop_ids_and_end_of_text(llm):
    plain = answer(llm).outputs[0].token_ids
    assert len(set(plain[:3])) == 3
    one = answer(llm, params=greedy(stop_token_ids=[plain[2]])).outputs[0]
    assert one.token_ids == plain[:3]
    assert (one.finish_reason, one.stop_reason) == ("stop", plain[2])
    assert one.text == llm.get_tokenizer().decode(plain[:2])
    end = llm.get_tokenizer().eos_token_id
    forced = greedy(logit_bias={end: 100.0}, ignore_eos=False)
    one = answer(llm, params=forced).outputs[0]
    assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == (
        [end],
        "",
        "stop",
        None,
    )
    ignored = answer(llm, params=greedy(logit_bias={end: 100.0})).outputs[0]
    assert (ignored.token_ids, ignored.finish_reason) == ([end] * 8, "length")


def test_stop_strings(llm):
    plain = answer(llm, params=greedy(max_tokens=20)).outputs[0]
    stop = plain.text[4:7]  # in the middle of the text, whatever its tokens are
    at = plain.text.find(stop)
    one = answer(llm, params=greedy(max_tokens=20, stop=[stop, "not there"])).outputs[0]
    assert (one.text, one.finish_reason, one.stop_reason) == (plain.text[:at], "stop", stop)
    assert len(one.token_ids) < 20
    assert plain.token_ids[: len(one.token_ids)] == one.token_ids
    kept = greedy(max_tokens=20, stop=stop, include_stop_str_in_output=True)
    assert answer(llm, params=kept).outputs[0].text == plain.text[:at] + stop


def test_text_only_where_wanted(llm):
    one = answer(llm, params=greedy(detokenize=False)).outputs[0]
    assert one.text == "" and len(one.token_ids) == 8


def test_n_greedy_answers_are_the_same_and_share_their_prompt(llm):
    output = answer(llm, tokens(33), greedy(n=3))
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert len({str(one.token_ids) for one in output.outputs}) == 1


# -- prefix cache ------------------------------------------------------------------------------


def test_second_request_of_a_kind_reuses_pages_and_answers_the_same(llm):
    first, second = answer(llm, tokens(40)), answer(llm, tokens(40))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)  # 39 in pages of 8
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_next_turn_reuses_the_answer(llm, reference):
    first = answer(llm, tokens(20))
    longer = first.prompt_token_ids + first.outputs[0].token_ids + [5, 6, 7]
    second = answer(llm, {"prompt_token_ids": longer})
    assert second.num_cached_tokens == 24  # 27 of the 28 tokens have KV
    found = Comparison()
    compare(found, reference, longer, None, second.outputs[0].token_ids)
    assert found.differences == []


def test_adapters_never_share_pages(llm, files, reference):
    prompt, found = tokens(40), Comparison()
    for index in (None, 0, 1, None, 0, 1):
        lora = None if index is None else adapter(files, index)
        output = answer(llm, prompt, greedy(logprobs=0), lora)
        one = output.outputs[0]
        name = None if index is None else str(index)
        ids = prompt["prompt_token_ids"]
        compare(found, reference, ids, name, one.token_ids, one.logprobs)
    assert found.differences == []
    assert found.worst_logprob < 1e-4


def test_reset_prefix_cache(llm):
    answer(llm, tokens(40))
    llm.llm_engine.reset_prefix_cache()
    assert answer(llm, tokens(40)).num_cached_tokens == 0


def test_prefix_cache_off_by_option(files):
    llm = small_llm(files.model, enable_lora=False, enable_prefix_caching=False)
    assert [answer(llm, tokens(40)).num_cached_tokens for _ in range(2)] == [0, 0]


def test_adapter_that_is_reloaded_while_a_request_waits(llm, files, tmp_path):
    """It runs with what the folder holds now, without the old version's pages."""
    shutil.copytree(files.adapters[0], tmp_path / "a")
    request = LoRARequest("a", 1, str(tmp_path / "a"))
    old = answer(llm, tokens(40), lora_request=request).outputs[0].token_ids
    llm.llm_engine.add_request("waits", tokens(40), GREEDY, lora_request=request)
    kind = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    make_adapter(files.model, tmp_path / "a", seed=9, **kind)
    reload = LoRARequest("a", 1, str(tmp_path / "a"), load_inplace=True)
    assert llm.llm_engine.add_lora(reload)
    output = run(llm.llm_engine)[-1]
    assert output.num_cached_tokens == 0
    found = Comparison()
    renewed = Reference(files.model, {"a": tmp_path / "a"})
    new = output.outputs[0].token_ids
    compare(found, renewed, tokens(40)["prompt_token_ids"], "a", new)
    assert found.differences == []
    assert new != old


# -- log-probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 17, 60])
def test_prompt_logprobs_are_those_of_transformers(llm, files, reference, length):
    """In chunks of 16, and with the prompt's pages cached: they are computed all the same."""
    ids = tokens(length)["prompt_token_ids"]
    answer(llm, tokens(length))
    for index in (None, 1):
        lora = None if index is None else adapter(files, index)
        output = answer(llm, tokens(length), greedy(prompt_logprobs=3, logprobs=3), lora)
        expected = reference.logprobs(ids, None if index is None else str(index))
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == length
        rows = zip(output.prompt_logprobs[1:], ids[1:], expected[:-1], strict=True)
        for found, token, row in rows:
            assert_logprobs(found, token, row, 3)


def assert_logprobs(found: dict, token: int, row: np.ndarray, top: int) -> None:
    """The token's and the best ones', with their ranks; ranks of near ties may be either."""
    assert found[token].logprob == pytest.approx(row[token], abs=1e-4)
    assert set(np.argsort(-row)[:top].tolist()) | {token} == set(found)
    for one, entry in found.items():
        assert entry.logprob == pytest.approx(row[one], abs=1e-4)
        ranks = np.sum(row > row[one] + 1e-5) + 1, np.sum(row > row[one] - 1e-5)
        assert ranks[0] <= entry.rank <= ranks[1]


def test_logprobs_of_an_answer(llm, reference):
    output = answer(llm, tokens(9), greedy(logprobs=4, temperature=2.0, seed=3))
    one, ids = output.outputs[0], output.prompt_token_ids
    expected = reference.logprobs(ids + one.token_ids, None)[len(ids) - 1 : -1]
    for found, token, row in zip(one.logprobs, one.token_ids, expected, strict=True):
        assert_logprobs(found, token, row, 4)
        assert found[token].decoded_token == llm.get_tokenizer().decode([token])


def test_prompt_logprobs_beside_others_and_preempted(llm, reference):
    params = [greedy(max_tokens=60, prompt_logprobs=0 if i % 2 else None) for i in range(8)]
    before = llm.llm_engine.scheduler.num_preemptions
    outputs = llm.generate([tokens(36, i) for i in range(8)], params, use_tqdm=False)
    assert llm.llm_engine.scheduler.num_preemptions > before
    for output, one in zip(outputs, params, strict=True):
        assert (output.prompt_logprobs is None) == (one.prompt_logprobs is None)
        if output.prompt_logprobs is not None:
            ids = output.prompt_token_ids
            expected = reference.logprobs(ids, None)
            found = [
                row[token].logprob
                for row, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
            ]
            np.testing.assert_allclose(found, expected[np.arange(35), ids[1:]], atol=1e-4)


# -- outputs as they come ----------------------------------------------------------------------


def collect(llm, **params) -> list:
    engine = llm.llm_engine
    engine.add_request("r", PROMPT, greedy(max_tokens=12, logprobs=0, **params))
    return run(engine)


def test_kinds_of_output(llm):
    (final,) = collect(llm, output_kind=RequestOutputKind.FINAL_ONLY)
    whole = final.outputs[0]
    cumulative = [output.outputs[0] for output in collect(llm)]
    assert [len(one.token_ids) for one in cumulative] == list(range(1, 13))
    assert all(whole.text.startswith(one.text) for one in cumulative)
    assert cumulative[-1] == whole
    deltas = [output.outputs[0] for output in collect(llm, output_kind=RequestOutputKind.DELTA)]
    assert [len(one.token_ids) for one in deltas] == [1] * 12
    assert [token for one in deltas for token in one.token_ids] == whole.token_ids
    assert "".join(one.text for one in deltas) == whole.text
    assert [row for one in deltas for row in one.logprobs] == whole.logprobs
    assert [one.finish_reason for one in deltas] == [None] * 11 + ["length"]


def test_deltas_never_hold_what_a_stop_string_takes_back(llm):
    text = collect(llm)[-1].outputs[0].text
    stop = text[5:9]
    deltas = collect(llm, output_kind=RequestOutputKind.DELTA, stop=[stop])
    shown = "".join(output.outputs[0].text for output in deltas)
    assert shown == text[: text.find(stop)]


# -- abort -------------------------------------------------------------------------------------


def test_abort_of_a_waiting_a_running_and_a_request_in_flight(llm, files):
    engine = llm.llm_engine
    expected = answer(llm, tokens(20, 1)).outputs[0].token_ids
    for name, lora in (("waits", None), ("starts", 0), ("runs", 1), ("stays", None)):
        request = None if lora is None else adapter(files, lora)
        engine.add_request(name, tokens(20, 1), GREEDY, lora_request=request)
    engine.abort_request("waits")
    engine.step()  # "starts" and a part of "runs" are on the device
    engine.abort_request("starts")
    engine.step()
    engine.step()
    engine.abort_request(["runs", "never heard of"])
    outputs = run(engine)
    assert {output.request_id for output in outputs} == {"stays"}
    assert outputs[-1].outputs[0].token_ids == expected


def test_request_id_is_free_again_after_an_abort(llm):
    engine = llm.llm_engine
    expected = answer(llm, tokens(5, 2)).outputs[0].token_ids
    engine.add_request("r", tokens(5, 1), GREEDY)
    engine.step()
    engine.abort_request("r")
    engine.add_request("r", tokens(5, 2), GREEDY)
    assert run(engine)[-1].outputs[0].token_ids == expected


def test_interrupt_leaves_nothing_behind(llm, monkeypatch):
    engine, steps = llm.llm_engine, iter(range(4))
    step = type(engine).step

    def interrupted(self):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([tokens(30, i) for i in range(9)], GREEDY, use_tqdm=False)
    assert not engine.has_unfinished_requests()
    assert len(answer(llm).outputs[0].token_ids) == 8


# -- wrong requests ----------------------------------------------------------------------------

WRONG = {
    "token id -1 is outside": ({"prompt_token_ids": [5, -1]}, {}, None),
    "token id 320 is outside": ({"prompt_token_ids": [320]}, {}, None),
    "prompt_token_ids": ({"prompt_token_ids": [1.5]}, {}, None),
    "the prompt has 96 tokens; with max_model_len=96": (tokens(96), {}, None),
    "the prompt has no tokens": ({"prompt_token_ids": []}, {}, None),
    "no tokens": ("", {}, None),
    "not int": (5, {}, None),
    "multi_modal_data is not supported": ({"prompt": "a", "multi_modal_data": {}}, {}, None),
    "logprobs=21 is above max_logprobs=20": (PROMPT, {"logprobs": 21}, None),
    "prompt_logprobs=30 is above": (PROMPT, {"prompt_logprobs": 30}, None),
    "logit_bias: token id 999": (PROMPT, {"logit_bias": {999: 1.0}}, None),
    "stop_token_ids: token id 999": (PROMPT, {"stop_token_ids": [999]}, None),
    "lora_request must be a LoRARequest, not dict": (PROMPT, {}, {"lora_name": "a"}),
    "'gone'.*is not a folder": (PROMPT, {}, LoRARequest("gone", 9, "/nowhere/at/all")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_request_is_named_and_hurts_nobody(llm, message):
    """Between two right ones, in both interfaces."""
    prompt, changes, lora = WRONG[message]
    params, engine = greedy(**changes), llm.llm_engine
    engine.add_request("right", PROMPT, GREEDY)
    with pytest.raises(ValueError, match=message):
        engine.add_request("wrong", prompt, params, lora_request=lora)
    assert {output.request_id for output in run(engine)} == {"right"}
    with pytest.raises(ValueError, match=message):
        llm.generate(
            [PROMPT, prompt, PROMPT],
            [GREEDY, params, GREEDY],
            lora_request=[None, lora, None],
            use_tqdm=False,
        )


def test_adapter_of_too_large_a_rank_is_named(llm, files, tmp_path):
    kind = {"r": 40, "target_modules": ["q_proj"]}
    make_adapter(files.model, tmp_path / "large", **kind)
    with pytest.raises(AdapterError, match=r"'large'.*rank 40 .* max_lora_rank=32"):
        answer(llm, lora_request=LoRARequest("large", 1, str(tmp_path / "large")))
    assert llm.llm_engine.list_loras() == set()


def test_id_of_another_path_is_named(llm, files):
    answer(llm, lora_request=adapter(files, 0))
    with pytest.raises(AdapterError, match=r"id 1 stands for .*adapter-4"):
        answer(llm, lora_request=LoRARequest("other", 1, str(files.adapters[1])))
    same = LoRARequest("another name", 1, str(files.adapters[0]))
    assert answer(llm, lora_request=same).lora_request is same


def test_request_ids(llm):
    engine = llm.llm_engine
    engine.add_request("r", PROMPT, GREEDY)
    with pytest.raises(ValueError, match="request r is running already"):
        engine.add_request("r", PROMPT, GREEDY)
    with pytest.raises(ValueError, match="request_id must be a string, not 5"):
        engine.add_request(5, PROMPT, GREEDY)
    assert len(run(engine)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_params": [GREEDY] * 2}, "sampling_params has 2 entries for 3 prompts"),
        ({"lora_request": [None]}, "lora_request has 1 entries for 3 prompts"),
        ({"sampling_params": {"n": 1}}, "sampling_params must be SamplingParams"),
        ({"sampling_params": [GREEDY, None, GREEDY]}, "sampling_params must be SamplingParams"),
    ],
)
def test_wrong_arguments_of_generate(llm, arguments, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([PROMPT] * 3, use_tqdm=False, **arguments)
    with pytest.raises(TypeError, match="temperature"):
        llm.generate(PROMPT, temperature=0)


def test_no_prompts_no_answers(llm):
    assert llm.generate([], GREEDY, use_tqdm=False) == []


# -- LLM ---------------------------------------------------------------------------------------


def test_chat_uses_the_template(llm, files):
    talk = [{"role": "user", "content": "the dog"}]
    (output,) = llm.chat(talk, GREEDY, use_tqdm=False)
    assert output.prompt == "<s>user: the dog\nassistant: "
    assert output.prompt_token_ids.count(1) == 1  # not another one from the tokeniser
    outputs = llm.chat([talk, talk], GREEDY, use_tqdm=False, lora_request=[None, adapter(files, 2)])
    assert outputs[0].outputs[0].token_ids == output.outputs[0].token_ids
    assert outputs[1].outputs[0].token_ids != output.outputs[0].token_ids
    plain = "{{ messages[0]['content'] }}"
    (output,) = llm.chat(talk, GREEDY, use_tqdm=False, chat_template=plain)
    assert output.prompt == "the dog"


def test_default_sampling_params_are_the_models(llm):
    assert llm.get_default_sampling_params() == SamplingParams()
    assert len(llm.generate(PROMPT, use_tqdm=False)[0].outputs[0].token_ids) <= 16


def test_generation_config_gives_defaults_and_ends(files, tmp_path):
    shutil.copytree(files.model, tmp_path / "m")
    text = '{"temperature": 0.6, "top_k": 7, "eos_token_id": [2, 9, 4000], "do_sample": true}'
    (tmp_path / "m" / "generation_config.json").write_text(text)
    args = EngineArgs(model=str(tmp_path / "m"))
    inputs = InputProcessor(args, model_config(load_hf_config(args.model)))
    assert inputs.default_params() == SamplingParams(temperature=0.6, top_k=7)
    assert inputs.eos_ids == {2, 9}  # and none that the model cannot say


def test_generation_config_of_a_repository_is_that_of_the_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    for commit, revision in (("a" * 40, "main"), ("b" * 40, "v2")):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "generation_config.json").write_text(f'{{"is": "{revision}"}}')
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    assert generation_config("some/model", None) == {"is": "main"}
    assert generation_config("some/model", "v2") == {"is": "v2"}
    assert generation_config("some/other", None) == {}


def test_unknown_and_unsupported_arguments_are_named(files):
    with pytest.raises(TypeError, match="unknown argument max_lora_ranks"):
        small_llm(files.model, max_lora_ranks=4)
    with pytest.raises(NotImplementedError, match="quantization='awq'"):
        small_llm(files.model, quantization="awq")
    with pytest.raises(ValueError, match="max_cpu_loras=1 is below max_loras=2"):
        small_llm(files.model, max_cpu_loras=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 513}, "max_model_len=513 is above the 512 positions"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens=4 is below max_num_seqs=8"),
        ({"num_gpu_blocks_override": 11}, "room for 88 tokens.*max_model_len=96"),
        (
            {"tensor_parallel_size": 3},
            "tensor_parallel_size=3 neither divides num_key_value_heads=2",
        ),
        ({"tensor_parallel_size": 12}, "tensor_parallel_size=12 does not divide"),
        ({"kernel_implementation": "magic"}, "kernel_implementation='magic'"),
        ({"dtype": "int4"}, "dtype='int4'"),
    ],
)
def test_sizes_that_cannot_be_are_named(files, options, message, monkeypatch):
    """Before minutes go into weights, where the memory left does not matter."""
    if "num_gpu_blocks_override" not in options:
        monkeypatch.delattr("jlora.engine.device_side.load_model")
    with pytest.raises(ValueError, match=message):
        small_llm(files.model, **options)


def test_more_devices_than_there_are(files, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:2])
    monkeypatch.delattr("jlora.engine.device_side.load_model")
    with pytest.raises(ValueError, match="tensor_parallel_size=6, but 2 cpu devices are visible"):
        small_llm(files.model, tensor_parallel_size=6)


def test_without_tokeniser_and_without_lora(files):
    options = {"enable_lora": False, "skip_tokenizer_init": True}
    llm = small_llm(files.model, **options)
    engine = llm.llm_engine
    for wrong, message in (
        ({"prompt": PROMPT}, "skip_tokenizer_init=True: pass prompt_token_ids"),
        ({"prompt": tokens(3), "params": greedy(stop="a")}, "stop strings need a tokeniser"),
        ({"prompt": tokens(3), "lora_request": adapter(files, 0)}, "'adapter 0'.*enable_lora=True"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_request("r", **wrong)
    for name in ("add_lora", "remove_lora", "pin_lora"):
        with pytest.raises(ValueError, match="enable_lora=True"):
            getattr(engine, name)(adapter(files, 0))
    with pytest.raises(ValueError, match="chat needs a tokeniser"):
        llm.chat([{"role": "user", "content": "a"}])
    one = answer(llm, tokens(3)).outputs[0]
    assert one.text == "" and len(one.token_ids) == 8


def test_random_weights_for_benchmarks(files):
    llm = small_llm(files.model, enable_lora=False, load_format="dummy", seed=3)
    assert len(answer(llm).outputs[0].token_ids) == 8


def test_progress_is_shown(llm, capsys):
    llm.generate([PROMPT] * 2, GREEDY, use_tqdm=True)
    assert "tok/s" in capsys.readouterr().err


# -- adapters ----------------------------------------------------------------------------------


def test_adapter_of_a_waiting_or_running_request_is_not_removed(llm, files):
    engine = llm.llm_engine
    engine.add_request("r", PROMPT, GREEDY, lora_request=adapter(files, 0))
    with pytest.raises(AdapterError, match="adapter 1 is wanted by 1 waiting"):
        engine.remove_lora(1)
    engine.step()
    with pytest.raises(AdapterError, match="adapter 1 is in use"):
        engine.remove_lora(1)
    run(engine)
    assert engine.remove_lora(1)
    assert not engine.remove_lora(1)


def test_pinned_adapters_in_every_slot_refuse_others_and_serve_on(llm, files):
    engine = llm.llm_engine
    for index in (0, 1):
        engine.add_lora(adapter(files, index))
        engine.pin_lora(index + 1)
    with pytest.raises(AdapterError, match="all 2 slots hold pinned"):
        answer(llm, lora_request=adapter(files, 2))
    assert answer(llm, lora_request=adapter(files, 1)).finished
    engine.remove_lora(1)
    assert answer(llm, lora_request=adapter(files, 2)).finished


def test_pins_that_come_while_a_request_waits_end_it_with_an_error(llm, files):
    engine = llm.llm_engine
    engine.add_request("r", PROMPT, GREEDY, lora_request=adapter(files, 2))
    for index in (0, 1):
        engine.add_lora(adapter(files, index))
        engine.pin_lora(index + 1)
    (output,) = run(engine)
    assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")
    assert "pinned" in output.outputs[0].stop_reason


def test_adapter_that_vanishes_while_a_request_waits_ends_it_with_an_error(llm, files, tmp_path):
    engine = llm.llm_engine
    shutil.copytree(files.adapters[0], tmp_path / "a")
    engine.add_request("r", PROMPT, GREEDY, lora_request=LoRARequest("a", 9, str(tmp_path / "a")))
    engine._manager().manager.remove_adapter(9)  # as if evicted
    shutil.rmtree(tmp_path / "a")
    engine.add_request("other", PROMPT, GREEDY)
    outputs = {output.request_id: output for output in run(engine)}
    assert outputs["r"].outputs[0].finish_reason == "abort"
    assert str(tmp_path / "a") in outputs["r"].outputs[0].stop_reason
    assert len(outputs["other"].outputs[0].token_ids) == 8


def test_more_adapters_than_the_host_keeps(llm, files, reference, tmp_path):
    """max_cpu_loras=4, max_loras=2: five in one batch, some more than once."""
    paths = list(files.adapters)
    for index in (3, 4):
        shutil.copytree(files.adapters[index - 3], tmp_path / str(index))
        paths.append(tmp_path / str(index))
    order = [0, 3, 1, 4, 2, 0, 4, 2, 1, 3]
    given = [LoRARequest(str(index), index + 1, str(paths[index])) for index in order]
    outputs = llm.generate([PROMPT] * 10, GREEDY, lora_request=given, use_tqdm=False)
    found = Comparison()
    for index, output in zip(order, outputs, strict=True):
        ids = output.prompt_token_ids
        compare(found, reference, ids, str(index % 3), output.outputs[0].token_ids)
    assert found.differences == []


def test_engine_args_are_vllms(files):
    """Positional model, everything else by name; an engine of its own."""
    engine = LLMEngine.from_engine_args(
        EngineArgs(str(files.model), **{k: v for k, v in SMALL.items() if k != "use_tqdm"})
    )
    assert engine.get_num_unfinished_requests() == 0
    assert engine.step() == []
