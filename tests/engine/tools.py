"""A small tokeniser, a small model that uses it, and engines that compile little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jlora import LLM
from tests.reference import make_adapter, make_model

SPECIAL = ["<pad>", "<s>", "</s>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and the other dogs",
    "many adapters are served from one base model in one batch",
    "une phrase déjà vue, über alles, 東京 東京 🙂🙂 naïve café",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, and a character may be cut into several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def make_text_model(
    folder: Path, family: str = "llama3", **changes: Any
) -> PreTrainedTokenizerFast:
    """A random model with the tokeniser of `make_tokenizer`, in one folder."""
    tokenizer = make_tokenizer()
    make_model(family, folder, vocab_size=len(tokenizer), **changes)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_adapters(model: Path, folder: Path, ranks: tuple[int, ...] = (4, 8, 20)) -> list[Path]:
    """All-modules adapters of these ranks."""
    folders = [folder / f"adapter-{rank}" for rank in ranks]
    for seed, (rank, path) in enumerate(zip(ranks, folders, strict=True)):
        make_adapter(model, path, seed=seed, r=rank, lora_alpha=rank, target_modules="all-linear")
    return folders


# Two token buckets and one sequence bucket; pages and chunks much shorter than the prompts.
SMALL = {
    "enforce_eager": True,
    "use_tqdm": False,
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 32,
    "max_cpu_loras": 4,
    "max_model_len": 96,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "num_gpu_blocks_override": 64,
}


def small_llm(model: Path, **options: Any) -> LLM:
    """An LLM of SMALL sizes, and of options."""
    return LLM(str(model), **{**SMALL, **options})
