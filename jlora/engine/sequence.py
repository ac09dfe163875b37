"""One answer in the making, and the request it belongs to."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import Any

from jlora.engine.detokenizer import Detokenizer
from jlora.engine.kv_pages import Prefix
from jlora.manager import AdapterVersion
from jlora.request import (
    Logprob,
    Logprobs,
    LoRARequest,
    RequestMetrics,
    SamplingParams,
)


class Status(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """The tokens of one answer, and what of the device they hold.

    tokens: prompt and known output. num_computed: positions whose KV is written by the steps
    dispatched so far. in_flight: sampled tokens that the host has not read yet. rope_length: see
    kv_pages.Prefix. acts_from: the position from which on the adapter acts, None when it never
    does.
    """

    request: RequestState
    index: int
    seed: int
    tokens: list[int]
    num_prompt: int
    rope_length: int
    acts_from: int | None
    detokenizer: Detokenizer | None
    status: Status = Status.WAITING
    num_computed: int = 0
    in_flight: int = 0
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    row: int = -1
    slot: int = -1
    found_slot: bool = False  # its adapter had a slot when its turn came
    passes: int = 0  # sequences that have started before it while it waited for a slot
    logprobs: Logprobs = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reported: int = 0  # tokens in the last delta
    reported_text: int = 0
    reported_end: bool = False

    @property
    def lora_request(self) -> LoRARequest | None:
        """The adapter that acts in this sequence, if one does."""
        return None if self.acts_from is None else self.request.lora_request

    @property
    def adapter_id(self) -> int | None:
        """The id of that adapter, or of the version of it that the request has begun with."""
        return None if self.acts_from is None else self.request.adapter_id

    @property
    def prefix(self) -> Prefix:
        """What its pages depend on besides the tokens."""
        identity = "" if self.acts_from is None else self.request.adapter_identity
        return Prefix(self.rope_length, identity, self.acts_from or 0)

    @property
    def length(self) -> int:
        """Tokens, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def num_output(self) -> int:
        """Tokens of the answer, those in flight included."""
        return self.length - self.num_prompt

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "" if self.detokenizer is None else self.detokenizer.text

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.status is Status.FINISHED

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Marks the answer complete: "stop", "length" or "abort"."""
        self.status, self.finish_reason, self.stop_reason = Status.FINISHED, reason, stop_reason
        if self.detokenizer is not None:
            self.detokenizer.finish()


@dataclass(eq=False)
class RequestState:
    """A request and its n sequences.

    arrival: its number in the order in which requests came. adapter_id: of its adapter, or of the
    version that it has begun with when that has been superseded. adapter_identity: of the version
    that it has begun with, "" before. error: why it could not be served.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    lora_request: LoRARequest | None
    max_tokens: int
    stop_ids: frozenset[int]
    tokenizer: Any = None
    adapter_version: AdapterVersion | None = None  # for which it was checked
    arrival: int = 0
    adapter_id: int | None = None
    adapter_identity: str = ""
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.time()))
    error: Exception | None = None

    def __post_init__(self) -> None:
        if self.lora_request is not None:
            self.adapter_id = self.lora_request.lora_int_id

    @property
    def finished(self) -> bool:
        """Whether every answer is complete."""
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)
