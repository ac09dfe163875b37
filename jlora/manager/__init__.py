"""Adapters on the host: reading, registry, LRU, pins, slots, rank blocks. Imports no jax."""

from jlora.manager.blocks import (
    BlockArrays,
    BlockPool,
    BlockWrite,
    Needs,
    SlotMap,
    block_arrays,
    blocks_needed,
    pool_rows,
    row_blocks,
)
from jlora.manager.device import Write
from jlora.manager.export import export_adapter
from jlora.manager.features import (
    FeatureWrite,
    feature_rows,
    feature_writes,
    is_full,
    no_features,
)
from jlora.manager.fetching import Load
from jlora.manager.loader import AdapterLoader
from jlora.manager.lora_model import (
    BaseWeight,
    LoRALayerWeights,
    LoRAModel,
    PackedLoRALayerWeights,
    VocabRows,
)
from jlora.manager.manager import LoRAModelManager
from jlora.manager.mixture import LoRAMixture
from jlora.manager.peft_config import PEFTHelper, other_base_model
from jlora.manager.requirements import UNLIMITED, fitted, options_for
from jlora.manager.resolver import FolderResolver, HubResolver, LoRAResolver, resolve
from jlora.manager.stats import AdapterState, AdapterStatus, Durations, LoRAStats
from jlora.manager.tiers import TieredLoRAManager
from jlora.manager.worker_manager import (
    AdapterVersion,
    LRUCacheWorkerLoRAManager,
    WorkerLoRAManager,
)

__all__ = [
    "UNLIMITED",
    "AdapterLoader",
    "AdapterState",
    "AdapterStatus",
    "AdapterVersion",
    "BaseWeight",
    "BlockArrays",
    "BlockPool",
    "BlockWrite",
    "Durations",
    "FeatureWrite",
    "FolderResolver",
    "HubResolver",
    "LRUCacheWorkerLoRAManager",
    "LoRALayerWeights",
    "LoRAMixture",
    "LoRAModel",
    "LoRAModelManager",
    "LoRAResolver",
    "LoRAStats",
    "Load",
    "Needs",
    "PEFTHelper",
    "PackedLoRALayerWeights",
    "SlotMap",
    "TieredLoRAManager",
    "VocabRows",
    "WorkerLoRAManager",
    "Write",
    "block_arrays",
    "blocks_needed",
    "export_adapter",
    "feature_rows",
    "feature_writes",
    "fitted",
    "is_full",
    "no_features",
    "options_for",
    "other_base_model",
    "pool_rows",
    "resolve",
    "row_blocks",
]
