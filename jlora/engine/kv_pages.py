"""Which pages of the KV cache are whose, and which can be found again by what they hold."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Seq

import numpy as np


def page_hash(parent: bytes, tokens: Seq[int]) -> bytes:
    """Names a full page by its tokens and everything before them."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(np.asarray(tokens, np.int32).tobytes())
    return digest.digest()


def root_hash(adapter: str, rope_length: int) -> bytes:
    """The parent of a sequence's first page: what else its keys and values depend on.

    adapter: identity of the adapter that acts, "" for none. rope_length: the prompt's length
    where the rotation depends on it, else 0.
    """
    return hashlib.blake2b(f"{adapter}\0{rope_length}".encode(), digest_size=16).digest()


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

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def find(self, parent: bytes, tokens: Seq[int], limit: int) -> tuple[list[int], list[bytes]]:
        """The pages that hold the longest known prefix of tokens[:limit], and their hashes.

        They are not taken yet: see `take`.
        """
        pages: list[int] = []
        hashes: list[bytes] = []
        size = self.page_size
        if not self.caching:
            return pages, hashes
        for start in range(0, limit - size + 1, size):
            parent = page_hash(parent, tokens[start : start + size])
            page = self._page_of.get(parent)
            if page is None:
                break
            pages.append(page)
            hashes.append(parent)
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
            known = self._hash_of.pop(page, None)
            if known is not None:
                del self._page_of[known]
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: list[int]) -> None:
        """One reference less to each; the last page of a sequence is reused before its first."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None

    def register(self, page: int, name: bytes) -> None:
        """The page is full and can be found under this hash."""
        if self.caching and name not in self._page_of and page not in self._hash_of:
            self._page_of[name] = page
            self._hash_of[page] = name

    def reset(self) -> None:
        """Forgets every hash; the pages in use stay so."""
        self._page_of.clear()
        self._hash_of.clear()
