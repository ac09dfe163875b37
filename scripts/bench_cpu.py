"""Tokens a second on a CPU: jlora beside PEFT's mixed batches (`adapter_names`), in one run.

A Llama of random weights and one rank-16 adapter on all projections for each of eight users; both
generate greedily, in float32, for the same batch of prompts. Each is run once to warm up and then
timed, the better of `--repeats`; the tokens of both are compared. Needs torch and peft.

    taskset -c 0,1 python scripts/bench_cpu.py --out cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from jlora import LLM, LoRARequest, SamplingParams

ADAPTERS, RANK = 8, 16


def make_model(folder: Path, layers: int, hidden: int) -> LlamaForCausalLM:
    """Random weights, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def make_adapters(model: LlamaForCausalLM, folder: Path) -> PeftModel:
    """One PEFT model with all adapters, whose B is not zero; saved to folder/a0 and so on."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    peft_model = get_peft_model(model, config, adapter_name="a0")
    for index in range(1, ADAPTERS):
        peft_model.add_adapter(f"a{index}", config)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    peft_model.save_pretrained(folder, selected_adapters=[f"a{i}" for i in range(ADAPTERS)])
    return peft_model.eval()


def best(run: Callable[[], list[list[int]]], repeats: int, name: str) -> tuple[float, list]:
    """-> seconds of the fastest of the repeats after one to warm up, and the tokens."""
    run()
    times = []
    for _ in tqdm(range(repeats), desc=name, leave=False):
        start = time.perf_counter()
        tokens = run()
        times.append(time.perf_counter() - start)
    return min(times), tokens


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens generated")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="a JSON line is appended here too")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = Path(tempfile.mkdtemp(prefix="jlora-bench-"))
    peft_model = make_adapters(make_model(folder / "model", args.layers, args.hidden), folder)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 4096, (args.batch, args.prompt))
    used = [f"a{index % ADAPTERS}" for index in range(args.batch)]

    def with_peft() -> list[list[int]]:
        inputs = torch.from_numpy(prompts)
        with torch.no_grad():
            out = peft_model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                adapter_names=used,
                do_sample=False,
                max_new_tokens=args.answer,
            )
        return out[:, args.prompt :].tolist()

    llm = LLM(
        str(folder / "model"),
        dtype="float32",
        enable_lora=True,
        max_loras=ADAPTERS,
        max_lora_rank=RANK,
        max_num_seqs=args.batch,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 30,
    )
    loras = {f"a{i}": LoRARequest(f"a{i}", i + 1, str(folder / f"a{i}")) for i in range(ADAPTERS)}
    params = SamplingParams(temperature=0, max_tokens=args.answer, ignore_eos=True)

    def with_jlora() -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
            params,
            lora_request=[loras[name] for name in used],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    total = args.batch * args.answer
    peft_seconds, peft_tokens = best(with_peft, args.repeats, "PEFT")
    jlora_seconds, jlora_tokens = best(with_jlora, args.repeats, "jlora")
    line = json.dumps(
        {
            "what": "cpu, mixed batch",
            "cores": len(os.sched_getaffinity(0)),
            "batch": args.batch,
            "peft_tok_s": round(total / peft_seconds),
            "jlora_tok_s": round(total / jlora_seconds),
            "ratio": round(peft_seconds / jlora_seconds, 2),
            "same_answers": sum(
                ours == theirs for ours, theirs in zip(jlora_tokens, peft_tokens, strict=True)
            ),
        }
    )
    print(line)
    if args.out:
        with Path(args.out).open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
