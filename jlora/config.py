"""Configuration: frozen, checked when made, so that everything behind it can rely on it."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.request import LoRARequest

LORA_BLOCK_RANK = 16  # fills one bf16 tile of a TPU, the least width of a GPU's matrix unit
DTYPES = ("float32", "bfloat16", "float16")
DTYPE_ALIASES = {"float": "float32", "half": "float16"}
# "auto" takes what it finds; "orbax" is what `jlora convert` writes; "dummy" makes random weights.
LOAD_FORMATS = ("auto", "safetensors", "orbax", "dummy")


def resolve_dtype(name: Any, argument: str, auto: str) -> str:
    """A dtype argument ("auto", a name, a jnp or torch dtype) as one of `DTYPES`."""
    if name is None or name == "auto":
        return auto
    text = name if isinstance(name, str) else getattr(name, "__name__", None) or str(name)
    text = text.removeprefix("torch.")
    text = DTYPE_ALIASES.get(text, text)
    if text not in DTYPES:
        raise ValueError(f"{argument}={name!r} is not supported; use auto, {', '.join(DTYPES)}")
    return text


def require_int(name: str, value: Any, least: int) -> None:
    """Raises unless value is an int of at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


def require_seconds(name: str, value: Any, positive: bool = False) -> None:
    """Raises unless value is a finite number of seconds, above 0 if it must be."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < float("inf") or (value == 0 and not positive)):
        least = "above 0" if positive else "of at least 0"
        raise ValueError(f"{name} must be a number of seconds {least}, not {value!r}")


def require_bool(name: str, value: Any) -> None:
    """Raises unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


_RESERVED_SWITCHES = (
    "enable_lora_dora",
    "enable_lora_bias",
    "enable_lora_embeddings",
    "allow_nonfinite_loras",
    "fully_sharded_loras",
)
_RESERVED_COUNTS = (
    "max_lora_token_rows",
    "max_lora_full_weights",
    "lora_extra_vocab_size",
    "lora_expert_blocks",
)


@dataclass(frozen=True)
class LoRAConfig:
    """Limits of adapter serving.

    max_lora_rank: largest rank accepted. max_loras: slots on the device, so distinct adapters in
    one step. max_cpu_loras: adapters kept in host memory (default: twice max_loras, and at least 8
    more). max_cpu_lora_bytes: bytes of their tensors at most (up to 1 GB besides is kept for the
    next ones). lora_dtype: of the pool on the device, "auto" for the model's. target_modules: when
    given, the only modules (last name part, e.g. "q_proj") that an adapter may touch; others are
    refused.
    lora_pool_blocks: rank blocks (of 16) a projection on the device; by default enough for
    max_loras adapters of max_lora_rank, fewer make room for something else. max_lora_blocks: rank
    blocks a slot may list in each projection, so of one request (a mixture of adapters lists those
    of all); by default those of one adapter of max_lora_rank.

    What only some adapters need is reserved by name, and costs nothing when it is not:
    enable_lora_dora: DoRA's magnitudes. enable_lora_bias: lora_bias, and biases of their own.
    enable_lora_embeddings: low-rank adapters of embed_tokens and lm_head. max_lora_token_rows:
    tokens a slot whose row of embed_tokens or lm_head an adapter may replace or add.
    max_lora_full_weights: adapters on the device that replace the whole of embed_tokens or
    lm_head. lora_extra_vocab_size: tokens that an adapter may add to the vocabulary.
    lora_expert_blocks: rank blocks of the experts of a mixture-of-experts model, for all layers.
    allow_nonfinite_loras: serves adapters that hold NaN or infinity.
    fully_sharded_loras: divides A and B of every projection among the devices, where otherwise one
    of them is on each; costs a sum over the devices for every projection of a layer.

    How adapters come and go: max_lora_loads: reads at the same time, in the background.
    lora_load_timeout: seconds after which one is given up. lora_retry_seconds: for how long
    requests for an adapter that could not be loaded are refused before it is tried again.
    max_staged_loras: adapters that are copied to the device ahead of the slot that they wait for,
    each of which takes its size there meanwhile (on a single GPU room for the largest is kept for
    each). max_lora_passes: sequences that may start before
    one that waits for a slot; then slots are emptied for it.
    """

    max_lora_rank: int = 16
    max_loras: int = 1
    max_cpu_loras: int | None = None
    lora_dtype: str = "auto"
    target_modules: tuple[str, ...] | None = None
    lora_pool_blocks: int | None = None
    max_lora_blocks: int | None = None
    enable_lora_dora: bool = False
    enable_lora_bias: bool = False
    enable_lora_embeddings: bool = False
    max_lora_token_rows: int = 0
    max_lora_full_weights: int = 0
    lora_extra_vocab_size: int = 0
    lora_expert_blocks: int = 0
    allow_nonfinite_loras: bool = False
    max_cpu_lora_bytes: int | None = None
    max_lora_loads: int = 4
    lora_load_timeout: float = 60.0
    lora_retry_seconds: float = 5.0
    max_staged_loras: int = 4
    max_lora_passes: int = 64
    fully_sharded_loras: bool = False

    def __post_init__(self) -> None:
        require_int("max_lora_rank", self.max_lora_rank, 1)
        require_int("max_loras", self.max_loras, 1)
        if self.max_cpu_loras is None:
            warm = self.max_loras + max(self.max_loras, 8)  # a tier below the slots that is warm
            object.__setattr__(self, "max_cpu_loras", warm)
        require_int("max_cpu_loras", self.max_cpu_loras, 1)
        if self.host_capacity < self.max_loras:
            raise ValueError(
                f"max_cpu_loras={self.max_cpu_loras} is below max_loras={self.max_loras}: an "
                f"adapter on the device is also kept on the host; use {self.max_loras} or more"
            )
        object.__setattr__(
            self, "lora_dtype", resolve_dtype(self.lora_dtype, "lora_dtype", auto="auto")
        )
        names = self.target_modules
        if names is not None:
            listed = isinstance(names, (list, tuple, set, frozenset)) and names
            if not listed or not all(isinstance(name, str) and name for name in names):
                raise ValueError(f"target_modules must be a list of module names, not {names!r}")
            object.__setattr__(self, "target_modules", tuple(names))
        if self.max_lora_blocks is not None:
            require_int("max_lora_blocks", self.max_lora_blocks, self.rank_blocks)
        if self.lora_pool_blocks is not None:
            require_int("lora_pool_blocks", self.lora_pool_blocks, self.rank_blocks)
        if self.max_cpu_lora_bytes is not None:
            require_int("max_cpu_lora_bytes", self.max_cpu_lora_bytes, 1)
        for name in ("max_lora_loads", "max_staged_loras", "max_lora_passes"):
            require_int(name, getattr(self, name), 1)
        require_seconds("lora_load_timeout", self.lora_load_timeout, positive=True)
        require_seconds("lora_retry_seconds", self.lora_retry_seconds)
        for name in _RESERVED_SWITCHES:
            require_bool(name, getattr(self, name))
        for name in _RESERVED_COUNTS:
            require_int(name, getattr(self, name), 0)
        if self.fully_sharded_loras and self.enable_lora_dora:
            raise NotImplementedError(
                "fully_sharded_loras=True beside enable_lora_dora=True is not supported: the norms "
                "of DoRA need a whole A or B on each device"
            )

    @property
    def host_capacity(self) -> int:
        """max_cpu_loras with its default filled in."""
        assert self.max_cpu_loras is not None  # filled in by __post_init__
        return self.max_cpu_loras

    @property
    def rank_blocks(self) -> int:
        """Rank blocks of one adapter of the largest rank."""
        return -(-self.max_lora_rank // LORA_BLOCK_RANK)

    @property
    def max_blocks(self) -> int:
        """Rank blocks that one slot may list."""
        return self.max_lora_blocks or self.rank_blocks

    @property
    def pool_blocks(self) -> int:
        """Rank blocks on the device, for each projection."""
        return self.lora_pool_blocks or self.rank_blocks * self.max_loras


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `type` and its parameters, as `transformers` names them."""

    type: str
    theta: float
    max_position_embeddings: int
    params: tuple[tuple[str, Any], ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """A parameter of this rope type, or the default when it is absent or null."""
        value = dict(self.params).get(name)
        return default if value is None else value

    def rotary_dim(self, head_dim: int) -> int:
        """The first dimensions of a head, which are turned; the others stay."""
        return int(head_dim * self.get("partial_rotary_factor", 1.0))

    @property
    def length_dependent_from(self) -> int | None:
        """Sequences longer than this are rotated by frequencies that depend on their length."""
        if self.type == "dynamic":
            return self.max_position_embeddings
        if self.type == "longrope":
            return int(self.get("original_max_position_embeddings"))
        return None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: sizes and the flags in which the families differ, whose defaults are Llama's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    max_position_embeddings: int
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False  # qkv_proj and gate_up_proj are a module each
    pre_norms: bool = True  # in front of attention and MLP
    post_norms: bool = False  # behind them, before the residual sum
    norm_in_float32: bool = False  # norms multiply by their weight before they cast, not after
    norm_offset: float = 0.0  # added to that weight; only with norm_in_float32
    qk_norm: bool = False
    qk_norm_whole: bool = False  # with qk_norm: over all heads together, not over each
    clip_qkv: float | None = None  # q, k and v lie between minus and plus this
    rope_restarts: bool = False  # what outgrows the short rotations starts over, all by the long
    rope_in_float32: bool = False  # turns q and k before they are cast to dtype, not after
    sliding_rope: RopeConfig | None = None  # of the layers with a window, when not `rope`
    sliding_windows: tuple[int | None, ...] = ()  # a layer; None: full attention
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    attention_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add to the residual stream
    logits_divisor: float = 1.0
    logits_soft_cap: float | None = None
    num_experts: int = 0  # 0: a dense MLP of intermediate_size
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # the weights of a token's experts sum to one
    expert_parallel: bool = False  # devices have whole experts each, not a part of every one
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    extra_vocab_size: int = 0  # tokens that adapters may add

    @property
    def total_vocab(self) -> int:
        """The vocabulary with what adapters may add to it."""
        return self.vocab_size + self.extra_vocab_size

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotations: of all layers, or of full and of sliding ones."""
        return (self.rope,) if self.sliding_rope is None else (self.rope, self.sliding_rope)

    @property
    def restarts_above(self) -> int | None:
        """Sequences that grow longer than this are computed anew."""
        return self.rope.length_dependent_from if self.rope_restarts else None


@dataclass
class EngineArgs:
    """Arguments of an engine, named as vLLM names them; see docs/architecture.md for each.

    The sizes left None are chosen when the engine starts: max_model_len by the model,
    max_num_batched_tokens 2048, block_size 32, the KV cache by the memory that is left
    (kv_cache_memory_bytes sets it directly, the way of a CPU). lora_modules: adapters that are
    loaded at the start; what they need is reserved besides what the other options say.
    enable_expert_parallel: the devices divide the experts of a mixture among them, not each expert.
    lora_resolvers: who is asked, in this order, for an adapter that is known by name only.
    host_timeout: seconds without a sign of life after which one of several hosts is taken for lost.
    """

    model: str
    tokenizer: str | None = None
    dtype: Any = "auto"
    seed: int = 0
    revision: str | None = None
    tokenizer_revision: str | None = None
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    block_size: int | None = None
    enable_prefix_caching: bool | None = None
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enforce_eager: bool = False
    skip_tokenizer_init: bool = False
    max_logprobs: int = 20
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    lora_dtype: Any = "auto"
    lora_target_modules: tuple[str, ...] | list[str] | None = None
    lora_pool_blocks: int | None = None
    max_lora_blocks: int | None = None
    enable_lora_dora: bool = False
    enable_lora_bias: bool = False
    enable_lora_embeddings: bool = False
    max_lora_token_rows: int = 0
    max_lora_full_weights: int = 0
    lora_extra_vocab_size: int = 0
    lora_expert_blocks: int = 0
    allow_nonfinite_loras: bool = False
    max_cpu_lora_bytes: int | None = None
    max_lora_loads: int = 4
    lora_load_timeout: float = 60.0
    lora_retry_seconds: float = 5.0
    max_staged_loras: int = 4
    max_lora_passes: int = 64
    lora_modules: Sequence[LoRARequest] | None = None
    lora_resolvers: Sequence[Any] | None = None
    fully_sharded_loras: bool = False
    quantization: str | None = None
    kernel_implementation: str | None = None
    host_timeout: float = 30.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be a folder or a Hub repository, not {self.model!r}")
        if self.quantization:
            raise NotImplementedError(f"quantization={self.quantization!r} is not supported yet")
        if self.load_format not in LOAD_FORMATS:
            raise ValueError(
                f"load_format={self.load_format!r} is not supported; use one of "
                f"{', '.join(LOAD_FORMATS)}"
            )
        for name in (
            "enforce_eager",
            "skip_tokenizer_init",
            "enable_lora",
            "enable_expert_parallel",
        ):
            require_bool(name, getattr(self, name))
        if self.enable_prefix_caching is not None:
            require_bool("enable_prefix_caching", self.enable_prefix_caching)
        require_int("seed", self.seed, 0)
        require_int("tensor_parallel_size", self.tensor_parallel_size, 1)
        require_int("max_num_seqs", self.max_num_seqs, 1)
        require_int("max_logprobs", self.max_logprobs, 0)
        for name in (
            "max_model_len",
            "max_num_batched_tokens",
            "block_size",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
        ):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization={share!r} must be above 0, at most 1")
        seconds = self.host_timeout
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 2:
            raise ValueError(f"host_timeout={seconds!r} must be above 2 seconds")
        resolve_dtype(self.dtype, "dtype", auto="auto")
        self._lora_limits()
        if self.lora_modules is not None:
            self._check_lora_modules(self.lora_modules)
        for one in self.lora_resolvers or ():
            if not callable(getattr(one, "resolve_lora", None)):
                raise ValueError(f"lora_resolvers: {one!r} has no method resolve_lora")

    def _check_lora_modules(self, requests: Any) -> None:
        from jlora.request import LoRARequest  # which needs this module

        listed = isinstance(requests, (list, tuple))
        if not listed or not all(isinstance(one, LoRARequest) for one in requests):
            raise ValueError(f"lora_modules must be a list of LoRARequest, not {requests!r}")
        if not self.enable_lora:
            raise ValueError("lora_modules needs enable_lora=True")

    def lora_config(self) -> LoRAConfig | None:
        """The adapter limits, or None when LoRA is off."""
        return self._lora_limits() if self.enable_lora else None

    def _lora_limits(self) -> LoRAConfig:
        """The fields of LoRAConfig, which have the same names here but for target_modules."""
        names = {field.name for field in dataclasses.fields(LoRAConfig)} - {"target_modules"}
        limits = {name: getattr(self, name) for name in names}
        return LoRAConfig(target_modules=self.lora_target_modules, **limits)  # type: ignore[arg-type]

    @classmethod
    def from_options(cls, **options: Any) -> EngineArgs:
        """As the constructor, with an error that names every unknown argument."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(
                f"unknown argument {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        return cls(**options)


AsyncEngineArgs = EngineArgs
