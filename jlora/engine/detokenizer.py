"""Text from tokens as they come, never half a character, and stop strings across tokens."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "�"  # what tokenisers decode a cut character to


class Detokenizer:
    """The text of one answer.

    A tokeniser's text for a token depends on its neighbours, so a window of tokens is decoded
    with and without the new one, and the difference is new text once it ends in a whole
    character.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: list[int],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """prompt: its last tokens give the first one of the answer its neighbours."""
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stop, self._include_stop = stop, include_stop
        self._window = list(prompt[-4:])
        self._read = len(self._window)  # tokens of the window whose text is out
        self._held = ""
        self.text = ""
        self.matched: str | None = None

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )

    def add(self, token: int, *, search: bool = True) -> bool:
        """Appends a token; True when a stop string is complete (`matched` is set, text cut).

        search: False while stop strings do not count (before min_tokens).
        """
        self._window.append(token)
        old, new = self._decode(self._window[: self._read]), self._decode(self._window)
        if new == old:  # a skipped token: no neighbour for the next, which would lose its space
            self._window.pop()
            return False
        if new.endswith(INCOMPLETE) or len(new) < len(old):
            self._held = new[len(old) :]
            return False
        return self._append(new[len(old) :], search)

    def _append(self, piece: str, search: bool) -> bool:
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._held = ""
        start = len(self.text)
        self.text += piece
        return search and bool(piece) and self._find_stop(start)

    def _find_stop(self, start: int) -> bool:
        """Looks for stop strings that end after `start`; the one that begins first wins."""
        found = [
            (at, stop)
            for stop in self._stop
            if (at := self.text.find(stop, max(0, start - len(stop) + 1))) >= 0
        ]
        if not found:
            return False
        at, self.matched = min(found)
        self.text = self.text[: at + len(self.matched) if self._include_stop else at]
        return True

    def finish(self) -> None:
        """The answer is complete: a character that never was completed comes out as it is."""
        if self.matched is None:
            self.text += self._held
        self._held = ""

    @property
    def safe_length(self) -> int:
        """Characters that no stop string can take back any more."""
        longest = max(map(len, self._stop), default=1)
        return max(0, len(self.text) - (longest - 1))
