"""Draws docs/adapters_cliff.png: time to the first token when more adapters are asked for than
there are slots, from the "cliff" lines of `bench_adapters.py --what cliff --out`.

Needs matplotlib, as plot_benchmarks.py does.

    python scripts/plot_adapters.py cliff.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Adapters and median milliseconds with 8 slots, as reported in sgl-project/sglang #13349
# (2025-11): Llama 3.1 8B on two H100s, 4 requests a second of 4,096 tokens in and 2,048 out. Not
# the load of ours: only the step from one point to the other is to be compared.
SGLANG = ((8, 40.0), (16, 6278.0))
LINES = (("p50", "median", "-o", "tab:blue"), ("p99", "P99", "--s", "tab:orange"))


def cliff_rows(path: Path) -> dict[int, dict]:
    """The last "cliff" line for each number of adapters wanted, in ascending order."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if row["what"] == "cliff" and row["first_token_ms"]]
    if not rows:
        raise SystemExit(f'{path} has no "cliff" lines')
    if len({row["max_loras"] for row in rows}) > 1:
        raise SystemExit(f"{path} mixes several numbers of slots; draw one of them")
    return dict(sorted((row["wanted"], row) for row in rows))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Draws docs/adapters_cliff.png.")
    parser.add_argument("data", type=Path, help="JSON lines")
    parser.add_argument("--out", type=Path, default=DOCS / "adapters_cliff.png")
    args = parser.parse_args()
    rows = cliff_rows(args.data)
    slots = next(iter(rows.values()))["max_loras"]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, name, style, colour in LINES:
        times = [row["first_token_ms"][key] for row in rows.values()]
        axes.plot(list(rows), times, style, color=colour, ms=4, label=f"jlora, {name}")
    label = "SGLang, median, 8 slots: its #13349, other load"
    axes.plot(*zip(*SGLANG, strict=True), ":^", color="0.35", ms=6, label=label)
    for wanted, ms in SGLANG:
        offset = {"xytext": (-8, -4), "ha": "right", "textcoords": "offset points"}
        axes.annotate(f"{ms:,.0f} ms", (wanted, ms), **offset, fontsize=8, color="0.35")
    axes.axvline(slots, color="0.7", lw=1)
    axes.text(slots, 0.95, f" {slots} slots", fontsize=8, transform=axes.get_xaxis_transform())
    ticks = sorted({*rows, *(wanted for wanted, _ in SGLANG)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.set_xlabel("adapters wanted, 16 requests at a time")
    axes.set_ylabel("ms to the first token")
    axes.set_title("More adapters than slots (lower is better)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
