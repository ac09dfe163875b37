"""What special adapters need, and what requests may name besides a folder."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file

from jlora import AdapterError, LoRARequest, SamplingParams
from tests.reference import (
    INVOCATION,
    VOCAB,
    Comparison,
    Reference,
    compare,
    load_base,
    make_adapter,
    make_model,
    special_kinds,
)
from tests.test_against_peft import build, engine, requests_of, run_and_compare

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
PLAIN = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "o_proj"]},
    "c": {"r": 20, "lora_alpha": 20, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model, and adapters of low rank only."""
    return build(tmp_path_factory.mktemp("plain"), "llama3", PLAIN)


def prompt(seed: int = 0, length: int = 20) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def answers(llm, requests, prompts=None):
    """The answers to one prompt each."""
    prompts = [prompt(i) for i in range(len(requests))] if prompts is None else prompts
    return llm.generate(
        [{"prompt_token_ids": one} for one in prompts],
        PARAMS,
        lora_request=requests,
        use_tqdm=False,
    )


def check(outputs, reference, names):
    """Every answer is the reference's, by the adapter's name."""
    found = Comparison()
    for name, output in zip(names, outputs, strict=True):
        one = output.outputs[0]
        compare(found, reference, output.prompt_token_ids, name, one.token_ids, one.logprobs)
    assert found.differences == []
    assert found.worst_logprob < 1e-4


# -- mixtures --------------------------------------------------------------------------------

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.5}


class Mixed:
    """PEFT's add_weighted_adapter."""

    def __init__(self, model, adapters, names, combination):
        names = list(names)
        self.model = PeftModel.from_pretrained(
            load_base(model), str(adapters[names[0]]), adapter_name=names[0]
        )
        for name in names[1:]:
            self.model.load_adapter(str(adapters[name]), adapter_name=name)
        weights = [WEIGHTS[name] for name in names]
        self.model.add_weighted_adapter(names, weights, "mix", combination_type=combination)
        self.model.set_adapter("mix")
        self.model.eval()

    @torch.no_grad()
    def logprobs(self, tokens, adapter, prompt):
        logits = self.model(torch.tensor([tokens])).logits
        return torch.log_softmax(logits[0].double(), dim=-1).numpy()


def mixture(adapters, names, combination, mixture_id=50) -> LoRARequest:
    requests = {one.lora_name: one for one in requests_of(adapters)}
    components = [(requests[name], WEIGHTS[name]) for name in names]
    return LoRARequest("mix", mixture_id, components=components, combination_type=combination)


@pytest.mark.parametrize(("names", "combination"), [("abc", "cat"), ("ab", "linear")])
def test_a_mixture_is_pefts_weighted_adapter(plain, names, combination):
    model, adapters = plain
    llm = engine(model, max_lora_blocks=4)
    single, mixed = requests_of(adapters), mixture(adapters, names, combination)
    outputs = answers(llm, [mixed, single[0], None, mixed, single[2], mixed])
    reference = Reference(model, adapters)
    check(outputs[1:3] + outputs[4:5], reference, ["a", None, "c"])
    peft = Mixed(model, adapters, names, combination)
    check([outputs[0], outputs[3], outputs[5]], peft, ["mix"] * 3)


def test_a_mixture_copies_no_blocks(plain):
    model, adapters = plain
    llm = engine(model, max_lora_blocks=4, max_lora_rank=32, lora_pool_blocks=4)
    answers(llm, requests_of(adapters))  # 1 + 1 + 2 blocks of q_proj
    manager = llm.llm_engine.lora.manager
    resident = manager.slot_maps["qkv"].blocks.copy()
    answers(llm, [mixture(adapters, "abc", "cat")])
    slot = manager.slot_of(50)
    assert set(manager.slot_maps["qkv"].get(slot)) == set(resident[resident >= 0].ravel())


def test_a_mixture_with_too_many_blocks_names_the_option(plain):
    model, adapters = plain
    llm = engine(model, max_lora_rank=32)
    with pytest.raises(AdapterError, match=r"'mix'.* 4 rank blocks .* max_lora_blocks=4"):
        answers(llm, [mixture(adapters, "abc", "cat")])


def test_linear_needs_equal_ranks(plain):
    model, adapters = plain
    with pytest.raises(AdapterError, match=r"'mix'.*equal rank.*q_proj.*4, 20"):
        answers(engine(model), [mixture(adapters, "ac", "linear")])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("dora", "DoRA"),
        ("lora-bias", "biases"),
        ("saved-head", "vocabulary rows"),
        ("activated", "invocation tokens"),
    ],
)
def test_other_adapters_cannot_be_mixed(plain, tmp_path, kind, text):
    model, adapters = plain
    make_adapter(model, tmp_path / "x", **special_kinds("llama3")[kind])
    special = LoRARequest("x", 9, str(tmp_path / "x"))
    llm = engine(model, lora_modules=[special])
    mixed = LoRARequest("mix", 50, components=[(requests_of(adapters)[0], 1.0), (special, 1.0)])
    with pytest.raises(AdapterError, match=f"'mix': component 9 has {text}"):
        answers(llm, [mixed])


# -- adapters in memory ----------------------------------------------------------------------


def in_memory(folder, adapter_id, convert=np.asarray, **options) -> LoRARequest:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    arrays = {name: convert(tensor) for name, tensor in tensors.items()}
    return LoRARequest("m", adapter_id, lora_tensors=arrays, peft_config=config, **options)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_an_adapter_in_memory_is_as_from_a_folder_and_replaced_in_place(plain, convert):
    model, adapters = plain
    llm, reference = engine(model), Reference(model, adapters)
    request = in_memory(adapters["a"], 1, convert)
    check(answers(llm, [request, None, request]), reference, ["a", None, "a"])
    for name in ("b", "c"):
        new = in_memory(adapters[name], 1, convert, load_inplace=True)
        assert llm.llm_engine.add_lora(new)
        assert not llm.llm_engine.add_lora(new)  # the same content
        check(answers(llm, [new, None]), reference, [name, None])


def test_other_tensors_under_a_known_id_are_refused_without_load_inplace(plain):
    model, adapters = plain
    llm = engine(model)
    answers(llm, [in_memory(adapters["a"], 1)])
    answers(llm, [in_memory(adapters["a"], 1)])  # a copy: the same adapter
    with pytest.raises(AdapterError, match="id 1 stands for tensors in memory"):
        answers(llm, [in_memory(adapters["b"], 1)])


def test_a_bad_adapter_in_memory_is_refused_by_name(plain):
    model, adapters = plain
    request = in_memory(adapters["a"], 1)
    name = next(name for name in request.lora_tensors if "lora_A" in name)
    tensors = {**request.lora_tensors, name: request.lora_tensors[name].T}
    bad = LoRARequest("m", 1, lora_tensors=tensors, peft_config=request.peft_config)
    with pytest.raises(AdapterError, match=r"adapter 'm'.*lora_A.*shape"):
        answers(engine(model), [bad])


# -- activated LoRA --------------------------------------------------------------------------


def test_what_is_before_the_invocation_is_the_bases_and_shared(plain, tmp_path):
    model, _ = plain
    kind = special_kinds("llama3")["activated"]
    make_adapter(model, tmp_path / "activated", **kind)
    request = LoRARequest("activated", 1, str(tmp_path / "activated"))
    llm = engine(model)
    long = prompt(5, 70)
    base = answers(llm, [None], [long])[0]
    assert base.num_cached_tokens == 0
    outputs = answers(llm, [request], [[*long, *INVOCATION, 3]])
    assert outputs[0].num_cached_tokens == 64  # whole pages of 16
    reference = Reference(model, {"activated": tmp_path / "activated"})
    check(outputs, reference, ["activated"])
    # And the other way: the base finds what was computed before the adapter acted, no more.
    other = prompt(6, 40)
    answers(llm, [request], [[*other[:34], *INVOCATION, *other[34:]]])
    again = answers(llm, [None], [[*other[:34], *INVOCATION, *other[34:]]])[0]
    assert again.num_cached_tokens == 32
    check([again], reference, [None])


def test_without_the_invocation_an_activated_lora_is_the_base(plain, tmp_path):
    model, _ = plain
    make_adapter(model, tmp_path / "x", **special_kinds("llama3")["activated"])
    llm, long = engine(model), prompt(7, 40)
    base, other = (
        answers(llm, [one], [long])[0] for one in (None, LoRARequest("x", 1, str(tmp_path / "x")))
    )
    assert other.outputs[0].token_ids == base.outputs[0].token_ids
    assert other.num_cached_tokens == 32
    assert not llm.llm_engine.lora.manager.in_use(1)


# -- what must be reserved ---------------------------------------------------------------------

OPTIONS = {
    "dora": "enable_lora_dora=True",
    "dora-vocabulary": "enable_lora_dora=True",
    "lora-bias": "enable_lora_bias=True",
    "embed": "enable_lora_embeddings=True",
    "head": "enable_lora_embeddings=True",
    "saved-head": "max_lora_token_rows=101 (or max_lora_full_weights=1)",
    "tokens": "max_lora_token_rows=3",
    "added": "lora_extra_vocab_size=3",
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_is_not_reserved_is_refused_with_the_option(plain, tmp_path, kind):
    model, _ = plain
    make_adapter(model, tmp_path / "x", **special_kinds("llama3")[kind])
    llm = engine(model, lora_extra_vocab_size=0)
    with pytest.raises(AdapterError) as caught:
        answers(llm, [LoRARequest("x", 1, str(tmp_path / "x"))])
    assert str(caught.value).startswith("adapter 'x'")
    assert OPTIONS[kind] in str(caught.value)
    assert llm.llm_engine.list_loras() == set()


def test_with_nothing_reserved_the_pool_is_rank_blocks_only(plain):
    model, _ = plain
    state = engine(model).llm_engine.runner.pool.state
    assert set(state.rows) == {"qkv", "o", "gate_up", "down"}
    assert all(row.magnitude is None and row.bias is None for row in state.rows.values())
    assert state.token_rows == {}
    assert state.full == {}


@pytest.mark.parametrize("rows", [200, 0])
def test_matrices_are_served_as_rows_or_whole(plain, tmp_path, rows):
    model, _ = plain
    kinds = {name: special_kinds("llama3")[name] for name in ("saved-both", "saved-head", "added")}
    adapters = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        adapters[name] = tmp_path / name
        make_adapter(model, adapters[name], seed=seed, **kind)
    options = {"max_lora_token_rows": rows} if rows else {"max_lora_full_weights": 2}
    llm = engine(model, lora_extra_vocab_size=3, max_cpu_loras=8, **options)
    run_and_compare(llm, Reference(model, adapters), adapters)


def test_tensors_are_counted(plain, tmp_path):
    model, _ = plain
    for name, kind in special_kinds("llama-bias").items():
        if name.startswith("bias"):
            continue
        folder = tmp_path / name
        make_adapter(model, folder, **kind)
        request = LoRARequest(name, 1, str(folder))
        llm = engine(model, lora_modules=[request])
        counts = llm.llm_engine.lora_tensor_counts(1)
        assert sum(counts.values()) == len(load_file(folder / "adapter_model.safetensors")), name


def test_base_model_of_another_name_warns_once(plain, tmp_path, caplog):
    model, adapters = plain
    for number in (1, 2):
        shutil.copytree(adapters["a"], tmp_path / str(number))
        path = tmp_path / str(number) / "adapter_config.json"
        config = {**json.loads(path.read_text()), "base_model_name_or_path": "some/other-model"}
        path.write_text(json.dumps(config))
    llm = engine(model)
    with caplog.at_level("WARNING", logger="jlora"):
        answers(llm, [LoRARequest(str(n), n, str(tmp_path / str(n))) for n in (1, 2)])
    warnings = [one.getMessage() for one in caplog.records if "base model" in one.getMessage()]
    assert len(warnings) == 1
    assert "some/other-model" in warnings[0]


def test_make_model_is_what_the_adapters_are_of(tmp_path):
    """A model of other widths refuses the adapter, with both numbers."""
    make_model("llama3", tmp_path / "one")
    make_model("llama3", tmp_path / "other", hidden_size=36)
    make_adapter(tmp_path / "one", tmp_path / "a", r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"shape \[2, 48\], expected \[2, 36\]"):
        answers(engine(tmp_path / "other"), [LoRARequest("a", 1, str(tmp_path / "a"))])
