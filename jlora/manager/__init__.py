"""Adapters on the host: reading, registry, LRU, pins, slots, rank blocks. Imports no jax."""

from jlora.manager.blocks import (
    BlockPool,
    BlockWrite,
    SlotMap,
    blocks_needed,
    pool_rows,
    row_blocks,
)
from jlora.manager.features import FeatureWrite, feature_rows, no_features
from jlora.manager.loader import AdapterLoader
from jlora.manager.lora_model import (
    BaseWeight,
    LoRALayerWeights,
    LoRAModel,
    PackedLoRALayerWeights,
    VocabRows,
)
from jlora.manager.manager import LoRAModelManager, Write
from jlora.manager.mixture import LoRAMixture
from jlora.manager.peft_config import PEFTHelper, other_base_model
from jlora.manager.requirements import UNLIMITED, fitted, options_for
from jlora.manager.worker_manager import (
    AdapterVersion,
    LRUCacheWorkerLoRAManager,
    WorkerLoRAManager,
)

__all__ = [
    "UNLIMITED",
    "AdapterLoader",
    "AdapterVersion",
    "BaseWeight",
    "BlockPool",
    "BlockWrite",
    "FeatureWrite",
    "LRUCacheWorkerLoRAManager",
    "LoRALayerWeights",
    "LoRAMixture",
    "LoRAModel",
    "LoRAModelManager",
    "PEFTHelper",
    "PackedLoRALayerWeights",
    "SlotMap",
    "VocabRows",
    "WorkerLoRAManager",
    "Write",
    "blocks_needed",
    "feature_rows",
    "fitted",
    "no_features",
    "options_for",
    "other_base_model",
    "pool_rows",
    "row_blocks",
]
