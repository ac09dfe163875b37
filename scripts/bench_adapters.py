"""Times the engine with more adapters than slots; writes one JSON line a figure.

    python scripts/bench_adapters.py --what resident zipf load --out zipf.jsonl
    python scripts/bench_adapters.py --what cliff --ranks 16 --out cliff.jsonl
    python scripts/bench_adapters.py --what simulate --max-loras 8 16 32 64 128

zipf: `--outstanding` requests are always in the engine, and the adapter that is k-th in popularity
is asked for with a probability of 1/k^zipf. resident: as zipf, but among the most popular adapters
that fit on the device, which are there before it begins: what zipf is to be compared with. cliff:
16 requests at a time for one of a few adapters, fewer and more than there are slots. load: steps of
others while newcomers' adapters come in that nobody has asked for, and while newcomers' adapters
are there. simulate: a scheduler for which loads are free, without an engine: how much too few slots
cost by themselves.

Only two adapters of each rank are written. All others are folders of symbolic links to those, so
their files are in the page cache after the first reads, and no figure here holds the time of a
disk. To the engine they are different adapters, each read, checked and copied by itself.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from simulate_slots import simulate, spread, write, zipf_draws
from tqdm import tqdm

WORKLOADS = ("resident", "zipf", "cliff", "load", "simulate")
STEP_MS = "1:6.65 8:6.84 32:7.39 64:8.71 128:9.66 256:12.8"  # 8B shapes, 8 adapters, one H100
REAL = 2  # adapters of each rank that are written
CLIFF_CLIENTS, CLIFF_REQUESTS, CLIFF_SHAPE = 16, 256, (256, 64)  # at a time, in all, (in, out)
STEADY, LOAD_EVERY, LOAD_RANK, LOAD_INPUT = 32, 20, 16, 16
LOAD_SPARE_STEPS = 400  # what the last of the loads may take


@dataclass
class Tally:
    """What steps brought. ended: requests, failed: those of them that ended with "abort"."""

    first: dict[str, float] = field(default_factory=dict)  # seconds to a request's first token
    steps: list[float] = field(default_factory=list)  # seconds
    tokens: int = 0
    busy: int = 0  # steps that gave a token
    ended: int = 0
    failed: int = 0


def adapters_moved(before: Any, after: Any) -> dict[str, Any]:
    """How many adapters were read and copied between two LoRAStats, a second and how long each."""

    def mean_ms(one: Any, other: Any) -> float:
        return round((other.total - one.total) / max(other.count - one.count, 1) * 1e3, 1)

    return {
        "loads": after.loads.count - before.loads.count,
        "load_ms": mean_ms(before.loads, after.loads),
        "copies": after.copies.count - before.copies.count,
        "copy_ms": mean_ms(before.copies, after.copies),
        "hits": after.hits - before.hits,
    }


class Clients:
    """Adds requests and steps the engine, with an eye on the clock."""

    def __init__(self, engine: Any, vocab: int) -> None:
        from jlora import SamplingParams
        from jlora.request import RequestOutputKind

        self.engine, self.vocab, self.added = engine, vocab, 0
        self.open: dict[str, float | None] = {}  # when it was added, None once it has a token
        self.tally, self._rng = Tally(), np.random.default_rng(1)
        self._params = lambda answer: SamplingParams(
            temperature=0,
            max_tokens=answer,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def add(self, lora: Any, tokens: int, answer: int) -> str:
        """A request of random tokens; lora: None for the base."""
        name, self.added = f"r{self.added}", self.added + 1
        prompt = {"prompt_token_ids": self._rng.integers(10, self.vocab, tokens).tolist()}
        self.open[name] = time.perf_counter()
        self.engine.add_request(name, prompt, self._params(answer), lora_request=lora)
        return name

    def step(self) -> None:
        """One step, noted in `tally`."""
        start, tally = time.perf_counter(), self.tally
        outputs = self.engine.step()
        now, before = time.perf_counter(), tally.tokens
        tally.steps.append(now - start)
        for output in outputs:
            tokens = sum(len(one.token_ids) for one in output.outputs)
            tally.tokens += tokens
            added = self.open.get(output.request_id)
            if tokens and added is not None:
                tally.first[output.request_id] = now - added
                self.open[output.request_id] = None
            if output.finished:
                del self.open[output.request_id]
                tally.ended += 1
                tally.failed += any(one.finish_reason == "abort" for one in output.outputs)
        tally.busy += tally.tokens > before

    def serve(
        self, loras: Iterator[Any], at_once: int, count: int, shape: tuple[int, int], what: str
    ) -> dict[str, Any]:
        """Keeps `at_once` requests open; the figures of `count` that end, after `at_once` others.

        shape: tokens of a prompt and of its answer. The first answers are shorter, each by
        another length, so that requests do not end and start all at once.
        """
        self.tally, warm, start = Tally(), False, 0.0
        before_it = self.engine.lora_stats()
        lengths = iter(self._rng.integers(1, shape[1], at_once, endpoint=True).tolist())
        with tqdm(total=at_once + count, desc=what, leave=False) as bar:
            while not warm or self.tally.ended < count:
                while len(self.open) < at_once:
                    self.add(next(loras), shape[0], next(lengths, shape[1]))
                    if len(self.open) == 1:  # while nobody runs adapters are read one by one
                        self.step()
                before = self.tally.ended
                self.step()
                bar.update(self.tally.ended - before)
                if not warm and self.tally.ended >= at_once:
                    self.tally, warm, start = Tally(), True, time.perf_counter()
                    before_it = self.engine.lora_stats()
        seconds, tally = time.perf_counter() - start, self.tally
        figures = {
            "out_tok_s": round(tally.tokens / seconds, 1),
            "requests_s": round(tally.ended / seconds, 2),
            "first_token_ms": spread([*tally.first.values()], 1),
            "step_ms": spread(tally.steps),
            "sequences_a_step": round(tally.tokens / max(tally.busy, 1), 1),
            "steps": len(tally.steps),
            "failed": tally.failed,
            "s": round(seconds, 2),
            **adapters_moved(before_it, self.engine.lora_stats()),
        }
        self.stop()
        return figures

    def touch(self, loras: list[Any], what: str) -> None:
        """One token from each, one after the other: the last ones have the slots."""
        for lora in tqdm(loras, desc=what, leave=False):
            self.add(lora, LOAD_INPUT, 1)
            self.finish()

    def finish(self) -> None:
        """Steps until every request has ended."""
        while self.engine.has_unfinished_requests():
            self.step()

    def stop(self) -> None:
        """Ends every request."""
        self.engine.abort_request(list(self.open))
        self.open.clear()
        self.engine.step()  # collects the step that is under way


class Bench:
    """An engine, its adapters, and where the figures go."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        import jax
        from bench_engine import SHAPES, write_model

        from jlora import LLMEngine
        from jlora.config import LORA_BLOCK_RANK, EngineArgs
        from jlora.model import load_hf_config, model_config
        from jlora.projections import ModuleMap

        self.args, self.slots = args, args.max_loras[0]
        write_model(folder / "model", args.shape)
        modules = ModuleMap(model_config(load_hf_config(str(folder / "model"))))
        ranks = np.random.default_rng(2).choice(args.ranks, args.adapters).tolist()
        spare = args.loads if "load" in args.what else 0
        loras = self._adapters(modules, folder, ranks + [LOAD_RANK] * spare)
        self.loras, self.spare = loras[: args.adapters], loras[args.adapters :]
        blocks = [-(-rank // LORA_BLOCK_RANK) for rank in (*ranks, *[LOAD_RANK] * bool(spare))]
        pool = args.pool_blocks or self.slots * max(blocks)
        self.fitting = int((np.cumsum(blocks[: args.adapters])[: self.slots] <= pool).sum())
        self.tags = {
            **{name: getattr(args, name) for name in ("shape", "adapters", "ranks", "zipf")},
            "max_loras": self.slots,
            "max_cpu_loras": args.max_cpu_loras,
            "max_lora_loads": args.max_lora_loads,
            "pool_blocks": pool,
            "device": jax.devices()[0].device_kind,
        }
        self.steady_answer = 2 * args.loads * LOAD_EVERY + LOAD_SPARE_STEPS + 100
        longest = max(*CLIFF_SHAPE, args.output, self.steady_answer if spare else 0) + args.input
        options = {"kernel_implementation": args.kernels} if args.kernels else {}
        start = time.perf_counter()
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                str(folder / "model"),
                dtype="bfloat16",
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=max(2048, longest),
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                enable_prefix_caching=False,
                gpu_memory_utilization=args.gpu_memory_utilization,
                enforce_eager=args.eager,
                enable_lora=True,
                max_loras=self.slots,
                max_cpu_loras=max(args.max_cpu_loras, self.slots),
                max_lora_loads=args.max_lora_loads,
                max_lora_rank=max(*args.ranks, LOAD_RANK if spare else 1),
                lora_pool_blocks=args.pool_blocks,
                lora_expert_blocks=pool * (modules.config.num_experts > 0),
                **options,
            ),
            progress=True,
        )
        self.clients = Clients(engine, SHAPES[args.shape]["vocab_size"])
        self.say(what="init_s", v=round(time.perf_counter() - start, 1))

    @staticmethod
    def _adapters(modules: Any, folder: Path, ranks: list[int]) -> list[Any]:
        """A few files of each rank, and links to them for all others."""
        from bench_engine import write_adapter

        from jlora import LoRARequest

        made: dict[int, list[Path]] = {}
        for rank in tqdm(sorted(set(ranks)), desc="adapters", leave=False):
            paths = [(folder / f"rank{rank}_{seed}", seed) for seed in range(REAL)]
            made[rank] = [write_adapter(modules, path, rank, seed, False) for path, seed in paths]
        loras = []
        for index, rank in enumerate(tqdm(ranks, desc="links", leave=False)):
            path = folder / f"adapter{index}"
            path.mkdir()
            for file in made[rank][index % REAL].iterdir():
                (path / file.name).symlink_to(file)
            loras.append(LoRARequest(f"a{index}", index + 1, str(path)))
        return loras

    def say(self, **figure: Any) -> None:
        """Prints and writes one figure."""
        write(self.args, {**figure, **self.tags})

    def zipf(self) -> None:
        """Among all adapters."""
        self._popular("zipf", len(self.loras))

    def resident(self) -> None:
        """Among the most popular ones that fit, each loaded before."""
        self.clients.touch(self.loras[: self.fitting], "resident, first each alone")
        self._popular("resident", self.fitting)

    def _popular(self, what: str, among: int) -> None:
        args = self.args
        draws = zipf_draws(among, args.zipf, args.requests + 3 * args.outstanding)
        loras, shape = (self.loras[i] for i in draws), (args.input, args.output)
        found = self.clients.serve(loras, args.outstanding, args.requests, shape, what)
        load = {"outstanding": args.outstanding, "input": args.input, "output": args.output}
        self.say(what=what, among=among, **found, **load, max_num_seqs=args.max_num_seqs)

    def cliff(self) -> None:
        """A uniform choice among a few adapters, for first tokens."""
        rng = np.random.default_rng(3)
        for wanted in self.args.wanted:
            if wanted > len(self.loras):
                continue
            loras, title = self.loras[:wanted], f"{wanted} adapters"
            self.clients.touch(loras, title)
            total = CLIFF_REQUESTS + 3 * CLIFF_CLIENTS
            drawn = (loras[i] for i in rng.integers(0, wanted, total))
            found = self.clients.serve(drawn, CLIFF_CLIENTS, CLIFF_REQUESTS, CLIFF_SHAPE, title)
            self.say(what="cliff", wanted=wanted, **found)

    def load(self) -> None:
        """Step times while newcomers come, whose adapters must come or are there, in turn.

        load: steps in which an adapter was on its way. resident: the other steps in the turn of a
        newcomer whose adapter is there. quiet: those of them without a newcomer. A newcomer's
        prompt makes a step longer wherever its adapter is, so load is to be compared with resident.
        """
        clients, args = self.clients, self.args
        others = self.loras[: min(8, self.slots // 2)]
        clients.touch(others, "load, adapters of the others")
        steady = min(STEADY, args.max_num_seqs - 2)
        for i in range(steady):
            lora = others[i // 2 % len(others)] if i % 2 and others else None
            clients.add(lora, args.input, self.steady_answer)
        while any(added is not None for added in clients.open.values()):
            clients.step()
        resident = "resident", others[0] if others else None
        clients.add(resident[1], LOAD_INPUT, 1)  # compiles, with --eager
        for _ in range(LOAD_EVERY):
            clients.step()
        clients.tally = Tally()
        steps: dict[str, list[float]] = {"load": [], "resident": [], "quiet": []}
        first: dict[str, list[float]] = {"load": [], "resident": []}
        coming: dict[str, str] = {}  # newcomers, and whether they need a load
        turns = [(kind, lora) for new in self.spare for kind, lora in (("load", new), resident)]
        last = time.perf_counter()
        for i in tqdm(range(len(turns) * LOAD_EVERY + LOAD_SPARE_STEPS), desc="load", leave=False):
            turn, step = divmod(i, LOAD_EVERY)
            if turn < len(turns) and step == 0:
                kind, lora = turns[turn]
                coming[clients.add(lora, LOAD_INPUT, 1)] = kind
            elif turn >= len(turns) and not coming:
                break
            kinds = set(coming.values())
            clients.step()
            now = time.perf_counter()
            seconds, last = now - last, now
            if "load" in kinds:
                steps["load"].append(seconds)
            elif turn < len(turns) and turns[turn][0] == "resident":
                steps["resident"].append(seconds)
                steps["quiet"] += [] if kinds else [seconds]
            for name in [name for name in coming if name not in clients.open]:
                kind = coming.pop(name)
                if name in clients.tally.first:  # else it failed
                    first[kind].append(clients.tally.first[name])
        times = {kind: spread(seconds) for kind, seconds in steps.items()}
        ratios = {
            f"load_to_{kind}": {k: round(times["load"][k] / v, 2) for k, v in times[kind].items()}
            for kind in ("quiet", "resident")
            if times["load"] and times[kind]
        }
        self.say(
            what="load",
            sequences=steady,
            steps={kind: len(seconds) for kind, seconds in steps.items()},
            step_ms=times,
            **ratios,
            first_token_ms={kind: spread(seconds) for kind, seconds in first.items()},
            unfinished=len(coming),
            failed=clients.tally.failed,
        )
        clients.stop()


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", choices=WORKLOADS, default=["resident", "zipf"])
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument(
        "--max-loras", type=int, nargs="+", help="slots (default: 128; cliff alone 8; simulate 5)"
    )
    parser.add_argument("--max-cpu-loras", type=int, default=300)
    parser.add_argument("--max-lora-loads", type=int, default=4, help="reads at a time")
    parser.add_argument("--pool-blocks", type=int, help="lora_pool_blocks of the engine")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help="drawn")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--outstanding", type=int, default=512, help="requests at a time")
    parser.add_argument("--requests", type=int, default=2048, help="that are counted")
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--wanted", type=int, nargs="+", default=[4, 8, 9, 12, 16, 32])
    parser.add_argument("--loads", type=int, default=32, help="new adapters of load")
    parser.add_argument("--shape", default="8b", help="8b, olmoe or tiny")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--eager", action="store_true", help="compile on first use")
    parser.add_argument("--kernels", help="xla, gpu or tpu (default: by the device)")
    parser.add_argument("--max-passes", type=int, default=64, help="simulate: starts past one")
    parser.add_argument("--drains", type=int, default=0, help="simulate: at a time; 0: no limit")
    parser.add_argument("--step-ms", nargs="+", default=STEP_MS.split(), help="simulate: rows:ms")
    parser.add_argument(
        "--prompt-ms", type=float, default=0.0, help="simulate: for each token of a prompt"
    )
    parser.add_argument("--out", help="JSON lines are appended here too")
    args = parser.parse_args()
    engine = set(args.what) - {"simulate"}
    if args.max_loras is None:
        several = [8, 16, 32, 64, 128]
        args.max_loras = [8] if engine == {"cliff"} else [128] if engine else several
    if engine and len(args.max_loras) > 1:
        parser.error("an engine has one --max-loras; only simulate takes several")
    return args


def main() -> None:
    """See the module."""
    args = arguments()
    if "simulate" in args.what:
        simulate(args)
    timed = [name for name in args.what if name != "simulate"]
    if not timed:
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jlora.manager").setLevel(logging.WARNING)  # a line an adapter
    folder = Path(tempfile.mkdtemp(prefix="jlora-bench-"))
    try:
        bench = Bench(args, folder)
        for name in timed:
            getattr(bench, name)()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
