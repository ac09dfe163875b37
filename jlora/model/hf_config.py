"""A Hugging Face configuration as a ModelConfig; what cannot be served is refused by name."""

from __future__ import annotations

from typing import Any

from jlora.config import ModelConfig, RopeConfig, resolve_dtype

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def load_hf_config(model: str, revision: str | None = None) -> Any:
    """The transformers configuration of a folder or Hub repository."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, revision=revision)


def model_config(hf: Any, dtype: Any = "auto") -> ModelConfig:
    """Reads a transformers configuration object.

    dtype: of weights, activations and KV; "auto" takes the checkpoint's, where float32 (which
    most old checkpoints just default to) stays float32.
    """
    if hf.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {hf.model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    quantization = getattr(hf, "quantization_config", None)
    if quantization:
        raise ValueError(f"quantization_config={quantization!r} is not supported")
    if hf.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act {hf.hidden_act!r} is not supported ({', '.join(ACTIVATIONS)})"
        )
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    stored = getattr(hf, "dtype", None) or getattr(hf, "torch_dtype", None)
    attention_bias = bool(getattr(hf, "attention_bias", False))
    eos, rope = hf.eos_token_id, _rope(hf)
    return ModelConfig(
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        rope=rope,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        max_position_embeddings=_positions(rope),
        hidden_act=hf.hidden_act,
        qkv_bias=attention_bias or hf.model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        qk_norm=hf.model_type == "qwen3",
        sliding_windows=_windows(hf),
        dtype=resolve_dtype(dtype, "dtype", auto=resolve_dtype(stored, "dtype", auto="float32")),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        bos_token_id=getattr(hf, "bos_token_id", None),
    )


def _rope(hf: Any) -> RopeConfig:
    params = dict(hf.rope_parameters or {})
    nested = sorted(key for key, value in params.items() if isinstance(value, dict))
    if nested:
        raise ValueError(f"rope_parameters of their own for {', '.join(nested)} are not supported")
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    theta = params.pop("rope_theta", None) or getattr(hf, "rope_theta", 10000.0)
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not supported ({', '.join(ROPE_TYPES)})")
    if params.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
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
    window = getattr(hf, "sliding_window", None)
    layers = hf.num_hidden_layers
    kinds = getattr(hf, "layer_types", None)
    if hf.model_type == "llama":  # which looks at neither
        return (None,) * layers
    if kinds and hf.model_type != "mistral":
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(f"layer type {', '.join(unknown)} is not supported")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window if hf.model_type == "mistral" else None,) * layers
