"""Profiles decode steps of the engine: how much of the time the device works, and on what.

    python scripts/profile_step.py --adapters 8 --batches 32 128 --picture docs/trace.png

Writes one JSON line a batch: milliseconds a step without the profiler, and with it the span of a
step, the part of it in which the device ran something, its pauses, and the kernels by time.
The picture shows the last steps of the last batch: the host's calls of `step` above the device.
"""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
from bench_engine import Bench, command_line
from tqdm import trange

from jlora import SamplingParams

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CALL, STEPS, BEFORE, SHOWN, LISTED = "engine step", 32, 16, 4, 16


class Event(NamedTuple):
    """start, end: microseconds of the trace."""

    start: float
    end: float
    name: str


def traced(folder: Path) -> tuple[list[Event], list[Event]]:
    """What ran on the device, in order, and the host's calls of `step`."""
    (file,) = folder.rglob("*.trace.json.gz")
    records = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {
        (record["name"], record["pid"], record.get("tid")): record["args"]["name"]
        for record in records
        if record.get("ph") == "M" and "name" in record.get("args", {})
    }
    device, host = [], []
    for record in records:
        if record.get("ph") != "X":
            continue
        start, length = record["ts"], record.get("dur", 0.0)
        event = Event(start, start + length, record["name"])
        thread = names.get(("thread_name", record["pid"], record["tid"]), "")
        process = next(
            (v for k, v in names.items() if k[:2] == ("process_name", record["pid"])), ""
        )
        if record["name"] == CALL:
            host.append(event)
        elif "/device:" in process and thread.startswith("Stream"):
            device.append(event)
    return sorted(device), sorted(host)


def pauses(events: list[Event], start: float, end: float) -> list[float]:
    """Microseconds of each pause between start and end, in which no stream ran anything."""
    found = []
    for event in events:
        if event.start > start:
            found.append(min(event.start, end) - start)
        start = max(start, event.end)
    return [*found, end - start] if end > start else found


def summary(device: list[Event], host: list[Event]) -> dict:
    """Figures of a step, from the end of the host's first call to that of its last."""
    start, end, steps = host[0].end, host[-1].end, len(host) - 1
    events = [event for event in device if start < event.end and event.start < end]
    idle, times = pauses(events, start, end), Counter[str]()
    for event in events:
        times[event.name] += event.end - event.start  # type: ignore[assignment]
    return {
        "span_ms": round((end - start) / steps / 1e3, 3),
        "busy": round(1 - sum(idle) / (end - start), 4),
        "launches": round(len(events) / steps),
        "longest_pause_us": round(max(idle, default=0.0), 1),
        "pauses_over_10us": sum(pause > 10 for pause in idle),
        "us_a_step": {name: round(v / steps, 1) for name, v in times.most_common(LISTED)},
    }


def draw(device: list[Event], host: list[Event], file: Path, title: str) -> None:
    """The last `SHOWN` calls of the host and what the device ran meanwhile."""
    calls = host[-SHOWN - 1 : -1]
    start, end = calls[0].start, calls[-1].end
    figure, axes = plt.subplots(figsize=(11, 2.2), layout="constrained")
    for height, events, colour in ((1, calls, "tab:orange"), (0, device, "tab:blue")):
        bars = [(e.start / 1e3 - start / 1e3, (e.end - e.start) / 1e3) for e in events]
        axes.broken_barh(bars, (height - 0.35, 0.7), facecolors=colour)
    axes.set_xlim(0, (end - start) / 1e3)
    axes.set_yticks([0, 1], ["device", "host, in step()"])
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize="medium")
    figure.savefig(file, dpi=110)


def profile(bench: Bench, batch: int, picture: Path | None) -> None:
    """Steps of `batch` sequences, first without the profiler, then with it."""
    engine, args = bench.llm.llm_engine, bench.args
    params = SamplingParams(
        temperature=0, max_tokens=2 * STEPS + 6 * BEFORE, ignore_eos=True, detokenize=False
    )
    for i, prompt in enumerate(bench.prompts(batch, args.context)):
        lora = bench.loras[i % args.adapters] if args.adapters else None
        engine.add_request(f"{batch}-{i}", prompt, params, lora_request=lora)
    started: set[str] = set()
    while len(started) < batch:
        started |= {output.request_id for output in engine.step()}

    def run(count: int) -> float:
        for _ in range(BEFORE):
            engine.step()
        start = time.perf_counter()
        for _ in trange(count, desc=f"batch {batch}", leave=False):
            with jax.profiler.TraceAnnotation(CALL):
                engine.step()
        return (time.perf_counter() - start) / count * 1e3

    wall, folder = run(STEPS), Path(tempfile.mkdtemp(prefix="jlora-profile-"))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    try:
        with jax.profiler.trace(folder, profiler_options=options):
            run(STEPS)
        device, host = traced(folder)
    finally:
        shutil.rmtree(folder)
    engine.abort_request([f"{batch}-{i}" for i in range(batch)])
    engine.step()
    figures = summary(device, host)
    bench.say(what="profile", batch=batch, wall_ms=round(wall, 3), **figures)
    if picture:
        title = f"decode, {batch} sequences, {args.adapters} adapters: busy {figures['busy']:.1%}"
        draw(device, host, picture, title)


def main() -> None:
    """See the module."""
    parser = command_line(__doc__.split("\n")[0])
    parser.add_argument("--picture", type=Path, help="a PNG of the last batch")
    parser.set_defaults(adapters=8, batches=[32, 128], what=[])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(tempfile.mkdtemp(prefix="jlora-bench-"))
    try:
        bench = Bench(args, folder)
        for batch in args.batches:
            profile(bench, batch, args.picture)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
