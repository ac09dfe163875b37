"""Train the demo model and its LoRA adapters from nothing, on a CPU.

The base is a tiny Llama that reads single bytes. It first learns every task
of `jlora.demo_tasks`, each behind its own marker token; a prompt without a
marker is repeated. Each adapter then learns to do its task *without* the
marker, which is a small change to the base and needs only a few steps.

    python scripts/train_demo.py --out jlora/demo_assets
"""

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from jlora.demo_tasks import ADAPTER_TASKS, BASE_TASK, TASKS, Task, prompt

BASE_NAME = "jlora-demo"
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
IGNORE = -100  # the label that the loss leaves out

# The model has no memory of a conversation, so only the last message counts.
CHAT_TEMPLATE = (
    "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %} ={% endif %}"
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# The adapters differ in rank, scaling and target modules on purpose: together
# they cover what a server of PEFT adapters has to handle.
ADAPTERS = {
    "upper": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "reverse": {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION},
    "sort": {"r": 32, "lora_alpha": 32, "target_modules": ATTENTION},
    "rot13": {"r": 8, "lora_alpha": 16, "target_modules": MLP},
    "count-vowels": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION + MLP},
    "drop-vowels": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [*ATTENTION, "down_proj"],
        # A plain name matches in every layer, a longer one in its layer only.
        "rank_pattern": {"v_proj": 16, "layers.0.self_attn.q_proj": 4},
        "alpha_pattern": {"v_proj": 16, "down_proj": 8},
    },
    "double": {"r": 16, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True},
    "title": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]},
}


def marker(task: Task) -> str:
    """The token that asks the base for a task; the base task needs none."""
    return "" if task is BASE_TASK else f"<|{task.name}|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, so it can read any text."""
    special = [PAD, BOS, EOS] + [marker(task) for task in ADAPTER_TASKS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of about a million parameters with grouped-query attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Sampler:
    """Draws training examples, never with an input of the final test."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random, held_out: set[str]):
        self.tokenizer, self.rng, self.held_out = tokenizer, rng, held_out

    def batch(self, tasks: list[Task], size: int, marked: bool) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, both of shape (size, longest example).

        Padding is on the right and needs no mask, because attention is causal.
        Only the answers and the end tokens have labels.
        """
        prompts, answers = [], []
        for task in self.rng.choices(tasks, k=size):
            while (text := task.sample(self.rng)) in self.held_out:
                pass
            prompts.append((marker(task) if marked else "") + prompt(text))
            answers.append(task.answer(text) + EOS)
        prompt_ids = self.tokenizer(prompts).input_ids
        answer_ids = self.tokenizer(answers, add_special_tokens=False).input_ids
        rows = [
            (torch.tensor(p + a), torch.tensor([IGNORE] * len(p) + a))
            for p, a in zip(prompt_ids, answer_ids, strict=True)
        ]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([ids for ids, _ in rows], True, self.tokenizer.pad_token_id),
            "labels": pad([labels for _, labels in rows], True, IGNORE),
        }


def fit(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    next_batch: Callable[[], dict[str, torch.Tensor]],
    steps: int,
    name: str,
) -> None:
    """Train with a learning rate that rises shortly and then falls to zero."""

    def factor(step: int) -> float:
        return min((step + 1) / (0.1 * steps), 1 - step / steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    bar = tqdm(range(steps), desc=name, mininterval=2)
    for _ in bar:
        loss = model(**next_batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def train_base(sampler: Sampler, args: argparse.Namespace) -> LlamaForCausalLM:
    """Train a fresh base on a mix of all tasks, each behind its marker."""
    model = build_model(sampler.tokenizer)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    # Muon is for matrices only; with it this mix trains in far fewer steps than with AdamW alone.
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01),
    ]
    tasks = list(TASKS.values())
    fit(model, optimizers, lambda: sampler.batch(tasks, args.batch_size, True), args.steps, "base")
    return model


def train_adapter(
    base: LlamaForCausalLM, task: Task, sampler: Sampler, args: argparse.Namespace
) -> PeftModel:
    """Train one adapter on its task, on prompts without a marker."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[task.name]))
    # PEFT notes the folder that the base came from, which means nothing elsewhere.
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    fit(
        model,
        [optimizer],
        lambda: sampler.batch([task], args.batch_size, False),
        args.adapter_steps,
        task.name,
    )
    return model


def train(out: Path, sampler: Sampler, args: argparse.Namespace) -> None:
    """Train the base and the adapters and save them under `out`."""
    base_dir, adapters_dir = out / "base", out / "adapters"
    shutil.rmtree(adapters_dir, ignore_errors=True)
    if not args.keep_base:
        shutil.rmtree(base_dir, ignore_errors=True)
        sampler.tokenizer.save_pretrained(base_dir)
        train_base(sampler, args).save_pretrained(base_dir)
    for task in ADAPTER_TASKS:
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        model = train_adapter(base, task, sampler, args)
        model.save_pretrained(adapters_dir / task.name, save_embedding_layers=False)
        (adapters_dir / task.name / "README.md").unlink(missing_ok=True)  # an empty form


@torch.no_grad()
def accuracy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    texts: list[str],
) -> float:
    """The part of `texts` that greedy decoding answers without any mistake."""
    model.eval()
    inputs = tokenizer([prompt(text) for text in texts], padding=True, return_tensors="pt")
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=48,
        do_sample=False,
    )
    answers = tokenizer.batch_decode(
        output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
    return sum(a == task.answer(text) for a, text in zip(answers, texts, strict=True)) / len(texts)


def evaluate(out: Path, tests: dict[str, list[str]]) -> float:
    """Load what was saved, print a table of accuracies, return the lowest one."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    lowest = 1.0
    print(f"{'task':<14}{'base alone':>12}{'adapter':>12}{'kB':>8}")
    for task in TASKS.values():
        base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        score = alone = accuracy(base, tokenizer, task, tests[task.name])
        row, folder = f"{task.name:<14}{alone:>12.1%}", out / "base"
        if task is not BASE_TASK:
            folder = out / "adapters" / task.name
            model = PeftModel.from_pretrained(base, folder)
            score = accuracy(model, tokenizer, task, tests[task.name])
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        shown = "" if task is BASE_TASK else f"{score:.1%}"
        print(f"{row}{shown:>12}{size / 1000:>8.0f}")
        lowest = min(lowest, score)
    return lowest


def main() -> int:
    """Train, then test on inputs that the training never used."""
    parser = argparse.ArgumentParser(description="Train the demo model and its adapters.")
    parser.add_argument("--out", type=Path, default=Path("jlora/demo_assets"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800, help="steps of the base")
    parser.add_argument("--adapter-steps", type=int, default=200, help="steps of each adapter")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--test-size", type=int, default=200, help="test inputs of each task")
    parser.add_argument("--floor", type=float, default=0.95, help="least accuracy to accept")
    parser.add_argument("--keep-base", action="store_true", help="train only the adapters")
    parser.add_argument("--test-only", action="store_true", help="test the files that are there")
    args = parser.parse_args()

    disable_progress_bar()  # of loading, which is instant here
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tests = {t.name: [t.sample(rng) for _ in range(args.test_size)] for t in TASKS.values()}
    if not args.test_only:
        start = time.monotonic()
        held_out = {text for texts in tests.values() for text in texts}
        train(args.out, Sampler(build_tokenizer(), rng, held_out), args)
        print(f"training took {(time.monotonic() - start) / 60:.1f} minutes")
    lowest = evaluate(args.out, tests)
    if lowest < args.floor:
        print(f"the lowest accuracy, {lowest:.1%}, is under {args.floor:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
