"""Random models and adapters, and what transformers and PEFT answer with them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

VOCAB = 101
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Large, so that the answers depend on every weight and are not the same token for ever.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIE = 1e-4  # logits closer than this may be ordered either way


def rope(rope_type: str, **parameters) -> dict:
    """The rope_parameters entry of a configuration."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


LLAMA3_ROPE = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONGROPE = rope(
    "longrope",
    short_factor=[1.0 + 0.05 * i for i in range(8)],
    long_factor=[1.5 + 0.5 * i for i in range(8)],
    original_max_position_embeddings=96,
    factor=4.0,
)
PHI = {"head_dim": None, "pad_token_id": 0}
PHI_LONGROPE = rope(  # turns 6 of a head's 8 dimensions
    "longrope",
    partial_rotary_factor=0.75,
    short_factor=[1.0 + 0.05 * i for i in range(3)],
    long_factor=[1.5 + 0.5 * i for i in range(3)],
    original_max_position_embeddings=96,
)
# Family -> (model_type, differences from SIZES).
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama2": ("llama", {"num_key_value_heads": 6, "head_dim": 8}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3.1": ("llama", LLAMA3_ROPE),
    "llama3.2": ("llama", {**LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 24}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", rope("linear", factor=2.0)),
    "llama-dynamic": ("llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 96}),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-longrope": ("llama", LONGROPE),
    "mistral": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen2-window": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
            "head_dim": None,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,  # tied, and scaled, it would repeat its last token
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "initializer_range": 0.05,  # as tied embeddings are scaled, its last token wins else
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": (
        "phi3",
        {**rope("default", partial_rotary_factor=0.75), **PHI, "sliding_window": 24},
    ),
    "phi3-longrope": ("phi3", {**PHI_LONGROPE, **PHI, "original_max_position_embeddings": 96}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.3,
        },
    ),
    "olmo2": ("olmo2", {"pad_token_id": 0}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (
        "olmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "clip_qkv": 0.9,
            "head_dim": None,
            "pad_token_id": 0,
        },
    ),
}


def make_model(family: str, folder: Path, seed: int = 0, **changes) -> torch.nn.Module:
    """A random model of the family, saved to the folder (two shards), biases and norms random."""
    model_type, differences = FAMILIES[family]
    sizes = {**SIZES, **differences, **changes}
    config = transformers.AutoConfig.for_model(
        model_type, **{key: value for key, value in sizes.items() if value is not None}
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in name:  # Gemma's multiply by 1 + weight, so by about 2
                parameter.normal_(1, 0.1)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# What a family calls these, or has instead of them.
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
ATTENTION_ONLY = {
    "all-linear": ".*[qkvo]_proj",  # PEFT would take the experts too
    "mlp.down_proj": "self_attn.o_proj",
    "gate_proj": "k_proj",
    "up_proj": "q_proj",
    "down_proj": "o_proj",
}
RENAMED = {"phi3": FUSED, **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), ATTENTION_ONLY)}


def adapter_kinds(rank_limit: int = 64, family: str = "llama3") -> dict[str, dict]:
    """LoraConfig arguments of adapters of different ranks and kinds, for a family's modules."""
    kinds = {
        "all-8": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
        "qv-4": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "mlp-16": {"r": 16, "lora_alpha": 8, "target_modules": ["gate_proj", "down_proj"]},
        "rslora-24": {"r": 24, "lora_alpha": 12, "target_modules": ALL, "use_rslora": True},
        "patterns": {
            "r": 6,
            "lora_alpha": 6,
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 20},
            "alpha_pattern": {"v_proj": 9, "layers.0.*": 2},
        },
        "one-layer-1": {
            "r": 1,
            "target_modules": ["o_proj", "up_proj"],
            "layers_to_transform": [1],
        },
        "all-64": {"r": 64, "lora_alpha": 32, "target_modules": "all-linear"},
    }
    kinds = {name: kind for name, kind in kinds.items() if kind["r"] <= rank_limit}
    renamed = RENAMED.get(FAMILIES[family][0])
    if renamed is None:
        return kinds
    names = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in renamed))
    return json.loads(names.sub(lambda match: renamed[match[0]], json.dumps(kinds)))


INVOCATION = [7, 8]  # of activated LoRAs
TOKENS, ADDED = [5, 40, 99], 3


def special_kinds(family: str) -> dict[str, dict]:
    """LoraConfig arguments of what only some adapters have; `added` resizes the vocabulary first.

    Of everything that PEFT can make for the family.
    """
    model_type, differences = FAMILIES[family]
    fused, moe = model_type == "phi3", "num_experts_per_tok" in differences
    q, v = ("qkv_proj",) * 2 if fused else ("q_proj", "v_proj")
    last = "o_proj" if moe else "down_proj"
    some = list(dict.fromkeys([q, v, last]))
    kinds = {
        "dora": {"r": 8, "target_modules": [*some, "o_proj"], "use_dora": True},
        "dora-patterns": {
            "r": 4,
            "target_modules": [q, "o_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"layers.1.*o_proj": 18},
        },
        "dora-vocabulary": {
            "r": 5,
            "target_modules": ["embed_tokens", "lm_head"],
            "use_dora": True,
        },
        "lora-bias": {"r": 6, "target_modules": [*some, "lm_head"], "lora_bias": True},
        "embed": {"r": 7, "target_modules": ["embed_tokens", v]},
        "head": {"r": 20, "target_modules": ["lm_head", "o_proj"]},
        "saved-head": {"r": 2, "target_modules": [q], "modules_to_save": ["lm_head"]},
        "saved-both": {
            "r": 2,
            "target_modules": [last],
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
        "tokens": {"r": 3, "target_modules": [v], "trainable_token_indices": TOKENS},
        "tokens-apart": {
            "r": 3,
            "target_modules": ["o_proj"],
            "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [4, 41]},
        },
        "added": {"r": 4, "target_modules": [v], "added": ADDED},
        "added-targeted": {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "added": ADDED},
        "activated": {
            "r": 8,
            "target_modules": some,
            "alora_invocation_tokens": INVOCATION,
            "task_type": "CAUSAL_LM",
        },
    }
    if tied(family):
        both = {"ensure_weight_tying": True}
        kinds["tied-embed"] = {"r": 4, "target_modules": ["embed_tokens", q], **both}
        kinds["tied-saved"] = {
            "r": 4,
            "target_modules": [q],
            "modules_to_save": ["embed_tokens"],
            **both,
        }
    if biased(family):
        kinds["bias-all"] = {"r": 3, "target_modules": [v], "bias": "all"}
        kinds["bias-own"] = {"r": 3, "target_modules": [q, "o_proj"], "bias": "lora_only"}
        kinds["bias-dora"] = {"r": 3, "target_modules": [q], "bias": "all", "use_dora": True}
    if moe:
        where = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        kinds["experts"] = {"r": 3, "target_modules": [q], "target_parameters": where}
        kinds["experts-up"] = {"r": 18, "target_modules": [v], "target_parameters": where[:1]}
        kinds["experts-down"] = {"r": 5, "target_modules": [], "target_parameters": where[1:]}
        kinds["all-linear"] = {"r": 2, "target_modules": "all-linear"}
        kinds["router"] = {"r": 2, "target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    return kinds


def tied(family: str) -> bool:
    """Whether the head is the embedding."""
    model_type, differences = FAMILIES[family]
    return differences.get("tie_word_embeddings", model_type.startswith("gemma"))


def biased(family: str) -> bool:
    """Whether some projections have biases."""
    model_type, differences = FAMILIES[family]
    return model_type == "qwen2" or differences.get("attention_bias", False)


def load_base(model_folder: Path, added: int = 0) -> transformers.PreTrainedModel:
    """The base model in float32; added: tokens that its vocabulary is enlarged by."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder,
        attn_implementation="eager",  # the only one that knows Gemma 2's soft cap everywhere
    )
    base = base.float().eval()
    if added:
        base.resize_token_embeddings(base.config.vocab_size + added, mean_resizing=False)
    return base


def make_adapter(
    model_folder: Path, folder: Path, seed: int = 0, size: float = 0.25, added: int = 0, **kind
) -> None:
    """Saves a random adapter as PEFT does; all that is trained is changed, and so the answers."""
    torch.manual_seed(seed)
    model = get_peft_model(load_base(model_folder, added), LoraConfig(**kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or ".lora_embedding_A." in name:
                parameter.normal_(0, size)
            elif "magnitude" in name:
                parameter.mul_(1 + size * torch.randn_like(parameter))
            elif parameter.requires_grad and ".lora_" not in name:  # biases, rows, matrices
                parameter.add_(size * torch.randn_like(parameter))
            elif added and parameter.shape[0] == VOCAB + added:
                parameter[VOCAB:].normal_(0, size)
    model.save_pretrained(str(folder))


class Reference:
    """PEFT's answers, one sequence at a time, without a cache; a model for each adapter."""

    def __init__(self, model_folder: Path, adapters: dict[str, Path], added: int = ADDED) -> None:
        """Loads the base and every adapter; added: by those whose names begin so."""
        self.base = load_base(model_folder)
        self.models = {
            name: PeftModel.from_pretrained(
                load_base(model_folder, added if name.startswith("added") else 0), str(folder)
            ).eval()
            for name, folder in adapters.items()
        }

    @torch.no_grad()
    def logprobs(
        self, tokens: list[int], adapter: str | None, prompt: int | None = None
    ) -> np.ndarray:
        """[tokens, vocab] log-probabilities of what follows each token.

        prompt: how many of the tokens are the prompt, where invocation tokens are looked for (None:
        all).
        """
        options = {}
        model = self.base if adapter is None else self.models[adapter]
        if adapter is not None and model.active_peft_config.alora_invocation_tokens:
            found = last_invocation(tokens[:prompt])
            options["alora_offsets"] = [None if found is None else len(tokens) - found]
        logits = model(torch.tensor([tokens]), **options).logits
        return torch.log_softmax(logits[0].double(), dim=-1).numpy()


def last_invocation(prompt: list[int]) -> int | None:
    """Where INVOCATION comes last."""
    count = len(INVOCATION)
    found = [i for i in range(len(prompt) - count + 1) if prompt[i : i + count] == INVOCATION]
    return found[-1] if found else None


@dataclasses.dataclass
class Comparison:
    """What `compare` found."""

    tokens: int = 0
    ties: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)
    worst_logprob: float = 0.0
    logprobs: list[float] = dataclasses.field(default_factory=list)


def compare(
    found: Comparison,
    reference: Reference,
    prompt: list[int],
    adapter: str | None,
    answer: list[int],
    logprobs: list[dict] | None = None,
) -> None:
    """Checks a greedy answer by teacher forcing: every token must be the reference's best.

    Where the two best logits are within TIE either is right (and counted).
    """
    expected = reference.logprobs(prompt + answer, adapter, len(prompt))[len(prompt) - 1 : -1]
    for index, (token, row) in enumerate(zip(answer, expected, strict=True)):
        found.tokens += 1
        order = np.argsort(-row)
        if token != order[0]:
            if row[order[0]] - row[token] < TIE:
                found.ties += 1
            else:
                found.differences.append(
                    f"{adapter}, prompt of {len(prompt)}: token {index} is {token}, PEFT's "
                    f"{order[0]} (by {row[order[0]] - row[token]:.2g})"
                )
        if logprobs is not None:
            found.logprobs.append(logprobs[index][token].logprob)
            error = abs(found.logprobs[-1] - row[token])
            found.worst_logprob = max(found.worst_logprob, float(error))


def edit_config(folder: Path, **changes) -> None:
    """Changes keys of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
