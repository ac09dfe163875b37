"""What goes wrong while adapters come, change and go: by mistake, by accident, or on purpose."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import AdapterError, LoRARequest, SamplingParams
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
    """The step fails; an adapter whose blocks were not written must not be served as it is."""
    options = {**EVERYTHING, "max_loras": 2, "max_lora_token_rows": 0}
    llm = engine(files / "model", **options)
    folders = {name: special(files, name), "plain": files / "plain"}
    reference = Reference(files / "model", folders)
    requests = [LoRARequest(n, i + 1, str(f)) for i, (n, f) in enumerate(folders.items())]
    pool = llm.llm_engine.runner.pool
    for request in requests:
        llm.llm_engine.add_lora(request)
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
    with pytest.raises(AdapterError, match="id 1 stands for"):
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
    core.add_request("waits", {"prompt_token_ids": tokens}, PARAMS, lora_request=request)
    shutil.rmtree(folder)
    shutil.copytree(special(files, new), folder)
    outputs = []
    try:
        core.add_request(
            "reloads",
            {"prompt_token_ids": prompt()},
            PARAMS,
            lora_request=dataclasses.replace(request, load_inplace=True),
        )
    except AdapterError:
        pass
    while core.has_unfinished_requests():
        outputs += core.step()
    answer = next(one for one in outputs if one.request_id == "waits" and one.finished)
    if answer.outputs[0].finish_reason == "abort":
        return
    name = "added" if old == "added" else "activated"
    check(Reference(files / "model", {name: special(files, old)}), name, answer)
