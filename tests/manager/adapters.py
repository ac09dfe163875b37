"""A small model's table, and adapters for it written by hand: fast, and wrong at will."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jlora.config import LoRAConfig, ModelConfig, RopeConfig
from jlora.manager import AdapterVersion, LoRALayerWeights, LoRAModel, TieredLoRAManager
from jlora.projections import ModuleMap
from jlora.request import LoRARequest

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = ATTENTION + MLP
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def model_config(**changes) -> ModelConfig:
    """Two layers whose widths all differ: hidden 24, inner 40, 4 heads and 2 KV heads of 8."""
    sizes = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig("default", 10000.0, 64),
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**sizes, **changes})


MODULES = ModuleMap(model_config())


def widths(module: str, modules: ModuleMap = MODULES) -> tuple[int, int]:
    """Input and output width of a module."""
    place = modules.place(module)
    return place.projection.d_in, place.projection.parts[place.part].width


def named(parts: Iterable[str], modules: ModuleMap = MODULES) -> list[str]:
    """The modules of every layer whose last name is among the parts."""
    return [name for name in modules.names() if name.rsplit(".", 1)[1] in tuple(parts)]


def key(module: str, matrix: str) -> str:
    """The name PEFT gives a tensor; matrix is A or B."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


def make_tensors(
    parts: Iterable[str] = ALL,
    rank: int = 4,
    seed: int = 0,
    dtype=np.float32,
    modules: ModuleMap = MODULES,
) -> dict[str, np.ndarray]:
    """Random lora_A and lora_B of every module named."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in named(parts, modules):
        d_in, d_out = widths(module, modules)
        tensors[key(module, "A")] = rng.standard_normal((rank, d_in)).astype(dtype)
        tensors[key(module, "B")] = rng.standard_normal((d_out, rank)).astype(dtype)
    return tensors


def make_config(**changes) -> dict:
    """What PEFT writes for rank 4 on all modules, changed; a key set to ... is left out."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(ALL), **changes}
    return {name: value for name, value in config.items() if value is not ...}


def write_adapter(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config) -> Path:
    """Saves an adapter of rank 4 on all modules, or these tensors, with its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        parts = config.get("target_modules", ALL)
        tensors = make_tensors(parts, config.get("r", 4))
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(make_config(**config)))
    return folder


def request(adapter_id: int, path: Path | str = "nowhere", **options) -> LoRARequest:
    """A request for adapter `a<id>`."""
    return LoRARequest(f"a{adapter_id}", adapter_id, str(path), **options)


def zeros_model(adapter_id: int, rank: int = 4, parts: Iterable[str] = ALL) -> LoRAModel:
    """An adapter in memory that takes no memory: for tests of bookkeeping only."""
    loras = {}
    for module in named(parts):
        d_in, d_out = widths(module)
        a, b = (np.broadcast_to(np.float32(0), shape) for shape in ((rank, d_in), (d_out, rank)))
        loras[module] = LoRALayerWeights(module, rank, rank, a, b, 1.0)
    return LoRAModel(adapter_id, rank, loras)


def lora_config(**options) -> LoRAConfig:
    """Two slots, four adapters on the host, ranks up to 32."""
    return LoRAConfig(**{"max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 32, **options})


def device_state(manager) -> tuple:
    """What the device would be told, writes apart: to see that nothing has changed."""
    return (
        manager.lora_index_to_id,
        {name: pool.num_free for name, pool in manager.pools.items()},
        {name: (m.blocks.tolist(), m.counts.tolist()) for name, m in manager.slot_maps.items()},
    )


class WaitingLoRAManager(TieredLoRAManager):
    """Waits for what the engine would come back to."""

    def settle(self) -> None:
        """Until nothing is on its way."""
        while self.busy:
            self.wait(1)
            self.collect()

    def read(self, request: LoRARequest) -> AdapterVersion:
        """As a request that arrives."""
        self.known(request)
        self.load_now([request])
        if self.manager.get_adapter(request.lora_int_id) is None:
            self.want({request.lora_int_id: request})
        self.settle()
        return self.version(request.lora_int_id)

    def start(self, request: LoRARequest) -> int | None:
        """As a sequence that is alone in waiting: its slot, None when it must go on waiting."""
        adapter_id = request.lora_int_id
        self.known(request)
        while True:
            self.want({adapter_id: request})
            slot = self.acquire(request, adapter_id)
            if slot is not None or not self.busy:
                return slot
            self.wait(1)
            self.collect()
