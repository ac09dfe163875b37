"""Adapters that JAX trainers save with Orbax: the same as PEFT's files, or refused by name."""

from __future__ import annotations

import json
import os
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from jlora.cli import main
from jlora.errors import AdapterError
from jlora.manager import FolderResolver, LoRAModel, export_adapter
from jlora.manager.peft import file_fingerprint
from tests.manager.adapters import MODULES, WEIGHTS, key, lora_config, make_tensors, widths
from tests.manager.peft_models import applied, llama, logits, modules_of, read, save, saved_config
from tests.manager.test_adapter_files import content
from tests.reference import make_model

NAME = "jlora_adapter.json"
HEADS, KV, DIM, HIDDEN, INNER = 4, 2, 8, 24, 40  # of tests.manager.adapters
SOME = ["q_proj", "v_proj", "down_proj"]


def write(folder, tree, config=None, place="adapter", **options):
    """Saves a pytree as an adapter's checkpoint, with its configuration beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder / place, ocp.args.PyTreeSave(tree))
    if config is not None:
        (folder / NAME).write_text(json.dumps(config))
    return folder


def load(folder, **options) -> LoRAModel:
    options = lora_config(**options)
    return LoRAModel.from_local_checkpoint(folder, 1, MODULES, options, "adapter 'a'")


def ours(tensors):
    """PEFT's tensors as jlora's pytree: the input first, the output last."""
    tree = {}
    for name, array in tensors.items():
        *above, matrix, _ = name.removeprefix("base_model.model.").split(".")
        inside = tree
        for one in above:
            inside = inside.setdefault(one, {})
        inside[matrix.lower()] = array.T
    return tree


def assert_holds(lora, tensors, scaling):
    """The adapter is these tensors."""
    assert len(lora.loras) * 2 == len(tensors) == sum(lora.tensor_counts.values())
    for name, layer in lora.loras.items():
        np.testing.assert_array_equal(layer.lora_a, tensors[key(name, "A")])
        np.testing.assert_array_equal(layer.lora_b, tensors[key(name, "B")])
        assert layer.scaling == scaling


# -- jlora's layout --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("place", ["adapter", "."])
def test_our_layout(dtype, place, tmp_path):
    tensors, folder = make_tensors(dtype=dtype), tmp_path / "a"
    if place == ".":
        write(tmp_path, ours(tensors), place="a")
        (folder / NAME).write_text('{"lora_alpha": 6}')
    else:
        write(folder, ours(tensors), {"lora_alpha": 6})
    lora = load(folder)
    assert_holds(lora, tensors, 1.5)
    assert lora.rank == 4


@pytest.mark.parametrize(
    "options", [{"use_ocdbt": False}, {"use_ocdbt": False, "use_zarr3": True}, {"use_zarr3": True}]
)
def test_every_storage_of_orbax(options, tmp_path):
    tensors = make_tensors()
    assert_holds(load(write(tmp_path, ours(tensors), {"lora_alpha": 4}, **options)), tensors, 1)


def test_names_may_be_one_string(tmp_path):
    tensors = make_tensors()
    flat = {
        name.removeprefix("base_model.model.").replace(".weight", "").lower(): array.T
        for name, array in tensors.items()
    }
    assert_holds(load(write(tmp_path, flat, {"lora_alpha": 4})), tensors, 1)


def test_each_module_has_its_own_rank(tmp_path):
    tensors = {**make_tensors(("q_proj", "o_proj"), 4), **make_tensors(("v_proj",), 20, seed=1)}
    lora = load(write(tmp_path, ours(tensors), {"lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}))
    scales = {"q_proj": 0.5, "o_proj": 2, "v_proj": 0.4}
    for name, layer in lora.loras.items():
        last = name.rsplit(".", 1)[1]
        assert layer.rank == (20 if last == "v_proj" else 4)
        assert layer.scaling == pytest.approx(scales[last])


def test_what_only_some_adapters_have(tmp_path):
    """By PEFT's names and in its shapes, with the keys of its configuration."""
    expected = logits(save(llama(), tmp_path / "peft", target_modules=SOME, use_dora=True, r=3))
    arrays = load_file(tmp_path / "peft" / WEIGHTS)
    tree = {name.removeprefix("base_model.model."): array for name, array in arrays.items()}
    alpha = saved_config(tmp_path / "peft")["lora_alpha"]
    write(tmp_path / "a", tree, {"lora_alpha": alpha, "use_dora": True})
    one, other = read(tmp_path / "a", modules_of()), read(tmp_path / "peft", modules_of())
    assert content(one) == content(other) and one.has_magnitudes
    assert expected.shape


# -- Qwix and Tunix --------------------------------------------------------------------------


def tunix(tensors, layers=2):
    """As Tunix's Llama and Qwen have them: heads apart, linear layers of Flax in the MLP."""
    tree = {}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        attention, mlp = {}, {}
        for one, heads in (("q", HEADS), ("k", KV), ("v", KV)):
            a, b = pair(tensors, f"{at}.self_attn.{one}_proj")
            attention[f"{one}_proj"] = {"w_lora_a": a, "w_lora_b": b.reshape(-1, heads, DIM)}
        a, b = pair(tensors, f"{at}.self_attn.o_proj")
        attention["o_proj"] = {"w_lora_a": a.reshape(HEADS, DIM, -1), "w_lora_b": b}
        for one in ("gate_proj", "up_proj", "down_proj"):
            a, b = pair(tensors, f"{at}.mlp.{one}")
            mlp[one] = {"kernel_lora_a": a, "kernel_lora_b": b}
        tree[str(layer)] = {"attn": attention, "mlp": mlp}
    return {"layers": tree}


def pair(tensors, module):
    return tensors[key(module, "A")].T, tensors[key(module, "B")].T


@pytest.mark.parametrize("wrap", ["plain", "params", "nnx"])
def test_tunix_names(wrap, tmp_path):
    tensors = make_tensors()
    tree = tunix(tensors)
    if wrap == "params":
        tree = {"params": tree}
    if wrap == "nnx":  # what nnx.state(model, nnx.LoRAParam) is
        flat = nnx.traversals.flatten_mapping(tree)
        params = {path: nnx.LoRAParam(jnp.asarray(array)) for path, array in flat.items()}
        tree = nnx.from_flat_state(params)
    folder = write(tmp_path, tree, {"lora_alpha": 6}, place="model_params")
    assert_holds(load(folder), tensors, 1.5)


def test_tunix_gemma_names(tmp_path):
    """k and v of one module share A; B has them apart."""
    tensors = make_tensors()
    for layer in range(2):
        k, v = (f"model.layers.{layer}.self_attn.{one}_proj" for one in "kv")
        tensors[key(v, "A")] = tensors[key(k, "A")]
    tree = tunix(tensors)
    for layer, module in tree["layers"].items():
        attention = module["attn"]
        attention["q_einsum"] = attention.pop("q_proj")
        attention["attn_vec_einsum"] = attention.pop("o_proj")
        k, v = attention.pop("k_proj"), attention.pop("v_proj")
        both = np.stack([k["w_lora_b"], v["w_lora_b"]], axis=1)  # [rank, 2, heads, head size]
        attention["kv_einsum"] = {"w_lora_a": k["w_lora_a"], "w_lora_b": both}
        assert layer in "01" and both.shape == (4, 2, KV, DIM)
    assert_holds(load(write(tmp_path, tree, {"lora_alpha": 4})), tensors, 1)


def test_hugging_face_modules_with_qwix_names(tmp_path):
    tensors = make_tensors(("q_proj",))
    q = {
        f"model.layers.{layer}.self_attn.q_proj": dict(
            zip(
                ("kernel_lora_a", "kernel_lora_b"),
                pair(tensors, f"model.layers.{layer}.self_attn.q_proj"),
                strict=True,
            )
        )
        for layer in range(2)
    }
    assert_holds(load(write(tmp_path, q, {"lora_alpha": 4})), tensors, 1)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (None, r"without jlora_adapter.json, so its alpha is not known; write that file"),
        ({}, "has no lora_alpha"),
        ([], "has no lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha='16' must be a finite number"),
        ({"lora_alpha": 16, "magic": 1}, "magic=1"),
        ({"lora_alpha": 16, "r": 5}, r"has shape \[4, 24\], expected \[5, 24\]"),
        ({"lora_alpha": 16, "target_modules": ["k_proj"]}, "PEFT would drop it"),
    ],
)
def test_what_is_not_known_is_refused(config, found, tmp_path):
    folder = write(tmp_path, ours(make_tensors(("q_proj",))), config)
    with pytest.raises(AdapterError, match=f"adapter 'a'.*{found}"):
        load(folder)


def test_json_that_is_none_is_refused(tmp_path):
    folder = write(tmp_path, ours(make_tensors()))
    for text in ("", "{", "[" * 100_000):
        (folder / NAME).write_text(text)
        with pytest.raises(AdapterError, match="is not readable JSON"):
            load(folder)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"layers.0.mlp.gate_proj_lora_a": (4, HIDDEN, 4)}, r"gate_proj_lora_a' \[4, 24, 4\] is"),
        ({"embedder.input_embedding_lora_a": (50, 4)}, "'embedder.input_embedding_lora_a'"),
        ({"layers.0.attn.kv_einsum.w_lora_b": (4, 3, KV, DIM)}, "expected 2 in its second axis"),
        ({"layers.0.attn.q_proj.w_lora_a": (4,)}, "expected two axes or more"),
        ({"layers.0.attn.q_proj.w": (HIDDEN, HEADS, DIM)}, "none of .*'layers.0.attn.q_proj.w'"),
        ({"layers.0.input_layernorm.w_lora_a": (1, 4)}, "model.layers.0.input_layernorm"),
        ({"layers.7.attn.q_proj.w_lora_a": (HIDDEN, 4)}, "model.layers.7.self_attn.q_proj"),
        ({"step": ()}, "none of its arrays is a lora_a.*'step'"),
        ({"layers.0.attn.q_proj.w_lora_a": (HIDDEN, 4)}, "has no lora_B"),
        (
            {
                "layers.0.attn.q_proj.w_lora_a": (HIDDEN + 1, 4),
                "layers.0.attn.q_proj.w_lora_b": (4, HEADS, DIM),
            },
            r"has shape \[4, 25\], expected \[4, 24\]",
        ),
        (
            {
                "layers.0.attn.q_proj.w_lora_a": (HIDDEN, 4),
                "model.layers.0.self_attn.q_proj.lora_a": (HIDDEN, 4),
            },
            "is there twice",
        ),
    ],
)
def test_arrays_without_a_place_are_refused_by_name(change, found, tmp_path):
    tree = {name: np.ones(shape, np.float32) for name, shape in change.items()}
    with pytest.raises(AdapterError, match=found):
        load(write(tmp_path, tree, {"lora_alpha": 4}))


@pytest.mark.parametrize("kind", [np.int32, np.int8])
def test_integers_are_refused(kind, tmp_path):
    tree = ours({name: array.astype(kind) for name, array in make_tensors().items()})
    with pytest.raises(AdapterError, match=f"is {np.dtype(kind)}, expected a floating point"):
        load(write(tmp_path, tree, {"lora_alpha": 4}))


def test_nan_is_refused(tmp_path):
    tensors = make_tensors()
    tensors[key("model.layers.1.mlp.up_proj", "B")][3, 1] = np.nan
    with pytest.raises(AdapterError, match=r"model.layers.1.mlp.up_proj.lora_B.weight holds nan"):
        load(write(tmp_path, ours(tensors), {"lora_alpha": 4}))


def test_a_root_of_steps_is_refused(tmp_path):
    write(tmp_path / "steps" / "100", ours(make_tensors()), {"lora_alpha": 4})
    with pytest.raises(AdapterError, match=r"no Orbax checkpoint \(of one step\)"):
        load(tmp_path / "steps")
    load(tmp_path / "steps" / "100")


def test_damage_is_an_adapter_error(tmp_path):
    """Cut, emptied or lost files; no zeros, and nothing but AdapterError."""
    tensors = make_tensors(rank=32)
    whole = write(tmp_path / "whole", ours(tensors), {"lora_alpha": 32})
    assert_holds(load(whole), tensors, 1)
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    refused = 0
    for number, name in enumerate(names):
        for how in ("lost", "empty", "cut", "noise"):
            folder = tmp_path / f"{number}-{how}"
            shutil.copytree(whole, folder)
            data = (folder / name).read_bytes()
            noise = np.random.default_rng(number).bytes(len(data))
            changed = {"empty": b"", "cut": data[: len(data) // 2], "noise": noise}
            (folder / name).unlink()
            if how != "lost":
                (folder / name).write_bytes(changed[how])
            try:
                lora = load(folder)
            except AdapterError:
                refused += 1
            else:  # a file that is not needed
                assert_holds(lora, tensors, 1)
    assert refused >= 8


def test_chunks_larger_than_an_array_are_refused(tmp_path):
    """Decoding one would take memory that nobody has."""
    folder = write(tmp_path, ours(make_tensors()), {"lora_alpha": 4}, use_ocdbt=False)
    path = folder / "adapter" / "model.layers.0.mlp.up_proj.lora_a" / ".zarray"
    array = json.loads(path.read_text())
    path.write_text(json.dumps({**array, "chunks": [1 << 20, 1 << 20]}))
    with pytest.raises(AdapterError, match=r"up_proj.lora_a: its chunks .* are larger than it is"):
        load(folder)


# -- versions --------------------------------------------------------------------------------


def test_identity_is_of_all_files(tmp_path):
    folder = write(tmp_path / "a", ours(make_tensors()), {"lora_alpha": 4})
    before, fingerprint = load(folder).identity, file_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert load(tmp_path / "copy").identity == before
    (tmp_path / "copy" / NAME).write_text('{"lora_alpha": 5}')
    assert load(tmp_path / "copy").identity != before
    shutil.rmtree(folder / "adapter")
    write(folder, ours(make_tensors(seed=1)))
    assert file_fingerprint(folder) != fingerprint
    assert load(folder).identity != before
    for path in sorted((folder / "adapter").rglob("*")):
        if path.is_file():
            fingerprint = file_fingerprint(folder)
            os.utime(path, (1, 1))
            assert file_fingerprint(folder) != fingerprint


def test_a_folder_of_adapters_has_them_too(tmp_path):
    folder = write(tmp_path / "team" / "sql", ours(make_tensors()), {"lora_alpha": 4})
    assert FolderResolver(tmp_path).resolve_lora("team/sql") == os.path.realpath(folder)


def test_pefts_files_win(tmp_path):
    save(llama(), tmp_path, target_modules=SOME)
    expected = content(read(tmp_path, modules_of()))
    write(tmp_path, ours(make_tensors(seed=1)), {"lora_alpha": 4})
    assert content(read(tmp_path, modules_of())) == expected


# -- export ----------------------------------------------------------------------------------


def test_peft_loads_what_is_exported(tmp_path):
    """An Orbax adapter with several ranks, and its logits by PEFT and by hand."""
    model = llama()
    tensors = {
        **orbax_tensors(model, ("q_proj", "o_proj"), 4),
        **orbax_tensors(model, ("up_proj",), 6),
    }
    folder = write(tmp_path / "a", ours(tensors), {"lora_alpha": 6, "alpha_pattern": {"q_proj": 2}})
    export_adapter(str(folder), tmp_path / "out")
    lora = read(folder, modules_of())
    assert content(read(tmp_path / "out", modules_of())) == content(lora)
    peft = PeftModel.from_pretrained(llama(), str(tmp_path / "out")).eval()
    np.testing.assert_allclose(logits(peft), logits(applied(llama(), lora)), atol=2e-5)
    assert not np.allclose(logits(peft), logits(llama()), atol=1e-3)


def orbax_tensors(model, parts, rank):
    rng = np.random.default_rng(rank)
    tensors = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in parts:
            d_out, d_in = module.weight.shape
            tensors[key(name, "A")] = rng.normal(size=(rank, d_in)).astype(np.float32)
            tensors[key(name, "B")] = rng.normal(size=(d_out, rank)).astype(np.float32)
    return tensors


@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": SOME, "use_dora": True, "rank_pattern": {"v_proj": 7}},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["v_proj"], "trainable_token_indices": [3, 4]},
    ],
)
def test_pefts_own_adapters_are_exported_unchanged(kind, tmp_path):
    expected = logits(save(llama(), tmp_path / "a", **kind))
    export_adapter(str(tmp_path / "a"), tmp_path / "out")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("a", "out"))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    peft = PeftModel.from_pretrained(llama(), str(tmp_path / "out")).eval()
    np.testing.assert_allclose(logits(peft), expected, atol=1e-6)


def test_bfloat16_and_a_tokeniser_are_exported(tmp_path):
    tensors = make_tensors(dtype=ml_dtypes.bfloat16)
    folder = write(tmp_path / "a", ours(tensors), {"lora_alpha": 4})
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "out").mkdir()
    export_adapter(str(folder), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    assert content(load(tmp_path / "out")) == content(load(folder))


def test_export_on_the_command_line(tmp_path, capsys):
    make_model("llama3", tmp_path / "model")
    folder = write(tmp_path / "a", ours(make_tensors(("q_proj",))), {"lora_alpha": 4})
    arguments = ["export-adapter", str(folder), str(tmp_path / "out")]
    assert main([*arguments, "--model", str(tmp_path / "model")]) == 2  # of another width
    assert "expected [4, 48]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert load(tmp_path / "out").loras
    assert main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_refused_adapter_leaves_nothing(tmp_path):
    folder = write(tmp_path / "a", {"x": np.ones((2, 2), np.float32)}, {"lora_alpha": 4, "r": 1})
    with pytest.raises(AdapterError):
        export_adapter(str(folder), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert widths("model.layers.0.mlp.up_proj") == (HIDDEN, INNER)


def test_a_string_among_the_arrays_is_refused_by_name(tmp_path):
    tree = {**ours(make_tensors(SOME)), "made": {"by": "hello"}}
    folder = write(tmp_path / "a", tree, {"lora_alpha": 8})
    with pytest.raises(AdapterError, match=r"holds strings.*made\.by"):
        load(folder)


def rank_4(**changes):
    """jlora's pytree of an adapter of rank 4 of one module; None: without that array."""
    arrays = {"lora_a": np.ones((HIDDEN, 4), np.float32), "lora_b": np.ones((4, 32), np.float32)}
    arrays = {name: one for name, one in (arrays | changes).items() if one is not None}
    return {"model": {"layers": {"0": {"self_attn": {"q_proj": arrays}}}}}


@pytest.mark.parametrize(
    ("tree", "config", "said"),
    [
        (rank_4(), {"lora_alpha": 4, "r": 8}, "are not of rank 8"),
        (rank_4(lora_b=None), {"lora_alpha": 4}, "has lora_A and no lora_B"),
        (rank_4(lora_b=np.ones((3, 32), np.float32)), {"lora_alpha": 4}, "are not of rank 4"),
        (rank_4(lora_b=np.ones((4, 32), np.int8)), {"lora_alpha": 4}, "int8"),
        (rank_4(lora_b=np.ones((4, 32), bool)), {"lora_alpha": 4}, "bool"),
        (rank_4(lora_b=np.ones((4, 32), np.complex64)), {"lora_alpha": 4}, "complex64"),
    ],
    ids=["rank", "alone", "ranks", "int8", "bool", "complex"],
)
def test_what_is_no_adapter_is_not_exported(tree, config, said, tmp_path):
    folder = write(tmp_path / "a", tree, config)
    with pytest.raises(AdapterError, match=said):
        export_adapter(str(folder), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("place", ["default", "state", "pytree"])
def test_places_where_orbax_puts_a_step(place, tmp_path):
    tensors = make_tensors(SOME)
    folder = write(tmp_path / "a", ours(tensors), {"lora_alpha": 8, "r": 4}, place)
    assert load(folder).loras


def test_export_says_what_is_wrong_with_a_configuration(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("[1]")
    save_file(
        {"x.lora_A.weight": np.ones((2, 2), np.float32)}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="adapter"):
        export_adapter(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
