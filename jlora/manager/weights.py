"""What an adapter holds for one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class LoRALayerWeights:
    """The adapter of one module: delta W = scaling * lora_b @ lora_a.

    lora_a: [rank, input_dim]. lora_b: [output_dim, rank]. Both as PEFT saves them (of an embedding
    lora_embedding_A and _B; input_dim is the vocabulary). bias: of lora_B, [output_dim], scaled as
    lora_b is. magnitude: DoRA's, [output_dim]; the whole is then magnitude * (W + delta W) /
    norm(W + delta W), the norm over the input (Liu et al. 2024, eq. 5).
    """

    module_name: str
    rank: int
    lora_alpha: float
    lora_a: np.ndarray
    lora_b: np.ndarray
    scaling: float
    bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    def optimize(self) -> LoRALayerWeights:
        """Folds the scale into lora_b, in float32; afterwards scaling is 1."""
        if self.scaling != 1.0:
            scaled = self.lora_b.astype(np.float32) * np.float32(self.scaling)
            self.lora_b = scaled.astype(self.lora_b.dtype)
            self.scaling = 1.0
        return self

    @property
    def input_dim(self) -> int:
        """Width of the module's input."""
        return self.lora_a.shape[1]

    @property
    def output_dim(self) -> int:
        """Width of the module's output."""
        return self.lora_b.shape[0]

    @property
    def is_packed(self) -> bool:
        """Whether this holds several modules that run as one projection."""
        return False


@dataclass
class PackedLoRALayerWeights:
    """The adapters of the modules of one projection (q, k, v); None where one has none."""

    module_name: str
    parts: tuple[LoRALayerWeights | None, ...]

    @classmethod
    def pack(
        cls, module_name: str, parts: Sequence[LoRALayerWeights | None]
    ) -> PackedLoRALayerWeights:
        """Puts the parts beside each other; they keep their own ranks and scales."""
        return cls(module_name, tuple(parts))

    @classmethod
    def pack_moe(
        cls, module_name: str, experts: Sequence[Sequence[LoRALayerWeights | None]]
    ) -> list[PackedLoRALayerWeights]:
        """The parts of each expert of a layer; module_name: of all experts ("...mlp.experts")."""
        return [cls.pack(f"{module_name}.{one}", parts) for one, parts in enumerate(experts)]

    @property
    def rank(self) -> int:
        """The largest rank of the parts."""
        return max((part.rank for part in self.parts if part is not None), default=0)

    @property
    def is_packed(self) -> bool:
        """Whether this holds several modules that run as one projection."""
        return True


@dataclass(frozen=True)
class VocabRows:
    """Rows of embed_tokens or lm_head that an adapter has instead of the base's, or added ones."""

    ids: np.ndarray  # int32 [rows], ascending
    rows: np.ndarray  # [rows, hidden]
