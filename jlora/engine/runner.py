"""The device side of the engine: the arrays, dispatch and read."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jlora.engine.adapter_pool import AdapterPool
from jlora.engine.hosts import Leader, agreed
from jlora.engine.joined import joined
from jlora.engine.memory import keep_gaps
from jlora.engine.programs import StepArrays, StepPrograms
from jlora.engine.sampler import TokenLogprobs, Variant
from jlora.engine.scheduler import Entry, Plan
from jlora.engine.state import (
    ADMIT_ROWS,
    PAGES,
    SeqState,
    admission,
    pack_batch,
    short,
)
from jlora.model import AdapterState, as_argument

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """A dispatched step: its entries, and arrays that the device may still be computing."""

    entries: list[Entry]
    tokens: jax.Array | None
    logprobs: TokenLogprobs | None
    prompt_logprobs: TokenLogprobs | None
    hosts: Leader | None = None  # who compute it, too

    def read(self) -> tuple[np.ndarray | None, TokenLogprobs | None, TokenLogprobs | None]:
        """Waits for the device: tokens [seqs], and the log-probabilities where asked for."""
        arrays = self.tokens, self.logprobs, self.prompt_logprobs
        if self.hosts is not None:
            self.hosts.wait(arrays)
        return jax.device_get(arrays)


class ModelRunner:
    """Owns weights, adapter pool, KV cache and sequence state; applies what the host decides."""

    def __init__(
        self,
        params: Any,
        programs: StepPrograms,
        pool: AdapterPool | None,
        hosts: Leader | None = None,
    ) -> None:
        """Allocates the KV cache and the rows of the sequences.

        params: the weights. hosts: who are to do the same.
        """
        # A plain list: flattening an nnx.State of 200 weights takes a millisecond at every call.
        self.params: list[jax.Array] = jax.tree.leaves(params)
        self.programs, self.config = programs, programs.config
        self.pool, self.hosts = pool, hosts
        self.kv, self.hidden = _zeros(programs.kv()), _zeros(programs.hidden())
        self.state: SeqState = jax.tree.map(_zeros, programs.state())
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        here = [one for one in programs.mesh.local_devices if one.platform == "gpu"]
        self._walls = [keep_gaps(device) for device in here]

    # -- compiling -------------------------------------------------------------------------

    def _pool(self, lora: bool) -> AdapterState | None:
        """What a step with or without adapters is given of the pool."""
        return self.pool.state if lora and self.pool is not None else None

    @property
    def _adapts_vocabulary(self) -> bool:
        """Whether adapters may change the logits other than by the hidden state."""
        return self.pool is not None and self.pool.adapts_vocabulary

    def _compile(self, key: tuple) -> jax.stages.Compiled:
        arrays = StepArrays(self.params, self._pool(True), self.kv, self.hidden, self.state)
        return self.programs.compile(key, arrays)

    def executables(self) -> list[tuple]:
        """The keys of everything that serving can need, see StepPrograms.lower."""
        return self.programs.executables(self._adapts_vocabulary)

    def warm_up(self, progress: bool = True) -> None:
        """Compiles every executable, several at a time, and on a GPU runs each."""
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
        if self.programs.mesh.devices.flat[0].platform == "gpu":
            self.run_all(keys)
        logger.info("compiled %d executables in %.1f s", len(keys), time.perf_counter() - start)

    def run_all(self, keys: list[tuple]) -> None:
        """Runs executables with nobody in the batch, twice: on a GPU XLA then records their graphs.

        Else it would do so when they are first needed, and every sequence wait for 10 to 40 ms.
        """
        config = self.config
        buckets = {config.seq_bucket(tokens): tokens for tokens in config.token_buckets}
        for key in keys * 2:
            match key:
                case ("forward", tokens, lora):
                    self._forward(self._nobody(tokens), tokens, lora)
                case ("sample", seqs, variant, vocab):
                    self._sample(self._nobody(buckets[seqs]), variant, vocab)
                case ("prompt", tokens, vocab):
                    self._score(self._nobody(tokens), tokens, vocab)
                case _:
                    self.admit(*admission([], config.max_num_seqs, config.history))
        jax.block_until_ready(self.state)

    def _nobody(self, tokens: int) -> np.ndarray:
        shape = self.config.seq_bucket(tokens), PAGES + self.config.max_pages
        return as_argument(np.zeros(shape, np.int32), self.programs.replicated)

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

    def dispatch(self, plan: Plan, variant: Variant, prompt_logprobs: bool) -> StepResult:
        """Starts a step and returns at once; reading its result waits.

        prompt_logprobs: whether some sequence wants those of this step's prompt tokens.
        """
        config = self.config
        for start in range(0, len(plan.admitted), ADMIT_ROWS):
            admitted = plan.admitted[start : start + ADMIT_ROWS]
            new, at = admission(admitted, config.max_num_seqs, config.history)
            told = [] if self.hosts is None else [at, *short(new)]
            with agreed(self.hosts, "admit", [], told):
                self.admit(new, at)
        tokens = next(size for size in config.token_buckets if size >= plan.num_tokens)
        batch = pack_batch(plan, config.seq_bucket(tokens), config.max_pages)
        lora = self.pool is not None and any(entry.sequence.slot >= 0 for entry in plan.entries)
        drawn = variant if any(entry.sample for entry in plan.entries) else None
        with agreed(self.hosts, "step", [tokens, lora, drawn, prompt_logprobs], [batch]):
            arrays = self.run(batch, tokens, lora, drawn, prompt_logprobs)
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()
        return StepResult(plan.entries, *arrays, self.hosts)

    def admit(self, new: SeqState, at: np.ndarray) -> None:
        """Fills the rows of sequences that begin, see `admission`."""
        told = as_argument(joined([*vars(new).values(), at]), self.programs.replicated)
        self.state = self.compiled("admit")(self.state, told)

    def run(
        self,
        batch: np.ndarray,
        tokens: int,
        lora: bool,
        variant: Variant | None,
        prompt_logprobs: bool,
    ) -> tuple[jax.Array | None, TokenLogprobs | None, TokenLogprobs | None]:
        """Starts a step that has been planned; the same on every host.

        batch: of `pack_batch`. tokens: the bucket. lora: whether anybody has an adapter. variant:
        None when nobody gets a token. Returns tokens and log-probabilities as in StepResult.
        """
        batch = as_argument(batch, self.programs.replicated)
        vocab = lora and self._adapts_vocabulary
        prompt, sampled, logprobs = None, None, None
        self._forward(batch, tokens, lora)
        if prompt_logprobs:
            prompt = self._score(batch, tokens, vocab)
        if variant is not None:
            sampled, logprobs = self._sample(batch, variant, vocab)
        return sampled, logprobs, prompt

    def _forward(self, batch: Any, tokens: int, lora: bool) -> None:
        forward, pool = self.compiled("forward", tokens, lora), self._pool(lora)
        arguments = self.params, pool, self.kv, self.hidden, self.state, batch
        self.kv, self.hidden = forward(*arguments)

    def _score(self, batch: Any, tokens: int, vocab: bool) -> TokenLogprobs:
        score, pool = self.compiled("prompt", tokens, vocab), self._pool(vocab)
        return score(self.params, pool, self.hidden, self.state, batch)

    def _sample(
        self, batch: Any, variant: Variant, vocab: bool
    ) -> tuple[jax.Array, TokenLogprobs | None]:
        sampler, pool = self.compiled("sample", batch.shape[0], variant, vocab), self._pool(vocab)
        arguments = self.params, pool, self.hidden, self.state, batch
        self.state, tokens, logprobs = sampler(*arguments)
        return tokens, logprobs


def _zeros(described: jax.ShapeDtypeStruct) -> jax.Array:
    make = functools.partial(jnp.zeros, described.shape, described.dtype)
    return jax.jit(make, out_shardings=described.sharding)()
