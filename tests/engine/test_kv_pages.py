"""The page allocator against a simple model of it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jlora.engine.kv_pages import PageAllocator, Prefix

PAGES, SIZE = 8, 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
ROOTS = st.sampled_from(
    [
        Prefix(),
        Prefix(0, "a"),
        Prefix(9, "a"),
        Prefix(0, "a", 3),
        Prefix(0, "b", 3),
        Prefix(0, "a", 4),
    ]
)


@dataclasses.dataclass(eq=False)
class Holder:
    """A sequence: its pages hold its tokens."""

    root: Prefix
    tokens: list[int]
    pages: list[int]


def entry_of(prefix: Prefix, tokens: list[int]) -> tuple:
    """What a page that ends with these tokens holds: the base's until the adapter acts."""
    acts = prefix.adapter and len(tokens) > prefix.acts_from
    return (prefix if acts else Prefix(prefix.rope_length), *tokens)


class Pages(RuleBasedStateMachine):
    """content: what each page holds (root and all tokens up to its end) if it can be found.

    free: in the order in which pages must be reused.
    """

    holders = Bundle("holders")

    def __init__(self):
        super().__init__()
        self.pages = PageAllocator(PAGES, SIZE)
        self.free = list(range(PAGES))
        self.content: dict[int, tuple] = {}
        self.held: list[Holder] = []

    def known(self, root, tokens) -> list[int]:
        """The pages of the longest prefix that can be found, by the model."""
        found = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            entry = entry_of(root, tokens[:end])
            page = next((p for p, c in self.content.items() if c == entry), None)
            if page is None:
                break
            found.append(page)
        return found

    @rule(target=holders, root=ROOTS, tokens=TOKENS)
    def start(self, root, tokens):
        pages, hashes = self.pages.find(root, tokens, len(tokens) - 1)
        assert pages == self.known(root, tokens[: len(tokens) - 1])
        assert len(hashes) == len(pages)
        need = -(-len(tokens) // SIZE) - len(pages)
        assert self.pages.num_free_without(pages) == len(set(self.free) - set(pages))
        if need > self.pages.num_free_without(pages):
            return Holder(root, [], [])
        self.pages.take(pages)
        self.free = [page for page in self.free if page not in pages]
        new = self.pages.allocate(need)
        assert new == self.free[:need]
        del self.free[:need]
        holder = Holder(root, tokens, pages + new)
        for page in new:
            self.content.pop(page, None)
        self.held.append(holder)
        self.register(holder)
        return holder

    def register(self, holder):
        name = None
        for index in range(len(holder.tokens) // SIZE):
            part = holder.tokens[index * SIZE : (index + 1) * SIZE]
            name = holder.root.page_hash(name, index * SIZE, part)
            page = holder.pages[index]
            self.pages.register(page, name)
            entry = entry_of(holder.root, holder.tokens[: (index + 1) * SIZE])
            if page not in self.content and entry not in self.content.values():
                self.content[page] = entry

    @rule(holder=consumes(holders))
    def release(self, holder):
        if holder not in self.held:
            return
        self.pages.release(holder.pages)
        self.held.remove(holder)
        still = {page for other in self.held for page in other.pages}
        self.free += [page for page in reversed(holder.pages) if page not in still]

    @rule()
    def reset(self):
        self.pages.reset()
        self.content.clear()

    @invariant()
    def counts_agree(self):
        assert self.pages.num_free == len(self.free)
        assert list(self.pages._free) == self.free
        for page in range(PAGES):
            holders = sum(page in holder.pages for holder in self.held)
            assert self.pages._references[page] == holders

    @invariant()
    def a_page_is_written_by_one(self):
        """Pages that several hold are full ones, found under what they hold."""
        for holder in self.held:
            for index, page in enumerate(holder.pages):
                shared = sum(page in other.pages for other in self.held) > 1
                assert not shared or (index + 1) * SIZE <= len(holder.tokens)


Pages.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestPages = Pages.TestCase


def test_nothing_is_found_without_caching():
    pages, prefix = PageAllocator(4, 2, caching=False), Prefix()
    pages.register(*pages.allocate(1), prefix.page_hash(None, 0, [1, 2]))
    assert pages.find(prefix, [1, 2, 3], 3) == ([], [])


def test_last_page_of_a_sequence_is_reused_first():
    pages = PageAllocator(3, 2)
    first, second, third = pages.allocate(3)
    pages.release([first, second, third])
    assert pages.allocate(2) == [third, second]


def test_found_page_that_is_free_again_is_not_reused_while_taken():
    pages, prefix = PageAllocator(2, 2), Prefix()
    (page,) = pages.allocate(1)
    pages.register(page, prefix.page_hash(None, 0, [1, 2]))
    pages.release([page])
    found, _ = pages.find(prefix, [1, 2, 3], 2)
    assert found == [page]
    pages.take(found)
    assert page not in pages.allocate(1)


def chain(prefix: Prefix, tokens: list[int]) -> list[bytes]:
    """The names of a sequence's pages of two tokens."""
    names: list[bytes] = []
    for start in range(0, len(tokens), 2):
        parent = names[-1] if names else None
        names.append(prefix.page_hash(parent, start, tokens[start : start + 2]))
    return names


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Prefix(), Prefix(0, "a")),
        (Prefix(0, "a"), Prefix(0, "b")),
        (Prefix(0, "a"), Prefix(100, "a")),
        (Prefix(0, "a", 0), Prefix(0, "a", 1)),
    ],
)
def test_pages_under_different_prefixes_differ(one, other):
    assert not set(chain(one, [1, 2, 3, 4])) & set(chain(other, [1, 2, 3, 4]))


@pytest.mark.parametrize(("acts_from", "shared"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (9, 3)])
def test_pages_before_the_adapter_acts_are_the_bases(acts_from, shared):
    tokens = [1, 2, 3, 4, 5, 6]
    base, adapted = chain(Prefix(), tokens), chain(Prefix(0, "a", acts_from), tokens)
    assert [one == other for one, other in zip(base, adapted, strict=True)] == [
        index < shared for index in range(3)
    ]


def test_page_names_depend_on_everything_before():
    assert chain(Prefix(), [1, 1, 2, 2])[1] != chain(Prefix(), [3, 3, 2, 2])[1]
