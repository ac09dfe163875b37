"""Draws docs/decode.png from the figures in docs/benchmarks/: milliseconds a decode step.

Dotted is the floor: the bytes that a step must read (weights, the adapters in use, the KV of its
sequences, each once) at the bandwidth that `bench_engine.py --what bandwidth` measured.

Needs matplotlib, which nothing else here needs and jlora does not install ("plot").

    python scripts/plot_benchmarks.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

# The 8B of bench_engine.py in bfloat16: bytes of its layers and output matrix, of one adapter of
# rank 16, and of the keys and values of a token.
WEIGHT_BYTES = 2 * (32 * 4096 * (6144 + 4096 + 3 * 14336) + 128256 * 4096)
ADAPTER_BYTES = 2 * 16 * 32 * (3 * 4096 + 6144 + 2 * 4096 + 2 * 4096 + 2 * 14336 + 14336 + 4096)
KV_BYTES = 2 * 2 * 32 * 8 * 128
MEAN_CONTEXT = 128 + 34  # of the tokens that are timed
DOCS = Path(__file__).resolve().parent.parent / "docs"
ENGINES = {
    "jlora": ("jlora_h100_8b_r16.jsonl", "-o"),
    "vLLM 0.25.1": ("vllm_0.25.1_h100_8b_r16.jsonl", "--s"),
}
COLOURS = {0: "0.35", 8: "tab:blue", 32: "tab:orange"}  # by number of adapters


def decode_steps(path: Path) -> dict[int, list[tuple[int, float]]]:
    """(batch, milliseconds a step) of every "decode" line, by number of adapters."""
    steps: dict[int, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["what"] == "decode":
            steps.setdefault(row["adapters"], []).append((row["batch"], row["ms_per_step"]))
    return steps


def floor(adapters: int, batch: int, bandwidth: float) -> float:
    """Milliseconds that reading everything once takes; bandwidth: bytes a second."""
    size = WEIGHT_BYTES + min(adapters, batch) * ADAPTER_BYTES + batch * MEAN_CONTEXT * KV_BYTES
    return size / bandwidth * 1e3


def measured_bandwidth(path: Path) -> float:
    """Bytes a second, of the "bandwidth" line."""
    rows = map(json.loads, path.read_text().splitlines())
    return next(row["gb_s"] for row in rows if row["what"] == "bandwidth") * 1e9


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DOCS / "benchmarks")
    parser.add_argument("--out", type=Path, default=DOCS / "decode.png")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    batches: list[int] = []
    for engine, (name, style) in ENGINES.items():
        for adapters, points in decode_steps(args.data / name).items():
            batches, times = map(list, zip(*sorted(points), strict=True))
            label = f"{engine}, {adapters or 'no'} adapters"
            axes.plot(batches, times, style, color=COLOURS[adapters], ms=4, label=label)
    bandwidth = measured_bandwidth(args.data / ENGINES["jlora"][0])
    for adapters, colour in COLOURS.items():
        floors = [floor(adapters, batch, bandwidth) for batch in batches]
        axes.plot(batches, floors, ":", color=colour, label=f"floor, {adapters or 'no'} adapters")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences in the batch")
    axes.set_ylabel("ms a decode step")
    axes.set_title("8B shapes, bf16, rank 16, one H100 (lower is better)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
