"""Adapters on the host: reading, registry, LRU, pins, slots, rank blocks. Imports no jax."""

from jlora.manager.blocks import BlockPool, BlockWrite, SlotMap, blocks_needed
from jlora.manager.lora_model import (
    LoRALayerWeights,
    LoRAModel,
    PackedLoRALayerWeights,
    VocabRows,
)
from jlora.manager.manager import LoRAModelManager
from jlora.manager.peft_config import PEFTHelper, other_base_model
from jlora.manager.requirements import options_for
from jlora.manager.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

__all__ = [
    "BlockPool",
    "BlockWrite",
    "LRUCacheWorkerLoRAManager",
    "LoRALayerWeights",
    "LoRAModel",
    "LoRAModelManager",
    "PEFTHelper",
    "PackedLoRALayerWeights",
    "SlotMap",
    "VocabRows",
    "WorkerLoRAManager",
    "blocks_needed",
    "options_for",
    "other_base_model",
]
