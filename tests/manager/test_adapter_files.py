"""Files of an adapter: pickles, both kinds at once, tensors in memory, headers made to hurt."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import threading
import time
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file

from jlora.errors import AdapterError
from jlora.manager import LoRAModel, PEFTHelper, safetensors_file
from jlora.manager.earlier import EarlierReads
from jlora.manager.peft import file_fingerprint, read_config
from jlora.manager.peft_config import other_base_model
from jlora.manager.recycled import RecycledMemory
from jlora.manager.requirements import UNLIMITED
from tests.manager.adapters import (
    CONFIG,
    MODULES,
    WEIGHTS,
    key,
    lora_config,
    make_config,
    make_tensors,
    write_adapter,
)
from tests.manager.peft_models import llama, modules_of, save

BIN = "adapter_model.bin"
Q0 = "model.layers.0.self_attn.q_proj"


def load(folder, **options) -> LoRAModel:
    return LoRAModel.from_local_checkpoint(
        folder, 1, MODULES, lora_config(**options), "adapter 'a'"
    )


def content(lora: LoRAModel) -> dict:
    """Everything that an adapter computes with, comparable."""
    found = {}
    for name, layer in lora.loras.items():
        for field in ("lora_a", "lora_b", "bias", "magnitude"):
            array = getattr(layer, field)
            if array is not None:
                found[name, field] = (array.dtype.name, array.shape, array.tobytes())
        found[name, "scaling"] = (layer.rank, layer.lora_alpha, layer.scaling)
    for name, bias in lora.biases.items():
        found[name, "own bias"] = bias.tobytes()
    for name, rows in lora.vocab_rows.items():
        found[name, "rows"] = (rows.ids.tolist(), rows.rows.tobytes())
    found["rest"] = (lora.added_tokens, lora.invocation_tokens, lora.rank)
    return found


# -- adapter_model.bin -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_pickled_tensors_are_the_same_adapter(dtype, zipped, tmp_path):
    kind = {torch.bfloat16: ml_dtypes.bfloat16}.get(dtype, str(dtype).removeprefix("torch."))
    tensors = make_tensors()
    folder = write_adapter(tmp_path / "a", {k: t.astype(kind) for k, t in tensors.items()})
    expected = content(load(folder))
    (folder / WEIGHTS).unlink()
    pickled = {name: torch.from_numpy(t).to(dtype) for name, t in tensors.items()}
    torch.save(pickled, folder / BIN, _use_new_zipfile_serialization=zipped)
    lora = load(folder)
    assert content(lora) == expected
    (folder / BIN).write_bytes(b"")
    np.testing.assert_array_equal(lora.loras[Q0].lora_a, lora.loras[Q0].lora_a.copy())


def test_views_and_shared_memory_in_a_pickle(tmp_path):
    folder = write_adapter(tmp_path / "a")
    expected = content(load(folder))
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({k: torch.from_numpy(t.T.copy()).T for k, t in tensors.items()}, folder / BIN)
    assert content(load(folder)) == expected


def test_of_both_files_the_safe_one_is_read(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / BIN).write_bytes(b"nonsense")
    assert load(folder).loras
    before = file_fingerprint(folder)
    (folder / BIN).write_bytes(b"other nonsense")
    assert file_fingerprint(folder) != before


class Evil:
    def __reduce__(self):
        return (sys.exit, (3,))


PICKLES = {
    "code": Evil(),
    "code inside": {"a": Evil()},
    "a list": [torch.zeros(2)],
    "numbers": {"a": 1},
    "other keys": {1: torch.zeros(2)},
    "sparse": {"a": torch.zeros(2, 2).to_sparse()},
    "nowhere": {"a": torch.zeros(2, device="meta")},
    "a whole state": {"state": {"a": torch.zeros(2)}},
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_of_something_else_is_refused(case, tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    torch.save(PICKLES[case], folder / BIN)
    with pytest.raises(AdapterError, match=r"'a'.*adapter_model\.bin") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", pickle.dumps({"a": 1}), b"\x80\x02" * 50])
def test_a_damaged_pickle_is_refused(data, tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes(data)
    with pytest.raises(AdapterError, match=r"'a'.*adapter_model\.bin"):
        load(folder)


def test_a_truncated_pickle_is_refused(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    torch.save({k: torch.from_numpy(t) for k, t in make_tensors().items()}, folder / BIN)
    data = (folder / BIN).read_bytes()
    for length in (len(data) // 3, len(data) - 30):
        (folder / BIN).write_bytes(data[:length])
        with pytest.raises(AdapterError, match=r"'a'.*adapter_model\.bin"):
            load(folder)


def test_without_torch_a_pickle_is_refused_with_the_way_out(tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / BIN)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"needs torch.*adapter_model\.safetensors"):
        load(folder)


# -- in memory ---------------------------------------------------------------------------------


def from_memory(tensors, modules=MODULES, **config) -> LoRAModel:
    helper = PEFTHelper.from_dict(make_config(**config))
    return LoRAModel.from_lora_tensors(1, tensors, helper, modules, UNLIMITED, "adapter 'a'")


def test_tensors_may_be_arrays_of_jax():
    tensors = {name: t.astype(ml_dtypes.bfloat16) for name, t in make_tensors().items()}
    ours = from_memory({name: jnp.asarray(t) for name, t in tensors.items()})
    assert content(ours) == content(from_memory(tensors))
    assert ours.loras[Q0].lora_a.dtype == ml_dtypes.bfloat16


def test_names_of_pefts_modules(tmp_path):
    """`model.state_dict()` names the adapter, `get_peft_model_state_dict` and the file do not."""
    config = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    peft = save(llama(), tmp_path, **config)
    arrays = {k: t.detach().numpy() for k, t in get_peft_model_state_dict(peft).items()}
    arrays = {k: t for k, t in arrays.items() if "base_layer" not in k}
    inside = {k: t.numpy() for k, t in peft.state_dict().items() if "lora_" in k}
    assert any(".default" in name for name in inside)
    config |= {"r": 3, "lora_alpha": 5}
    expected = content(from_memory(arrays, modules_of(), **config))
    assert content(from_memory(inside, modules_of(), **config)) == expected
    bare = {name.removeprefix("base_model.model."): t for name, t in inside.items()}
    assert content(from_memory(bare, modules_of(), **config)) == expected


def test_rows_by_the_names_of_pefts_modules(tmp_path):
    tokens = {"trainable_token_indices": [1, 5], "modules_to_save": ["lm_head"]}
    peft = save(llama(), tmp_path, target_modules=["q_proj"], **tokens)
    wanted = ("lora_", "trainable_tokens_delta", "modules_to_save")
    inside = {k: t.numpy() for k, t in peft.state_dict().items() if any(w in k for w in wanted)}
    helper = PEFTHelper.from_dict(json.loads((tmp_path / "adapter_config.json").read_text()))
    base = llama().lm_head.weight.detach().numpy()
    lora = LoRAModel.from_lora_tensors(
        1, inside, helper, modules_of(), UNLIMITED, base_weight=lambda name: base
    )
    assert lora.vocab_rows["embed_tokens"].ids.tolist() == [1, 5]
    assert len(lora.vocab_rows["lm_head"].ids) == 50


def test_two_adapters_in_one_table_are_refused():
    tensors = make_tensors()
    twice = {k.replace("lora_A", "lora_A.one"): t for k, t in tensors.items()}
    twice |= {k.replace("lora_A", "lora_A.two"): t for k, t in tensors.items()}
    with pytest.raises(AdapterError, match=r"'a'.*twice"):
        from_memory(twice)


# -- the base model's name ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "engine", "differs"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", False),
        ("meta-llama/Llama-3.1-8B", "/models/Llama-3.1-8B/", False),
        ("/old/place/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", False),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("Llama-3.1-8B", "Qwen3-8B", True),
        (None, "Qwen3-8B", False),
        ("", "Qwen3-8B", False),
        (7, "Qwen3-8B", False),
    ],
)
def test_another_base_model(written, engine, differs, tmp_path):
    write_adapter(tmp_path, base_model_name_or_path=written)
    helper = read_config(tmp_path, "adapter 'a'")
    name = helper.base_model_name
    assert (name is not None and other_base_model(name, engine)) == differs


# -- numbers that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_nonfinite_numbers_are_served_only_on_request(number, dtype, tmp_path):
    tensors = {k: t.astype(dtype) for k, t in make_tensors().items()}
    tensors[key(Q0, "A")][1, 2] = number
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(AdapterError, match=rf"'a'.*{Q0}\.lora_A.*NaN or infinity"):
        load(folder)
    lora = load(folder, allow_nonfinite_loras=True)
    np.testing.assert_array_equal(np.float32(lora.loras[Q0].lora_a[1, 2]), np.float32(number))


# -- made to hurt ------------------------------------------------------------------------------


def header(table: dict, data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "overlapping": header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
    "a hole": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
    "negative offset": header({"a": entry([1], -4, 0)}, b"\0" * 4),
    "negative shape": header({"a": entry([-1], 0, 4)}, b"\0" * 4),
    "huge shape": header({"a": entry([2**40, 2**40], 0, 4)}, b"\0" * 4),
    "shape and offsets disagree": header({"a": entry([3], 0, 4)}, b"\0" * 4),
    "the same name twice": struct.pack("<Q", 124)
    + (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ).ljust(124)
    + b"\0" * 8,
    "a header of 200 MB": struct.pack("<Q", 200_000_000) + b"{}",
    "4 bits": header({"a": entry([2], 0, 1, "F4")}, b"\0"),
    "complex": header({"a": entry([1], 0, 8, "C64")}, b"\0" * 8),
    "paths": header({"../../etc/passwd": entry([1], 0, 4)}, b"\0" * 4),
    "no name": header({"": entry([1], 0, 4)}, b"\0" * 4),
    "zero byte": header({"a\0b": entry([1], 0, 4)}, b"\0" * 4),
    "a long name": header({"model." * 20_000: entry([1], 0, 4)}, b"\0" * 4),
    "a long name that nearly fits": header(
        {"base_model.model." * 5_000 + "lora_A.weightx": entry([1], 0, 4)}, b"\0" * 4
    ),
    "suffixes without end": header({".lora_A.weight" * 5_000: entry([1], 0, 4)}, b"\0" * 4),
    "only metadata": header({"__metadata__": {"format": "pt"}}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case, tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).write_bytes(HEADERS[case])
    start = time.perf_counter()
    with pytest.raises(AdapterError) as caught:
        load(folder)
    assert time.perf_counter() - start < 5
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_not_read(tmp_path):
    """The last tensor has a wrong shape: the 32 MB before it are not brought into memory."""
    tensors = make_tensors(("q_proj",))
    name = "base_model.model.zzz.lora_A.weight"
    folder = write_adapter(
        tmp_path / "a", tensors | {name: np.ones((2**21, 4), np.float32)}, target_modules=["q_proj"]
    )
    tracemalloc.start()
    with pytest.raises(AdapterError, match="zzz"):
        load(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("kept", [1, 3, 100], ids=["all kept", "some kept", "none kept"])
@pytest.mark.parametrize("dtypes", ["f4", "f4 f2", "bf f8 f4"])
def test_tensors_that_are_read_together_are_those_of_the_library(tmp_path, kept, dtypes):
    """Read apart, together, or partly so; of one dtype, or of some that move others off theirs."""
    kinds = [ml_dtypes.bfloat16 if one == "bf" else np.dtype(one) for one in dtypes.split()]
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}" + ".lora_A.weight" * (i % kept == kept // 2): rng.standard_normal(
            (i % 7 + 1, 2 * i + 1)
        ).astype(kinds[i % len(kinds)])
        for i in range(20)
    }
    save_file(tensors, tmp_path / "x.safetensors")
    earlier = EarlierReads()
    with safetensors_file.SafetensorsFile(tmp_path / "x.safetensors", earlier) as file:
        assert set(file) == set(tensors)
        for name, expected in tensors.items():
            assert file[name].shape == expected.shape and file[name].dtype == expected.dtype
            np.testing.assert_array_equal(file[name][...], expected)
            np.testing.assert_array_equal(file[name][:1], expected[:1])
            if file[name].bound is not None:
                together = [one for one in file.values() if one.bound is not None]
                assert len({one.dtype for one in together}) == 1
                assert file[name].bound == max(np.abs(one[...]).max() for one in together)


def test_memory_is_used_again_when_no_array_is_left():
    memory = RecycledMemory()
    first = memory.empty(1 << 21)
    first[:] = 7
    where, view = first.ctypes.data, first[100:200].view(np.float32).reshape(5, 5)
    del first
    other = memory.empty(1 << 21)
    assert other.ctypes.data != where  # the view still needs it
    other[:] = 0
    assert (view.view(np.uint8) == 7).all()
    del view
    again = memory.empty((1 << 21) - 5)
    assert again.ctypes.data == where and again.nbytes == (1 << 21) - 5
    assert memory.empty(1 << 10).nbytes == 1 << 10
    assert memory.empty(0).nbytes == 0


def test_a_number_that_is_not_finite_is_found_in_its_tensor(tmp_path):
    """Though all tensors of the file are looked through at once."""
    tensors = make_tensors(("q_proj", "v_proj"))
    name = [name for name in tensors if "lora_B" in name][-1]
    for value in (np.nan, np.inf, -np.inf):
        bad = {key: array.copy() for key, array in tensors.items()}
        bad[name][-1, -1] = value
        folder = write_adapter(tmp_path / str(value), bad, target_modules=["q_proj", "v_proj"])
        with pytest.raises(AdapterError, match=name):
            load(folder)
        load(folder, allow_nonfinite_loras=True)


def test_what_is_not_kept_takes_no_memory(tmp_path):
    """A tensor that is passed over must not live as long as those beside it."""
    tensors = make_tensors(("q_proj",))
    name = next(iter(tensors)).replace("lora_A.weight", "lora_velora_embed")
    folder = write_adapter(
        tmp_path / "a", tensors | {name: np.ones(1 << 20, np.float32)}, target_modules=["q_proj"]
    )
    lora = load(folder)
    kept = sum(one.nbytes for layer in lora.loras.values() for one in (layer.lora_a, layer.lora_b))
    assert kept == lora.nbytes
    assert all(layer.lora_a.base.nbytes == kept for layer in lora.loras.values())


def test_a_refused_adapter_is_not_hashed_to_its_end(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / CONFIG).write_text("[]")
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 33)  # sparse
    start = time.perf_counter()
    with pytest.raises(AdapterError):
        load(folder)
    assert time.perf_counter() - start < 1


def test_a_file_that_is_not_read_does_not_matter(tmp_path):
    folder = write_adapter(tmp_path / "a")
    before = load(folder).identity
    with (folder / BIN).open("wb") as file:
        file.truncate(1 << 33)
    start = time.perf_counter()
    assert load(folder).identity == before
    assert time.perf_counter() - start < 1


def test_a_header_without_end_is_refused_unread(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 25))
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 26)
    with pytest.raises(AdapterError, match="header has 33554432 bytes"):
        load(folder)


def test_a_file_that_ends_early_is_refused(tmp_path, monkeypatch):
    """It was whole when its header was read."""
    folder = write_adapter(tmp_path / "a")
    real = safetensors_file.SafetensorsFile._read_layout

    def shorten(self, *arguments):
        found = real(self, *arguments)
        with (folder / WEIGHTS).open("r+b") as file:
            file.truncate((folder / WEIGHTS).stat().st_size - 8)
        return found

    monkeypatch.setattr(safetensors_file.SafetensorsFile, "_read_layout", shorten)
    with pytest.raises(AdapterError, match=r"ends before|not fully covered"):
        load(folder)


def test_a_hundred_thousand_tensors(tmp_path):
    table = {f"t{index}": entry([1], 4 * index, 4 * index + 4) for index in range(100_000)}
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).write_bytes(header(table, b"\0" * 400_000))
    with pytest.raises(AdapterError, match="t"):
        load(folder)


PATTERNS = {
    "nested": "(a+)+$",
    "nested in the middle": r".*(\w*_)*proj",
    "alternatives in a repeat": "(a|a)*",
    "alternatives in a repeat, counted": "(a|aa){1,60}",
    "an optional one in a repeat": "(a?a?)+",
    "optional ones in a row": "a?" * 40 + "a" * 40,
    "alternatives in a row": "(a|a)" * 40,
    "repeats in a row": ".*" * 9 + "x",
    "a reference": r"(.*)\1*x",
    "in a look-ahead": "(?=(a+)+$)x",
    "too long": "a" * 5000,
}


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_expressions_that_take_for_ever_are_refused(case, field):
    pattern = PATTERNS[case]
    value = {pattern: 3} if field == "rank_pattern" else pattern
    with pytest.raises(AdapterError, match=f"{field} holds"):
        PEFTHelper.from_dict(make_config(**{field: value}))


FAST = [
    r".*\.(q_proj|k_proj|v_proj)",
    r"^model\.layers\.\d+\.self_attn\.[qkvo]_proj$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    r"model\.layers\.(1[0-9]|2[0-7])\..*proj",
    r".*(?<!lm_)head|.*proj",
]


@pytest.mark.parametrize("pattern", FAST)
def test_expressions_that_people_write_are_accepted_and_fast(pattern):
    helper = PEFTHelper.from_dict(make_config(target_modules=pattern))
    names = [f"model.layers.{layer}.self_attn.{'x' * 30}" for layer in range(200)]
    start = time.perf_counter()
    assert sum(helper.targets(name) for name in names) == 0
    assert time.perf_counter() - start < 2


def test_the_slowest_expression_that_is_accepted():
    helper = PEFTHelper.from_dict(make_config(target_modules=".*a.*a.*a.*ab"))
    start = time.perf_counter()
    assert not helper.targets("a" * 64)
    assert time.perf_counter() - start < 1


def test_ten_thousand_patterns(tmp_path):
    patterns = {f"layers.{index}.self_attn.q_proj": 4 for index in range(10_000)}
    folder = write_adapter(
        tmp_path / "a", rank_pattern=patterns, layers_to_transform=list(range(10_000))
    )
    start = time.perf_counter()
    assert load(folder).rank == 4
    assert time.perf_counter() - start < 20
    patterns["one.more"] = 4
    write_adapter(tmp_path / "a", rank_pattern=patterns)
    with pytest.raises(AdapterError, match="rank_pattern has 10001 entries"):
        load(folder)


def test_a_file_like_an_earlier_one_is_read_as_if_it_were_the_first(tmp_path):
    """What was found out of a header holds for no other configuration, limit or length."""
    targets = ("q_proj", "v_proj", "down_proj")
    earlier, modules = EarlierReads(), {"target_modules": list(targets)}

    def read(folder, kept, **options):
        config = lora_config(**options)
        return LoRAModel.from_local_checkpoint(
            folder, 1, MODULES, config, "adapter 'a'", earlier=kept
        )

    for index, config in enumerate(
        (
            {},
            {},
            {"lora_alpha": 7},
            {"use_rslora": True},
            {"alpha_pattern": {"q_proj": 3}},
            {"layers_to_transform": [0, 1]},
        )
    ):
        tensors = make_tensors(targets, seed=index)
        folder = write_adapter(tmp_path / str(index), tensors, **modules, **config)
        assert content(read(folder, earlier)) == content(read(folder, None))
        assert read(folder, earlier).tensor_counts == read(folder, None).tensor_counts
    for wrong in ({"r": 16}, {"target_modules": ["q_proj"]}, {"use_dora": True}):
        folder = write_adapter(tmp_path / f"wrong{wrong}", make_tensors(targets), **modules | wrong)
        with pytest.raises(AdapterError):
            read(folder, earlier)
    bad = make_tensors(targets, seed=9)
    bad[next(iter(bad))][0, 0] = np.nan
    with pytest.raises(AdapterError, match="nan"):
        read(write_adapter(tmp_path / "nan", bad, **modules), earlier)
    folder = write_adapter(tmp_path / "short", make_tensors(targets), **modules)
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate((folder / WEIGHTS).stat().st_size - 2)
    with pytest.raises(AdapterError, match="safetensors"):
        read(folder, earlier)


def test_of_headers_only_so_much_is_kept():
    earlier, made = EarlierReads(), []
    for index in range(40):
        earlier.layout(bytes([index]) * (1 << 20), 1, lambda: made.append(1) or object())
    assert len(made) == 40
    kept = [one for one in range(40) if (bytes([one]) * (1 << 20), 1) in earlier._found]
    assert kept == list(range(32, 40))
    huge = b"x" * (1 << 24)
    earlier.layout(huge, 1, object)
    assert (huge, 1) not in earlier._found and len(earlier._found) == 8


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["embed_tokens"]}])
def test_what_one_file_has_of_the_base_another_may_have_changed(tmp_path, config):
    """A matrix that equals the base's is dropped; in the next file with that header it may not."""
    targets, vocab = ("q_proj", "v_proj"), MODULES.config.vocab_size
    base = np.random.default_rng(0).standard_normal((vocab, 24)).astype(np.float32)
    name, earlier = "base_model.model.model.embed_tokens.weight", EarlierReads()
    changed, broken = base.copy(), base.copy()
    changed[[3, 7]] += 1
    broken[3] = np.nan

    def read(index, matrix, kept):
        tensors = {**make_tensors(targets, seed=index), name: matrix}
        folder = tmp_path / str(index)
        if not folder.exists():
            write_adapter(folder, tensors, target_modules=list(targets), **config)
        options = lora_config(max_lora_token_rows=16)
        return LoRAModel.from_local_checkpoint(
            folder, 1, MODULES, options, "a", base_weight=lambda _: base, earlier=kept
        )

    assert not read(0, base, earlier).vocab_rows
    assert read(1, changed, earlier).vocab_rows["embed_tokens"].ids.tolist() == [3, 7]
    assert content(read(1, changed, earlier)) == content(read(1, changed, None))
    with pytest.raises(AdapterError, match="nan"):
        read(2, broken, earlier)


def test_the_base_model_an_adapter_names_makes_no_plan_of_its_own(tmp_path):
    earlier = EarlierReads()
    for index in range(12):
        names = {"base_model_name_or_path": f"some/model-{index}", "lora_alpha": index // 6 + 1}
        folder = write_adapter(tmp_path / str(index), make_tensors(seed=index), **names)
        LoRAModel.from_local_checkpoint(folder, 1, MODULES, lora_config(), "a", earlier=earlier)
    (layout,) = earlier._found.values()
    assert len(layout.plans) == 2


def test_a_file_that_hangs_does_not_keep_others_waiting(tmp_path, monkeypatch):
    slow, fast = (write_adapter(tmp_path / name, make_tensors()) for name in ("slow", "fast"))
    real, reads, go_on = os.preadv, [], threading.Event()

    def read(number, *arguments):
        reads.append(number)
        if len(reads) == 1:
            go_on.wait(20)
        return real(number, *arguments)

    monkeypatch.setattr(os, "preadv", read)
    thread = threading.Thread(target=load, args=(slow,))
    thread.start()
    while not reads:
        time.sleep(0.001)
    load(fast)
    assert thread.is_alive()
    go_on.set()
    thread.join(20)
    assert len(reads) == 2
