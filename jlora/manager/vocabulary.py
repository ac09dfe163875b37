"""Rows of embed_tokens and lm_head that an adapter file holds beside low-rank matrices.

Three kinds of tensors: a matrix that takes the place of the base's own (PEFT saves it when the
module is targeted or the vocabulary was resized; tied modules share it), a copy that only its
module has (modules_to_save), and single rows (trainable_token_indices), which go on top.
"""

from __future__ import annotations

import numpy as np

from jlora.manager.peft_config import EMBED, HEAD
from jlora.manager.tensors import Modules, Source, Tensor, chunks
from jlora.manager.weights import VocabRows

VOCAB_KINDS = (
    "weight",
    "base_layer",
    "original_module",
    "modules_to_save",
    "token_adapter.base_layer",
    "trainable_tokens_delta",
)
_BASE = ("base_layer", "original_module", "token_adapter.base_layer")
_MATRICES = (*_BASE, "weight", "modules_to_save")
_DELTA = "trainable_tokens_delta"


class VocabularyReader:
    """Reads the vocabulary's rows of one adapter; `check` comes first and reads no tensor."""

    def __init__(self, source: Source, modules: Modules) -> None:
        self.source, self.helper = source, source.helper
        self.tensors = {name: modules.get(name, {}) for name in (EMBED, HEAD)}
        self.vocab = source.modules.config.vocab_size
        self.ids = dict(self.helper.token_ids)
        both = EMBED in self.ids and HEAD in self.ids
        same = both and self.ids[EMBED] == self.ids[HEAD]
        # PEFT ties the head's rows to the embedding's, unless other ones are named for the head.
        self.head_follows = source.tied and EMBED in self.ids and (not both or same)
        self.added = self._added_tokens()

    def _added_tokens(self) -> int:
        sizes = [
            tensor.data.shape[0]
            for tensors in self.tensors.values()
            for kind, tensor in tensors.items()
            if kind in _MATRICES and len(tensor.data.shape) == 2
        ]
        largest = max((one for ids in self.ids.values() for one in ids), default=-1) + 1
        return max([*sizes, self.vocab if sizes else largest, self.vocab]) - self.vocab

    # -- checks ------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises for tensors that are not there, or have no meaning, or do not fit."""
        self._check_token_ids()
        self._check_presence()
        hidden = self.source.modules.config.hidden_size
        rows = self.vocab + self.added
        for module, tensors in self.tensors.items():
            for kind, tensor in tensors.items():
                if kind == _DELTA:
                    ids = self.ids[EMBED if self._follows(module) else module]
                    why = f"{len(ids)} trainable_token_indices, hidden size {hidden}"
                    self.source.check(tensor, (len(ids), hidden), why)
                elif kind in _MATRICES:
                    self._check_meaning(module, kind, tensor)
                    why = f"{self.vocab} tokens of the model, {self.added} added, hidden {hidden}"
                    if tensor.data.shape[:1] and tensor.data.shape[0] < self.vocab:
                        why += "; a smaller vocabulary is not served"
                    self.source.check(tensor, (rows, hidden), why)

    def _check_token_ids(self) -> None:
        apart = self.source.tied and len(self.ids) == 2 and not self.head_follows
        if apart and self.helper.ensure_weight_tying:
            self.source.fail(
                "trainable_token_indices of embed_tokens and lm_head differ, which "
                "ensure_weight_tying excludes"
            )
        for module, ids in self.ids.items():
            for one in ids:
                if one >= self.vocab + self.added:
                    self.source.fail(
                        f"trainable_token_indices of {module} hold {one}, but the matrices of the "
                        f"file have {self.vocab + self.added} tokens"
                    )
            if self._adapted(module) or module in self.helper.saved_modules:
                self.source.fail(
                    f"trainable_token_indices of {module} exclude target_modules and "
                    "modules_to_save of it, as in PEFT"
                )
        if self.head_follows and (self._adapted(HEAD) or HEAD in self.helper.saved_modules):
            self.source.fail(
                "trainable_token_indices of a tied embed_tokens are of lm_head too, which "
                "target_modules or modules_to_save names; this is not supported"
            )

    def _check_presence(self) -> None:
        for module in self.helper.saved_modules:
            if "weight" not in self.tensors[module]:
                self.source.fail(f"module {module} is in modules_to_save, but has no weight")
        for module in self.ids:
            if _DELTA not in self.tensors[module] and not self._follows(module):
                self.source.fail(
                    f"module {module} is in trainable_token_indices, but has no "
                    f"token_adapter.{_DELTA}"
                )
        for module, tensors in self.tensors.items():
            if _DELTA in tensors and module not in self.ids and not self._follows(module):
                self.source.fail(
                    f"tensor {tensors[_DELTA].key} is of a module that trainable_token_indices "
                    "of its configuration does not name"
                )

    def _check_meaning(self, module: str, kind: str, tensor: Tensor) -> None:
        """PEFT saves and loads each kind of matrix only beside what it belongs to."""
        saved = module in self.helper.saved_modules or self._tied_copy(module)
        rows = module in self.ids or self._follows(module)
        fits = {
            "base_layer": self._adapted(module),
            "token_adapter.base_layer": rows,
            "original_module": saved,
            "modules_to_save": saved,
            # PEFT puts the matrix of a targeted module under another name, and drops this one.
            "weight": saved or not (self._adapted(module) or self.helper.targets(module) or rows),
        }[kind]
        if not fits:
            self.source.fail(
                f"tensor {tensor.key} does not fit the configuration: target_modules, "
                f"modules_to_save and trainable_token_indices say otherwise about {module}"
            )

    def _adapted(self, module: str) -> bool:
        return any(kind.startswith("lora_") for kind in self.tensors[module])

    def _follows(self, module: str) -> bool:
        return module == HEAD and self.head_follows

    def _tied_copy(self, module: str) -> bool:
        """lm_head of a tied model that ensure_weight_tying ties to a saved embedding."""
        tying = self.helper.ensure_weight_tying and self.source.tied
        return module == HEAD and tying and EMBED in self.helper.saved_modules

    # -- reading -----------------------------------------------------------------------------

    def read(self) -> dict[str, VocabRows]:
        """The rows that are not the base's, by "embed_tokens" and "lm_head"."""
        rows = self._own_matrices()
        for module, tensors in self.tensors.items():
            copied = module in self.helper.saved_modules or self._tied_copy(module)
            if copied and "weight" in tensors:
                rows[module] = self._differing(module, tensors["weight"])
                self._same(tensors, "modules_to_save", tensors["weight"])
        if self._tied_copy(HEAD):
            if HEAD in rows and not _equal(rows[HEAD], rows[EMBED]):
                self.source.fail(
                    "modules_to_save of embed_tokens and lm_head differ, which "
                    "ensure_weight_tying excludes"
                )
            rows[HEAD] = rows[EMBED]
        for module, ids in self.ids.items():
            if self._follows(module):
                continue
            tensor = self.tensors[module][_DELTA]
            order = np.argsort(np.asarray(ids, np.int32), kind="stable")
            new = VocabRows(np.asarray(ids, np.int32)[order], self.source.read(tensor)[order])
            rows[module] = _over(rows.get(module), new)
        if self.head_follows:
            self._same(self.tensors[HEAD], _DELTA, self.tensors[EMBED][_DELTA])
            rows[HEAD] = rows[EMBED]
        rows = {module: one for module, one in rows.items() if len(one.ids)}
        self._check_added(rows)
        return {module.rsplit(".", 1)[-1]: one for module, one in rows.items()}

    def _own_matrices(self) -> dict[str, VocabRows]:
        """Rows of matrices that take the place of the base's; tied modules have one in common."""
        rows: dict[str, VocabRows] = {}
        for module, tensors in self.tensors.items():
            copied = module in self.helper.saved_modules or self._tied_copy(module)
            kinds = _BASE if copied else (*_BASE, "weight")
            for tensor in (tensors[kind] for kind in kinds if kind in tensors):
                found = self._differing(module, tensor)
                for other in (EMBED, HEAD) if self.source.tied else (module,):
                    if not _equal(rows.setdefault(other, found), found):
                        self.source.fail(
                            f"tensor {tensor.key} differs from another of the file for the same "
                            "matrix"
                        )
        return rows

    def _differing(self, module: str, tensor: Tensor) -> VocabRows:
        """The rows of a whole matrix that are not the base's, and those beyond it."""
        base = self._base(module, tensor)
        ids, rows = [], []
        hidden = tensor.data.shape[1]
        for piece in chunks(tensor.data.shape[0], hidden * 8):
            ours = self.source.narrowed(tensor.key, np.asarray(tensor.data[piece]))
            theirs = base[piece]
            same = (_bits(ours[: len(theirs)].astype(base.dtype, copy=False)) == _bits(theirs)).all(
                axis=1
            )
            changed = np.concatenate([~same, np.ones(len(ours) - len(theirs), bool)])
            ids.append(np.flatnonzero(changed) + piece.start)
            rows.append(ours[changed])
        return VocabRows(np.concatenate(ids).astype(np.int32), np.concatenate(rows))

    def _base(self, module: str, tensor: Tensor) -> np.ndarray:
        if self.source.base_weight is None:
            self.source.fail(
                f"tensor {tensor.key} must be compared with the base model's, which is not at "
                "hand here"
            )
        base = self.source.base_weight(f"{module}.weight")
        if base.shape != (self.vocab, tensor.data.shape[1]):
            self.source.fail(
                f"tensor {tensor.key} must be compared with the base model's, which has shape "
                f"{list(base.shape)}, expected {[self.vocab, tensor.data.shape[1]]}"
            )
        return base

    def _same(self, tensors: dict[str, Tensor], kind: str, other: Tensor) -> None:
        """Raises when there is a tensor of the kind and it is not as the other."""
        if kind not in tensors:
            return
        one = tensors[kind]
        for piece in chunks(one.data.shape[0], one.data.shape[1] * 8):
            if not np.array_equal(np.asarray(one.data[piece]), np.asarray(other.data[piece])):
                self.source.fail(f"tensors {one.key} and {other.key} differ, expected the same")

    def _check_added(self, rows: dict[str, VocabRows]) -> None:
        for module in (EMBED, HEAD) if self.added else ():
            have = rows[module].ids if module in rows else np.zeros(0, np.int32)
            new = have[have >= self.vocab]  # ascending
            if len(new) < self.added:
                gaps = np.flatnonzero(new != self.vocab + np.arange(len(new)))
                missing = self.vocab + (gaps[0] if len(gaps) else len(new))
                self.source.fail(
                    f"the adapter adds {self.added} tokens to the {self.vocab} of the model, but "
                    f"holds no row of {module} for token {missing}; save it with PEFT's "
                    "save_embedding_layers=True"
                )


def _bits(array: np.ndarray) -> np.ndarray:
    """As integers: bfloat16 compares a row of them ten times faster."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _over(below: VocabRows | None, above: VocabRows) -> VocabRows:
    """Both; rows of `above` where both have one."""
    if below is None:
        return above
    keep = ~np.isin(below.ids, above.ids)
    ids = np.concatenate([below.ids[keep], above.ids])
    dtype = np.result_type(below.rows, above.rows)
    rows = np.concatenate([below.rows[keep].astype(dtype), above.rows.astype(dtype)])
    order = np.argsort(ids)
    return VocabRows(ids[order], rows[order])


def _equal(one: VocabRows, other: VocabRows) -> bool:
    return one is other or (
        np.array_equal(one.ids, other.ids) and np.array_equal(one.rows, other.rows)
    )
