"""The base model's own tensors, on the host, for adapters that are told from them."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jlora.config import ModelConfig
from jlora.model.loading import Checkpoint, LoadedModel, open_checkpoint
from jlora.model.weight_table import EMBED, HEAD


class BaseWeights:
    """Reads a tensor by its name in a checkpoint ("model.embed_tokens.weight")."""

    def __init__(
        self,
        config: ModelConfig,
        model: str,
        revision: str | None,
        load_format: str = "auto",
        made_up: LoadedModel | None = None,
    ) -> None:
        """made_up: the weights themselves, when there is no checkpoint."""
        self._config, self._made_up = config, made_up
        self._where = model, config, revision, load_format

    def __call__(self, name: str) -> np.ndarray:
        """The tensor as it is in the checkpoint; lm_head.weight of a tied model is the embedding.

        Raises KeyError when the checkpoint has none of this name.
        """
        if name == HEAD and self._config.tie_word_embeddings:
            name = EMBED
        if self._made_up is not None:
            return self._from_device(self._made_up, name)
        return self._checkpoint.tensor(name)

    @functools.cached_property
    def _checkpoint(self) -> Checkpoint:
        return open_checkpoint(*self._where)

    def _from_device(self, loaded: LoadedModel, name: str) -> np.ndarray:
        rows = {EMBED: "embed_tokens", HEAD: "lm_head"}
        if name not in rows:  # made-up biases are zero
            return np.zeros((), np.float32)
        weight, _ = loaded.weight(rows[name], 0)
        return np.asarray(jax.device_get(weight))[: self._config.vocab_size]
