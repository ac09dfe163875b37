"""Adapters that cannot be served: refused by name, and nothing of them stays behind."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from jlora.errors import AdapterError
from jlora.manager.peft_values import check_regex
from tests.manager.adapters import (
    ALL,
    CONFIG,
    MODULES,
    WEIGHTS,
    WaitingLoRAManager,
    device_state,
    key,
    lora_config,
    make_tensors,
    request,
    write_adapter,
)

Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"
A, B = key(Q0, "A"), key(Q0, "B")
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def worker(tmp_path):
    """A manager with room, and one good adapter in a slot."""
    one = WaitingLoRAManager(MODULES, lora_config())
    one.add_adapter(request(1, write_adapter(tmp_path / "good")))
    one.manager.take_writes()
    return one


def refused(worker, path, *parts: str, **options) -> str:
    """Every way in must refuse the adapter with the same words, and change nothing."""
    before = device_state(worker.manager), worker.manager.list_adapters()
    bad = request(2, path, **options)
    messages, step = set(), lambda one: worker.set_active_adapters([one])
    for way in (worker.add_adapter, worker.read, worker.start, step):
        with pytest.raises(AdapterError) as caught:
            way(bad)
        messages.add(str(caught.value))
        assert (device_state(worker.manager), worker.manager.list_adapters()) == before
        assert worker.manager.take_writes() == []
    assert len(messages) == 1
    message = messages.pop()
    for part in ("adapter 'a2'", *parts):
        assert part in message, message
    assert "\n" not in message
    return message


# -- tensors ---------------------------------------------------------------------------------


def put(name, value):
    """A change of the tensors: name becomes value (a function of what was there), None removes."""

    def change(tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name)) if callable(value) else value

    return change


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def spoil(number, dtype=np.float32):
    def change(tensor):
        tensor = tensor.astype(dtype)
        tensor[1, 2] = number
        return tensor

    return change


BASE = "base_model.model."
TENSORS = {
    "no lora_A": (put(A, None), [Q0, "no lora_A.weight"]),
    "no lora_B": (put(B, None), [Q0, "no lora_B.weight"]),
    "rank": (put(A, ones(5, 24)), [f"{Q0}.lora_A", "[5, 24]", "expected [4, 24]", "rank 4"]),
    "width in": (put(A, ones(4, 25)), [f"{Q0}.lora_A", "[4, 25]", "expected [4, 24]", "24 in"]),
    "width out": (put(B, ones(33, 4)), [f"{Q0}.lora_B", "[33, 4]", "expected [32, 4]", "32 out"]),
    "A transposed": (put(A, ones(24, 4)), [f"{Q0}.lora_A", "[24, 4]", "expected [4, 24]"]),
    "B transposed": (put(B, ones(4, 32)), [f"{Q0}.lora_B", "[4, 32]", "expected [32, 4]"]),
    "one axis": (put(A, ones(96)), [f"{Q0}.lora_A", "[96]", "expected [4, 24]"]),
    "three axes": (put(B, ones(32, 4, 1)), [f"{Q0}.lora_B", "[32, 4, 1]", "expected [32, 4]"]),
    "no axis": (put(B, ones()), [f"{Q0}.lora_B", "[]", "expected [32, 4]"]),
    "an empty one": (put(A, ones(0, 24)), [f"{Q0}.lora_A", "[0, 24]", "expected [4, 24]"]),
    "integers": (put(A, ones(4, 24, dtype=np.int32)), [f"{Q0}.lora_A", "I32", "float32"]),
    "float8": (put(A, ones(4, 24, dtype=ml_dtypes.float8_e4m3fn)), [A, "F8_E4M3", "float32"]),
    "NaN": (put(B, spoil(NAN)), [f"{Q0}.lora_B", "NaN or infinity"]),
    "infinity": (put(A, spoil(-INF, np.float16)), [f"{Q0}.lora_A", "NaN or infinity"]),
    "bfloat16 NaN": (put(A, spoil(NAN, ml_dtypes.bfloat16)), [f"{Q0}.lora_A", "NaN or infinity"]),
    "beyond float32": (put(A, spoil(1e300, np.float64)), [f"{Q0}.lora_A", "infinity", "float32"]),
    "unknown module": (
        put(f"{BASE}model.layers.0.self_attn.w_proj.lora_A.weight", ones(4, 24)),
        ["self_attn.w_proj", "q_proj", "layers 0 to 1"],
    ),
    "lm_head": (put(f"{BASE}lm_head.lora_A.weight", ones(4, 24)), ["lm_head", "q_proj"]),
    "layer beyond the model": (
        put(f"{BASE}model.layers.2.mlp.up_proj.lora_A.weight", ones(4, 24)),
        ["model.layers.2.mlp.up_proj", "layers 0 to 1"],
    ),
    "DoRA's magnitudes": (
        put(f"{BASE}{Q0}.lora_magnitude_vector.weight", ones(32)),
        [f"{Q0}.lora_magnitude_vector", "use_dora"],
    ),
    "embedding": (
        put(f"{BASE}model.embed_tokens.lora_embedding_A", ones(4, 50)),
        ["model.embed_tokens.lora_embedding_A", "target_modules"],
    ),
    "base layer": (put(f"{BASE}{Q0}.base_layer.weight", ones(32, 24)), [f"{Q0}.base_layer.weight"]),
    "module to save": (put(f"{BASE}lm_head.weight", ones(50, 24)), ["lm_head.weight"]),
    "bias of B": (put(f"{BASE}{Q0}.lora_B.bias", ones(32)), [f"{Q0}.lora_B.bias"]),
    "bias of the module": (put(f"{BASE}{Q0}.bias", ones(32)), [f"{Q0}.bias"]),
    "adapter's name": (put(f"{BASE}{Q0}.lora_A.default.weight", ones(4, 24)), ["A.default.weight"]),
    "another spelling": (
        put(f"{BASE}{DOWN1.replace('.1.', '.01.')}.lora_A.weight", ones(4, 40)),
        ["model.layers.01.mlp.down_proj"],
    ),
    "twice": (put(A.removeprefix(BASE), ones(4, 24)), [f"{Q0}.lora_A", "twice"]),
    "line break": (put(f"{BASE}{Q0}\n.lora_A.weight", ones(4, 24)), ["q_proj"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case, worker, tmp_path):
    change, parts = TENSORS[case]
    tensors = make_tensors()
    change(tensors)
    refused(worker, write_adapter(tmp_path / "bad", tensors), *parts)


def test_no_tensors(worker, tmp_path):
    refused(worker, write_adapter(tmp_path / "bad", {}), "no tensors")


def test_rank_over_the_limit(worker, tmp_path):
    path = write_adapter(tmp_path / "bad", make_tensors(rank=33), r=33)
    refused(worker, path, "rank 33 of model.layers.", "max_lora_rank=32", "33 or more")


def test_one_rank_of_a_pattern_over_the_limit(worker, tmp_path):
    path = write_adapter(tmp_path / "bad", make_tensors(), rank_pattern={"1.mlp.down_proj": 40})
    refused(worker, path, "rank 40", DOWN1, "max_lora_rank=32")


def test_a_tensor_that_target_modules_does_not_name(worker, tmp_path):
    """PEFT would leave the tensor out with a warning."""
    tensors = make_tensors(("q_proj", "v_proj"))
    path = write_adapter(tmp_path / "bad", tensors, target_modules=["k_proj", "v_proj"])
    refused(worker, path, "q_proj.lora_A.weight", "target_modules", "k_proj")


def test_a_module_that_the_engine_does_not_allow(tmp_path):
    config = lora_config(target_modules=["q_proj", "v_proj"])
    worker = WaitingLoRAManager(MODULES, config)
    worker.add_adapter(request(1, write_adapter(tmp_path / "good", target_modules=["q_proj"])))
    worker.manager.take_writes()
    path = write_adapter(tmp_path / "bad", target_modules=["q_proj", "k_proj"])
    refused(worker, path, "model.layers.0.self_attn.k_proj", "target modules ['q_proj', 'v_proj']")


def test_allowed_modules_that_the_model_has_not_are_refused_at_the_start():
    with pytest.raises(ValueError, match=r"target_modules.*query.*q_proj"):
        WaitingLoRAManager(MODULES, lora_config(target_modules=["query", "v_proj"]))


# -- files -----------------------------------------------------------------------------------


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


WHOLE = save(make_tensors())
FILES = {
    "empty": b"",
    "garbage": b"\x93NUMPY" + bytes(range(256)) * 4,
    "a page of HTML": b"<html><body>404 not found</body></html>",
    "a pickle": b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94.",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "header too long": struct.pack("<Q", 2**60) + b"{}",
    "header not JSON": header(b"{not json}  "),
    "header not a table": header(b"[1, 2]  "),
    "offsets beyond the data": header(
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'
    ),
    "unknown dtype": header(
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"1234"
    ),
    "truncated": WHOLE[:-10],
    "truncated in the header": WHOLE[:100],
    "too long": WHOLE + b"more",
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, worker, tmp_path):
    path = write_adapter(tmp_path / "bad")
    (path / WEIGHTS).write_bytes(FILES[case])
    refused(worker, path, WEIGHTS, "not a readable safetensors file")


def test_no_weights(worker, tmp_path):
    path = write_adapter(tmp_path / "bad")
    (path / WEIGHTS).unlink()
    refused(worker, path, str(path), f"has no {WEIGHTS}")


def test_pickled_weights_that_are_no_pickle(worker, tmp_path):
    path = write_adapter(tmp_path / "bad")
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    refused(worker, path, "adapter_model.bin is not a readable file of tensors")


def test_weights_that_are_a_folder(worker, tmp_path):
    path = write_adapter(tmp_path / "bad")
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()
    refused(worker, path, f"has no {WEIGHTS}")


# -- configuration ---------------------------------------------------------------------------


def test_no_configuration(worker, tmp_path):
    (tmp_path / "bad").mkdir()
    save_file(make_tensors(), tmp_path / "bad" / WEIGHTS)
    refused(worker, tmp_path / "bad", str(tmp_path / "bad"), f"has no {CONFIG}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "not readable JSON"),
        (b"{r: 4}", "not readable JSON"),
        (b'{"r": 4', "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[" * 200_000, "not readable JSON"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "not readable JSON"),
        (b"[1, 2]", "holds a list"),
        (b'"LORA"', "holds a str"),
        (b"null", "holds a NoneType"),
        (b"{}", "has no r"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_text_of_the_configuration(text, part, worker, tmp_path):
    path = write_adapter(tmp_path / "bad")
    (path / CONFIG).write_bytes(text)
    refused(worker, path, CONFIG, part)


@pytest.mark.parametrize(
    "config",
    [
        {"r": ...},
        {"r": None},
        {"r": "4"},
        {"r": 4.0},
        {"r": 0},
        {"r": -4},
        {"r": True},
        {"r": NAN},
        {"r": 10**400},
        {"lora_alpha": "8"},
        {"lora_alpha": None},
        {"lora_alpha": NAN},
        {"lora_alpha": INF},
        {"lora_alpha": 1e300},
        {"lora_alpha": 10**400},
        {"lora_alpha": [8]},
        {"target_modules": ...},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": ""},
        {"target_modules": 5},
        {"target_modules": True},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": ["q_proj", 5]},
        {"target_modules": [""]},
        {"target_modules": "*_proj"},
        {"exclude_modules": 5},
        {"exclude_modules": ["k_proj", None]},
        {"exclude_modules": "("},
        {"use_rslora": "false"},
        {"use_rslora": 1},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": "q_proj"},
        {"rank_pattern": {"q_proj": "8"}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"*": 8}},
        {"rank_pattern": {"x{99999999999}": 8}},
        {"rank_pattern": {"(" * 2000 + ")" * 2000: 8}},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj": NAN}},
        {"alpha_pattern": {"(": 8}},
        {"layers_to_transform": "1"},
        {"layers_to_transform": [1.0]},
        {"layers_to_transform": ["1"]},
        {"layers_to_transform": True},
        {"layers_to_transform": {"1": 1}},
        {"layers_pattern": 5, "layers_to_transform": 1},
        {"layers_pattern": "(", "layers_to_transform": 1},
        {"layers_pattern": "layers"},
        {"bias": "lora"},
        {"use_dora": 1},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["classifier"]},
        {"modules_to_save": "lm_head"},
        {"trainable_token_indices": [3]},
        {"trainable_token_indices": [3, 3]},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": {"wte": [3]}},
        {"lora_bias": "yes"},
        {"task_type": "SEQ_CLS"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": ["gaussian"]},
        {"peft_type": "IA3"},
        {"peft_type": ["LORA"]},
        {"layer_replication": [[0, 1]]},
        {"alora_invocation_tokens": [50]},
        {"alora_invocation_tokens": ["1"]},
        {"target_parameters": "experts.down_proj"},
        {"ensure_weight_tying": "no"},
        {"use_dora": True, "lora_bias": True},
        {"use_tensor_magic": True},
        {"scale_everything_by": 0},
    ],
    ids=lambda config: str(config)[:60],
)
def test_values_of_the_configuration(config, worker, tmp_path):
    path = write_adapter(tmp_path / "bad", make_tensors())
    content = json.loads((path / CONFIG).read_text()) | config
    (path / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    refused(worker, path, next(iter(config)))


# -- paths and ids ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such", "./no/such", "no/such/folder", "~/no-such", "x"])
def test_a_path_that_is_not_there(path, worker):
    refused(worker, path, path, "not a folder", CONFIG, "user/name")


def test_a_path_that_is_a_file(worker, tmp_path):
    path = write_adapter(tmp_path / "bad") / WEIGHTS
    refused(worker, path, str(path), "not a folder")


def test_an_id_reused_for_another_path(worker, tmp_path):
    second = write_adapter(tmp_path / "second", seed_of_nothing=None)
    third = write_adapter(tmp_path / "third")
    assert worker.add_adapter(request(2, second))
    worker.manager.take_writes()
    refused(worker, third, "id 2", str(second), str(third), "remove_lora")
    assert worker.remove_adapter(2)
    assert worker.add_adapter(request(2, third))


def test_one_id_for_two_paths_in_one_step(worker, tmp_path):
    paths = [write_adapter(tmp_path / name) for name in ("second", "third")]
    with pytest.raises(AdapterError, match=r"id 2 .*second.*third"):
        worker.set_active_adapters([request(2, path) for path in paths])
    assert worker.list_adapters() == {1}


def test_a_good_adapter_after_a_bad_one(worker, tmp_path):
    """A refusal leaves no trace of the id."""
    bad = write_adapter(tmp_path / "bad", {})
    refused(worker, bad, "no tensors")
    assert worker.add_adapter(request(2, write_adapter(tmp_path / "other", make_tensors(ALL))))


@pytest.mark.parametrize(("depth", "fits"), [(50, True), (61, False), (900, False)])
def test_nested_groups_of_a_pattern(depth, fits):
    """Refused before Python recurses: what is collected meanwhile could not run its own code."""
    pattern = "(" * depth + r"\(?q_proj" + ")" * depth
    if fits:
        check_regex(pattern, pattern, "rank_pattern", "adapter 'a'")
        return
    with pytest.raises(AdapterError, match=r"rank_pattern holds .* nested too deeply"):
        check_regex(pattern, pattern, "rank_pattern", "adapter 'a'")
