"""The command line: `jlora generate`, `jlora convert`, `jlora export-adapter`, `jlora demo`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

GENERATE_HELP = """\
Prompts come from the arguments, from --prompts FILE (one a line; .jsonl: one JSON object a line
with "prompt" or "prompt_token_ids", and optionally "lora" and any of the sampling options), or from
standard input. Answers are JSON lines in the order of the prompts. What the adapters of --lora need
(rank, DoRA, biases, vocabulary, experts) is reserved, and each has a slot unless --max-loras says
fewer.

  jlora generate MODEL "Hello" --lora sql=path/to/adapter --use sql
"""
CONVERT_HELP = """\
Writes MODEL with its weights packed, as an Orbax checkpoint, into OUT, with its configuration and
tokeniser. It can then be loaded by LLM(model=OUT), on any number of devices, each of which reads
only its part. The host holds all weights while they are written.
"""
EXPORT_HELP = """\
Writes any adapter that jlora reads (PEFT's, or an Orbax checkpoint of a JAX trainer) as
adapter_config.json and adapter_model.safetensors into OUT, which PEFT loads.
"""
SAMPLING = {
    "n": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "max_tokens": int,
    "min_tokens": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "logprobs": int,
}
ENGINE = {
    "dtype": str,
    "max_model_len": int,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "max_loras": int,
    "max_lora_rank": int,
    "max_cpu_loras": int,
    "gpu_memory_utilization": float,
    "kv_cache_memory_bytes": int,
    "tensor_parallel_size": int,
    "enable_expert_parallel": bool,
    "block_size": int,
}


def _add_options(parser: Any, title: str, options: dict[str, type]) -> None:
    group = parser.add_argument_group(title)
    for name, kind in options.items():
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": "store_true", "default": None}
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, **how)


def _given(args: argparse.Namespace, options: dict[str, type]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in options if getattr(args, name) is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jlora", description="Many LoRA adapters in one batch.")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the engine does")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser(
        "generate",
        help="answer prompts",
        description=GENERATE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_argument("model", help="a folder or Hub repository")
    generate.add_argument(
        "prompt", nargs="*", help="prompts (default: --prompts, or standard input)"
    )
    generate.add_argument("--prompts", type=Path, help="a file, one prompt a line, or .jsonl")
    generate.add_argument(
        "--lora", action="append", default=[], metavar="NAME=PATH", help="an adapter; repeatable"
    )
    generate.add_argument("--use", metavar="NAME", help="the adapter of prompts that name none")
    generate.add_argument("--out", type=Path, help="write here instead of standard output")
    generate.add_argument("--stop", action="append", help="a stop string; repeatable")
    generate.add_argument("--ignore-eos", action="store_true")
    generate.add_argument("--enforce-eager", action="store_true", help="compile on first use")
    generate.add_argument(
        "--distributed",
        nargs="?",
        const=(),
        type=_host,
        metavar="HOST:PORT,COUNT,INDEX",
        help="be one of several hosts: where process 0 is, how many processes there are, and which "
        "this one is, from 0; nothing where jax finds that out itself, as on TPU VMs",
    )
    _add_options(generate, "sampling", SAMPLING)
    _add_options(generate, "engine", ENGINE)
    _add_writers(commands)
    demo = commands.add_parser("demo", help="one mixed batch of the adapters that ship with jlora")
    demo.add_argument("text", nargs="*", help="one or two lower-case words (default: random ones)")
    demo.add_argument("--count", type=int, default=3, help="random texts, when none are given")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _add_writers(commands: Any) -> None:
    """The commands that write a model or an adapter in another form."""
    convert = commands.add_parser(
        "convert", help="write a model's weights ready for loading", description=CONVERT_HELP
    )
    convert.add_argument("model", help="a folder or Hub repository with safetensors")
    convert.add_argument("out", type=Path, help="a folder, which does not exist or is empty")
    convert.add_argument("--dtype", default="auto", help="of the weights (default: the model's)")
    convert.add_argument("--revision", help="of a Hub repository")
    export = commands.add_parser(
        "export-adapter", help="write an adapter as PEFT does", description=EXPORT_HELP
    )
    export.add_argument("adapter", help="a folder or Hub repository")
    export.add_argument("out", type=Path, help="a folder, which does not exist or is empty")
    export.add_argument("--model", help="check first that the adapter fits this model")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2 for input that is refused."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "generate":  # argparse stops collecting prompts at the first option
        args.prompt += [one for one in rest if not one.startswith("-")]
        rest = [one for one in rest if one.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        run = {
            "generate": _generate,
            "convert": _convert,
            "export-adapter": _export,
            "demo": _demo,
        }
        return run[args.command](args)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        print(f"jlora: {error}", file=sys.stderr)
        return 2


# -- generate ------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    from jlora import LLM, EngineArgs, LoRARequest, SamplingParams, follow

    adapters = dict(_named_path(item) for item in args.lora)
    requests = {
        name: LoRARequest(name, index, path)
        for index, (name, path) in enumerate(adapters.items(), start=1)
    }
    options = _given(args, ENGINE)
    if requests:
        options = {"enable_lora": True, "max_loras": len(requests), **options}
        options["lora_modules"] = list(requests.values())  # reserves what they need
    options["enforce_eager"] = args.enforce_eager
    # Prompts, too, are read by the first process only.
    if args.distributed is not None and not _leads(args.distributed, options):
        follow(EngineArgs.from_options(model=args.model, **options))
        return 0
    common = _given(args, SAMPLING)
    if args.stop:
        common["stop"] = args.stop
    if args.ignore_eos:
        common["ignore_eos"] = True
    prompts, params, loras = [], [], []
    for where, row in _rows(args):
        name = row.pop("lora", args.use)
        if name is not None and name not in requests:
            raise ValueError(f"{where}: adapter {name!r} is not among --lora {list(requests)}")
        prompts.append({key: row.pop(key) for key in ("prompt", "prompt_token_ids") if key in row})
        try:
            params.append(SamplingParams(**{**common, **row}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        loras.append(None if name is None else requests[name])
    if not prompts:
        raise ValueError("no prompts")
    llm = LLM(args.model, **options)
    outputs = llm.generate(prompts, params, lora_request=loras)
    with _output(args.out) as file:
        for output in outputs:
            print(json.dumps(_record(output), ensure_ascii=False), file=file)
    return 0


def _host(text: str) -> tuple[str, int, int]:
    """The address of the first process, how many there are, and which this one is."""
    try:
        address, count, index = text.split(",")
        return address, int(count), int(index)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not HOST:PORT,COUNT,INDEX (without these, --distributed comes last)"
        ) from None


def _leads(where: tuple[()] | tuple[str, int, int], options: dict[str, Any]) -> bool:
    """Joins jax.distributed; whether this is the first process. where: of `_host`, or nothing."""
    import jax

    from jlora import EngineArgs
    from jlora.engine import memory

    share = options.get("gpu_memory_utilization", EngineArgs.gpu_memory_utilization)
    memory.reserve_fraction(share)  # before jax runs
    jax.distributed.initialize(*where)
    return jax.process_index() == 0


def _named_path(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if not (name and equals and path):
        raise ValueError(f"--lora {item!r} must be NAME=PATH")
    return name, path


def _rows(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each prompt stands, and what is said of it."""
    if args.prompt and args.prompts:
        raise ValueError("give prompts as arguments or by --prompts, not both")
    if args.prompt:
        for index, prompt in enumerate(args.prompt, start=1):
            yield f"prompt {index}", {"prompt": prompt}
        return
    jsonl = args.prompts is not None and args.prompts.suffix in (".jsonl", ".json")
    text = args.prompts.read_text() if args.prompts is not None else sys.stdin.read()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        if not jsonl:
            yield where, {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not {"prompt", "prompt_token_ids"} & set(row):
            raise ValueError(f"{where} must be an object with prompt or prompt_token_ids")
        yield where, row


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("w") as file:
            yield file


def _record(output: Any) -> dict[str, Any]:
    answers = [
        {
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            **({} if answer.stop_reason is None else {"stop_reason": answer.stop_reason}),
            **(
                {} if answer.logprobs is None else {"cumulative_logprob": answer.cumulative_logprob}
            ),
        }
        for answer in output.outputs
    ]
    lora = output.lora_request
    prompt = {} if output.prompt is None else {"prompt": output.prompt}
    return {**prompt, "lora": None if lora is None else lora.lora_name, "outputs": answers}


# -- convert, export-adapter ---------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    import jax

    from jlora.model import convert_model

    jax.config.update("jax_platforms", "cpu")  # leaves a TPU's chips to who serves
    convert_model(args.model, args.out, dtype=args.dtype, revision=args.revision)
    print(f"{args.out} holds the weights of {args.model}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from jlora.manager import export_adapter

    if args.model is not None:
        _check_fit(args.adapter, args.model)
    export_adapter(args.adapter, args.out)
    print(f"{args.out} holds the adapter of {args.adapter}")
    return 0


def _check_fit(adapter: str, model: str) -> None:
    """Raises AdapterError for an adapter that is not of this model."""
    from jlora import LoRARequest
    from jlora.manager import UNLIMITED, AdapterLoader
    from jlora.model import BaseWeights, load_hf_config, model_config
    from jlora.projections import ModuleMap

    config = model_config(load_hf_config(model))
    loader = AdapterLoader(ModuleMap(config), UNLIMITED, BaseWeights(config, model, None))
    loader.load(LoRARequest(Path(adapter).name, 1, adapter))


# -- demo ----------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    import random
    import time

    from jlora import LLM, LoRARequest, SamplingParams
    from jlora.demo_tasks import ADAPTER_TASKS, BASE_TASK, prompt

    assets = Path(__file__).parent / "demo_assets"
    rng = random.Random(args.seed)
    texts = args.text or [BASE_TASK.sample(rng) for _ in range(args.count)]
    loras = {
        task.name: LoRARequest(task.name, index, str(assets / "adapters" / task.name))
        for index, task in enumerate(ADAPTER_TASKS, start=1)
    }
    print(f"One base model of 0.8 M parameters, {len(loras)} adapters of ranks 4 to 32.")
    print(
        "Compiling for this machine; then one shuffled batch, every request with its own adapter."
    )
    llm = LLM(
        str(assets / "base"),
        enable_lora=True,
        max_loras=len(loras),
        max_lora_rank=32,
        max_model_len=128,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        enforce_eager=True,
    )
    jobs = [(text, task) for text in texts for task in (BASE_TASK, *ADAPTER_TASKS)]
    rng.shuffle(jobs)
    prompts = [prompt(text) for text, _ in jobs]
    requests = [loras.get(task.name) for _, task in jobs]
    params = SamplingParams(temperature=0, max_tokens=48)
    llm.generate(prompts, params, lora_request=requests)  # compiles what the batch needs
    llm.llm_engine.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
    seconds = time.perf_counter() - start
    answers = {
        (text, task.name): output.outputs[0]
        for (text, task), output in zip(jobs, outputs, strict=True)
    }
    right = 0
    print(f"\n{'adapter':<14}{'prompt':<22}{'answer':<36}")
    for text in texts:
        for task in (BASE_TASK, *ADAPTER_TASKS):
            answer = answers[text, task.name].text
            correct = answer == task.answer(text)
            right += correct
            name = "(base)" if task is BASE_TASK else task.name
            mark = "" if correct else f"   (expected {task.answer(text)})"
            print(f"{name:<14}{textwrap.shorten(text, 20):<22}{answer}{mark}")
        print()
    tokens = sum(len(answer.token_ids) for answer in answers.values())
    print(
        f"{right} of {len(jobs)} as the task says; {len(jobs)} requests, {tokens} tokens in "
        f"{seconds:.2f} s: {tokens / seconds:.0f} tokens a second, all adapters in one batch."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
