"""Weights: from a checkpoint to sharded arrays, as a table filled over the empty model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jlora.config import ModelConfig
from jlora.model.decoder import Decoder
from jlora.model.layers import AXIS
from jlora.model.orbax_checkpoint import FOLDER, OrbaxCheckpoint, has_orbax_weights
from jlora.model.placing import place_on
from jlora.model.safetensors_checkpoint import SafetensorsCheckpoint, find_checkpoint
from jlora.model.weight_table import Path_, Weight, weight_table

T = TypeVar("T")
# Both have faults(table), array(weight, dtype, mesh) and tensor(name).
Checkpoint = SafetensorsCheckpoint | OrbaxCheckpoint


def open_checkpoint(
    model: str, config: ModelConfig, revision: str | None, load_format: str
) -> Checkpoint:
    """The weights of a folder or Hub repository.

    load_format: "safetensors", "orbax" (what `convert_model` writes), or "auto": a folder with a
    conversion in it is read as one, everything else as safetensors.
    """
    folder = Path(model)
    if load_format == "orbax" and not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, allow_patterns=[f"{FOLDER}/*"]))
    if load_format == "orbax" or (load_format == "auto" and has_orbax_weights(folder)):
        return OrbaxCheckpoint(folder, config)
    return SafetensorsCheckpoint(find_checkpoint(model, revision), config)


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


def load_model(
    config: ModelConfig,
    model: str,
    mesh: Mesh,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    dummy_seed: int | None = None,
    progress: bool = True,
) -> LoadedModel:
    """Loads a model onto the devices of a mesh.

    model: a folder or Hub repository. load_format: see `open_checkpoint`. dummy_seed: random
    weights instead.
    """
    table, shapes, model_of = _described(config, mesh.shape[AXIS])
    if dummy_seed is not None:
        arrays = _random_weights(table, shapes, mesh, dummy_seed, config.norm_offset, progress)
    else:
        checkpoint = open_checkpoint(model, config, revision, load_format)
        arrays = read_weights(table, config, checkpoint, mesh, progress)
    return model_of(arrays)


def describe_model(config: ModelConfig, mesh: Mesh) -> LoadedModel:
    """As load_model, of ShapeDtypeStructs: to compile for devices that are not there."""
    table, shapes, model_of = _described(config, mesh.shape[AXIS])
    return model_of(
        {
            weight.path: jax.ShapeDtypeStruct(
                shapes[weight.path].shape,
                shapes[weight.path].dtype,
                sharding=NamedSharding(mesh, weight.spec),
            )
            for weight in table
        }
    )


def _described(
    config: ModelConfig, shards: int
) -> tuple[list[Weight], dict[Path_, Any], Callable[[dict[Path_, Any]], LoadedModel]]:
    """The weights, the shape of each, and what makes a model of arrays (or of descriptions)."""
    table = weight_table(config, shards)
    graph, empty = nnx.split(nnx.eval_shape(lambda: Decoder(config, shards)))
    shapes = {tuple(path): leaf.get_value() for path, leaf in nnx.to_flat_state(empty)}
    if {weight.path for weight in table} != set(shapes):
        raise RuntimeError("the weight table and the model disagree")  # a defect of jlora
    specs = _as_state(empty, {weight.path: weight.spec for weight in table})
    return table, shapes, lambda arrays: LoadedModel(graph, _as_state(empty, arrays), specs)


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
            one = np.full(shape.shape, 1 - norm_offset, shape.dtype)
            arrays[weight.path] = place_on(one, sharding)
        else:
            key = jax.random.fold_in(jax.random.key(seed), index)
            arrays[weight.path] = draw(key, shape.shape, shape.dtype, sharding)
    return arrays


def _bar(items: Iterable[T], text: str, progress: bool) -> Iterable[T]:
    return tqdm(items, desc=text, disable=not progress, leave=False, dynamic_ncols=True)


def read_weights(
    table: list[Weight],
    config: ModelConfig,
    checkpoint: Checkpoint,
    mesh: Mesh,
    progress: bool,
) -> dict[Path_, jax.Array]:
    """Reads each device's parts, one weight after the other.

    Raises ValueError with everything that does not fit before it reads any.
    """
    faults = checkpoint.faults(table)
    if faults:
        listed = "\n  ".join(faults[:20]) + ("\n  ..." if len(faults) > 20 else "")
        raise ValueError(
            f"the checkpoint does not fit the configuration ({config.model_type}):\n  {listed}"
        )
    return {
        weight.path: checkpoint.array(weight, config.dtype, mesh)
        for weight in _bar(table, "weights", progress)
    }
