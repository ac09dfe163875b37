"""One adapter on the host: its layers, checked against the model it is for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config import LoRAConfig
from jlora.errors import AdapterError
from jlora.manager.earlier import EarlierReads
from jlora.manager.peft import as_array, content_name, file_fingerprint, open_adapter
from jlora.manager.peft_config import PEFTHelper
from jlora.manager.reader import read_parts
from jlora.manager.requirements import check_reserved, expert_blocks, needs
from jlora.manager.tensors import Source, without_adapter_name
from jlora.manager.weights import LoRALayerWeights, PackedLoRALayerWeights, VocabRows
from jlora.projections import ModuleMap

__all__ = ["LoRALayerWeights", "LoRAModel", "PackedLoRALayerWeights", "VocabRows"]

BaseWeight = Callable[[str], np.ndarray]
_READS = 3  # of files that somebody writes at the same time


class LoRAModel:
    """One adapter: the weights of each module that it changes."""

    def __init__(
        self,
        lora_model_id: int,
        rank: int,
        loras: dict[str, LoRALayerWeights],
        identity: str = "",
        *,
        biases: dict[str, np.ndarray] | None = None,
        vocab_rows: dict[str, VocabRows] | None = None,
        added_tokens: int = 0,
        invocation_tokens: tuple[int, ...] = (),
        base_model_name: str | None = None,
        tensor_counts: dict[str, int] | None = None,
        expert_blocks: int = 0,
    ) -> None:
        """rank: the largest of the layers. identity: what makes this version this one: a hash of
        what it holds; `fingerprint` is as good where it was not made of files.

        biases: module -> what its bias is instead of the base's, [d_out]. vocab_rows: by
        "embed_tokens", "lm_head". added_tokens: ids from the base's vocabulary size on that the
        adapter knows too. invocation_tokens: the adapter acts from their last occurrence in the
        prompt on (an activated LoRA); none: everywhere. base_model_name: what it was trained on.
        tensor_counts: how many tensors of the
        file went to each row of the projection table ("bias": biases of modules). expert_blocks:
        rank blocks that the experts of all layers take.
        """
        self.id = lora_model_id
        self.rank = rank
        self.loras = loras
        self.biases = biases or {}
        self.vocab_rows = vocab_rows or {}
        self.added_tokens = added_tokens
        self.invocation_tokens = invocation_tokens
        self.base_model_name = base_model_name
        self.tensor_counts = tensor_counts or {}
        self.expert_blocks = expert_blocks
        self.blocks_needed: dict[str, int] | None = None  # see blocks.blocks_needed
        self.identity = identity or f"id:{lora_model_id}"
        self.fingerprint = self.identity  # of its files, where it has any (see file_fingerprint)

    @functools.cached_property
    def key(self) -> str:
        """Names this adapter in this version."""
        return f"{self.id}:{self.identity}"

    @property
    def components(self) -> tuple[tuple[LoRAModel, float], ...]:
        """Itself, with weight 1: what a mixture has several of."""
        return ((self, 1.0),)

    def get_lora(self, module_name: str) -> LoRALayerWeights | None:
        """The weights for a module ("model.layers.0.self_attn.q_proj"), or None."""
        return self.loras.get(module_name)

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA."""
        return any(layer.magnitude is not None for layer in self.loras.values())

    @property
    def has_biases(self) -> bool:
        """Whether it adds to biases, or has its own."""
        return bool(self.biases) or any(layer.bias is not None for layer in self.loras.values())

    @property
    def needs(self) -> dict[str, int | bool]:
        """The least value of each option of LoRAConfig with which it is served."""
        return needs(self)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        arrays = [
            array
            for layer in self.loras.values()
            for array in (layer.lora_a, layer.lora_b, layer.bias, layer.magnitude)
            if array is not None
        ]
        arrays += [*self.biases.values(), *(one.rows for one in self.vocab_rows.values())]
        return sum(array.nbytes for array in arrays)

    @classmethod
    def from_local_checkpoint(
        cls,
        lora_dir: str | Path,
        lora_model_id: int,
        modules: ModuleMap,
        lora_config: LoRAConfig,
        name: str | None = None,
        base_weight: BaseWeight | None = None,
        known: tuple[str, str] | None = None,
        earlier: EarlierReads | None = None,
    ) -> LoRAModel:
        """Reads a folder that PEFT saved. Raises AdapterError for anything that does not fit.

        base_weight: gives a tensor of the base model ("model.embed_tokens.weight"; "lm_head.weight"
        also of a tied model) as the checkpoint has it, to compare what PEFT saved beside the
        adapter; without it an adapter that holds such tensors is refused. known: an earlier
        fingerprint of the files, and the identity that they had. earlier: what reads of other
        adapters, for the same model and limits, have left.
        """
        folder = Path(lora_dir)
        name = name or f"adapter {folder.name}"
        for _ in range(_READS):
            fingerprint = file_fingerprint(folder)
            identity = known[1] if known is not None and known[0] == fingerprint else ""
            try:
                with open_adapter(folder, name, earlier, hashed=not identity) as (helper, tensors):
                    source = Source(
                        name, helper, modules, lora_config, base_weight, seen=bool(identity)
                    )
                    lora = cls._from_source(lora_model_id, source, tensors, "")
                    lora.identity = identity or content_name(folder, tensors)
            except (AdapterError, OSError) as error:
                if file_fingerprint(folder) != fingerprint:
                    continue  # they were in the midst of a change
                if isinstance(error, AdapterError):
                    raise
                raise AdapterError(f"{name}: {folder} cannot be read: {error}") from error
            if file_fingerprint(folder) == fingerprint:
                lora.fingerprint = fingerprint
                return lora
        raise AdapterError(f"{name}: the files in {folder} change while they are read")

    @classmethod
    def from_lora_tensors(
        cls,
        lora_model_id: int,
        tensors: Mapping[str, Any],
        peft_helper: PEFTHelper,
        modules: ModuleMap,
        lora_config: LoRAConfig,
        name: str | None = None,
        identity: str = "",
        base_weight: BaseWeight | None = None,
    ) -> LoRAModel:
        """Places each tensor ("base_model.model.<module>.lora_A.weight") or raises AdapterError.

        tensors: anything that numpy makes an array of; names as in a file, or as PEFT has them in
        memory, with an adapter's name ("...lora_A.default.weight"). They are copied: the caller
        may go on to change them.
        """
        name = name or f"adapter {lora_model_id}"
        source = Source(name, peft_helper, modules, lora_config, base_weight)
        arrays = [
            (without_adapter_name(key), as_array(one, key, name).copy())
            for key, one in tensors.items()
        ]
        if len(dict(arrays)) < len(arrays):
            source.fail("a tensor is there twice, under the names of several adapters")
        return cls._from_source(lora_model_id, source, dict(arrays), identity)

    @classmethod
    def _from_source(
        cls, lora_model_id: int, source: Source, tensors: Mapping[str, Any], identity: str
    ) -> LoRAModel:
        parts, helper = read_parts(source, tensors), source.helper
        lora = cls(
            lora_model_id,
            max((layer.rank for layer in parts.loras.values()), default=0),
            parts.loras,
            identity,
            biases=parts.biases,
            vocab_rows=parts.vocab_rows,
            added_tokens=parts.added_tokens,
            invocation_tokens=helper.invocation_tokens,
            base_model_name=helper.base_model_name,
            tensor_counts=parts.tensor_counts,
            expert_blocks=expert_blocks(parts.loras, source.modules),
        )
        check_reserved(lora, source.config, source.adapter)
        return lora
