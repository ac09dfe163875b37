"""jlora serves many LoRA adapters from one base model in one batch, on JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.config import AsyncEngineArgs, EngineArgs, LoRAConfig
    from jlora.engine import AsyncLLMEngine, LLMEngine, follow
    from jlora.errors import AdapterError, AdapterInUseError, HostError
    from jlora.llm import LLM
    from jlora.manager import FolderResolver, HubResolver
    from jlora.request import (
        CompletionOutput,
        Logprob,
        LoRARequest,
        RequestOutput,
        RequestOutputKind,
        SamplingParams,
    )

__version__ = "0.1.0"

# Imported on first use: jlora.manager and jlora.config need no jax.
_HOME = {
    "AdapterError": "jlora.errors",
    "AdapterInUseError": "jlora.errors",
    "AsyncEngineArgs": "jlora.config",
    "AsyncLLMEngine": "jlora.engine",
    "CompletionOutput": "jlora.request",
    "EngineArgs": "jlora.config",
    "FolderResolver": "jlora.manager",
    "HostError": "jlora.errors",
    "HubResolver": "jlora.manager",
    "LLM": "jlora.llm",
    "LLMEngine": "jlora.engine",
    "LoRAConfig": "jlora.config",
    "LoRARequest": "jlora.request",
    "Logprob": "jlora.request",
    "RequestOutput": "jlora.request",
    "RequestOutputKind": "jlora.request",
    "SamplingParams": "jlora.request",
    "follow": "jlora.engine",
}

__all__ = [
    "LLM",
    "AdapterError",
    "AdapterInUseError",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineArgs",
    "FolderResolver",
    "HostError",
    "HubResolver",
    "LLMEngine",
    "LoRAConfig",
    "LoRARequest",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
    "follow",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
