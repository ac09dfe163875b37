"""Times the engine through the public API; writes one JSON line a figure.

The workloads and keys are those of the published vLLM figures in docs/benchmarks.md: an 8B-shaped
Llama with random weights, rank-16 adapters on all seven projections, greedy, prompts of random
tokens, request i using adapter i mod n.

    python scripts/bench_engine.py --adapters 8 --out jlora_8.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from jlora import LLM, LoRARequest, SamplingParams
from jlora.model import load_hf_config, model_config
from jlora.projections import ModuleMap

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "olmoe": {  # OLMoE-1B-7B
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "rope_theta": 10000.0,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "rope_theta": 10000.0,
    },
}
DECODE_BATCHES = (1, 8, 32, 64, 128, 256)
WORKLOADS = ("decode", "prefill", "throughput", "load", "bandwidth")
PREFILLS = ((1, 128), (1, 1024), (16, 1024), (64, 512))


def write_model(folder: Path, shape: str) -> None:
    """A configuration without weights; load_format="dummy" makes them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPES[shape],
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(modules: ModuleMap, folder: Path, rank: int, seed: int, dora: bool) -> Path:
    """Random bf16 on all projections of all layers and experts, as PEFT would save it."""
    rng, tensors = np.random.default_rng(seed), {}

    def draw(scale: float, *shape: int) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32)
        return (values * scale).astype(ml_dtypes.bfloat16)

    for name in modules.names():
        place = modules.place(name)
        assert place is not None
        d_in, d_out = place.projection.d_in, place.projection.parts[place.part].width
        tensors[f"base_model.model.{name}.lora_A.weight"] = draw(d_in**-0.5, rank, d_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = draw(0.01, d_out, rank)
        if dora:
            magnitude = np.abs(draw(1.0, d_out)) + ml_dtypes.bfloat16(0.5)
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({part.name for row in modules.projections for part in row.parts})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    config["use_dora"] = dora
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Bench:
    """An engine, its adapters, and where the figures go."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.tags = args, {"adapters": args.adapters, "rank": max(args.ranks)}
        if len(args.ranks) > 1:
            self.tags |= {"ranks": args.ranks}
        if args.dora or args.reserve or args.shape != "8b":
            self.tags |= {"dora": args.dora, "reserve": args.reserve, "shape": args.shape}
        if args.tensor_parallel_size > 1:
            self.tags |= {"devices": args.tensor_parallel_size, "fully_sharded": args.fully_sharded}
        model = folder / "model"
        write_model(model, args.shape)
        modules = ModuleMap(model_config(load_hf_config(str(model))))
        spare = 8 if args.adapters and "load" in args.what else 0  # loaded while slots are full
        with ThreadPoolExecutor() as executor:
            made = executor.map(
                lambda seed: write_adapter(
                    modules,
                    folder / f"adapter{seed}",
                    args.ranks[seed % len(args.ranks)],
                    seed,
                    args.dora,
                ),
                range(args.adapters + spare),
            )
            paths = list(tqdm(made, total=args.adapters + spare, desc="adapters", leave=False))
        self.loras = [LoRARequest(f"a{i}", i + 1, str(path)) for i, path in enumerate(paths)]
        self.spare = self.loras[args.adapters :]
        options = {}
        if args.adapters:
            options = {
                "enable_lora": True,
                "max_loras": args.adapters,
                "max_cpu_loras": args.adapters + 4,
                "max_lora_rank": args.max_lora_rank or max(*args.ranks, 8),
                "enable_lora_dora": args.dora or args.reserve,
                "enable_lora_bias": args.reserve,
                "lora_expert_blocks": args.adapters * (modules.config.num_experts > 0),
                "fully_sharded_loras": args.fully_sharded,
            }
        if args.kernels:
            options["kernel_implementation"] = args.kernels
        start = time.perf_counter()
        self.llm = LLM(
            str(model),
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max(2048, args.context + 128),
            max_num_seqs=256,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enable_prefix_caching=args.context > 128,
            gpu_memory_utilization=args.gpu_memory_utilization,
            enforce_eager=args.eager,
            tensor_parallel_size=args.tensor_parallel_size,
            use_tqdm=True,
            **options,
        )
        self.say(what="init_s", v=round(time.perf_counter() - start, 1))
        self.rng = np.random.default_rng(0)
        self.kept: dict[tuple[int, int], list] = {}  # long prompts, which are computed once

    def say(self, **figure) -> None:
        """Prints and writes one figure."""
        line = json.dumps({**figure, **self.tags})
        print(line, flush=True)
        if self.args.out:
            with Path(self.args.out).open("a") as file:
                file.write(line + "\n")

    def run(
        self, batch: int, tokens: int, answer: int, loras: list[LoRARequest] | None = None
    ) -> float:
        """Seconds of one generate call."""
        prompts = self.kept.get((batch, tokens)) or self.prompts(batch, tokens)
        if self.args.context > 128:
            self.kept[batch, tokens] = prompts
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        used = self.loras[: self.args.adapters] if loras is None else loras
        requests = [used[i % len(used)] for i in range(batch)] if used else None
        start = time.perf_counter()
        self.llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        return time.perf_counter() - start

    def prompts(self, batch: int, tokens: int) -> list:
        """Of random tokens."""
        vocab = SHAPES[self.args.shape]["vocab_size"]
        drawn = self.rng.integers(10, vocab, (batch, tokens))
        return [{"prompt_token_ids": prompt.tolist()} for prompt in drawn]

    def decode(self, batches: list[int], in_use: int | None = None) -> None:
        """(66 tokens - 2 tokens) / 64 after prompts of `--context`, each the better of two.

        in_use: how many of the adapters the batch uses; all when None.
        """
        extra, loras, context = {}, None, self.args.context
        if context > 128:
            extra = {"context": context}
        if in_use is not None:
            extra |= {"in_use": in_use, "max_lora_rank": self.args.max_lora_rank}
            loras = self.loras[:in_use]
        for batch in batches:
            self.run(batch, context, 2, loras)
            long, short = (
                min(self.run(batch, context, n, loras) for _ in range(2)) for n in (66, 2)
            )
            step = (long - short) / 64
            self.say(
                what="decode",
                batch=batch,
                **extra,
                ms_per_step=round(step * 1e3, 3),
                tok_s=round(batch / step),
            )

    def prefill(self) -> None:
        """One generate of one token, the better of two."""
        for batch, tokens in PREFILLS:
            self.run(batch, tokens, 1)
            seconds = min(self.run(batch, tokens, 1) for _ in range(2))
            self.say(
                what="prefill",
                batch=batch,
                input=tokens,
                ms=round(seconds * 1e3, 2),
                tok_s=round(batch * tokens / seconds),
            )

    def bandwidth(self) -> None:
        """Bytes a second of adding one to 1 GB, read and written: what floors are made of."""
        add = jax.jit(lambda x: x + 1, donate_argnums=0)
        x = add(jnp.zeros(2**29, jnp.bfloat16))
        x.block_until_ready()
        start = time.perf_counter()
        for _ in range(20):
            x = add(x)
        x.block_until_ready()
        each = (time.perf_counter() - start) / 20
        self.say(what="bandwidth", gb_s=round(2 * x.nbytes / each / 1e9))

    def throughput(self) -> None:
        """512 requests of 256 tokens in, 128 out."""
        seconds = self.run(512, 256, 128)
        self.say(
            what="throughput 512 x (256 in, 128 out)",
            s=round(seconds, 3),
            out_tok_s=round(512 * 128 / seconds),
        )

    def load(self) -> None:
        """add_lora of adapters not seen before, and first requests on adapters from disk."""
        for lora in self.spare[:3]:
            start = time.perf_counter()
            self.llm.llm_engine.add_lora(lora)
            self.say(what="load_adapter_ms", v=round((time.perf_counter() - start) * 1e3, 1))
        first = [round(self.run(1, 16, 1, [lora]) * 1e3, 1) for lora in self.spare[3:7]]
        self.say(what="first request on an adapter that is on disk, ms", v=first)


def command_line(description: str) -> argparse.ArgumentParser:
    """What Bench goes by."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--adapters", type=int, default=0, help="0: LoRA off")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[16], help="of adapter 0, 1 ... and so on again"
    )
    parser.add_argument(
        "--context", type=int, default=128, help="prompt of decode; longer ones are cached"
    )
    parser.add_argument("--max-lora-rank", type=int, help="default: the rank")
    parser.add_argument(
        "--in-use", type=int, nargs="+", default=[None], help="adapters a batch uses (default: all)"
    )
    parser.add_argument("--dora", action="store_true", help="the adapters are DoRAs")
    parser.add_argument(
        "--reserve", action="store_true", help="reserve magnitudes and biases that nobody uses"
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--what", nargs="+", choices=WORKLOADS, default=[*WORKLOADS[:4]])
    parser.add_argument("--batches", nargs="+", type=int, default=list(DECODE_BATCHES))
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.6)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--fully-sharded", action="store_true", help="fully_sharded_loras")
    parser.add_argument("--eager", action="store_true", help="compile on first use")
    parser.add_argument("--kernels", help="xla, gpu or tpu (default: by the device)")
    parser.add_argument("--out", help="JSON lines are appended here too")
    return parser


def main() -> None:
    """See the module."""
    args = command_line(__doc__.split("\n")[0]).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(tempfile.mkdtemp(prefix="jlora-bench-"))
    try:
        bench = Bench(args, folder)
        steps = {
            "decode": lambda: [bench.decode(args.batches, n) for n in args.in_use],
            "prefill": bench.prefill,
            "throughput": bench.throughput,
            "bandwidth": bench.bandwidth,
            "load": bench.load,
        }
        for name in args.what:
            if name != "load" or args.adapters:
                steps[name]()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
