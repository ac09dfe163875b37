"""An engine whose device is a few dictionaries that check every page that is read."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jlora.config import EngineArgs, ModelConfig, RopeConfig
from jlora.engine.arrivals import Arrivals
from jlora.engine.inputs import InputProcessor
from jlora.engine.kv_pages import PageAllocator
from jlora.engine.llm_engine import LLMEngine
from jlora.engine.scheduler import Plan, Scheduler
from jlora.manager import AdapterVersion
from jlora.manager.stats import Counters
from jlora.request import LoRARequest

VOCAB, EOS = 12, 11
MODEL = ModelConfig(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope=RopeConfig("default", 1e4, 64),
    tie_word_embeddings=True,
    max_position_embeddings=64,
    eos_token_ids=(EOS,),
)


def next_token(adapter: int, index: int, tokens: list[int]) -> int:
    """What the fake model answers; index: which of a request's answers."""
    return zlib.crc32(repr((adapter, index, tokens)).encode()) % VOCAB


def adapter_of(request: LoRARequest | None) -> int:
    """The adapter's id, 0 for none."""
    return 0 if request is None else request.lora_int_id


class FakeLoRA:
    """Slots of adapters that need no loading; stands for the worker manager and for its manager."""

    def __init__(self, slots: int) -> None:
        self.max_slots, self.slots = slots, OrderedDict()
        self.users, self.manager = Counter(), self
        self.unwritten: set[int] = set()
        self.bound: Counter[int] = Counter()
        self.counters, self.staged = Counters(), {}
        self.lora_config = SimpleNamespace(max_lora_passes=64, max_loras=slots)
        self.busy, self.leaving = False, set()
        self.versions: Counter[int] = Counter()  # of what each adapter's folder holds

    def known(self, request: LoRARequest) -> AdapterVersion:
        return self.version(request.lora_int_id)

    def check(self, request: LoRARequest) -> AdapterVersion:
        return self.known(request)

    def load_now(self, requests, onto_host=False) -> None:
        pass

    def place(self, adapter: int) -> bool:
        return True

    def stop_placing(self, adapter_ids):
        pass

    def collect(self) -> None:
        pass

    def want(self, requests) -> set[int]:
        return set()

    def bind(self, adapter: int) -> None:
        self.bound[adapter] += 1

    def unbind(self, adapter: int) -> None:
        assert self.bound[adapter] > 0
        self.bound[adapter] -= 1

    def slot_of(self, adapter: int) -> int | None:
        return self.slots.get(adapter)

    def get_adapter(self, adapter: int) -> object:
        return adapter  # all are on the host

    def to_drain(self, needs, nbytes) -> set[int]:
        """The slots of those with the fewest users."""
        free = self.max_slots - len(self.slots) + sum(not self.users[one] for one in self.slots)
        busy = sorted(self.slots, key=lambda one: (self.users[one], one))
        return set([one for one in busy if self.users[one]][: max(len(needs) - free, 0)])

    def version(self, adapter: int) -> AdapterVersion:
        identity = self.identity(adapter)
        return AdapterVersion(str(adapter), None, str(adapter), None, identity, identity, 0, {})

    def identity(self, adapter: int) -> str:
        return f"adapter {adapter}, version {self.versions[adapter]}"

    def acquire(self, request: LoRARequest, adapter: int) -> int | None:
        if adapter not in self.slots:
            unused = next((one for one in self.slots if not self.users[one]), None)
            if len(self.slots) == self.max_slots:
                if unused is None:
                    return None
                del self.slots[unused]
            free = set(range(self.max_slots)) - set(self.slots.values())
            self.slots[adapter] = min(free)
            self.unwritten.add(adapter)
        self.users[adapter] += 1
        return self.slots[adapter]

    def is_written(self, adapter: int) -> bool:
        assert adapter in self.slots
        return adapter not in self.unwritten

    def release(self, adapter: int) -> None:
        assert self.users[adapter] > 0
        self.users[adapter] -= 1

    def touch(self, adapter: int) -> None:
        self.slots.move_to_end(adapter)


class FakeRunner:
    """Runs plans. A page's content is, for each position, everything its KV depends on."""

    pool = None

    def __init__(
        self, lora: FakeLoRA, page_size: int, max_model_len: int, max_tokens: int, slots: int
    ) -> None:
        self.config, self.lora = SimpleNamespace(max_model_len=max_model_len), lora
        self.page_size, self.max_tokens, self.slots = page_size, max_tokens, slots
        self.kv: dict[tuple[int, int], tuple] = {}
        self.rows: dict[int, list[int]] = {}
        self.plans: list[Plan] = []

    def dispatch(self, plan: Plan, variant: str, prompt_logprobs: bool) -> SimpleNamespace:
        self.plans.append(plan)
        self.lora.unwritten.clear()
        assert 0 < plan.num_tokens <= self.max_tokens
        adapters = {adapter_of(entry.sequence.request.lora_request) for entry in plan.entries}
        assert len(adapters - {0}) <= self.slots
        assert len({entry.sequence.row for entry in plan.entries}) == len(plan.entries)
        for sequence in plan.admitted:
            self.rows[sequence.row] = list(sequence.tokens)
        for entry in plan.entries:  # every layer writes before it reads
            assert entry.count > 0
            for position in range(entry.start, entry.start + entry.count):
                self.kv[self.place(entry, position)] = self.content(entry, position)
        tokens = [self.sample(entry) for entry in plan.entries]
        return SimpleNamespace(
            entries=plan.entries, read=lambda: (np.asarray(tokens, np.int32), None, None)
        )

    def place(self, entry, position: int) -> tuple[int, int]:
        return entry.sequence.pages[position // self.page_size], position % self.page_size

    def content(self, entry, position: int) -> tuple:
        sequence = entry.sequence
        identity = self.lora.identity(adapter_of(sequence.request.lora_request))
        return identity, tuple(self.rows[sequence.row][: position + 1])

    def sample(self, entry) -> int:
        sequence, end = entry.sequence, entry.start + entry.count
        for position in range(end):
            assert self.kv[self.place(entry, position)] == self.content(entry, position)
        row = self.rows[sequence.row]
        assert entry.sample == (end == len(row))
        if not entry.sample:
            return -1
        adapter = adapter_of(sequence.request.lora_request)
        row.append(next_token(adapter, sequence.index, row))
        return row[-1]


def fake_engine(
    folder: Path,
    *,
    pages: int = 8,
    page_size: int = 2,
    max_model_len: int = 16,
    max_num_seqs: int = 3,
    max_tokens: int = 4,
    slots: int = 2,
    caching: bool = True,
) -> LLMEngine:
    """An LLMEngine in everything but its device, its tokeniser and its adapters."""
    engine = LLMEngine.__new__(LLMEngine)
    engine.args = EngineArgs(model=str(folder), skip_tokenizer_init=True)
    engine.model_config = MODEL
    engine.inputs = InputProcessor(engine.args, MODEL)
    engine.lora = FakeLoRA(slots)
    engine.runner = FakeRunner(engine.lora, page_size, max_model_len, max_tokens, slots)
    engine.pages = PageAllocator(pages, page_size, caching)
    engine.scheduler = Scheduler(engine.pages, engine.lora, max_num_seqs, max_tokens, max_model_len)
    preempt = engine.scheduler._preempt

    def checked_preempt(sequence):
        assert sequence.in_flight == 0  # its last token may end it, or another
        preempt(sequence)

    engine.scheduler._preempt = checked_preempt
    engine._requests, engine._in_flight = {}, None
    engine._arrivals, engine._numbers = Arrivals(), itertools.count()
    engine._resolved, engine._changed = {}, {}
    engine._seeds = np.random.default_rng(0)
    return engine


def expected_answer(
    prompt: list[int], adapter: int, index: int, max_tokens: int, max_model_len: int
) -> tuple[list[int], str]:
    """One token after the other, as by a loop around the model; and why it ends."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(adapter, index, tokens))
        if tokens[-1] == EOS:
            return tokens[len(prompt) :], "stop"
        if len(tokens) - len(prompt) == max_tokens or len(tokens) == max_model_len:
            return tokens[len(prompt) :], "length"
