"""The jitted functions of a step, compiled for arrays or for descriptions of arrays.

A step is `forward` (tokens to their hidden states) and `sample` (the last tokens' hidden states to
new tokens). They are compiled apart, since a forward is compiled for each token bucket with and
without adapters, a sampler for each sequence bucket and variant: the sum of both, not the product.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlora import kernels
from jlora.config import ModelConfig
from jlora.engine.joined import parted
from jlora.engine.sampler import VARIANTS, TokenLogprobs, Variant, sample, token_logprobs
from jlora.engine.state import (
    KV_LEN,
    PAGES,
    ROW,
    SAMPLE,
    SeqState,
    TokenView,
    admission,
    admit,
    empty_state,
    last_slots,
    last_tokens,
    token_view,
)
from jlora.kernels import Implementation
from jlora.model import (
    AXIS,
    AdapterState,
    LoadedModel,
    StepContext,
    TokenAdapters,
    rope_cos_sin,
)

# XLA's rematerialisation counts a donated KV cache again for each kernel that updates it in place,
# and then searches for 20 s a bucket for memory that nobody needs (seen on an H100).
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {"xla_disable_hlo_passes": "rematerialization"}
}
LOGPROB_CHUNK = 64  # prompt tokens whose logits exist at once


@dataclass(frozen=True)
class RunnerConfig:
    """The sizes that the compiled functions depend on."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    num_pages: int
    max_logprobs: int
    implementation: Implementation
    fully_sharded_loras: bool = False

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)

    @property
    def token_buckets(self) -> list[int]:
        """Token counts that steps are padded to: powers of two from 8, and the largest.

        From 256 on also half way between them: there a step takes as long as its tokens are many.
        """
        sizes = (
            size
            for power in (2**n for n in itertools.count(3))
            for size in ((power, power * 3 // 2) if power >= 256 else (power,))
        )
        smaller = itertools.takewhile(lambda size: size < self.max_num_batched_tokens, sizes)
        return [*smaller, self.max_num_batched_tokens]

    def seq_bucket(self, tokens: int) -> int:
        """Sequences that a step of so many tokens is padded to."""
        return min(tokens, self.max_num_seqs)

    @property
    def history(self) -> int:
        """Columns of SeqState.tokens: every position, and one past the last."""
        return self.max_model_len + 1


@dataclass
class StepArrays:
    """What a step works on: arrays, or ShapeDtypeStructs with shardings to compile for.

    params: the leaves of the model's weights. pool: None with LoRA off. hidden: what the last
    `forward` computed, in its first rows. It is written in place, as everything that stays on a
    device between steps: a GPU replays a recorded graph of a step, and for an array that is
    elsewhere XLA changes each of its kernels (5 ms for 600 of them).
    """

    params: list[Any]
    pool: AdapterState | None
    kv: Any  # [layers x pages, page_size, 2 x heads, head_dim]
    hidden: Any  # [max_num_batched_tokens, hidden]
    state: SeqState


class StepPrograms:
    """The functions of one model in one configuration, over the devices of a mesh."""

    def __init__(
        self,
        model: LoadedModel,
        model_config: ModelConfig,
        config: RunnerConfig,
        mesh: Mesh,
        pool_specs: AdapterState | None,
    ) -> None:
        """pool_specs: how the adapter pool is divided; None with LoRA off."""
        self._tree = jax.tree.structure(model.params)
        self._param_specs = jax.tree.leaves(
            model.specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )
        self.graph, self.pool_specs = model.graph, pool_specs
        self.model_config, self.config, self.mesh = model_config, config, mesh
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.kv_spec = PartitionSpec(None, None, AXIS, None)

    def kv(self) -> jax.ShapeDtypeStruct:
        """The KV cache, described."""
        config, model = self.config, self.model_config
        kept = kernels.storage_dtype(model.dtype, implementation=config.implementation)
        shape = kv_shape(model, config, self.mesh.shape[AXIS])
        return jax.ShapeDtypeStruct(shape, kept, sharding=NamedSharding(self.mesh, self.kv_spec))

    def hidden(self) -> jax.ShapeDtypeStruct:
        """The hidden states of a step's tokens, described."""
        shape = self.config.max_num_batched_tokens, self.model_config.hidden_size
        return self._array(shape, self.model_config.dtype)

    def state(self) -> SeqState:
        """The state of the sequences, described."""
        state = empty_state(self.config.max_num_seqs, self.config.history)
        return jax.tree.map(lambda one: self._array(one.shape, one.dtype), state)

    def describe(self, model: LoadedModel, pool: AdapterState | None) -> StepArrays:
        """What a step works on, described. model: of `describe_model`; pool: of Held."""
        if pool is not None:
            pool = jax.tree.map(
                lambda held: jax.ShapeDtypeStruct(
                    held.shape, held.dtype, sharding=NamedSharding(self.mesh, held.spec)
                ),
                pool,
            )
        params = jax.tree.leaves(model.params)
        return StepArrays(params, pool, self.kv(), self.hidden(), self.state())

    # -- the functions ---------------------------------------------------------------------

    def _forward(
        self,
        params: Any,
        pool: Any,
        kv: Array,
        hidden: Array,
        state: SeqState,
        batch: Array,
        *,
        tokens: int,
    ) -> tuple[Array, Array]:
        """-> kv and hidden, with this step's tokens in them."""
        model, view = self._model(params), token_view(state, batch, tokens, self.config.page_size)
        new, kv = model(view.tokens, kv, self._context(view, batch, pool))
        return kv, jax.lax.dynamic_update_slice(hidden, new, (0, 0))

    def _model(self, params: list[Array]) -> Any:
        return nnx.merge(self.graph, jax.tree.unflatten(self._tree, params))

    def _adapters(self, pool: AdapterState | None, slots: Array) -> TokenAdapters | None:
        if pool is None:
            return None
        config = self.config
        return TokenAdapters.of(pool, slots, config.implementation, config.fully_sharded_loras)

    def _context(self, view: TokenView, batch: Array, pool: AdapterState | None) -> StepContext:
        config, model = self.config, self.model_config
        ropes = tuple(
            rope_cos_sin(rope, model.head_dim, view.positions, view.rope_lengths)
            for rope in model.ropes
        )
        return StepContext(
            ropes=ropes,
            destinations=view.destinations,
            kv_lens=batch[:, KV_LEN],
            page_indices=batch[:, PAGES:],
            cu_q_lens=view.cu_q_lens,
            num_seqs=view.num_seqs,
            pages_per_layer=config.num_pages,
            implementation=config.implementation,
            adapters=self._adapters(pool, view.slots),
        )

    def _sample(
        self,
        params: Any,
        pool: AdapterState | None,
        hidden: Array,
        state: SeqState,
        batch: Array,
        *,
        variant: Variant,
    ) -> tuple[SeqState, Array, TokenLogprobs | None]:
        """-> state with the new tokens in the histories, tokens [seqs], log-probabilities.

        hidden: of `_forward`. pool: None when no adapter of the step changes the output matrix.
        """
        adapters = self._adapters(pool, last_slots(batch))
        logits = self._model(params).logits(hidden[last_tokens(batch)], adapters)
        tokens, logprobs = sample(logits, state, batch, variant, self.config.max_logprobs)
        rows = jnp.where(batch[:, SAMPLE] > 0, batch[:, ROW], self.config.max_num_seqs)
        history = state.tokens.at[rows, batch[:, KV_LEN]].set(tokens, mode="drop")
        fields = {**vars(state), "tokens": history}
        return SeqState(**fields), tokens, logprobs

    def _prompt_logprobs(
        self,
        params: Any,
        pool: AdapterState | None,
        hidden: Array,
        state: SeqState,
        batch: Array,
        *,
        tokens: int,
    ) -> TokenLogprobs:
        """The log-probability of what follows each token of the step. hidden: of `_forward`."""
        model, view = self._model(params), token_view(state, batch, tokens, self.config.page_size)
        chunk = min(LOGPROB_CHUNK, tokens)
        padding = -tokens % chunk
        hidden = jnp.pad(hidden[:tokens], ((0, padding), (0, 0)))
        hidden = hidden.reshape(-1, chunk, hidden.shape[1])
        targets = jnp.pad(view.next_tokens, (0, padding)).reshape(-1, chunk)
        none = kernels.NO_ADAPTER
        slots = jnp.pad(view.slots, (0, padding), constant_values=none).reshape(-1, chunk)

        def one(inputs: tuple[Array, Array, Array]) -> TokenLogprobs:
            logits = model.logits(inputs[0], self._adapters(pool, inputs[2]))
            return token_logprobs(logits, inputs[1], self.config.max_logprobs)

        chunks = jax.lax.map(one, (hidden, targets, slots))
        return jax.tree.map(lambda x: x.reshape(tokens + padding, *x.shape[2:])[:tokens], chunks)

    # -- compiling -------------------------------------------------------------------------

    def _sharded(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

    def lower(self, key: tuple, arrays: StepArrays) -> jax.stages.Lowered:
        """key: ("forward", tokens, lora), ("sample", seqs, variant, lora), ("prompt", tokens,
        lora) or ("admit",); lora: whether the pool is given to it.
        """
        params, state, kv, hidden = arrays.params, arrays.state, arrays.kv, arrays.hidden
        everywhere, weights, kv_spec = PartitionSpec(), self._param_specs, self.kv_spec
        if key[0] == "admit":
            new, at = admission([], self.config.max_num_seqs, self.config.history)
            told = [*vars(new).values(), at]
            placing = functools.partial(_admit, like=[self._array(x.shape, x.dtype) for x in told])
            admitted = jax.jit(placing, donate_argnums=(0,), out_shardings=self.replicated)
            return admitted.lower(state, self._array((sum(x.size for x in told),), np.int32))
        pool, pool_specs = (arrays.pool, self.pool_specs) if key[-1] else (None, None)

        def batch(seqs: int) -> jax.ShapeDtypeStruct:
            return self._array((seqs, PAGES + self.config.max_pages), np.int32)

        specs = (weights, pool_specs, everywhere, everywhere, everywhere)  # of sample and prompt
        match key:
            case ("forward", tokens, _):
                function = functools.partial(self._forward, tokens=tokens)
                inputs = (weights, pool_specs, kv_spec, everywhere, everywhere, everywhere)
                mapped = self._sharded(function, inputs, (kv_spec, everywhere))
                rows = batch(self.config.seq_bucket(tokens))
                forward = jax.jit(mapped, donate_argnums=(2, 3))
                return forward.lower(params, pool, kv, hidden, state, rows)
            case ("sample", seqs, variant, _):
                sampler = functools.partial(self._sample, variant=variant)
                mapped = self._sharded(sampler, specs, everywhere)
                sampled = jax.jit(mapped, donate_argnums=(3,))
                return sampled.lower(params, pool, hidden, state, batch(seqs))
            case ("prompt", tokens, _):
                score = functools.partial(self._prompt_logprobs, tokens=tokens)
                mapped = self._sharded(score, specs, everywhere)
                rows = batch(self.config.seq_bucket(tokens))
                return jax.jit(mapped).lower(params, pool, hidden, state, rows)
            case _:
                raise KeyError(key)

    def compile(self, key: tuple, arrays: StepArrays) -> jax.stages.Compiled:
        """Of a key as in `lower`."""
        options = COMPILER_OPTIONS.get(self.config.implementation)
        return self.lower(key, arrays).compile(options)

    def executables(self, adapts_vocabulary: bool) -> list[tuple]:
        """The keys of everything that serving can need. adapts_vocabulary: whether adapters may
        change the logits other than by the hidden state.
        """
        tokens = self.config.token_buckets
        seqs = sorted({self.config.seq_bucket(count) for count in tokens})
        lora = (False, True) if self.pool_specs is not None else (False,)
        vocab = (False, True) if adapts_vocabulary else (False,)
        return [
            ("admit",),
            *(("forward", count, on) for count in reversed(tokens) for on in lora),
            *(("sample", n, variant, on) for n in seqs for variant in VARIANTS for on in vocab),
            *(("prompt", count, on) for count in tokens for on in vocab),
        ]


def _admit(state: SeqState, told: Array, *, like: list[jax.ShapeDtypeStruct]) -> SeqState:
    """told: `joined`, an `admission`. like: the shapes and dtypes of its arrays."""
    *new, at = parted(told, like)
    return admit(state, SeqState(*new), at)


def kv_shape(model: ModelConfig, config: RunnerConfig, shards: int) -> tuple[int, ...]:
    """Shape of the KV cache over all devices: [layers x pages, page_size, 2 x heads, head_dim]."""
    local_heads = max(model.num_kv_heads // shards, 1)
    page_size, heads, head_dim = kernels.kv_page_shape(
        config.page_size,
        local_heads,
        model.head_dim,
        jnp.dtype(model.dtype),
        implementation=config.implementation,
    )
    return model.num_layers * config.num_pages, page_size, heads * shards, head_dim
