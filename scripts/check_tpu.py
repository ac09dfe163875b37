"""The checks to run first on a real TPU: prints pass or FAIL for each, and fails if one did.

    python scripts/check_tpu.py                on a TPU VM, from a checkout with the test extra
    python scripts/check_tpu.py --cpu          the same on a CPU: kernels interpreted, few cases

What is checked: the devices that JAX sees; each TPU kernel against its definition, over the case
list of the tests; the demo model with adapters, by the TPU kernels and by plain XLA, and on several
devices; that nothing is compiled after warm-up; what memory the engine takes; HBM bandwidth, and
the time of a decode step of an 8B-wide model, both beside published peaks.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests/
os.environ |= {"JAX_PLATFORMS": "cpu"} if "--cpu" in sys.argv else {}

import jax
import jax.numpy as jnp
import numpy as np
from bench_engine import write_adapter
from step_traffic import Workload, step_traffic
from tpu_facts import CHIPS, MODELS, describe_config
from tqdm import tqdm

from jlora import LLM, LoRARequest, SamplingParams
from jlora.engine.aot import local_bytes
from jlora.files import first_line
from jlora.model import describe_model
from jlora.projections import ModuleMap
from tests.kernels import cases

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5": "v5p", "TPU7x": "tpu7x"}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
QUICK = ("one-token", "scattered-float32", "mixed-float32")  # interpreted on a CPU
PAGE_SIZE, BATCH, STEPS, SLACK = 32, 32, 64, 2.0  # SLACK: times the roofline that still pass


class Skipped(Exception):
    """A check that says nothing here."""


def said(error: Exception) -> str:
    """What an error says, or where it was raised: a bare assert says nothing."""
    if str(error).strip():
        return first_line(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno} {frame.line}"


class Checks:
    """Runs each check by its name; a check returns what it found or raises what is wrong."""

    def __init__(self, cpu: bool) -> None:
        self.cpu, self.failed = cpu, 0
        self.platform = jax.devices()[0].platform

    def run(self, name: str, check: Callable[[], str]) -> None:
        try:
            verdict, text = "pass", check()
        except Skipped as why:
            verdict, text = "skip", str(why)
        except Exception as error:  # whatever it is, the other checks still tell something
            verdict, text = "FAIL", f"{type(error).__name__}: {said(error)[:200]}"
            self.failed += 1
        print(f"{verdict:<5} {name:<14} {text}", flush=True)

    def all(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "devices", self.devices
        yield from self.kernels()
        yield "adapters", self.adapters
        yield "several", self.several
        yield "compilations", self.compilations
        yield "memory", self.memory
        yield "bandwidth", self.bandwidth
        yield "step time", self.step_time

    # -- devices and kernels ---------------------------------------------------------------

    def devices(self) -> str:
        found = jax.devices()
        text = f"{len(found)} {found[0].device_kind}, jax {jax.__version__}"
        stats = found[0].memory_stats() or {}
        if "bytes_limit" in stats:
            text += f", {stats['bytes_limit'] / 2**30:.2f} GiB each"
        if self.platform != "tpu" and not self.cpu:
            raise RuntimeError(f"no TPU here, but {text}; --cpu tries the script out on a CPU")
        return text if self.platform == "tpu" else f"{text}: no TPU, so no figure is one of a TPU"

    def kernels(self) -> Iterator[tuple[str, Callable[[], str]]]:
        for name, check, every in (
            ("lora_shrink", cases.check_shrink, cases.LORA_CASES),
            ("lora_expand", cases.check_expand, cases.LORA_CASES),
            ("attention", cases.check_attention, cases.ATTENTION_CASES),
            ("write_kv", cases.check_write_kv, cases.WRITE_CASES),
            ("gmm", cases.check_grouped, cases.GROUPED_CASES),
        ):
            taken = [one for one in every if one.dtype != "float16"]  # refused by name
            yield name, lambda name=name, check=check, taken=taken: self.kernel(name, check, taken)

    def kernel(self, name: str, check: Callable, every: list) -> str:
        if self.cpu:
            every = [case for case in every if case.id in QUICK]
            if name == "attention":
                raise Skipped("JAX's own kernel is not interpreted")
        wrong = []
        for case in tqdm(every, desc=name, leave=False, dynamic_ncols=True):
            try:
                check(case, "tpu", self.cpu)
            except Exception as error:
                wrong.append(f"{case.id} ({said(error)[:80]})")
        if wrong:
            raise AssertionError(f"{len(wrong)} of {len(every)} cases: {', '.join(wrong[:5])}")
        return f"{len(every)} cases" + (", interpreted" if self.cpu else "")

    # -- a small model ---------------------------------------------------------------------

    @functools.cached_property
    def engine(self) -> LLM:
        return self.demo("xla" if self.cpu else "tpu")

    def demo(self, implementation: str, devices: int = 1) -> LLM:
        return LLM(
            str(ROOT / "jlora/demo_assets/base"),
            enable_lora=True,
            max_loras=4,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=128,
            kernel_implementation=implementation,
            tensor_parallel_size=devices,
            enforce_eager=self.cpu,  # compiles only what is used
            use_tqdm=False,
            kv_cache_memory_bytes=2**24,
        )

    def answers(self, llm: LLM) -> list:
        folders = sorted((ROOT / "jlora/demo_assets/adapters").iterdir())[:3]
        loras = [LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(folders)]
        prompts = [f"{word} =" for word in ("many adapters", "one base", "abc", "hello there")]
        asked = [(prompt, lora) for prompt in prompts for lora in (None, *loras)]
        out = llm.generate(
            [prompt for prompt, _ in asked],
            GREEDY,
            lora_request=[lora for _, lora in asked],
            use_tqdm=False,
        )
        return [one.outputs[0].token_ids for one in out]

    def adapters(self) -> str:
        own = self.answers(self.engine)
        plain = own if self.cpu else self.answers(self.demo("xla"))
        same = sum(list(a) == list(b) for a, b in zip(own, plain, strict=True))
        if same < len(own):
            raise AssertionError(f"{len(own) - same} of {len(own)} greedy answers differ from XLA")
        if len({tuple(tokens) for tokens in own}) < 4:
            raise AssertionError("adapters and base answer alike")
        text = f"{len(own)} answers with 3 adapters and without"
        return text + (", by plain XLA only" if self.cpu else " are those of plain XLA")

    def several(self) -> str:
        count = max(n for n in (1, 2, 4) if n <= jax.device_count())  # the model has four heads
        if count == 1:
            raise Skipped("there is one device")
        one = self.answers(self.engine)
        shared = self.answers(self.demo("xla" if self.cpu else "tpu", count))
        same = sum(list(a) == list(b) for a, b in zip(one, shared, strict=True))
        if same < len(one):
            raise AssertionError(f"{len(one) - same} of {len(one)} greedy answers differ")
        return f"{count} devices answer as one"

    def compilations(self) -> str:
        seen: list[str] = []

        def listen(event: str, *_: Any, **__: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                seen.append(event)

        self.answers(self.engine)  # adapters have been read and written once
        jax.monitoring.register_event_duration_secs_listener(listen)
        self.answers(self.engine)
        if seen:
            raise AssertionError(f"{len(seen)} compilations after warm-up")
        return "none after warm-up"

    def memory(self) -> str:
        device = jax.devices()[0]
        if not (device.memory_stats() or {}).get("bytes_in_use"):
            raise Skipped("the device does not say what is in use")
        before = device.memory_stats()["bytes_in_use"]
        runner = self.demo("tpu").llm_engine.runner
        held = (runner.params, runner.kv, runner.state, runner.pool and runner.pool.state)
        expected, took = local_bytes(held), device.memory_stats()["bytes_in_use"] - before
        text = f"{took / 1e6:.1f} MB in use, {expected / 1e6:.1f} MB of arrays"
        if took > 1.5 * expected + 2**26:
            raise AssertionError(text)
        return text

    # -- against the roofline --------------------------------------------------------------

    def chip(self) -> str | None:
        return KINDS.get(jax.devices()[0].device_kind)

    def bandwidth(self) -> str:
        size = 2**24 if self.cpu else 2**30
        x = jnp.zeros(size // 4, jnp.float32)
        add = jax.jit(lambda x: x + 1, donate_argnums=0)
        x = add(x).block_until_ready()
        start, rounds = time.perf_counter(), 20
        for _ in range(rounds):
            x = add(x)
        x.block_until_ready()
        rate = 2 * size * rounds / (time.perf_counter() - start)
        return self.beside(f"{rate / 1e9:.0f} GB/s", rate, lambda chip: chip.bandwidth, "GB/s", 1e9)

    def beside(
        self, text: str, value: float, peak: Callable, unit: str, scale: float, slack: float = SLACK
    ) -> str:
        """The text with the published peak, which the value may miss by the slack."""
        if self.chip() is None:
            return f"{text}; no published peak of {jax.devices()[0].device_kind}"
        chip = CHIPS[self.chip()]
        best = peak(chip) / chip.devices
        text += f" of {best / scale:.0f} {unit}"
        if value < best / slack:
            raise AssertionError(text)
        return text

    def step_time(self) -> str:
        layers = 2 if self.cpu else 8
        config = MODELS["llama-3.1-8b"] | {"num_hidden_layers": layers}
        if self.cpu:
            config |= {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
            config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        with tempfile.TemporaryDirectory() as folder:
            times = [self.decode(config, Path(folder), adapters) for adapters in (0, 8)]
        text = f"{layers} layers, batch {BATCH}: "
        text += f"{times[0] * 1e3:.2f} ms, {times[1] * 1e3:.2f} with 8 adapters"
        if self.chip() is None:
            return text
        best, model = CHIPS[self.chip()], describe_config(config)
        described = describe_model(model, jax.make_mesh((1,), ("model",)))
        for seconds, adapters in zip(times, (0, 8), strict=True):
            work = Workload(BATCH, 1, STEPS, adapters)
            moved = step_traffic(model, described, 1, PAGE_SIZE, work)
            floor = moved.bytes * best.devices / best.bandwidth
            text += f"; roofline {floor * 1e3:.2f}"
            if not floor < seconds < SLACK * floor:
                raise AssertionError(text)
        return text

    def decode(self, config: dict, folder: Path, adapters: int) -> float:
        """Seconds a step of greedy decode through the engine, the host included."""
        path = folder / f"model{adapters}"
        path.mkdir()
        names = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
        (path / "config.json").write_text(json.dumps(config | names))
        options = {"enable_lora": True, "max_loras": adapters} if adapters else {}
        modules, loras = ModuleMap(describe_config(config)), []
        for i in range(adapters):
            made = write_adapter(modules, folder / f"adapter{i}", 16, i, False)
            loras.append(LoRARequest(f"a{i}", i + 1, str(made)))
        llm = LLM(
            str(path),
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_seqs=BATCH,
            enforce_eager=True,
            use_tqdm=False,
            **options,
        )
        requests = [loras[i % adapters] for i in range(BATCH)] if adapters else None
        rng = np.random.default_rng(0)
        prompts = [{"prompt_token_ids": rng.integers(10, 500, 8).tolist()} for _ in range(BATCH)]

        def run(answer: int) -> float:
            params = SamplingParams(
                temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False
            )
            start = time.perf_counter()
            llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
            return time.perf_counter() - start

        steps = 16 if self.cpu else STEPS
        run(2)
        short = run(2)
        return (run(2 + steps) - short) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="try the script out on a CPU")
    parser.add_argument("--only", nargs="+", help="the checks of these names")
    args = parser.parse_args()
    checks = Checks(args.cpu)
    every = dict(checks.all())
    if unknown := set(args.only or ()) - set(every):
        parser.error(f"no such checks: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    for name, check in every.items():
        if args.only is None or name in {"devices", *args.only}:
            checks.run(name, check)
        if name == "devices" and checks.failed:
            break  # the others would say nothing
    if checks.failed:
        sys.exit(f"{checks.failed} checks failed")
    print("all checks passed" + (" (no TPU was there)" if checks.platform != "tpu" else ""))


if __name__ == "__main__":
    main()
