"""From what a LoRARequest names to an adapter on the host: a folder, memory, or a mixture."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jlora.config import LoRAConfig
from jlora.errors import AdapterError
from jlora.manager.blocks import most_blocks
from jlora.manager.earlier import EarlierReads
from jlora.manager.lora_model import BaseWeight, LoRAModel
from jlora.manager.mixture import Adapter, mix
from jlora.manager.peft import content_identity, file_fingerprint, resolve_adapter_path
from jlora.manager.peft_config import PEFTHelper, other_base_model
from jlora.projections import ModuleMap
from jlora.request import LoRARequest

logger = logging.getLogger(__name__)


class AdapterLoader:
    """Reads adapters for one model and the limits of one engine."""

    def __init__(
        self,
        modules: ModuleMap,
        lora_config: LoRAConfig,
        base_weight: BaseWeight | None = None,
        model_name: str | None = None,
    ) -> None:
        """base_weight: reads a tensor of the base's checkpoint, for adapters that bring one along.

        model_name: of the base; adapters that name another one are warned of.
        """
        self.modules, self.lora_config = modules, lora_config
        self._base_weight, self._model_name = base_weight, model_name
        self._warned: set[str] = set()
        self._earlier = EarlierReads()

    def load(
        self,
        request: LoRARequest,
        folder: Path | None = None,
        on_host: Callable[[LoRARequest], Adapter | None] = lambda _: None,
        known: Any = None,
    ) -> tuple[Adapter, Path | None]:
        """The adapter, and the folder of its files if it has one.

        folder: where it is known to be. on_host: gives a component that need not be read. known:
        the version that was read last, whose identity holds while its files are the same. Raises
        AdapterError for anything that cannot be served.
        """
        name, start = f"adapter {request.lora_name!r}", time.perf_counter()
        before = None if known is None else (known.fingerprint, known.identity)
        try:
            adapter, folder = self._read(request, folder, on_host, before)
            self._check_blocks(adapter, name)
        except AdapterError as error:
            logger.warning("refused %s", error)
            raise
        counts = adapter.tensor_counts if isinstance(adapter, LoRAModel) else {}
        tensors = ", ".join(f"{row} {count}" for row, count in counts.items())
        logger.info(
            "loaded %s (id %d, rank %d, %.1f MB) in %.0f ms; tensors: %s",
            name,
            adapter.id,
            adapter.rank,
            adapter.nbytes / 1e6,
            (time.perf_counter() - start) * 1e3,
            tensors or "those of its components",
        )
        return adapter, folder

    def _read(
        self,
        request: LoRARequest,
        folder: Path | None,
        on_host: Callable[[LoRARequest], Adapter | None],
        known: tuple[str, str] | None = None,
    ) -> tuple[Adapter, Path | None]:
        adapter_id, name = request.lora_int_id, f"adapter {request.lora_name!r}"
        if request.components is not None:
            parts = [
                (self._component(one, request, on_host), weight)
                for one, weight in request.components
            ]
            combination = request.combination_type
            return mix(adapter_id, parts, combination, name, self.lora_config), None
        limits = (self.modules, self.lora_config, name)
        if request.lora_tensors is not None:
            config = dict(request.peft_config or {})
            lora = LoRAModel.from_lora_tensors(
                adapter_id,
                request.lora_tensors,
                PEFTHelper.from_dict(config, name),
                *limits,
                identity=content_identity(request.lora_tensors, config, name),
                base_weight=self._base_weight,
            )
        else:
            folder = folder or self.folder(request)
            lora = LoRAModel.from_local_checkpoint(
                folder,
                adapter_id,
                *limits,
                base_weight=self._base_weight,
                known=known,
                earlier=self._earlier,
            )
        self._warn_of_base(request.base_model_name or lora.base_model_name, name)
        return lora, folder

    def _component(
        self,
        request: LoRARequest,
        mixture: LoRARequest,
        on_host: Callable[[LoRARequest], Adapter | None],
    ) -> LoRAModel:
        if request.lora_int_id == mixture.lora_int_id:
            raise AdapterError(
                f"adapter {mixture.lora_name!r}: component {request.lora_name!r} has the mixture's "
                f"own id {mixture.lora_int_id}"
            )
        adapter = on_host(request) or self._read(request, None, on_host)[0]
        if not isinstance(adapter, LoRAModel):
            raise AdapterError(
                f"adapter {mixture.lora_name!r}: component {request.lora_name!r} is a mixture"
            )
        return adapter

    def _check_blocks(self, adapter: Adapter, name: str) -> None:
        """Raises when the adapter takes more blocks of a row than a slot can list."""
        most, limit = most_blocks(adapter, self.modules), self.lora_config.max_blocks
        if most > limit:
            raise AdapterError(
                f"{name}: takes {most} rank blocks of 16 in a projection, a slot lists at most "
                f"{limit}; max_lora_blocks={most} would take it"
            )

    def _warn_of_base(self, base: str | None, name: str) -> None:
        """Says once of each name that it is not the model's."""
        if base is None or self._model_name is None or base in self._warned:
            return
        if other_base_model(base, self._model_name):
            self._warned.add(base)
            logger.warning(
                "%s was made for the base model %s; the one that is loaded is %s",
                name,
                base,
                self._model_name,
            )

    # -- what a request names ----------------------------------------------------------------

    @staticmethod
    def folder(request: LoRARequest) -> Path:
        """Where the files are; a Hub repository is downloaded, or found in its cache."""
        return resolve_adapter_path(request.lora_path, f"adapter {request.lora_name!r}")

    def fingerprint(self, request: LoRARequest, folder: Path | None = None) -> str:
        """The fingerprint that the request's adapter would have if it were loaded now."""
        if request.lora_tensors is not None:
            name = f"adapter {request.lora_name!r}"
            return content_identity(request.lora_tensors, request.peft_config or {}, name)
        if request.components is not None:
            return self._read(request, None, lambda _: None)[0].identity
        return file_fingerprint(folder or self.folder(request))


def source(request: LoRARequest) -> str:
    """What a request names, whatever the spelling."""
    if request.components is not None:
        parts = [f"{w!r} * {one.lora_int_id} ({source(one)})" for one, w in request.components]
        return f"{request.combination_type} of {', '.join(parts)}"
    if request.lora_tensors is not None:
        config: Mapping[str, Any] = request.peft_config or {}
        name = f"adapter {request.lora_name!r}"
        identity = content_identity(request.lora_tensors, config, name)
        return f"tensors in memory ({identity.removeprefix('memory:')[:12]})"
    path = os.path.expanduser(request.lora_path)
    return os.path.realpath(path) if os.path.isdir(path) else request.lora_path


def same_words(one: LoRARequest, other: LoRARequest) -> bool:
    """Whether two requests name the same in the same words, which spares a look at the disk."""
    return (
        one.lora_path == other.lora_path
        and one.lora_tensors is other.lora_tensors
        and one.peft_config is other.peft_config
        and one.components is other.components
    )


def same_source(one: LoRARequest, other: LoRARequest) -> bool:
    """Whether two requests name the same."""
    return same_words(one, other) or source(one) == source(other)
