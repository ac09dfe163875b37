"""The jit-compiled transformer: one decoder, its layers with adapters, and the weights."""

from jlora.model.decoder import Decoder
from jlora.model.hf_config import load_hf_config, model_config
from jlora.model.layers import AXIS, RowPool, StepContext
from jlora.model.loading import LoadedModel, load_model
from jlora.model.rope import rope_cos_sin

__all__ = [
    "AXIS",
    "Decoder",
    "LoadedModel",
    "RowPool",
    "StepContext",
    "load_hf_config",
    "load_model",
    "model_config",
    "rope_cos_sin",
]
