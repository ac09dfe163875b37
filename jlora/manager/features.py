"""What an adapter may have besides rank blocks, and where the device finds it, slot by slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jlora.config import LoRAConfig
from jlora.manager.blocks import pool_rows
from jlora.manager.lora_model import BaseWeight, LoRAModel
from jlora.manager.weights import VocabRows
from jlora.projections import EMBED, HEAD, Feature, ModuleMap, Projection

TOKEN_ROWS = {EMBED: Feature.EMBED_ROWS, HEAD: Feature.HEAD_ROWS}
FULL = {EMBED: Feature.FULL_EMBED, HEAD: Feature.FULL_HEAD}


def no_features(slots: int) -> np.ndarray:
    """int32 [slots + 1, features]: nobody has anything; the last row is for no adapter."""
    table = np.full((slots + 1, len(Feature)), slots, np.int32)
    table[:, [Feature.FULL_EMBED, Feature.FULL_HEAD]] = -1
    table[:, Feature.ADDED] = 0
    return table


def full_row(which: str) -> str:
    """The name under which full matrices of embed_tokens or lm_head are counted."""
    return f"full {which}"


def is_full(rows: VocabRows, config: LoRAConfig) -> bool:
    """Whether so many rows are kept as a whole matrix."""
    return len(rows.ids) > config.max_lora_token_rows


@dataclass(frozen=True)
class FeatureWrite:
    """A feature of the adapter in a slot that is to be written.

    projection: of MAGNITUDE and BIAS, which are written row by row, and of the others
    embed_tokens or lm_head. index: the slot, of FULL_EMBED and FULL_HEAD the matrix.
    """

    lora: LoRAModel
    modules: ModuleMap
    feature: Feature
    projection: Projection
    index: int

    @property
    def name(self) -> tuple[Feature, str]:
        """Which of its adapter's features it writes, wherever that is."""
        return self.feature, self.projection.name

    def magnitudes(self, shards: int) -> np.ndarray:
        """float32 [layers, stored width]; NaN where a module has none."""
        values = {
            name: one.magnitude
            for name, one in self.lora.loras.items()
            if one.magnitude is not None
        }
        return self._by_column(values, shards, np.nan)

    def biases(self, shards: int, base_weight: BaseWeight) -> np.ndarray:
        """float32 [layers, stored width], to be added to the outputs.

        lora_B's bias scaled, and a bias of the adapter's own less the base's.
        """
        values = {
            name: one.bias.astype(np.float32) * np.float32(one.scaling)
            for name, one in self.lora.loras.items()
            if one.bias is not None
        }
        for name, value in self.lora.biases.items():
            own = value.astype(np.float32) - base_weight(f"{name}.bias").astype(np.float32)
            values[name] = values[name] + own if name in values else own
        return self._by_column(values, shards, 0.0)

    def _by_column(self, values: dict[str, np.ndarray], shards: int, fill: float) -> np.ndarray:
        row, modules = self.projection, self.modules
        starts = np.cumsum([0, *(part.width for part in row.parts)])
        layers = modules.num_layers if row.per_layer else 1
        array = np.full((layers, int(starts[-1])), fill, np.float32)
        for name, value in values.items():
            place = modules.place(name)
            if place is not None and place.projection.name == row.name:
                start = starts[place.part]
                array[place.layer, start : start + len(value)] = value
        return array[:, row.columns(shards)]

    def token_rows(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens int32 [size], -1 past the last, and their rows float32 [size, hidden]."""
        own = self.lora.vocab_rows[self.projection.name]
        ids = np.full(size, -1, np.int32)
        ids[: len(own.ids)] = own.ids
        rows = np.zeros((size, own.rows.shape[1]), np.float32)
        rows[: len(own.rows)] = own.rows
        return ids, rows

    def matrix(self, vocab: int, base_weight: BaseWeight) -> np.ndarray:
        """[vocab, hidden]: the base's with the adapter's rows in it; zero past the last."""
        own = self.lora.vocab_rows[self.projection.name]
        known, hidden = self.modules.config.vocab_size, own.rows.shape[1]
        if np.count_nonzero(own.ids < known) == known:
            matrix = np.zeros((vocab, hidden), own.rows.dtype)
        else:
            base = base_weight(f"{self.modules.name(self.projection, 0)}.weight")
            matrix = np.zeros((vocab, hidden), np.result_type(base, own.rows))
            matrix[: len(base)] = base
        matrix[own.ids] = own.rows
        return matrix


def feature_writes(
    lora: LoRAModel, modules: ModuleMap, config: LoRAConfig, slot: int, full: dict[str, int]
) -> tuple[np.ndarray, list[FeatureWrite]]:
    """A slot's row of the feature table for an adapter, and the writes that make it true.

    full: which matrices it has been given, by "embed_tokens" and "lm_head".
    """
    features = no_features(config.max_loras)[-1]
    features[Feature.ADDED] = lora.added_tokens
    writes = []
    for feature, has in ((Feature.MAGNITUDE, lora.has_magnitudes), (Feature.BIAS, lora.has_biases)):
        if has:  # then every row is written, since the slot's arrays hold another adapter's
            features[feature] = slot
            for row in feature_rows(modules, config):
                writes.append(FeatureWrite(lora, modules, feature, row, slot))
    for row in modules.vocab_projections:
        own = lora.vocab_rows.get(row.name)
        if own is None:
            continue
        if row.name in full:
            features[FULL[row.name]] = full[row.name]
            writes.append(FeatureWrite(lora, modules, FULL[row.name], row, full[row.name]))
        else:
            features[TOKEN_ROWS[row.name]] = slot
            writes.append(FeatureWrite(lora, modules, TOKEN_ROWS[row.name], row, slot))
    return features, writes


def feature_rows(modules: ModuleMap, config: LoRAConfig) -> tuple[Projection, ...]:
    """The rows that may have magnitudes and biases: all but those of experts."""
    return tuple(row for row in pool_rows(modules, config) if not row.experts)
