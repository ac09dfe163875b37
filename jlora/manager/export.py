"""Any adapter that can be read, written as a folder that PEFT reads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jlora.errors import AdapterError
from jlora.manager.peft import (
    HUB_FILES,
    WEIGHTS_NAME,
    adapter_config,
    open_adapter,
    resolve_adapter_path,
)
from jlora.manager.peft_values import CONFIG_NAME
from jlora.manager.tensors import PREFIX, by_module

# What PEFT does not take for granted.
_DEFAULTS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"}


def export_adapter(path: str, out: str | Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, and a tokeniser that is there.

    path: a folder of PEFT's or with an Orbax checkpoint, or a Hub repository. out: a folder that
    is not there yet, or empty; it appears when all is written. Names are checked; that they are of
    some model's modules, and the shapes, are not. Raises AdapterError.
    """
    name, target = f"adapter {path}", Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(
            f"{name}: {target} exists and is not empty; give a folder that does not exist"
        )
    folder = resolve_adapter_path(path, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with open_adapter(folder, name) as (_, tensors):
            config = {**_DEFAULTS, **adapter_config(folder, name)}
            by_module(tensors, name)  # refuses names that are none
            for key, tensor in tensors.items():
                if not isinstance(tensor.dtype, np.dtype):
                    raise AdapterError(
                        f"{name}: tensor {key} is {tensor.dtype}, expected a floating point dtype "
                        "(float32, float16 or bfloat16)"
                    )
            arrays = {
                PREFIX + key.removeprefix(PREFIX): np.ascontiguousarray(tensor[...])
                for key, tensor in tensors.items()
            }
            save_file(arrays, written / WEIGHTS_NAME, {"format": "pt"})
        (written / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for pattern in set(HUB_FILES) - {CONFIG_NAME}:
            for file in filter(Path.is_file, folder.glob(pattern)):
                shutil.copyfile(file, written / file.name)
        os.chmod(written, 0o755)  # which a temporary folder is not
        os.replace(written, target)
    finally:
        shutil.rmtree(written, ignore_errors=True)
