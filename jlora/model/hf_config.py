"""A Hugging Face configuration as a ModelConfig; what cannot be served is refused by name."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.config import ModelConfig, RopeConfig, resolve_dtype

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "olmoe",
)
# Families whose layers all have the window, or each has one or not; the others have none.
WINDOW_EVERYWHERE = ("mistral", "phi3", "mixtral", "qwen3_moe")
WINDOW_BY_LAYER = ("qwen2", "qwen3", "gemma2", "gemma3_text")
ATTENTION_BIAS = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "granite",
    "olmo2",
    "qwen3_moe",
    "olmoe",
)
MLP_BIAS = ("llama", "granite")
# Fields that change what a model computes, and the only values that are served.
ONLY: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "is_encoder_decoder": (False,),
    "is_heterogeneous": (False,),  # per_layer_config
    "use_bidirectional_attention": (None, False),
    "mlp_only_layers": (None, []),  # layers of both kinds in one model
    "decoder_sparse_step": (1,),
}


def load_hf_config(model: str, revision: str | None = None) -> Any:
    """The transformers configuration of a folder or Hub repository."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, revision=revision)


def model_config(hf: Any, dtype: Any = "auto") -> ModelConfig:
    """Reads a transformers configuration object.

    dtype: of weights, activations and KV; "auto" takes the checkpoint's, where float32 (which
    most old checkpoints just default to) stays float32.
    """
    family = hf.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    _refuse(hf)
    heads = hf.num_attention_heads
    stored = getattr(hf, "dtype", None) or getattr(hf, "torch_dtype", None)
    dtype = resolve_dtype(dtype, "dtype", auto=resolve_dtype(stored, "dtype", auto="float32"))
    attention_bias = family in ATTENTION_BIAS and bool(hf.attention_bias)
    eos, (rope, sliding_rope) = hf.eos_token_id, _ropes(hf)
    return ModelConfig(
        model_type=family,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        rms_norm_eps=hf.rms_norm_eps,
        rope=rope,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        max_position_embeddings=_positions(rope)
        if sliding_rope is None
        else rope.max_position_embeddings,
        hidden_act=_activation(hf),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family in MLP_BIAS and bool(hf.mlp_bias),
        sliding_rope=sliding_rope,
        sliding_windows=_windows(hf),
        dtype=dtype,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        bos_token_id=getattr(hf, "bos_token_id", None),
        **_flags(hf, dtype),
        **_experts(hf),
    )


def _flags(hf: Any, dtype: str) -> dict[str, Any]:
    """What is special about a family."""
    match hf.model_type:
        case "qwen3" | "qwen3_moe":
            return {"qk_norm": True}
        case "phi3":
            return {"fused_projections": True, "rope_restarts": True}
        case "gemma2" | "gemma3_text":
            scale = np.float32(hf.hidden_size**0.5).astype(jnp.dtype(dtype))
            return {
                "qk_norm": hf.model_type == "gemma3_text",
                "post_norms": True,
                "norm_in_float32": True,
                "norm_offset": 1.0,
                "embedding_scale": float(scale),
                "attention_scale": hf.query_pre_attn_scalar**-0.5,
                "attention_soft_cap": hf.attn_logit_softcapping,
                "logits_soft_cap": hf.final_logit_softcapping,
            }
        case "granite":
            return {
                "embedding_scale": float(hf.embedding_multiplier),
                "attention_scale": float(hf.attention_multiplier),
                "residual_scale": float(hf.residual_multiplier),
                "logits_divisor": float(hf.logits_scaling),
            }
        case "olmo2":
            return {
                "qk_norm": True,
                "qk_norm_whole": True,
                "pre_norms": False,
                "post_norms": True,
                "norm_in_float32": True,
                "rope_in_float32": True,
            }
        case "olmoe":
            return {"qk_norm": True, "qk_norm_whole": True, "clip_qkv": hf.clip_qkv}
    return {}


def _experts(hf: Any) -> dict[str, Any]:
    """Of the families that are mixtures of experts."""
    match hf.model_type:
        case "mixtral":
            experts, inner, normalise = hf.num_local_experts, hf.intermediate_size, True
        case "olmoe":
            experts, inner, normalise = hf.num_experts, hf.intermediate_size, hf.norm_topk_prob
        case "qwen3_moe":
            experts, inner = hf.num_experts, hf.moe_intermediate_size
            normalise = hf.norm_topk_prob
        case _:
            return {}
    if not 0 < hf.num_experts_per_tok <= experts:
        raise ValueError(f"num_experts_per_tok={hf.num_experts_per_tok} of {experts} experts")
    return {
        "num_experts": experts,
        "num_experts_per_tok": hf.num_experts_per_tok,
        "moe_intermediate_size": inner,
        "norm_topk_prob": bool(normalise),
    }


def _refuse(hf: Any) -> None:
    """Raises for what would change the mathematics and is not served."""
    only = dict(ONLY)
    if hf.model_type == "gemma3_text":  # has the field, and transformers does not look at it
        only["attn_logit_softcapping"] = (None,)
    for name, served in only.items():
        value = getattr(hf, name, served[0])
        if value not in served:
            raise ValueError(
                f"{name}={value!r} is not supported for {hf.model_type}; only {served[0]!r} is"
            )


def _activation(hf: Any) -> str:
    name = "hidden_activation" if hf.model_type.startswith("gemma") else "hidden_act"
    value = getattr(hf, name)
    if value not in ACTIVATIONS:
        raise ValueError(f"{name} {value!r} is not supported ({', '.join(ACTIVATIONS)})")
    return value


def _ropes(hf: Any) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotation of all layers; or of the full ones, and of those with a window."""
    params = dict(hf.rope_parameters or {})
    if hf.model_type == "gemma3_text":
        kinds = tuple(kind for kind in ROPE_TYPES if kind not in ("dynamic", "longrope"))
        full, sliding = (
            _rope(hf, dict(params[kind]), kinds) for kind in ("full_attention", "sliding_attention")
        )
        return full, sliding
    return _rope(
        hf, params, ("default", "longrope") if hf.model_type == "phi3" else ROPE_TYPES
    ), None


def _rope(hf: Any, params: dict[str, Any], kinds: tuple[str, ...]) -> RopeConfig:
    nested = sorted(key for key, value in params.items() if isinstance(value, dict))
    if nested:
        raise ValueError(f"rope_parameters of their own for {', '.join(nested)} are not supported")
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    theta = params.pop("rope_theta", None) or getattr(hf, "rope_theta", 10000.0)
    if kind not in kinds:
        raise ValueError(
            f"rope_type {kind!r} is not supported for {hf.model_type} ({', '.join(kinds)})"
        )
    if params.get("partial_rotary_factor", 1.0) != 1.0 and hf.model_type != "phi3":
        raise ValueError(f"partial_rotary_factor other than 1 is not supported for {hf.model_type}")
    frozen = {key: tuple(v) if isinstance(v, list) else v for key, v in params.items()}
    return RopeConfig(kind, float(theta), hf.max_position_embeddings, tuple(sorted(frozen.items())))


def _positions(rope: RopeConfig) -> int:
    """The longest sequence: these types stretch the context that they name by their factor."""
    longest, factor = rope.max_position_embeddings, rope.get("factor", 1.0)
    match rope.type:
        case "linear" | "dynamic":
            return int(longest * factor)
        case "yarn":
            original = rope.get("original_max_position_embeddings", longest)
            return max(longest, int(original * factor))
        case _:
            return longest


def _windows(hf: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer, by the rule of transformers' models."""
    layers = hf.num_hidden_layers
    if hf.model_type in WINDOW_EVERYWHERE:
        return (hf.sliding_window,) * layers
    if hf.model_type not in WINDOW_BY_LAYER:  # which look at neither field
        return (None,) * layers
    unknown = sorted(set(hf.layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"layer type {', '.join(unknown)} is not supported")
    window = hf.sliding_window
    if window is None and "sliding_attention" in hf.layer_types:
        raise ValueError("layer_types names sliding_attention, but sliding_window is None")
    return tuple(window if kind == "sliding_attention" else None for kind in hf.layer_types)
