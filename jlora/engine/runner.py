"""The device side of a step: the jitted functions, what they are compiled for, dispatch and read.

A step is `forward` (tokens to the hidden states that are sampled from) and `sample` (hidden states
to tokens). They are compiled apart, since a forward is compiled for each token bucket with and
without adapters, a sampler for each sequence bucket and variant: the sum of both, not the product.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from tqdm import tqdm

from jlora import kernels
from jlora.config import ModelConfig
from jlora.engine.adapter_pool import AdapterPool
from jlora.engine.sampler import VARIANTS, TokenLogprobs, Variant, sample, token_logprobs
from jlora.engine.scheduler import Entry, Plan
from jlora.engine.state import (
    ADMIT_ROWS,
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
    pack_batch,
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

logger = logging.getLogger(__name__)
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

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)

    @property
    def token_buckets(self) -> list[int]:
        """Token counts that steps are padded to: powers of two from 8, and the largest."""
        powers = itertools.takewhile(
            lambda size: size < self.max_num_batched_tokens, (2**n for n in itertools.count(3))
        )
        return [*powers, self.max_num_batched_tokens]

    def seq_bucket(self, tokens: int) -> int:
        """Sequences that a step of so many tokens is padded to."""
        return min(tokens, self.max_num_seqs)

    @property
    def history(self) -> int:
        """Columns of SeqState.tokens: every position, and one past the last."""
        return self.max_model_len + 1


@dataclass
class StepResult:
    """A dispatched step: its entries, and arrays that the device may still be computing."""

    entries: list[Entry]
    tokens: jax.Array | None
    logprobs: TokenLogprobs | None
    prompt_logprobs: TokenLogprobs | None

    def read(self) -> tuple[np.ndarray | None, TokenLogprobs | None, TokenLogprobs | None]:
        """Waits for the device: tokens [seqs], and the log-probabilities where asked for."""
        return jax.device_get((self.tokens, self.logprobs, self.prompt_logprobs))


class ModelRunner:
    """Owns weights, adapter pool, KV cache and sequence state; applies what the host decides."""

    def __init__(
        self,
        model: LoadedModel,
        model_config: ModelConfig,
        config: RunnerConfig,
        mesh: Mesh,
        pool: AdapterPool | None,
    ) -> None:
        """Allocates the KV cache and the rows of the sequences."""
        # A plain list: flattening an nnx.State of 200 weights takes a millisecond at every call.
        self.params, self._params_tree = jax.tree.flatten(model.params)
        self._param_specs = jax.tree.leaves(
            model.specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )
        self.graph = model.graph
        self.model_config, self.config, self.mesh, self.pool = model_config, config, mesh, pool
        self._replicated = NamedSharding(mesh, PartitionSpec())
        shards = mesh.shape[AXIS]
        self._kv_spec = PartitionSpec(None, None, AXIS, None)
        kept = kernels.storage_dtype(model_config.dtype, implementation=config.implementation)
        self.kv = jax.jit(
            functools.partial(jnp.zeros, kv_shape(model_config, config, shards), kept),
            out_shardings=NamedSharding(mesh, self._kv_spec),
        )()
        state = empty_state(config.max_num_seqs, config.history)
        self.state: SeqState = jax.device_put(state, self._replicated)
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    # -- the jitted functions --------------------------------------------------------------

    def _forward(
        self, params: Any, pool: Any, kv: Array, state: SeqState, batch: Array, *, tokens: int
    ) -> tuple[Array, Array, Array]:
        """-> kv, hidden [seqs, hidden] of each sequence's last token, hidden of every token."""
        config, model = self.config, self._model(params)
        view = token_view(state, batch, tokens, config.page_size)
        hidden, kv = model(view.tokens, kv, self._context(view, batch, pool))
        last = jnp.maximum(view.cu_q_lens[1:] - 1, 0)
        return kv, hidden[last], hidden

    def _model(self, params: list[Array]) -> Any:
        return nnx.merge(self.graph, jax.tree.unflatten(self._params_tree, params))

    def _adapters(self, pool: AdapterState | None, slots: Array) -> TokenAdapters | None:
        if pool is None:
            return None
        return TokenAdapters.of(pool, slots, self.config.implementation)

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

        pool: None when no adapter of the step changes the output matrix.
        """
        adapters = self._adapters(pool, last_slots(batch))
        logits = self._model(params).logits(hidden, adapters)
        tokens, logprobs = sample(logits, state, batch, variant, self.config.max_logprobs)
        rows = jnp.where(batch[:, SAMPLE] > 0, batch[:, ROW], self.config.max_num_seqs)
        history = state.tokens.at[rows, batch[:, KV_LEN]].set(tokens, mode="drop")
        fields = {**vars(state), "tokens": history}
        return SeqState(**fields), tokens, logprobs

    def _prompt_logprobs(
        self, params: Any, pool: AdapterState | None, hidden: Array, state: SeqState, batch: Array
    ) -> TokenLogprobs:
        """The log-probability of what follows each token of the step."""
        model, tokens = self._model(params), hidden.shape[0]
        view = token_view(state, batch, tokens, self.config.page_size)
        chunk = min(LOGPROB_CHUNK, tokens)
        padding = -tokens % chunk
        hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[1])
        targets = jnp.pad(view.next_tokens, (0, padding)).reshape(-1, chunk)
        none = kernels.NO_ADAPTER
        slots = jnp.pad(view.slots, (0, padding), constant_values=none).reshape(-1, chunk)

        def one(inputs: tuple[Array, Array, Array]) -> TokenLogprobs:
            logits = model.logits(inputs[0], self._adapters(pool, inputs[2]))
            return token_logprobs(logits, inputs[1], self.config.max_logprobs)

        chunks = jax.lax.map(one, (hidden, targets, slots))
        return jax.tree.map(lambda x: x.reshape(tokens + padding, *x.shape[2:])[:tokens], chunks)

    # -- compiling -------------------------------------------------------------------------

    def _pool(self, lora: bool) -> tuple[AdapterState | None, AdapterState | None]:
        """What a step with or without adapters is given of the pool, and how it is divided."""
        if not lora or self.pool is None:
            return None, None
        return self.pool.state, self.pool.specs

    @property
    def _adapts_vocabulary(self) -> bool:
        """Whether adapters may change the logits other than by the hidden state."""
        return self.pool is not None and self.pool.adapts_vocabulary

    def _sharded(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def _compile(self, key: tuple) -> jax.stages.Compiled:
        """key: ("forward", tokens, lora), ("sample", seqs, variant, lora), ("prompt", tokens,
        lora) or ("admit",); lora: whether the pool is given to it.
        """
        params, state, kv, dtype = self.params, self.state, self.kv, self.model_config.dtype
        everywhere, width = PartitionSpec(), self.model_config.hidden_size
        arguments: tuple[Any, ...]
        function: Callable
        param_specs = self._param_specs

        def batch(seqs: int) -> jax.ShapeDtypeStruct:
            return self._array((seqs, PAGES + self.config.max_pages), np.int32)

        match key:
            case ("forward", tokens, lora):
                function = functools.partial(self._forward, tokens=tokens)
                pool, pool_specs = self._pool(lora)
                specs = (param_specs, pool_specs, self._kv_spec, everywhere, everywhere)
                mapped = self._sharded(function, specs, (self._kv_spec, everywhere, everywhere))
                arguments = (params, pool, kv, state, batch(self.config.seq_bucket(tokens)))
                lowered = jax.jit(mapped, donate_argnums=(2,)).lower(*arguments)
            case ("sample", seqs, variant, lora):
                function = functools.partial(self._sample, variant=variant)
                pool, pool_specs = self._pool(lora)
                specs = (param_specs, pool_specs, everywhere, everywhere, everywhere)
                mapped = self._sharded(function, specs, everywhere)
                arguments = (params, pool, self._array((seqs, width), dtype), state, batch(seqs))
                lowered = jax.jit(mapped, donate_argnums=(3,)).lower(*arguments)
            case ("prompt", tokens, lora):
                pool, pool_specs = self._pool(lora)
                specs = (param_specs, pool_specs, everywhere, everywhere, everywhere)
                mapped = self._sharded(self._prompt_logprobs, specs, everywhere)
                rows = batch(self.config.seq_bucket(tokens))
                arguments = (params, pool, self._array((tokens, width), dtype), state, rows)
                lowered = jax.jit(mapped).lower(*arguments)
            case _:
                new, at = admission([], self.config.max_num_seqs, self.config.history)
                small = jax.tree.map(lambda x: self._array(x.shape, x.dtype), new)
                lowered = jax.jit(admit, donate_argnums=(0,), out_shardings=self._replicated).lower(
                    state, small, self._array(at.shape, at.dtype)
                )
        return lowered.compile(COMPILER_OPTIONS.get(self.config.implementation))

    def executables(self) -> list[tuple]:
        """Everything that serving can need compiled."""
        tokens = self.config.token_buckets
        seqs = sorted({self.config.seq_bucket(count) for count in tokens})
        lora = (False, True) if self.pool is not None else (False,)
        vocab = (False, True) if self._adapts_vocabulary else (False,)
        return [
            ("admit",),
            *(("forward", count, on) for count in reversed(tokens) for on in lora),
            *(("sample", n, variant, on) for n in seqs for variant in VARIANTS for on in vocab),
            *(("prompt", count, on) for count in tokens for on in vocab),
        ]

    def warm_up(self, progress: bool = True) -> None:
        """Compiles every executable, several at a time."""
        start, keys = time.perf_counter(), self.executables()
        if self.pool is not None:
            self.pool.compile()
        with ThreadPoolExecutor(max(os.cpu_count() or 1, 4)) as executor:
            compiled: Iterable = executor.map(self._compile_beside_others, keys)
            bar = tqdm(
                compiled, desc="compiling", total=len(keys), disable=not progress, leave=False
            )
            found = dict(zip(keys, bar, strict=True))
        self._compiled.update({key: one or self._compile(key) for key, one in found.items()})
        logger.info("compiled %d executables in %.1f s", len(keys), time.perf_counter() - start)

    def _compile_beside_others(self, key: tuple) -> jax.stages.Compiled | None:
        """None when it failed, as it does when too many matmuls are tried out at the same time.

        Without memory for that XLA says RESOURCE_EXHAUSTED, or NOT_FOUND: all configs failed.
        """
        try:
            return self._compile(key)
        except jax.errors.JaxRuntimeError:
            return None

    def compiled(self, *key: Any) -> jax.stages.Compiled:
        """The executable for a key of `executables`, compiled now when warm-up was skipped."""
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = self._compile(key)
            logger.info("compiled %s in %.1f s", key, time.perf_counter() - start)
        return self._compiled[key]

    # -- running ---------------------------------------------------------------------------

    def _put(self, value: Any) -> Any:
        return jax.device_put(value, self._replicated)

    def dispatch(self, plan: Plan, variant: Variant, prompt_logprobs: bool) -> StepResult:
        """Starts a step and returns at once; reading its result waits.

        prompt_logprobs: whether some sequence wants those of this step's prompt tokens.
        """
        config = self.config
        for start in range(0, len(plan.admitted), ADMIT_ROWS):
            admitted = plan.admitted[start : start + ADMIT_ROWS]
            new, at = admission(admitted, config.max_num_seqs, config.history)
            self.state = self.compiled("admit")(self.state, *self._put((new, at)))
        tokens = next(size for size in config.token_buckets if size >= plan.num_tokens)
        seqs = config.seq_bucket(tokens)
        batch = self._put(pack_batch(plan, seqs, config.max_pages))
        lora = self.pool is not None and any(entry.sequence.slot >= 0 for entry in plan.entries)
        vocab = lora and self._adapts_vocabulary
        pool, head = self._pool(lora)[0], self._pool(vocab)[0]
        forward = self.compiled("forward", tokens, lora)
        self.kv, last, hidden = forward(self.params, pool, self.kv, self.state, batch)
        prompt = None
        if prompt_logprobs:
            score = self.compiled("prompt", tokens, vocab)
            prompt = score(self.params, head, hidden, self.state, batch)
        sampled, logprobs = None, None
        if any(entry.sample for entry in plan.entries):
            sampler = self.compiled("sample", seqs, variant, vocab)
            self.state, sampled, logprobs = sampler(self.params, head, last, self.state, batch)
        for array in jax.tree.leaves((sampled, logprobs, prompt)):
            array.copy_to_host_async()
        return StepResult(plan.entries, sampled, logprobs, prompt)


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
