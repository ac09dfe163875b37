"""The jit-compiled transformer: one decoder, its layers with adapters, and the weights."""

from jlora.model.adapters import AdapterState, RowPool, TokenAdapters, TokenRows
from jlora.model.base_weights import BaseWeights
from jlora.model.convert import convert_model
from jlora.model.decoder import Decoder
from jlora.model.hf_config import load_hf_config, model_config
from jlora.model.layers import AXIS, StepContext
from jlora.model.loading import LoadedModel, describe_model, load_model
from jlora.model.placing import as_argument, place_on
from jlora.model.rope import rope_cos_sin
from jlora.model.vocabulary import stored_vocab

__all__ = [
    "AXIS",
    "AdapterState",
    "BaseWeights",
    "Decoder",
    "LoadedModel",
    "RowPool",
    "StepContext",
    "TokenAdapters",
    "TokenRows",
    "as_argument",
    "convert_model",
    "describe_model",
    "load_hf_config",
    "load_model",
    "model_config",
    "place_on",
    "rope_cos_sin",
    "stored_vocab",
]
