"""Converted models: the same weights to the bit on any number of devices, or each fault by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file

from jlora import LLM, SamplingParams
from jlora.model import AXIS, BaseWeights, convert_model, load_hf_config, load_model, model_config
from jlora.model.weight_table import weight_table
from tests.reference import make_model

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ["llama-bias", "llama3.2", "phi3", "olmo2", "mixtral"]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """A model's folder, its conversion, and its configuration."""
    return converted(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return converted("llama-bias", tmp_path_factory.mktemp("llama"))


def converted(family, folder, **changes):
    make_model(family, folder / "model", **changes)
    convert_model(str(folder / "model"), folder / "out", progress=False)
    return folder / "model", folder / "out", model_config(load_hf_config(str(folder / "model")))


def load(config, folder, devices=1, load_format="auto"):
    mesh = jax.make_mesh(
        (devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    loaded = load_model(config, str(folder), mesh, load_format=load_format, progress=False)
    flat = nnx.to_flat_state(loaded.params)
    return {tuple(path): np.asarray(leaf.get_value()) for path, leaf in flat}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype
        np.testing.assert_array_equal(value, other[path])


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_the_same_to_the_bit(both, devices, dtype, tmp_path):
    model, out, config = both
    if dtype != config.dtype:
        out, config = tmp_path / "out", dataclasses.replace(config, dtype=dtype)
        convert_model(str(model), out, dtype=dtype, progress=False)
        assert model_config(load_hf_config(str(out))).dtype == dtype
    config = dataclasses.replace(config, extra_vocab_size=devices)
    assert_same(load(config, model, devices), load(config, out, devices))


def test_base_weights_are_those_of_the_checkpoint(both):
    model, out, config = both
    one = BaseWeights(config, str(model), None)
    other = BaseWeights(dataclasses.replace(config, extra_vocab_size=3), str(out), None)
    names = [source.name for weight in weight_table(config, 1) for source in weight.sources]
    for name in [*names, "lm_head.weight"]:
        found = other(name)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, one(name))
    with pytest.raises(KeyError):
        other("model.layers.0.self_attn.q_proj.lora_magic")


def test_on_any_number_of_devices(tmp_path):
    """Four and eight devices, more than KV heads: this process has two only."""
    converted("llama3", tmp_path, num_attention_heads=8, num_key_value_heads=2)
    program = (
        "import sys, pathlib\n"
        "from tests.model.test_orbax import assert_same, load\n"
        "from jlora.model import load_hf_config, model_config\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "config = model_config(load_hf_config(str(folder / 'out')))\n"
        "for devices in (1, 2, 4, 8):\n"
        "    assert_same(load(config, folder / 'model', devices), "
        "load(config, folder / 'out', devices))\n"
    )
    flags = "--xla_force_host_platform_device_count=8"
    run(program, str(tmp_path), XLA_FLAGS=flags)


def run(program, *arguments, **environment):
    """Runs a program in a process of its own; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_engine_answers_alike(llama):
    model, out, _ = llama
    answers = [answer(model), answer(out), answer(out, load_format="orbax")]
    assert answers[0] == answers[1] == answers[2]


def answer(folder, **options):
    sizes = {"max_num_seqs": 4, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 20}
    llm = LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True, **sizes, **options)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": [5, 6, 7]}], params)[0].outputs[0].token_ids


def test_formats_are_demanded(llama):
    model, out, config = llama
    load(config, model, load_format="safetensors")
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        load(config, out, load_format="safetensors")
    with pytest.raises(FileNotFoundError, match="jlora convert"):
        load(config, model, load_format="orbax")


def test_small_files_go_along(tmp_path):
    make_model("llama3", tmp_path / "model")
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        path = tmp_path / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "model" / "modeling.py").write_text("raise SystemExit")
    convert_model(str(tmp_path / "model"), tmp_path / "out", progress=False)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*n")}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= found
    text = (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text()
    assert text == "additional_chat_templates/tool.jinja"
    assert not list((tmp_path / "out").glob("*.py"))
    assert not list((tmp_path / "out").glob("*.safetensors*"))


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_there_is_not_written_over(llama, tmp_path, inside):
    out = tmp_path / "out"
    if inside:
        out.mkdir()
        (out / "mine").write_text("")
    else:
        out.write_text("")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_model(str(llama[0]), out, progress=False)


# -- what does not fit -----------------------------------------------------------------------


def test_every_fault_is_listed(llama, tmp_path):
    _, out, config = llama
    tree = arrays_of(out)
    del tree["norm"], tree["layers"]["1"]["mlp"]["down"]["weight"]
    tree["layers"]["0"]["attention"]["qkv"]["weight"] = np.zeros((5, 7), np.float32)
    tree["layers"]["0"]["attention"]["o"]["weight"] = tree["layers"]["0"]["attention"]["o"][
        "weight"
    ].astype(ml_dtypes.bfloat16)
    tree["layers"]["2"] = {"weight": np.ones(3, np.float32)}
    save(out, tmp_path / "bad", tree, {"jlora_layout": 99})
    with pytest.raises(ValueError, match="does not fit the configuration") as error:
        load(config, tmp_path / "bad")
    for fault in (
        "its layout is 99, expected 2",
        "missing array norm.weight",
        "missing array layers.1.mlp.down.weight",
        "layers.0.attention.qkv.weight has shape [5, 7], expected [48, 160]",
        "layers.0.attention.o.weight is bfloat16, expected float32",
        "unknown array layers.2.weight [3]",
    ):
        assert fault in str(error.value)


def arrays_of(out):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(out / "weights").item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        return checkpointer.restore(
            out / "weights", ocp.args.PyTreeRestore(metadata, restore_args=restore_args)
        )


def save(out, folder, tree, custom):
    folder.mkdir()
    shutil.copyfile(out / "config.json", folder / "config.json")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "weights", ocp.args.PyTreeSave(tree), custom_metadata=custom)


def test_what_orbax_restores_is_what_was_converted(llama):
    """The documented layout, read by Orbax itself."""
    model, out, _ = llama
    tensors = {k: v for f in model.glob("*.safetensors") for k, v in load_file(f).items()}
    parts = [tensors[f"model.layers.1.self_attn.{one}_proj.weight"] for one in "qkv"]
    np.testing.assert_array_equal(
        arrays_of(out)["layers"]["1"]["attention"]["qkv"]["weight"], np.concatenate(parts).T
    )


def test_another_dtype_is_refused(llama):
    _, out, config = llama
    with pytest.raises(ValueError, match=r"is float32, expected bfloat16 \(jlora convert --dtype"):
        load(dataclasses.replace(config, dtype="bfloat16"), out)


def test_another_pytree_is_refused(llama, tmp_path):
    _, out, config = llama
    save(out, tmp_path / "other", {"params": {"x": np.ones(4)}}, {})
    with pytest.raises(
        ValueError, match=r"layout is None, expected 2(.|\n)*unknown array params.x"
    ):
        load(config, tmp_path / "other")


def test_a_lost_file_is_an_error(llama, tmp_path):
    """Not zeros."""
    _, out, config = llama
    shutil.copytree(out, tmp_path / "out")
    largest = max((tmp_path / "out" / "weights").rglob("d/*"), key=lambda one: one.stat().st_size)
    largest.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load(config, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tree_metadata": 3}', "[" * 100_000])
def test_metadata_that_is_not_orbaxs_is_refused(llama, tmp_path, text):
    _, out, config = llama
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "weights" / "_METADATA").write_text(text)
    with pytest.raises(ValueError, match="_METADATA is not"):
        load(config, tmp_path / "out")


def test_a_conversion_that_was_killed_is_not_taken_for_a_whole_one(llama, tmp_path):
    """Killed when all is written and only the name is still that of an unfinished one."""
    model, _, config = llama
    program = (
        "import os, signal, sys\n"
        "def kill(source, target, *rest, **more):\n"
        "    if str(target).endswith('weights'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(source, target, *rest, **more)\n"
        "rename, os.rename, os.replace = os.rename, kill, kill\n"
        "from jlora.model import convert_model\n"
        "convert_model(sys.argv[1], sys.argv[2], progress=False)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(model), str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "out").glob("weights.orbax-checkpoint-tmp*"))
    for load_format, message in (("auto", "no safetensors files"), ("orbax", "no whole Orbax")):
        with pytest.raises(FileNotFoundError, match=message):
            load(config, tmp_path / "out", load_format=load_format)
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_model(str(model), tmp_path / "out", progress=False)


# -- memory ----------------------------------------------------------------------------------

MEASURE = """
import json, sys
import jax
import tensorstore
from jax.sharding import AxisType
from jlora.model import AXIS, load_hf_config, load_model, model_config

def kilobytes(key):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1])

config = model_config(load_hf_config(sys.argv[1]))
mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
jax.block_until_ready(jax.numpy.zeros(8) + 1)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = kilobytes("VmRSS")
leaves = jax.tree.leaves(load_model(config, sys.argv[1], mesh, progress=False).params)
jax.block_until_ready(leaves)
peak = kilobytes("VmHWM")
shards = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
sizes = {"shards": shards, "largest": max(leaf.nbytes for leaf in leaves)}
print(json.dumps({**sizes, "taken": 1024 * (peak - before)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_restoring_takes_no_more_than_the_shards_and_one_tensor(tmp_path):
    """Two layers of an 8B model's widths, 1.4 GB, on one and on eight devices."""
    sizes = {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
    make_wide_model(tmp_path / "model", sizes)
    convert_model(str(tmp_path / "model"), tmp_path / "out", progress=False)
    shutil.rmtree(tmp_path / "model")
    for devices in (1, 8):
        flags = f"--xla_force_host_platform_device_count={devices}"
        found = json.loads(run(MEASURE, str(tmp_path / "out"), XLA_FLAGS=flags))
        print(devices, "devices:", {key: f"{size / 1e6:.0f} MB" for key, size in found.items()})
        assert found["shards"] > 1.3e9
        assert found["taken"] < found["shards"] + found["largest"]


def make_wide_model(folder, sizes):
    """Random weights in one file; transformers and torch would take float32's memory."""
    from safetensors.numpy import save_file

    (folder).mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    rng = np.random.default_rng(0)
    config = model_config(load_hf_config(str(folder)))
    tensors = {}
    for weight in weight_table(config, 1):
        for source in weight.sources:
            bits = rng.integers(0, 1 << 15, source.shape, np.uint16) & 0x3FFF  # small and positive
            tensors[source.name] = bits.view(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
