"""Weights: from safetensors files to sharded arrays, as a table filled over the empty model."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jlora.config import ModelConfig
from jlora.model.decoder import Decoder
from jlora.model.layers import AXIS
from jlora.model.vocabulary import stored_vocab
from jlora.projections import ModuleMap, Part, Piece, Projection, layer_norms

Path_ = tuple[Any, ...]
T = TypeVar("T")
# Buffers that old checkpoints hold and the model computes.
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq")
WHOLE = PartitionSpec()  # every device has all of it
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# What Mixtral's checkpoints call the modules that the other families name alike.
_MIXTRAL = {
    "block_sparse_moe": "mlp",
    "w1.weight": "gate_proj.weight",
    "w2.weight": "down_proj.weight",
    "w3.weight": "up_proj.weight",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor that fills rows `start : start + shape[0]` of a weight or an expert."""

    name: str
    start: int
    shape: tuple[int, ...]
    expert: int | None = None


@dataclass(frozen=True)
class Weight:
    """One parameter of the model and what fills it.

    In Hugging Face's layout it is [rows, ...]; `rows_order` (None: as they come) lists the row
    of each stored one, `transposed` weights are stored [d_in, rows]; spec shards the stored one.
    Those of experts have one more axis in front.
    """

    path: Path_
    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    spec: PartitionSpec
    rows_order: np.ndarray | None = None
    transposed: bool = False


class LoadedModel(NamedTuple):
    """A model split as nnx.split does: its graph, its weights, and how they are divided."""

    graph: Any  # nnx.GraphDef
    params: Any  # nnx.State of arrays
    specs: Any  # nnx.State of PartitionSpecs

    def weight(self, row: str, layer: int) -> tuple[Any, PartitionSpec]:
        """A projection's weight as it is stored, and how it is divided; also of the vocabulary."""

        def find(tree: Any) -> Any:
            match row:
                case "embed_tokens":
                    found = tree["embed"]
                case "lm_head":
                    found = tree["lm_head"] if "lm_head" in tree else tree["embed"]
                case _:
                    blocks = tree["layers"][layer]
                    found = next(
                        blocks[at][row] for at in ("attention", "mlp") if row in blocks[at]
                    )
            return found["weight"].get_value()

        return find(self.params), find(self.specs)


def weight_table(config: ModelConfig, shards: int) -> list[Weight]:
    """Every parameter of `Decoder(config, shards)`."""
    modules = ModuleMap(config)
    hidden, vocab = config.hidden_size, config.vocab_size
    order = None
    stored = stored_vocab(config, shards)
    if stored != vocab:  # what is past the vocabulary repeats the last row, and is cut off
        order = np.minimum(np.arange(stored), vocab - 1)

    def whole(path: Path_, name: str, *shape: int, spec: PartitionSpec = WHOLE) -> Weight:
        return Weight(path, (Source(name, 0, shape),), shape, spec, order if spec else None)

    vocab_spec = PartitionSpec(AXIS, None)
    table = [
        whole(("embed", "weight"), EMBED, vocab, hidden, spec=vocab_spec),
        whole(("norm", "weight"), "model.norm.weight", hidden),
    ]
    if not config.tie_word_embeddings:
        table.append(whole(("lm_head", "weight"), HEAD, vocab, hidden, spec=vocab_spec))
    for layer in range(config.num_layers):
        at, prefix = ("layers", layer), f"model.layers.{layer}"
        for place, name in layer_norms(config).items():
            table.append(whole((*at, f"{place}_norm", "weight"), f"{prefix}.{name}.weight", hidden))
        table += _qk_norm_weights(config, layer, shards)
        for row in modules.projections:
            table += _projection_weights(modules, row, layer, shards)
    return table


def _qk_norm_weights(config: ModelConfig, layer: int, shards: int) -> list[Weight]:
    table: list[Weight] = []
    if not config.qk_norm:
        return table
    for norm, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
        path = ("layers", layer, "attention", norm, "weight")
        name = f"model.layers.{layer}.self_attn.{norm}.weight"
        if config.qk_norm_whole:  # divided and copied as the columns that it norms
            width = heads * config.head_dim
            columns = Projection("", "", (Part("", (Piece(width, heads),)),), 0, "out")
            order = columns.columns(shards) if shards > 1 else None
            spec = PartitionSpec(AXIS)
            table.append(Weight(path, (Source(name, 0, (width,)),), (width,), spec, order))
        else:
            shape = (config.head_dim,)
            table.append(Weight(path, (Source(name, 0, shape),), shape, WHOLE))
    return table


def _projection_weights(
    modules: ModuleMap, row: Projection, layer: int, shards: int
) -> list[Weight]:
    weights, biases, rows = [], [], sum(part.width for part in row.parts)
    for expert in range(row.experts or 1):
        start, of = 0, expert if row.experts else None
        for index, part in enumerate(row.parts):
            name, shape = modules.name(row, index, layer, expert), (part.width, row.d_in)
            weights.append(Source(f"{name}.weight", start, shape, of))
            if part.bias:
                biases.append(Source(f"{name}.bias", start, (part.width,)))
            start += part.width
    order = row.columns(shards) if shards > 1 and row.shard == "out" else None
    d_in, out = (AXIS if row.shard == shard else None for shard in ("in", "out"))
    front, spec_front = ((row.experts,), (None,)) if row.experts else ((), ())
    shape, spec = (*front, rows, row.d_in), PartitionSpec(*spec_front, d_in, out)
    at = ("layers", layer, "attention" if row.module == "self_attn" else "mlp", row.name)
    table = [Weight((*at, "weight"), tuple(weights), shape, spec, order, True)]
    if row.bias:
        spec = PartitionSpec(out) if out else WHOLE
        table.append(Weight((*at, "bias"), tuple(biases), (rows,), spec, order))
    return table


def load_model(
    config: ModelConfig,
    model: str,
    mesh: Mesh,
    *,
    revision: str | None = None,
    dummy_seed: int | None = None,
    progress: bool = True,
) -> LoadedModel:
    """Loads a model onto the devices of a mesh.

    model: a folder or Hub repository with safetensors. dummy_seed: random weights instead.
    """
    shards = mesh.shape[AXIS]
    table = weight_table(config, shards)
    graph, empty = nnx.split(nnx.eval_shape(lambda: Decoder(config, shards)))
    shapes = {tuple(path): leaf.get_value() for path, leaf in nnx.to_flat_state(empty)}
    if {weight.path for weight in table} != set(shapes):
        raise RuntimeError("the weight table and the model disagree")  # a defect of jlora
    if dummy_seed is not None:
        arrays = _random_weights(table, shapes, mesh, dummy_seed, config.norm_offset, progress)
    else:
        arrays = _read_weights(table, config, find_checkpoint(model, revision), mesh, progress)
    specs = {weight.path: weight.spec for weight in table}
    return LoadedModel(graph, _as_state(empty, arrays), _as_state(empty, specs))


def describe_model(config: ModelConfig, mesh: Mesh) -> LoadedModel:
    """As load_model, of ShapeDtypeStructs: to compile for devices that are not there."""
    shards = mesh.shape[AXIS]
    graph, empty = nnx.split(nnx.eval_shape(lambda: Decoder(config, shards)))
    shapes = {tuple(path): leaf.get_value() for path, leaf in nnx.to_flat_state(empty)}
    specs = {weight.path: weight.spec for weight in weight_table(config, shards)}
    arrays = {
        path: jax.ShapeDtypeStruct(
            shapes[path].shape, shapes[path].dtype, sharding=NamedSharding(mesh, spec)
        )
        for path, spec in specs.items()
    }
    return LoadedModel(graph, _as_state(empty, arrays), _as_state(empty, specs))


def _as_state(like: Any, values: dict[Path_, Any]) -> Any:
    """A tree of the same structure with these leaves."""
    flat = [(path, leaf.replace(values[tuple(path)])) for path, leaf in nnx.to_flat_state(like)]
    return nnx.from_flat_state(flat)


def _random_weights(
    table: list[Weight],
    shapes: dict[Path_, Any],
    mesh: Mesh,
    seed: int,
    norm_offset: float,
    progress: bool,
) -> dict[Path_, jax.Array]:
    """Norms of one, biases of zero, normal matrices that keep the activations' size."""

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key: Any, shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
        scale = 0.02 if len(shape) > 1 else 0.0
        value = scale * jax.random.normal(key, shape, jnp.float32)
        return jax.lax.with_sharding_constraint(value.astype(dtype), sharding)

    arrays = {}
    for index, weight in enumerate(_bar(table, "random weights", progress)):
        shape = shapes[weight.path]
        sharding = NamedSharding(mesh, weight.spec)
        if "norm" in str(weight.path[-2]):
            one = jnp.full(shape.shape, 1 - norm_offset, shape.dtype)
            arrays[weight.path] = jax.device_put(one, sharding)
        else:
            key = jax.random.fold_in(jax.random.key(seed), index)
            arrays[weight.path] = draw(key, shape.shape, shape.dtype, sharding)
    return arrays


def _bar(items: Iterable[T], text: str, progress: bool) -> Iterable[T]:
    return tqdm(items, desc=text, disable=not progress, leave=False, dynamic_ncols=True)


def find_checkpoint(model: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a folder or Hub repository, by its index when it has one."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{model}: no {', '.join(missing) or 'safetensors files'}")
    return files


def _tensors(files: list[Path], progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    for path in _bar(files, "weights", progress):
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except (SafetensorError, TypeError, AttributeError) as error:  # or a dtype numpy has not
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _read_weights(
    table: list[Weight], config: ModelConfig, files: list[Path], mesh: Mesh, progress: bool
) -> dict[Path_, jax.Array]:
    """Streams the files: a weight goes to the device when its last part has come.

    Raises ValueError that lists every missing, unknown and misshapen tensor.
    """
    wanted = {source.name: (weight, source) for weight in table for source in weight.sources}
    waiting = {weight.path: len(weight.sources) for weight in table}
    buffers: dict[Path_, np.ndarray] = {}
    arrays: dict[Path_, jax.Array] = {}
    seen: set[str] = set()
    faults: list[str] = []
    tied: dict[str, np.ndarray] = {}
    for found, tensor in _tensors(files, progress):
        name = _module_name(found, config)
        if config.tie_word_embeddings and name in (EMBED, HEAD):
            tied[name] = tensor
        fault = _fault(name, tensor, wanted, name in seen, config)
        seen.add(name)
        if fault is not None:
            faults.append(fault)
        if fault is not None or name not in wanted:
            continue
        weight, source = wanted[name]
        buffer = _fill(buffers, weight, source, tensor)
        waiting[weight.path] -= 1
        if waiting[weight.path] == 0 and not faults:
            arrays[weight.path] = _to_device(buffer, weight, config.dtype, mesh)
            buffers.pop(weight.path)
    faults += [f"missing tensor {name}" for name in wanted if name not in seen]
    if len(tied) == 2 and not np.array_equal(tied[EMBED], tied[HEAD]):
        faults.append(f"{HEAD} differs from {EMBED}, but the model has tie_word_embeddings=True")
    if faults:
        listed = "\n  ".join(faults[:20]) + ("\n  ..." if len(faults) > 20 else "")
        raise ValueError(
            f"the checkpoint does not fit the configuration ({config.model_type}):\n  {listed}"
        )
    return arrays


def _module_name(name: str, config: ModelConfig) -> str:
    """A checkpoint's tensor by the name that it has in every family."""
    if config.model_type != "mixtral":
        return name
    return re.sub("|".join(_MIXTRAL), lambda match: _MIXTRAL[match[0]], name)


def _fault(
    name: str, tensor: np.ndarray, wanted: dict, again: bool, config: ModelConfig
) -> str | None:
    """What is wrong with a tensor of the checkpoint."""
    if again:
        return f"{name} comes twice"
    if name not in wanted:
        expected = _COMPUTED.fullmatch(name) or (name == HEAD and config.tie_word_embeddings)
        return None if expected else f"unknown tensor {name} {list(tensor.shape)}"
    shape = wanted[name][1].shape
    if tensor.shape != shape:
        return f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"{name} is {tensor.dtype}, expected a floating point dtype"
    return None


def _fill(
    buffers: dict[Path_, np.ndarray], weight: Weight, source: Source, tensor: np.ndarray
) -> np.ndarray:
    if source.shape == weight.shape:
        return buffers.setdefault(weight.path, tensor)
    if weight.path not in buffers:
        buffers[weight.path] = np.zeros(weight.shape, tensor.dtype)  # zero: a part without bias
    elif buffers[weight.path].dtype != tensor.dtype:  # float32 holds every part's values
        buffers[weight.path] = buffers[weight.path].astype(np.float32)
    buffer = buffers[weight.path]
    matrix = buffer if source.expert is None else buffer[source.expert]
    matrix[source.start : source.start + source.shape[0]] = tensor
    return buffer


def _to_device(buffer: np.ndarray, weight: Weight, dtype: str, mesh: Mesh) -> jax.Array:
    """Reorders on the host; transposes and casts on the device."""
    rows = weight.rows_order
    if rows is not None:
        buffer = buffer[:, rows] if buffer.ndim == 3 else buffer[rows]
    spec = weight.spec
    incoming = PartitionSpec(*spec[:-2], spec[-1], spec[-2]) if weight.transposed else spec
    on_device = jax.device_put(buffer, NamedSharding(mesh, incoming))
    return _finish(on_device, weight.transposed, jnp.dtype(dtype), NamedSharding(mesh, spec))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _finish(value: jax.Array, transposed: bool, dtype: Any, sharding: Any) -> jax.Array:
    value = (jnp.swapaxes(value, -1, -2) if transposed else value).astype(dtype)
    return jax.lax.with_sharding_constraint(value, sharding)
