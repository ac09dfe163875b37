"""Models and chips of the ahead-of-time table: shapes as published, peaks as published."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers

from jlora.config import ModelConfig
from jlora.model import model_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MODELS: dict[str, dict[str, Any]] = {  # what shapes the step, from each model's config.json
    "llama-3.1-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.3-70b": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
}


class Chip(NamedTuple):
    """Published figures of one chip, and how many devices JAX sees in it."""

    hbm: float  # GB or GiB as published; what the compiler gives to a program is asked of it
    bandwidth: float  # of HBM, bytes a second
    flops: float  # bfloat16, a second
    devices: int
    source: str


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    "v5e": Chip(16, 819e9, 197e12, 1, _DOCS + "v5e"),
    "v6e": Chip(32, 1638e9, 918e12, 1, _DOCS + "tpu7x"),  # its page on v6e says 1,640 GB/s
    "v5p": Chip(95, 2765e9, 459e12, 1, _DOCS + "tpu7x"),  # two cores, which are one device
    "tpu7x": Chip(192, 7380e9, 2307e12, 2, _DOCS + "tpu7x"),  # two chiplets, a device each
}


class Slice(NamedTuple):
    """Chips that a model is divided among, and the topology to ask the compiler for."""

    chip: str
    topology: str
    chips: int

    @property
    def devices(self) -> int:
        return self.chips * CHIPS[self.chip].devices


SLICES = {  # topologies come in hosts of four chips or more; of a smaller slice the first are used
    "v5e-1": Slice("v5e", "v5e:2x2", 1),
    "v5e-4": Slice("v5e", "v5e:2x2", 4),
    "v5e-8": Slice("v5e", "v5e:2x4", 8),
    "v6e-1": Slice("v6e", "v6e:2x2", 1),
    "v6e-4": Slice("v6e", "v6e:2x2", 4),
    "v6e-8": Slice("v6e", "v6e:2x4", 8),
    "v5p-4": Slice("v5p", "v5p:2x2x1", 4),
    "tpu7x-2": Slice("tpu7x", "tpu7x:2x2x1", 2),
}


def describe_config(config: dict[str, Any]) -> ModelConfig:
    """A dictionary as of config.json as the engine's own configuration, in bfloat16."""
    kind, rest = config["model_type"], {k: v for k, v in config.items() if k != "model_type"}
    return model_config(transformers.AutoConfig.for_model(kind, dtype="bfloat16", **rest))
