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
from jlora.manager.peft_config import PEFTHelper
from jlora.manager.peft_values import CONFIG_NAME
from jlora.manager.tensors import PREFIX, Modules, by_module, require_float

# What PEFT does not take for granted.
_DEFAULTS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"}


def export_adapter(path: str, out: str | Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, and a tokeniser that is there.

    path: a folder of PEFT's or with an Orbax checkpoint, or a Hub repository. out: a folder that
    is not there yet, or empty; it appears when all is written. Names are checked, and that A and B
    of a module are there and of the rank of the configuration; that they are of some model's
    modules, and their widths, are not. Raises AdapterError.
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
        with open_adapter(folder, name) as (helper, tensors):
            config = {**_DEFAULTS, **adapter_config(folder, name)}
            modules = by_module(tensors, name)
            _check_ranks(modules, helper, name)
            for tensor in (one for kinds in modules.values() for one in kinds.values()):
                require_float(tensor, name)
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


def _check_ranks(modules: Modules, helper: PEFTHelper, name: str) -> None:
    """Raises for an A or B that is alone, or of another rank than the configuration's.

    The experts of one array have their ranks beside each other, and are left to who serves them.
    """
    for module, kinds in modules.items():
        a, b = kinds.get("lora_A"), kinds.get("lora_B")
        if (a is None) != (b is None):
            there, missing = ("lora_A", "lora_B") if b is None else ("lora_B", "lora_A")
            raise AdapterError(f"{name}: {module} has {there} and no {missing}")
        if a is None or b is None or "experts" in module.split("."):
            continue
        ranks, expected = (a.data.shape[0], b.data.shape[-1]), helper.rank(module)
        if len(a.data.shape) != 2 or len(b.data.shape) != 2 or ranks != (expected, expected):
            raise AdapterError(
                f"{name}: lora_A {list(a.data.shape)} and lora_B {list(b.data.shape)} of {module} "
                f"are not of rank {expected}, as the configuration has it; expected "
                f"[{expected}, inputs] and [outputs, {expected}]"
            )
