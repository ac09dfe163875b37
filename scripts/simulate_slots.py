"""A scheduler for which loading an adapter takes no time: what too few slots cost by themselves.

`bench_adapters.py --what simulate` runs it; it needs no engine and no JAX.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm


def write(args: argparse.Namespace, figure: dict[str, Any]) -> None:
    """Prints a figure, and appends it to `--out`."""
    line = json.dumps(figure)
    print(line, flush=True)
    if args.out:
        with Path(args.out).open("a") as file:
            file.write(line + "\n")


def zipf_draws(adapters: int, power: float, count: int) -> Iterator[int]:
    """Adapters in the order in which they are asked for, the same ones each time."""
    weights = np.arange(1, adapters + 1, dtype=float) ** -power
    rng = np.random.default_rng(0)
    return iter(rng.choice(adapters, count, p=weights / weights.sum()).tolist())


def spread(seconds: list[float], digits: int = 2) -> dict[str, float] | None:
    """Median, P99 and maximum, in milliseconds."""
    if not seconds:
        return None
    p50, p99 = np.percentile(seconds, (50, 99))
    values = {"p50": p50, "p99": p99, "max": max(seconds)}
    return {name: round(float(value) * 1e3, digits) for name, value in values.items()}


@dataclass
class Waiting:
    """A request without a row: when it came (ms), and how many started past it since."""

    adapter: int
    came: float
    passes: int = 0


class Simulation:
    """First come, first served among those whose adapter can have a slot at once.

    An adapter needs a slot to run; it takes a free one or that of the idle adapter which was used
    longest ago. Who cannot is passed over; after `max_passes` starts behind its back, the slot
    with the fewest running requests starts nobody any more, until it is idle and changes hands.
    A prompt takes its share of the first step's tokens, and `--prompt-ms` of time for each of them.
    """

    def __init__(self, args: argparse.Namespace, slots: int, drains: int) -> None:
        """drains: slots that may be promised at a time; 0: any number."""
        self.args, self.slots, self.drains = args, slots, drains or slots
        self.waiting: list[Waiting] = []
        self.users: Counter[int] = Counter()  # running requests, of each adapter in a slot
        self.idle: dict[int, None] = {}  # adapters in a slot that nobody uses, oldest first
        self.promised: dict[int, int] = {}  # adapters that must leave their slot, and for which
        self.running = self.loads = 0

    def run(self, step_ms: tuple[list[float], list[float]]) -> dict[str, Any]:
        """The figures of `--requests` that end, after twice `--outstanding` others."""
        args, clock, step, ended = self.args, 0.0, 0, 0
        warm, total = 2 * args.outstanding, 2 * args.outstanding + args.requests
        draws = zipf_draws(args.adapters, args.zipf, total + 2 * args.outstanding)
        lengths = np.random.default_rng(1).integers(1, args.output, args.outstanding, endpoint=True)
        lengths = iter(lengths.tolist())
        ends: dict[int, list[int]] = {}  # adapters whose requests end, by step
        first: list[float] = []
        tokens, since, loads = 0, None, 0
        with tqdm(total=total, desc=f"{self.slots} slots", leave=False) as bar:
            while ended < total:
                while len(self.waiting) + self.running < args.outstanding:
                    self.waiting.append(Waiting(next(draws), clock))
                started = self._admit()
                for request in started:  # the first ones are shorter, or all would end at once
                    length = next(lengths, args.output)
                    ends.setdefault(step + length - 1, []).append(request.adapter)
                prompts = len(started) * args.input
                clock += np.interp(self.running, *step_ms) + prompts * args.prompt_ms
                if since is not None:
                    tokens += self.running
                    first += [clock - request.came for request in started]
                done = ends.pop(step, [])
                for adapter in done:
                    self._leave(adapter)
                ended, step = ended + len(done), step + 1
                bar.update(len(done))
                if since is None and ended >= warm:
                    since, loads = (clock, step), self.loads
        ms, steps = clock - since[0], step - since[1]
        return {
            "running": round(tokens / steps, 1),
            "out_tok_s": round(tokens / ms * 1e3),
            "first_token_ms": spread([one / 1e3 for one in first], 0),
            "loads_s": round((self.loads - loads) / ms * 1e3, 1),
        }

    def _admit(self) -> list[Waiting]:
        """Starts those who may, in order of arrival; promises slots to those passed too often."""
        for old, new in list(self.promised.items()):
            if old in self.idle:
                del self.promised[old], self.idle[old]
                self.idle[new], self.loads = None, self.loads + 1
        room = min(
            self.args.max_num_seqs - self.running,
            (self.args.max_num_batched_tokens - self.running) // max(self.args.input, 1),
        )
        started: list[Waiting] = []
        passed: list[Waiting] = []
        for at, request in enumerate(self.waiting):
            if len(started) >= room:
                passed += self.waiting[at:]
                break
            if not self._place(request.adapter):
                passed.append(request)
                continue
            self.users[request.adapter] += 1
            self.idle.pop(request.adapter, None)
            started.append(request)
            for other in passed:
                other.passes += 1
        self.waiting = passed
        self.running += len(started)
        self._promise()
        return started

    def _place(self, adapter: int) -> bool:
        """Whether it has, or now gets, a slot that it may use."""
        if adapter in self.idle or adapter in self.users:
            return adapter not in self.promised
        if len(self.idle) + len(self.users) >= self.slots:
            if not self.idle:
                return False
            del self.idle[next(iter(self.idle))]
        self.loads += 1
        self.idle[adapter] = None
        self.promised = {old: new for old, new in self.promised.items() if new != adapter}
        return True

    def _promise(self) -> None:
        for request in self.waiting:
            here = request.adapter in self.idle or request.adapter in self.users
            if request.passes < self.args.max_passes or here:
                continue
            rest = [adapter for adapter in self.users if adapter not in self.promised]
            if len(self.promised) >= self.drains or not rest:
                return
            if request.adapter not in self.promised.values():
                self.promised[min(rest, key=self.users.__getitem__)] = request.adapter

    def _leave(self, adapter: int) -> None:
        self.running -= 1
        self.users[adapter] -= 1
        if not self.users[adapter]:
            del self.users[adapter]
            self.idle[adapter] = None


def simulate(args: argparse.Namespace) -> None:
    """Each number of slots, with the first line for as many slots as adapters."""
    pairs = (pair.split(":") for pair in args.step_ms)
    rows, times = map(list, zip(*sorted((float(n), float(ms)) for n, ms in pairs), strict=True))
    names = ("adapters", "zipf", "outstanding", "max_num_seqs", "input", "output", "drains")
    names += ("prompt_ms", "step_ms")
    tags = {name: getattr(args, name) for name in names}
    every = None
    for slots in (args.adapters, *args.max_loras):
        found = Simulation(args, slots, args.drains).run((rows, times))
        every = every or found
        relative = {
            "running_to_unlimited": round(found["running"] / every["running"], 3),
            "throughput_to_unlimited": round(found["out_tok_s"] / every["out_tok_s"], 3),
        }
        write(args, {"what": "simulate", "max_loras": slots, **found, **relative, **tags})
