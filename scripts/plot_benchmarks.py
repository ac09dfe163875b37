"""Draws docs/decode.png from the figures in docs/benchmarks/: milliseconds a decode step.

Needs matplotlib, which nothing else here needs and jlora does not install ("plot").

    python scripts/plot_benchmarks.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
