"""From a model as Hugging Face saves it to one whose weights are ready to be read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType

from jlora.files import TOKENIZER_FILES
from jlora.model.hf_config import load_hf_config, model_config
from jlora.model.layers import AXIS
from jlora.model.loading import open_checkpoint, read_weights
from jlora.model.orbax_checkpoint import FOLDER, LAYOUT
from jlora.model.weight_table import Path_, weight_table

_CHUNK = 1 << 20  # bytes: devices read whole chunks, of which some lie at their borders
# What of a model's folder goes along: all but weights and code.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "additional_chat_templates/*",
)


def convert_model(
    model: str,
    out: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    progress: bool = True,
) -> None:
    """Writes a folder that `LLM` loads faster, in parts, and on any number of devices.

    model: a folder or Hub repository with safetensors. out: a folder that is not there yet, or
    empty. dtype: as `LLM` has it. The host holds all weights at once. The weights come last, and
    under their name only when they are whole.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is not empty; give a folder that does not exist (what a "
            "conversion that was killed has left can be deleted)"
        )
    config = model_config(load_hf_config(model, revision), dtype)
    small = _small_files(model, revision)
    cpu = jax.devices("cpu")[:1]
    mesh = jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,), devices=cpu)
    checkpoint = open_checkpoint(model, config, revision, "safetensors")
    # Without the padding and the copies of rows that a mesh would want.
    table = [dataclasses.replace(one, rows_order=None) for one in weight_table(config, 1)]
    arrays = read_weights(table, config, checkpoint, mesh, progress)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in small.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    _set_dtype(folder / "config.json", config.dtype)
    _save(folder / FOLDER, arrays)


def _small_files(model: str, revision: str | None) -> dict[str, Path]:
    """What is copied, by name."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*_SMALL_FILES]))
    found = [path for pattern in _SMALL_FILES for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): path for path in found}


def _set_dtype(path: Path, dtype: str) -> None:
    """Says what the weights now are, so that "auto" takes it."""
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)  # an older name
    path.write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def _save(folder: Path, arrays: dict[Path_, jax.Array]) -> None:
    """Writes an Orbax checkpoint of the arrays in nested dictionaries by their paths."""
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *above, last = (str(key) for key in path)
        inside = tree
        for key in above:
            inside = inside.setdefault(key, {})
        inside[last] = array
    # Weights hardly compress, and decompressing them would take longer than reading them.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            folder.absolute(),
            ocp.args.PyTreeSave(tree, save_args=save_args),
            custom_metadata={"jlora_layout": LAYOUT},
        )
