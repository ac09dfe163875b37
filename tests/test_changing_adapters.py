"""What goes wrong while adapters come, change and go: by mistake, by accident, or on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import shutil
import threading
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import AdapterError, AsyncLLMEngine, LoRARequest, SamplingParams
from tests.engine.tools import make_text_model, make_tokenizer, small_llm
from tests.reference import (
    INVOCATION,
    VOCAB,
    Comparison,
    Reference,
    compare,
    make_adapter,
    make_model,
    special_kinds,
)
from tests.test_adapter_kinds import Mixed, mixture
from tests.test_against_peft import engine

KINDS = special_kinds("llama-bias")
EVERYTHING = {
    "max_loras": 1,
    "max_lora_rank": 32,
    "max_cpu_loras": 8,
    "enable_lora_dora": True,
    "enable_lora_bias": True,
    "enable_lora_embeddings": True,
    "max_lora_token_rows": 8,
    "max_lora_full_weights": 1,
    "lora_extra_vocab_size": 4,
    "max_model_len": 128,
}
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with biases, and a plain adapter."""
    folder = tmp_path_factory.mktemp("broken")
    make_model("llama-bias", folder / "model")
    make_adapter(folder / "model", folder / "plain", seed=3, r=4, target_modules=["q_proj"])
    return folder


def special(files, name: str, seed: int = 0, **changes):
    """The folder of an adapter of a special kind."""
    folder = files / f"{name}-{seed}-{'-'.join(changes)}"
    if not folder.exists():
        make_adapter(files / "model", folder, seed=seed, **{**KINDS[name], **changes})
    return folder


def prompt(seed: int = 0, length: int = 20) -> list[int]:
    return np.random.default_rng(seed).integers(9, VOCAB, length).tolist()


def ask(llm, request, tokens=None, **changes):
    """The answer to one prompt."""
    params = dataclasses.replace(PARAMS, **changes)
    tokens = prompt() if tokens is None else tokens
    return llm.generate({"prompt_token_ids": tokens}, params, lora_request=request, use_tqdm=False)[
        0
    ]


def check(reference, name, output):
    """The answer is the reference's."""
    found, one = Comparison(), output.outputs[0]
    compare(found, reference, output.prompt_token_ids, name, one.token_ids, one.logprobs)
    assert found.differences == []
    assert found.worst_logprob < 1e-4


def in_memory(folder, adapter_id=1, **options) -> LoRARequest:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return LoRARequest("m", adapter_id, lora_tensors=tensors, peft_config=config, **options)


# -- slots and features ------------------------------------------------------------------------


def test_a_slot_forgets_the_features_of_the_adapter_before(files):
    names = ["dora", "bias-all", "saved-both", "tokens", "added", "lora-bias", "embed", "head"]
    folders = {name: special(files, name) for name in names} | {"plain": files / "plain"}
    reference = Reference(files / "model", folders)
    llm = engine(files / "model", **EVERYTHING)
    requests = {n: LoRARequest(n, i + 1, str(f)) for i, (n, f) in enumerate(folders.items())}
    for name in (*names, *reversed(names)):
        check(reference, name, ask(llm, requests[name]))
        check(reference, "plain", ask(llm, requests["plain"]))
        check(reference, None, ask(llm, None))
    for name in names:  # in place, under one id
        request = LoRARequest("x", 50, str(folders[name]), load_inplace=True)
        check(reference, name, ask(llm, request))


# -- failures in the middle --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bias-all", "added"])
def test_a_write_that_fails_is_made_up_for(files, monkeypatch, name):
    """An adapter whose blocks were not written must not be served as it is."""
    options = {**EVERYTHING, "max_loras": 2, "max_lora_token_rows": 0}
    llm = engine(files / "model", **options)
    folders = {name: special(files, name), "plain": files / "plain"}
    reference = Reference(files / "model", folders)
    requests = [LoRARequest(n, i + 1, str(f)) for i, (n, f) in enumerate(folders.items())]
    pool = llm.llm_engine.runner.pool
    llm.llm_engine.add_lora(requests[1])
    real = pool._base_weight

    def broken(tensor):
        raise OSError("the disk is gone")

    monkeypatch.setattr(pool, "_base_weight", broken)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            ask(llm, requests[0])
    check(reference, "plain", ask(llm, requests[1]))
    check(reference, None, ask(llm, None))
    with pytest.raises(OSError, match="the disk is gone"):
        ask(llm, requests[0])
    monkeypatch.setattr(pool, "_base_weight", real)
    check(reference, name, ask(llm, requests[0]))
    check(reference, "plain", ask(llm, requests[1]))


def test_arrays_that_the_caller_changes_are_copied(files):
    """A training loop updates its arrays in place, between loading and writing too."""
    llm = engine(files / "model", max_loras=1, max_cpu_loras=3)
    reference = Reference(files / "model", {"plain": files / "plain"})
    request = in_memory(files / "plain")
    llm.llm_engine.add_lora(request)
    for array in request.lora_tensors.values():
        array[...] = 1.0
    check(reference, "plain", ask(llm, request))
    ask(llm, LoRARequest("x", 2, str(special(files, "activated"))), [*prompt(), *INVOCATION])
    check(reference, "plain", ask(llm, request))  # its slot was lost meanwhile


def test_the_same_arrays_with_another_configuration_are_another_adapter(files):
    llm = engine(files / "model")
    request = in_memory(files / "plain")
    ask(llm, request)
    changed = {**request.peft_config, "lora_alpha": 80}
    other = dataclasses.replace(request, peft_config=changed)
    with pytest.raises(AdapterError, match=r"id 1 stands for"):
        ask(llm, other)


@pytest.mark.parametrize("value", [object(), "text", None, {1: 2}, [[1.0], [2.0, 3.0]]])
def test_what_is_no_array_is_refused_by_name(files, value):
    request = in_memory(files / "plain")
    tensors = dict(request.lora_tensors)
    name = next(iter(tensors))
    tensors[name] = value
    with pytest.raises(AdapterError, match=rf"'m'.*{name}"):
        ask(engine(files / "model"), dataclasses.replace(request, lora_tensors=tensors))


# -- activated LoRA ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 40]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"added": 3},
    ],
    ids=str,
)
def test_what_acts_before_the_invocation_is_pefts_or_refused(files, changes):
    """PEFT's low-rank part begins at the invocation; saved modules and biases act everywhere."""
    changes = dict(changes)
    added = changes.pop("added", 0)
    folder = files / ("activated-" + "-".join(f"{k}-{v}" for k, v in changes.items()) + str(added))
    make_adapter(files / "model", folder, **KINDS["activated"], **changes, added=added)
    name = "added-activated" if added else "activated"
    reference = Reference(files / "model", {name: folder})
    llm = engine(files / "model", **EVERYTHING)
    request = LoRARequest("x", 1, str(folder))
    more = [VOCAB + 1] if added else []
    prompts = [[5, *more, *prompt(), *INVOCATION, 40, 3], [5, *more, *prompt(), 40]]
    try:
        outputs = [ask(llm, request, tokens) for tokens in prompts]
    except AdapterError as error:
        assert "alora_invocation_tokens" in str(error)  # noqa: PT017
        return
    for output in outputs:
        check(reference, name, output)


@pytest.mark.parametrize("where", [0, 7, 8, 15, 16, 17, 38], ids=str)
def test_invocations_anywhere(files, where):
    """At the start, at the end, across a page's border, several; chunked; found in the cache."""
    folder = special(files, "activated")
    reference = Reference(files / "model", {"activated": folder})
    llm = engine(files / "model", block_size=8, max_num_batched_tokens=8)
    base = prompt(4, 40)
    tokens = [*base[:where], *INVOCATION, *base[where + 2 :]]
    request = LoRARequest("x", 1, str(folder))
    for one in (None, request, request, None):
        check(reference, None if one is None else "activated", ask(llm, one, tokens))
    twice = [*INVOCATION, *tokens[:20], *INVOCATION, *INVOCATION]
    check(reference, "activated", ask(llm, request, twice))
    output = ask(llm, request, tokens, prompt_logprobs=1, n=2)
    check(reference, "activated", output)
    expected = reference.logprobs(tokens, "activated", len(tokens))
    for index, entry in enumerate(output.prompt_logprobs[1:]):
        assert abs(entry[tokens[index + 1]].logprob - expected[index][tokens[index + 1]]) < 1e-4
    short = INVOCATION[:1]
    check(reference, "activated", ask(llm, request, short))


def test_preempted_activated(files):
    folder = special(files, "activated")
    reference = Reference(files / "model", {"activated": folder, "plain": files / "plain"})
    llm = engine(
        files / "model", block_size=8, num_gpu_blocks_override=12, max_model_len=90, max_num_seqs=4
    )
    adapters = [
        ("activated", LoRARequest("x", 1, str(folder))),
        (None, None),
        ("plain", LoRARequest("y", 2, str(files / "plain"))),
    ] * 2
    prompts = [[*prompt(i, 9 + i), *INVOCATION, *prompt(i, 3)] for i in range(6)]
    outputs = llm.generate(
        [{"prompt_token_ids": one} for one in prompts],
        dataclasses.replace(PARAMS, max_tokens=40),
        lora_request=[one for _, one in adapters],
        use_tqdm=False,
    )
    assert llm.llm_engine.scheduler.num_preemptions > 0
    for (name, _), output in zip(adapters, outputs, strict=True):
        check(reference, name, output)


# -- adapters that change while requests wait ----------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [("activated", "dora"), ("added", "dora")])
def test_a_request_is_not_served_by_an_adapter_it_was_not_checked_for(files, tmp_path, old, new):
    """It waits; meanwhile the adapter becomes one of another kind."""
    folder = shutil.copytree(special(files, old), tmp_path / "x")
    llm = engine(files / "model", **EVERYTHING)
    core = llm.llm_engine
    core.add_request(
        "runs",
        {"prompt_token_ids": prompt()},
        dataclasses.replace(PARAMS, max_tokens=20),
        lora_request=LoRARequest("plain", 2, str(files / "plain")),
    )
    core.step()
    tokens = [*prompt(1), *(INVOCATION if old == "activated" else [VOCAB + 1]), 30, 31]
    request = LoRARequest("x", 1, str(folder))
    core.load_loras([request])
    core.add_request("waits", {"prompt_token_ids": tokens}, PARAMS, lora_request=request)
    shutil.rmtree(folder)
    shutil.copytree(special(files, new), folder)
    outputs = []
    with contextlib.suppress(AdapterError):
        core.add_request(
            "reloads",
            {"prompt_token_ids": prompt()},
            PARAMS,
            lora_request=dataclasses.replace(request, load_inplace=True),
        )
    while core.has_unfinished_requests():
        outputs += core.step()
    answer = next(one for one in outputs if one.request_id == "waits" and one.finished)
    if answer.outputs[0].finish_reason == "abort":
        return
    name = "added" if old == "added" else "activated"
    check(Reference(files / "model", {name: special(files, old)}), name, answer)


# -- mixtures ----------------------------------------------------------------------------------


def plain_adapters(files, count=3, rank=4):
    """Folders of plain adapters, and requests with ids from 1."""
    folders = [files / f"mixed-{rank}-{i}" for i in range(count)]
    for i, folder in enumerate(folders):
        if not folder.exists():
            modules = ["q_proj", "down_proj"]
            make_adapter(files / "model", folder, seed=10 + i, r=rank, target_modules=modules)
    return folders, [LoRARequest(str(i), i + 1, str(f)) for i, f in enumerate(folders)]


@pytest.mark.parametrize(
    ("weight", "combination", "dtype"),
    [(3e38, "cat", "float32"), (3e38, "linear", "float32"), (1e14, "linear", "float16")],
)
def test_a_mixture_of_huge_weight_hurts_nobody_else(files, weight, combination, dtype):
    _, requests = plain_adapters(files)
    llm = engine(files / "model", max_lora_blocks=4, lora_dtype=dtype)
    names = [None, "1", "2"] * 2
    others = [None if name is None else requests[int(name)] for name in names]
    prompts = [{"prompt_token_ids": prompt(i)} for i in range(7)]
    alone = [llm.generate(p, PARAMS, lora_request=o) for p, o in zip(prompts, others, strict=False)]
    llm.llm_engine.reset_prefix_cache()
    components = [(requests[0], weight), (requests[1], 1.0)]
    mixed = LoRARequest("mix", 9, components=components, combination_type=combination)
    try:
        llm.llm_engine.add_lora(mixed)
    except AdapterError as error:
        assert "'mix'" in str(error)  # noqa: PT017
        return
    outputs = llm.generate(prompts, PARAMS, lora_request=[*others, mixed])
    for one, output in zip(alone, outputs, strict=False):
        assert one[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_a_mixture_and_its_components_come_and_go(files, tmp_path):
    """Removed, pinned, reloaded and evicted, in use and not; the folder of one is gone."""
    folders, _ = plain_adapters(files)
    copies = [shutil.copytree(one, tmp_path / str(i)) for i, one in enumerate(folders)]
    requests = [LoRARequest(str(i), i + 1, str(f)) for i, f in enumerate(copies)]
    llm = engine(
        files / "model",
        max_loras=2,
        max_cpu_loras=2,
        max_lora_blocks=2,
        max_lora_rank=16,
        lora_pool_blocks=4,
    )
    core, manager = llm.llm_engine, llm.llm_engine.lora.manager
    mixed = LoRARequest("mix", 9, components=[(requests[0], 0.5), (requests[1], -0.25)])
    expected = ask(llm, mixed).outputs[0].token_ids
    alone = [ask(llm, one).outputs[0].token_ids for one in requests]
    params = dataclasses.replace(PARAMS, max_tokens=12)
    core.add_request("m", {"prompt_token_ids": prompt()}, params, lora_request=mixed)
    core.add_request("c", {"prompt_token_ids": prompt()}, params, lora_request=requests[0])
    core.step()
    for one in (9, 1):
        with pytest.raises(AdapterError, match="in use"):
            core.remove_lora(one)
    assert core.pin_lora(1)
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                right = expected if output.request_id == "m" else alone[0]
                assert output.outputs[0].token_ids[:6] == right
    assert core.remove_lora(1)
    assert ask(llm, mixed).outputs[0].token_ids == expected
    assert core.pin_lora(9)
    for index in (0, 1, 2):
        assert ask(llm, requests[index]).outputs[0].token_ids == alone[index]
    shutil.rmtree(copies[0])
    assert ask(llm, mixed).outputs[0].token_ids == expected  # pinned, so it is there
    assert core.remove_lora(9)
    for index in (1, 2):
        assert ask(llm, requests[index]).outputs[0].token_ids == alone[index]
    with pytest.raises(AdapterError, match=r"'0'"):
        ask(llm, mixed)
    shutil.copytree(folders[2], copies[0])  # another adapter in its place
    changed = ask(llm, mixed).outputs[0].token_ids
    assert changed != expected
    shutil.rmtree(copies[0])
    shutil.copytree(folders[0], copies[0])
    assert ask(llm, dataclasses.replace(mixed, load_inplace=True)).outputs[0].token_ids == expected
    for one in core.list_loras():
        core.remove_lora(one)
    assert manager.lora_index_to_id == [None, None]
    assert all(pool.num_free == pool.num_blocks for pool in manager.pools.values())
    assert not manager.slot_maps["qkv"].counts.any()


def test_a_mixture_that_fits_no_pool_names_the_option(files):
    _, requests = plain_adapters(files)
    options = {"max_lora_rank": 16, "max_loras": 1, "max_lora_blocks": 3}
    llm = engine(files / "model", **options)
    mixed = LoRARequest("mix", 9, components=[(one, 1.0) for one in requests])
    with pytest.raises(AdapterError, match=r"'mix'.*lora_pool_blocks"):
        ask(llm, mixed)
    assert ask(llm, requests[0])


# -- masks -------------------------------------------------------------------------------------

SAMPLING = [
    {"temperature": 0},
    {"temperature": 50.0, "logprobs": None, "seed": 1},
    {"temperature": 50.0, "logprobs": None, "seed": 2, "top_k": 200, "min_p": 0.0},
    {"temperature": 50.0, "seed": 3, "min_p": 1e-9, "presence_penalty": -2.0},
    {"temperature": 50.0, "seed": 4, "frequency_penalty": 2.0, "repetition_penalty": 0.1},
    {"temperature": 50.0, "seed": 5, "logit_bias": dict.fromkeys(range(VOCAB), -50.0)},
    {"temperature": 50.0, "seed": 6, "logit_bias": dict.fromkeys(range(VOCAB), -float("inf"))},
]


def test_added_tokens_are_nobody_elses(files):
    """Whatever runs beside: tokens, log-probabilities and their number are as alone."""
    llm = engine(files / "model", **{**EVERYTHING, "max_loras": 3}, max_logprobs=200)
    added = LoRARequest("added", 1, str(special(files, "added")))
    other = LoRARequest("plain", 2, str(files / "plain"))
    sees = []
    for index, changes in enumerate(SAMPLING):
        one = dataclasses.replace(PARAMS, max_tokens=40, prompt_logprobs=None, **changes)
        if one.logprobs is not None:
            one = dataclasses.replace(one, logprobs=104, prompt_logprobs=104)
        prompts = [{"prompt_token_ids": prompt(index)}] * 3
        outputs = llm.generate(prompts, one, lora_request=[None, other, added], use_tqdm=False)
        alone = llm.generate(prompts[:1], one, use_tqdm=False)[0]
        assert outputs[0].outputs[0].token_ids == alone.outputs[0].token_ids
        for output in (*outputs[:2], alone):
            assert max(output.outputs[0].token_ids) < VOCAB
            listed = [*(output.outputs[0].logprobs or ()), *(output.prompt_logprobs or ())[1:]]
            for entry in listed:
                assert len(entry) == VOCAB
                assert all(np.isfinite(x.logprob) for x in entry.values())
        sees += outputs[2].outputs[0].token_ids
    assert max(sees) >= VOCAB
    for params in ({"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": [VOCAB]}):
        for request in (None, other):
            with pytest.raises(ValueError, match=f"{VOCAB} is outside"):
                ask(llm, request, **params)
        ask(llm, added, **params)
    for token in (VOCAB, VOCAB + 3):
        with pytest.raises(ValueError, match=f"{token} is outside"):
            ask(llm, None, [5, token])
    ask(llm, added, [5, VOCAB + 2])
    with pytest.raises(ValueError, match="outside"):
        ask(llm, added, [5, VOCAB + 3])


# -- what is reserved from adapters given at the start -------------------------------------------


def test_full_matrices_are_reserved_for_as_many_as_can_be_there(files, monkeypatch):
    monkeypatch.setattr("jlora.manager.requirements.TOKEN_ROWS_AT_MOST", 8)
    requests = [
        LoRARequest(str(i), i + 1, str(special(files, "saved-head", seed=i))) for i in range(3)
    ]
    llm = engine(files / "model", max_loras=1, lora_modules=requests)
    assert llm.llm_engine.lora_config.max_lora_full_weights == 1
    folders = {one.lora_name: one.lora_path for one in requests}
    reference = Reference(files / "model", folders)
    for request in requests:
        check(reference, request.lora_name, ask(llm, request))


def test_nonfinite_adapters_at_the_start_by_option(files):
    request = in_memory(files / "plain")
    name = next(name for name in request.lora_tensors if "lora_A" in name)
    request.lora_tensors[name][0, 0] = np.nan
    with pytest.raises(AdapterError, match=f"'m'.*{name}"):
        engine(files / "model", lora_modules=[request])
    llm = engine(files / "model", lora_modules=[request], allow_nonfinite_loras=True)
    assert llm.llm_engine.list_loras() == {1}


@pytest.mark.parametrize("value", ["a path", ["a path"], [None], {"name": "path"}, 3])
def test_lora_modules_are_requests(files, value):
    with pytest.raises(ValueError, match="lora_modules"):
        engine(files / "model", lora_modules=value)


def test_a_refused_adapter_at_the_start_is_named(files, tmp_path):
    with pytest.raises(AdapterError, match=r"'gone'"):
        engine(files / "model", lora_modules=[LoRARequest("gone", 1, str(tmp_path / "gone"))])
    twice = [
        LoRARequest("a", 1, str(files / "plain")),
        LoRARequest("b", 1, str(special(files, "dora"))),
    ]
    with pytest.raises(AdapterError, match=r"'b'.*id 1"):
        engine(files / "model", lora_modules=twice)


def test_more_adapters_at_the_start_than_the_host_keeps(files):
    folders, requests = plain_adapters(files)
    llm = engine(files / "model", max_loras=1, max_cpu_loras=2, lora_modules=requests)
    reference = Reference(files / "model", {str(i): f for i, f in enumerate(folders)})
    for i, request in enumerate(requests):
        check(reference, str(i), ask(llm, request))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_lora_blocks", 0),
        ("max_lora_blocks", -1),
        ("lora_pool_blocks", 0),
        ("max_lora_token_rows", -1),
        ("max_lora_full_weights", 1.5),
        ("lora_extra_vocab_size", -3),
        ("lora_expert_blocks", True),
        ("enable_lora_dora", 1),
        ("allow_nonfinite_loras", "yes"),
    ],
)
def test_bad_limits_are_refused_by_name(files, option, value):
    with pytest.raises(ValueError, match=option):
        engine(files / "model", **{option: value})


# -- tokenisers of adapters ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A model with a tokeniser, an engine, and an adapter."""
    folder = tmp_path_factory.mktemp("talks")
    make_text_model(folder / "model")
    make_adapter(folder / "model", folder / "plain", r=4, target_modules=["q_proj"])
    return folder, small_llm(folder / "model", max_lora_token_rows=400, lora_extra_vocab_size=2)


def with_tokenizer(talks, tmp_path, change=None) -> LoRARequest:
    """The adapter in a folder with a tokeniser of its own."""
    folder = shutil.copytree(talks[0] / "plain", tmp_path / "x")
    tokenizer = make_tokenizer()
    if change is not None:
        change(tokenizer)
    tokenizer.save_pretrained(folder)
    return LoRARequest("x", 1, str(folder))


@pytest.fixture
def llm(talks):
    yield talks[1]
    for one in talks[1].llm_engine.list_loras():
        talks[1].llm_engine.remove_lora(one)


def test_a_chat_uses_the_adapters_template(talks, llm, tmp_path):
    """Trained to chat: the vocabulary is the base's, the template is not."""

    def change(tokenizer):
        tokenizer.chat_template = "{% for m in messages %}new: {{ m['content'] }}{% endfor %}"

    request = with_tokenizer(talks, tmp_path, change)
    output = llm.chat([{"role": "user", "content": "dogs"}], PARAMS, lora_request=request)[0]
    assert output.prompt == "new: dogs"


def test_an_answer_ends_with_the_adapters_end(talks, llm, tmp_path):
    request = with_tokenizer(talks, tmp_path)
    free = ask(llm, request, [5, 6, 7], logprobs=None)
    third = free.outputs[0].token_ids[2]
    text = llm.get_tokenizer().convert_ids_to_tokens(third)
    path = tmp_path / "x" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token": text}))
    changed = dataclasses.replace(request, lora_int_id=2)
    output = ask(llm, changed, [5, 6, 7], logprobs=None, ignore_eos=False)
    end = free.outputs[0].token_ids.index(third)
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].token_ids == free.outputs[0].token_ids[: end + 1]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1, 2"),
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer.json", "\x00" * 100),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 7}'),
        ("added_tokens.json", "[3]"),
    ],
)
def test_a_broken_tokeniser_is_said_by_name(talks, llm, tmp_path, file, content):
    request = with_tokenizer(talks, tmp_path)
    (tmp_path / "x" / file).write_text(content)
    try:
        answer = llm.generate("dogs", PARAMS, lora_request=request, use_tqdm=False)
    except AdapterError as error:
        assert "'x'" in str(error)  # noqa: PT017
    else:
        assert answer[0].outputs[0].token_ids
    assert not llm.llm_engine.has_unfinished_requests()


def test_no_code_of_an_adapters_tokeniser_is_asked_about(talks, llm, tmp_path, monkeypatch):
    """At a terminal transformers asks whether to run it, and waits."""
    request = with_tokenizer(talks, tmp_path)
    path = tmp_path / "x" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "tokenizer_class": "Mine"}
    path.write_text(json.dumps(config))
    (tmp_path / "x" / "code.py").write_text("raise SystemExit('the code has run')")

    def asked(*_):
        pytest.fail("somebody is asked")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(AdapterError, match=r"'x'.*tokeniser"):
        llm.generate("dogs", PARAMS, lora_request=request, use_tqdm=False)


def test_a_huge_tokeniser_is_refused(talks, llm, tmp_path):
    request = with_tokenizer(talks, tmp_path)
    with (tmp_path / "x" / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 34)  # sparse
    with pytest.raises(AdapterError, match=r"'x'.*tokeniser"):
        llm.generate("dogs", PARAMS, lora_request=request, use_tqdm=False)


def test_a_tokeniser_is_not_read_for_each_request(talks, llm, tmp_path, monkeypatch):
    request = with_tokenizer(talks, tmp_path)
    llm.generate("dogs", PARAMS, lora_request=request, use_tqdm=False)
    read = []
    real = type(tmp_path).read_bytes
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: read.append(path) or real(path))
    llm.generate("dogs", PARAMS, lora_request=request, use_tqdm=False)
    assert read == []


def test_added_tokens_have_text(talks, llm, tmp_path):
    """In answers and beside log-probabilities, and for nobody else."""
    folder, size = tmp_path / "x", len(llm.get_tokenizer())
    make_adapter(
        talks[0] / "model", folder, r=4, target_modules=["q_proj"], added=2, size=0.6, seed=1
    )
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)
    request = LoRARequest("x", 1, str(folder))
    output = llm.generate(
        "dogs<two>",
        dataclasses.replace(PARAMS, logit_bias={size: 100.0}, max_tokens=3),
        lora_request=request,
    )[0]
    assert output.prompt_token_ids[-1] == size + 1
    assert output.outputs[0].text == "<one>" * 3
    assert output.outputs[0].logprobs[0][size].decoded_token == "<one>"
    base = llm.generate("dogs<two>", PARAMS)[0]
    assert max(base.prompt_token_ids) < size


def test_the_tokeniser_of_an_adapter_is_loaded_by_the_engines_thread(talks, llm, tmp_path):
    core, threads = llm.llm_engine, set()
    engine = AsyncLLMEngine(core)
    real = core.lora.check

    def check(request):
        threads.add(threading.current_thread().name)
        return real(request)

    core.lora.check = check
    try:
        asyncio.run(engine.get_tokenizer(with_tokenizer(talks, tmp_path)))
        assert not any(name == "MainThread" for name in threads)
    finally:
        del core.lora.check
        engine.shutdown()


def test_arrays_of_evicted_adapters_are_let_go(files):
    """A training loop that takes a new id each time would fill the memory."""
    llm = engine(files / "model", max_loras=1, max_cpu_loras=2)
    alive = []
    for adapter_id in range(1, 9):
        request = in_memory(files / "plain", adapter_id)
        alive += [weakref.ref(array) for array in request.lora_tensors.values()]
        ask(llm, request)
    count = len(request.lora_tensors)
    del request
    gc.collect()
    assert sum(one() is not None for one in alive) <= 2 * count
    again = in_memory(files / "plain", 1)
    check(Reference(files / "model", {"plain": files / "plain"}), "plain", ask(llm, again))
    name = next(iter(again.lora_tensors))
    again.lora_tensors[name][...] = 2
    other = dataclasses.replace(again, lora_tensors=dict(again.lora_tensors))
    with pytest.raises(AdapterError, match=r"id 1 stands for"):
        ask(llm, other)


def test_the_tokeniser_of_an_adapter_whose_folder_is_gone(talks, llm, tmp_path):
    def change(tokenizer):
        tokenizer.chat_template = "{% for m in messages %}new: {{ m['content'] }}{% endfor %}"

    request = with_tokenizer(talks, tmp_path, change)
    chat = [{"role": "user", "content": "dogs"}]
    first = llm.chat(chat, PARAMS, lora_request=request)[0]
    shutil.rmtree(tmp_path / "x")
    again = llm.chat(chat, PARAMS, lora_request=request)[0]  # it is on the host
    assert again.prompt == first.prompt
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_missing_matrix_names_its_option(files):
    options = {**EVERYTHING, "max_loras": 2, "max_lora_token_rows": 0}
    llm = engine(files / "model", **options)
    requests = [
        LoRARequest(str(i), i + 1, str(special(files, "saved-head", seed=i))) for i in range(2)
    ]
    for request in requests:  # one at a time
        ask(llm, request)
    llm.llm_engine.pin_lora(2)
    with pytest.raises(AdapterError, match=r"'0'.*max_lora_full_weights \(now 1\)"):
        ask(llm, requests[0])
    ask(llm, LoRARequest("plain", 3, str(files / "plain")))


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_a_mixture_in_the_vocabulary_is_pefts(files, combination):
    folders = {}
    for seed, name in enumerate("ab"):
        folders[name] = files / f"vocabulary-{name}"
        if not folders[name].exists():
            modules = ["embed_tokens", "lm_head", "q_proj"]
            make_adapter(files / "model", folders[name], seed=seed, r=4, target_modules=modules)
    llm = engine(files / "model", enable_lora_embeddings=True, max_lora_blocks=4)
    mixed = mixture(folders, "ab", combination)
    peft = Mixed(files / "model", folders, "ab", combination)
    check(peft, "mix", ask(llm, mixed))
    check(Reference(files / "model", {}), None, ask(llm, None))


def test_an_answer_is_of_one_version(files, tmp_path):
    """Preempted, and its adapter replaced meanwhile: it goes on with the version it began with."""
    folders, _ = plain_adapters(files)
    folder = shutil.copytree(folders[0], tmp_path / "x")
    request = LoRARequest("x", 1, str(folder))
    llm = engine(files / "model", block_size=8, max_model_len=90)
    core = llm.llm_engine
    params = dataclasses.replace(PARAMS, max_tokens=30)
    expected = ask(llm, request, max_tokens=30).outputs[0].token_ids
    core.reset_prefix_cache()
    core.add_request("one", {"prompt_token_ids": prompt()}, params, lora_request=request)
    for _ in range(6):
        core.step()
    core._collect({})
    core.scheduler._preempt(core.scheduler.running[0])
    shutil.rmtree(folder)
    shutil.copytree(folders[1], folder)
    core.add_request(
        "two",
        {"prompt_token_ids": prompt()},
        params,
        lora_request=dataclasses.replace(request, load_inplace=True),
    )
    outputs = {}
    while core.has_unfinished_requests():
        outputs |= {one.request_id: one.outputs[0] for one in core.step()}
    assert outputs["one"].token_ids == expected
    assert outputs["two"].finish_reason == "length"
    assert outputs["two"].token_ids != expected
    assert core.list_loras() == {1}
    assert list(core.lora.manager.list_adapters()) == [1]  # the old version went with its request
