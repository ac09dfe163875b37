"""Which pages of the KV cache are whose, and which can be found again by what they hold."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prefix:
    """What the keys and values of a sequence depend on besides its tokens.

    rope_length: the length by which its first tokens were turned (the prompt's, or that at which
    it started over), where the rotation depends on it, else 0. adapter: identity
    of the adapter that acts, "" for none. acts_from: the position from which on it does; what is
    before is the base's.
    """

    rope_length: int = 0
    adapter: str = ""
    acts_from: int = 0

    def page_hash(self, parent: bytes | None, start: int, tokens: Seq[int]) -> bytes:
        """Names the full page at `start` by all that its content depends on.

        parent: the name of the page before, None for the first.
        """
        if parent is None:
            parent = _digest(b"", str(self.rope_length).encode())
        if self.adapter and start <= self.acts_from < start + len(tokens):
            parent = _digest(parent, f"{self.acts_from}\0{self.adapter}".encode())
        return _digest(parent, np.asarray(tokens, np.int32).tobytes())


def _digest(parent: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(parent + content, digest_size=16).digest()


class PageAllocator:
    """Reference-counted pages; free ones keep their content, findable until they are reused.

    Pages are reused least recently freed first.
    """

    def __init__(self, num_pages: int, page_size: int, caching: bool = True) -> None:
        """caching: whether pages can be found again."""
        self.num_pages, self.page_size, self.caching = num_pages, page_size, caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._references = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._adapter_of: dict[int, str] = {}  # of pages that can be found, if one acts in them

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def find(self, prefix: Prefix, tokens: Seq[int], limit: int) -> tuple[list[int], list[bytes]]:
        """The pages that hold the longest known prefix of tokens[:limit], and their hashes.

        They are not taken yet: see `take`.
        """
        pages: list[int] = []
        hashes: list[bytes] = []
        size, name = self.page_size, None
        if not self.caching:
            return pages, hashes
        for start in range(0, limit - size + 1, size):
            name = prefix.page_hash(name, start, tokens[start : start + size])
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
            hashes.append(name)
        return pages, hashes

    def num_free_without(self, pages: list[int]) -> int:
        """Free pages when these are taken."""
        return len(self._free) - sum(self._references[page] == 0 for page in pages)

    def take(self, pages: list[int]) -> None:
        """One reference more to each."""
        for page in pages:
            if self._references[page] == 0:
                del self._free[page]
            self._references[page] += 1

    def allocate(self, count: int) -> list[int]:
        """New pages with one reference; the caller has looked at num_free."""
        pages = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            self._unregister(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: list[int]) -> None:
        """One reference less to each; the last page of a sequence is reused before its first."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None

    def register(self, page: int, name: bytes, adapter: str = "") -> None:
        """The page is full and can be found under this hash.

        adapter: identity of what acts in it.
        """
        if self.caching and name not in self._page_of and page not in self._hash_of:
            self._page_of[name] = page
            self._hash_of[page] = name
            if adapter:
                self._adapter_of[page] = adapter

    def _unregister(self, page: int) -> None:
        name = self._hash_of.pop(page, None)
        if name is not None:
            del self._page_of[name]
        self._adapter_of.pop(page, None)

    def forget(self, adapter: str) -> None:
        """No page in which the adapter of this identity acts is found again."""
        for page in [page for page, one in self._adapter_of.items() if one == adapter]:
            self._unregister(page)
            if page in self._free:  # to be used first
                self._free.move_to_end(page, last=False)

    def reset(self) -> None:
        """Forgets every hash; the pages in use stay so."""
        self._page_of.clear()
        self._hash_of.clear()
        self._adapter_of.clear()
