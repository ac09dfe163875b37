"""Compiles whole steps for TPUs that are not there and says what they take; needs only a CPU.

Of each model, slice and number of adapters: the decode step (forward and greedy sampler of a batch)
and a prefill step, compiled by libtpu. What a step must move is added up from the shapes and the
kernels' own grids and copies (step_traffic.py), and times are those of published peaks: nothing is
measured on a TPU. docs/tpu.md says how to read the table.

    JAX_PLATFORMS=cpu python scripts/aot_tpu.py --out aot.jsonl
    python scripts/aot_tpu.py --table aot.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu is here as a compiler only

import jax
from step_traffic import Workload, one_hot_table, step_traffic
from tpu_facts import CHIPS, MODELS, SLICES, describe_config
from tqdm import tqdm

from jlora.config import LoRAConfig, ModelConfig
from jlora.engine import aot
from jlora.engine.programs import RunnerConfig, StepArrays, StepPrograms
from jlora.model import describe_model

PAGE_SIZE, MAX_LOGPROBS, GIB = 32, 20, 2**30
STEPS = ("decode", "prefill")
JOB_BYTES = 6e9  # that a process compiling a 70B may take


@dataclasses.dataclass(frozen=True)
class Job:
    """A step of one model on one slice with so many adapters; experts: those of the experts too.

    prefill: its tokens, or None for the decode step. expert_parallel: each device has whole
    experts.
    """

    model: str
    slice: str
    adapters: int
    experts: bool
    batch: int
    context: int
    prefill: int | None
    expert_parallel: bool = False

    @property
    def name(self) -> str:
        whole = " whole experts" if self.expert_parallel else ""
        adapters = f"{self.adapters}{'e' if self.experts else ''}"
        return f"{self.model}{whole} {self.slice} {adapters} {self.step}"

    @property
    def step(self) -> str:
        return "decode" if self.prefill is None else "prefill"

    def config(self) -> ModelConfig:
        model = describe_config(MODELS[self.model])
        return dataclasses.replace(model, expert_parallel=self.expert_parallel)

    def lora(self) -> LoRAConfig | None:
        if not self.adapters:
            return None
        return LoRAConfig(
            max_loras=self.adapters,
            max_lora_rank=16,
            lora_expert_blocks=self.adapters if self.experts else 0,
        )

    def sizes(self) -> RunnerConfig:
        pages = self.batch * -(-self.context // PAGE_SIZE)
        tokens = max(self.prefill or 0, self.batch)
        sizes = (self.batch, tokens, self.context, PAGE_SIZE, pages, MAX_LOGPROBS)
        return RunnerConfig(*sizes, "tpu")

    def workload(self) -> Workload:
        kind = (self.adapters, self.experts)
        if self.prefill is None:
            return Workload(self.batch, 1, self.context, *kind)
        queries = max(self.prefill // self.batch, 1)
        return Workload(self.batch, queries, queries, *kind)

    def keys(self) -> list[tuple]:
        """The executables of the step."""
        forward = ("forward", self.workload().tokens, self.adapters > 0)
        if self.prefill is None:
            return [forward, ("sample", self.batch, "greedy", False)]
        return [forward]


def compile_job(job: Job) -> dict[str, Any]:
    """What a step takes, on each device."""
    jax.clear_caches()  # of the job before
    where, model = SLICES[job.slice], job.config()
    mesh = aot.tpu_mesh(where.topology, where.devices)
    programs, arrays = aot.describe_step(model, job.sizes(), job.lora(), mesh)
    parts = {
        "weights": arrays.params,
        "pool": arrays.pool,
        "kv": arrays.kv,
        "hidden": arrays.hidden,
    }
    resident = {name: aot.local_bytes(part) for name, part in parts.items()}
    described, limit = describe_model(model, mesh), aot.hbm_limit(mesh)
    moved = step_traffic(model, described, where.devices, PAGE_SIZE, job.workload())
    record = {
        **dataclasses.asdict(job),
        "step": job.step,
        "devices": where.devices,
        "limit": limit,
        "resident": resident,
        "moved": moved._asdict(),
        "need": sum(resident.values()),
        "versions": {name: version(name) for name in ("jax", "libtpu")},
    }
    if record["need"] > limit:  # the arrays alone
        return record | {"fits": False}
    record |= compiled(programs, arrays, job.keys(), record["need"])
    record["fits"] = record["need"] <= limit
    return record | (roofline(record) if record["fits"] else {})


def compiled(
    programs: StepPrograms, arrays: StepArrays, keys: list[tuple], resident: int
) -> dict[str, Any]:
    """What the compiler made of the programs of a step, and the HBM that a device needs."""
    result: dict[str, Any] = {"need": resident, "compile_seconds": 0.0, "activations": 0}
    found, kernels = Counter[str](), Counter[str]()
    sizes: Counter[str] = Counter()
    for key in keys:
        begin = time.perf_counter()
        try:
            executable = aot.compile_step(programs, arrays, key)
        except jax.errors.JaxRuntimeError as error:
            exhausted = aot.exhausted_bytes(error)
            if exhausted is None:
                raise
            result["need"] = max(result["need"], exhausted[0])
            result["refused"] = str(error).splitlines()[0][:200]
            break
        result["compile_seconds"] += round(time.perf_counter() - begin, 2)
        result["need"] = max(result["need"], resident + aot.step_bytes(executable))
        lines = aot.instructions(executable)
        kernels += aot.kernels_of(lines)
        result["activations"] += aot.kernel_blocks(lines)
        for kind, (count, size) in aot.collectives_of(lines).items():
            found[kind] += count
            sizes[kind] += size
    collectives = {kind: {"count": found[kind], "bytes": sizes[kind]} for kind in found}
    return result | {"kernels": dict(kernels), "collectives": collectives}


def roofline(record: dict[str, Any]) -> dict[str, Any]:
    """Bytes and the time of published peaks, of the slower of memory and matrix unit."""
    chip, moved = CHIPS[SLICES[record["slice"]].chip], record["moved"]
    size = moved["weights"] + moved["kv"] + moved["adapters"] + record["activations"]
    times = {
        "memory": size / (chip.bandwidth / chip.devices),
        "matrix unit": moved["flops"] / (chip.flops / chip.devices),
    }
    bound = max(times, key=lambda name: times[name])
    return {"bytes": size, "bound": bound, "roofline_ms": round(1e3 * times[bound], 3)}


# ----------------------------------------------------------------------------------- tables


def rows_of(records: list[dict]) -> Iterator[list[str]]:
    """A row of the big table for each model, slice and number of adapters."""
    by_job: dict[tuple, dict[str, dict]] = {}
    for one in records:
        whole = one.get("expert_parallel", False)
        key = (one["model"], whole, one["slice"], one["adapters"], one["experts"])
        by_job.setdefault(key, {})[one["step"]] = one
    order = {name: at for at, name in enumerate([*MODELS, *SLICES])}
    for key in sorted(by_job, key=lambda key: (order[key[0]], key[1], order[key[2]], *key[3:])):
        steps = by_job[key]
        need, limit = (max(one[of] for one in steps.values()) for of in ("need", "limit"))
        over = (need - limit) / GIB
        model, whole, where, adapters, experts = key
        cells = [f"{model}{', whole experts' if whole else ''}", where]
        cells.append(f"{adapters}{' + experts' if experts else ''}")
        cells += [f"{need / GIB:.1f}", "yes" if over <= 0 else f"no, by {over:.1f}"]
        if over > 0:
            yield cells + [""] * 7
            continue
        base = by_job.get((model, whole, where, 0, False), {}).get("decode")
        yield cells + decode_cells(steps.get("decode"), base) + prefill_cells(steps)


def decode_cells(decode: dict | None, base: dict | None) -> list[str]:
    if decode is None:
        return [""] * 4
    ratio = f"{without_kv(decode) / without_kv(base):.3f}" if base else ""
    time_ = f"{decode['roofline_ms']:.2f}"
    return [f"{decode['bytes'] / 1e9:.2f}", ratio, time_, collectives_text(decode)]


def prefill_cells(steps: dict[str, dict]) -> list[str]:
    """With the seconds that compiling took, of decode and prefill."""
    seconds = " + ".join(f"{one['compile_seconds']:.0f}" for _, one in sorted(steps.items()))
    prefill = steps.get("prefill")
    if prefill is None:
        return ["", "", seconds]
    return [f"{prefill['moved']['flops'] / 1e12:.2f}", f"{prefill['roofline_ms']:.1f}", seconds]


def without_kv(record: dict) -> int:
    return record["bytes"] - record["moved"]["kv"]


def collectives_text(record: dict) -> str:
    return (
        ", ".join(
            f"{one['count']} {kind} {one['bytes'] / 1e6:.1f} MB"
            for kind, one in record["collectives"].items()
        )
        or "none"
    )


HEADER = (
    *("model", "slice", "adapters", "needs GiB", "fits", "decode GB", "× base without KV"),
    *("decode ms", "collectives of a decode step", "prefill TFLOP", "prefill ms", "compile s"),
)


def table(header: tuple[str, ...], rows: Iterator[list[str]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one_hot_rows() -> Iterator[list[str]]:
    """The kernels against masked einsums: all LoRA of an 8B step on one device."""
    model = describe_config(MODELS["llama-3.1-8b"])
    cases = [(32, 8, 8), (32, 32, 8), (32, 32, 32), (2048, 8, 8), (2048, 32, 8), (2048, 32, 32)]
    for one in one_hot_table(model, cases):
        cells = [str(one[name]) for name in ("tokens", "slots", "used")]
        for what in ("pool", "flops"):
            for of in ("kernel", "one_hot"):
                cells.append(f"{one[f'{of}_{what}'] / (1e9 if what == 'pool' else 1e12):.2f}")
        yield cells


ONE_HOT_HEADER = (
    *("tokens", "slots", "in use", "A and B read, GB", "by one-hot, GB"),
    *("TFLOP as run", "by one-hot, TFLOP"),
)


def print_tables(path: Path) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    print(table(HEADER, rows_of(records)), table(ONE_HOT_HEADER, one_hot_rows()), sep="\n\n")


# -------------------------------------------------------------------------------------- main


def jobs_of(args: argparse.Namespace) -> list[Job]:
    return [
        Job(
            model,
            where,
            int(count.rstrip("e")),
            count.endswith("e"),
            args.batch,
            args.context,
            at,
            args.expert_parallel,
        )
        for model in args.models
        for where in args.chips
        for count in args.adapters
        for at in ([None] if "decode" in args.steps else [])
        + ([args.prefill] if "prefill" in args.steps else [])
        if not (count.endswith("e") or args.expert_parallel) or "num_experts" in MODELS[model]
        if not args.expert_parallel or SLICES[where].devices > 1
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--chips", nargs="+", choices=SLICES, default=list(SLICES))
    help_ = "how many; with an e, those of a mixture's experts too"
    parser.add_argument("--adapters", nargs="+", default=["0", "8", "32", "8e"], help=help_)
    help_ = "mixtures only, with whole experts on each device"
    parser.add_argument("--expert-parallel", action="store_true", help=help_)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--batch", type=int, default=32, help="sequences of a decode step")
    parser.add_argument("--context", type=int, default=2048, help="positions of each of them")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of a prefill step")
    parser.add_argument("--processes", type=int, help="by default as memory and cores allow")
    help_ = "JSON lines; what is in it already is not compiled again"
    parser.add_argument("--out", type=Path, default=Path("tpu_aot.jsonl"), help=help_)
    parser.add_argument("--table", type=Path, help="only print the tables of such a file")
    return parser.parse_args()


def default_processes() -> int:
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, int(memory / JOB_BYTES)))


def missing(jobs: list[Job], out: Path) -> list[Job]:
    """The jobs that have no record in the file."""
    seen = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    fields = {field.name for field in dataclasses.fields(Job)}
    done = {Job(**{name: one[name] for name in fields & one.keys()}) for one in seen}
    return [job for job in jobs if job not in done]


def main() -> None:
    args = parse_args()
    if args.table:
        print_tables(args.table)
        return
    jobs, failed = missing(jobs_of(args), args.out), 0
    context = multiprocessing.get_context("spawn")
    workers = args.processes or default_processes()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = {pool.submit(compile_job, job): job for job in jobs}
        for future in tqdm(as_completed(running), total=len(jobs), dynamic_ncols=True):
            try:
                record = future.result()
            except Exception as error:  # of one job: the others go on
                failed += 1
                tqdm.write(f"{running[future].name}: {str(error)[:300]}", file=sys.stderr)
                continue
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print_tables(args.out)
    if failed:
        sys.exit(f"{failed} of {len(jobs)} jobs failed")


if __name__ == "__main__":
    main()
