"""Requests whose adapters are being read: nothing can be said of their prompts yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jlora.engine.inputs import parse_prompt
from jlora.engine.sequence import RequestState, Sequence
from jlora.manager import Load
from jlora.request import LoRARequest, RequestMetrics, SamplingParams


@dataclass(frozen=True)
class Arrival:
    """A request as it came. number: in the order of arrival. time: of `time.time()`."""

    request_id: str
    prompt: Any
    params: SamplingParams
    lora_request: LoRARequest | None
    add_special_tokens: bool
    number: int
    time: float

    @property
    def adapter_id(self) -> int:
        """Of its adapter, 0 for none."""
        return 0 if self.lora_request is None else self.lora_request.lora_int_id


class Arrivals:
    """Requests, and the loads that they wait for."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Arrival, Load]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, arrival: Arrival, load: Load) -> None:
        """It waits for its adapter's load."""
        self._waiting[arrival.request_id] = arrival, load

    def take(self) -> list[tuple[Arrival, Exception | None]]:
        """Those whose loads have ended, in their order, with the loads' errors."""
        taken = [(arrival, load.error) for arrival, load in self._waiting.values() if load.done]
        for arrival, _ in taken:
            del self._waiting[arrival.request_id]
        return taken

    def drop(self, request_id: str) -> None:
        """Forgets a request; unknown ones are passed over."""
        self._waiting.pop(request_id, None)

    def ids_of(self, adapter_id: int) -> list[str]:
        """The requests that wait for an adapter."""
        every = (arrival for arrival, _ in self._waiting.values())
        return [one.request_id for one in every if one.adapter_id == adapter_id]


def failed_request(arrival: Arrival, error: Exception) -> RequestState:
    """What is left of a request that could not be served: n empty answers that say why."""
    text, tokens = parse_prompt(arrival.prompt)
    request = RequestState(
        arrival.request_id,
        text,
        list(tokens or ()),
        arrival.params,
        arrival.lora_request,
        max_tokens=0,
        stop_ids=frozenset(),
        metrics=RequestMetrics(arrival.time),
        error=error,
    )
    for index in range(arrival.params.n):
        known = len(request.prompt_token_ids)
        sequence = Sequence(request, index, 0, list(request.prompt_token_ids), known, 0, 0, None)
        sequence.finish("abort", str(error))
        request.sequences.append(sequence)
    return request
