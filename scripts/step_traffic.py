"""What one step must move and multiply on one device: weights once, KV, and the kernels' own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.config import ModelConfig
from jlora.engine.aot import local_bytes
from jlora.kernels import kv_page_shape, tpu_traffic
from jlora.kernels.tpu_traffic import Traffic
from jlora.model import LoadedModel
from jlora.projections import ModuleMap, Projection

EXPERT_ROWS = ("experts_gate_up", "experts_down")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step: `seqs` sequences of `queries` tokens each, the last of `context` positions.

    adapters: sequence i has adapter i modulo so many, of one rank block, on every row (on the
    experts if `experts`); the scheduler has sorted them by adapter. 0: nobody has one.
    """

    seqs: int
    queries: int
    context: int
    adapters: int = 0
    experts: bool = False

    @property
    def tokens(self) -> int:
        return self.seqs * self.queries

    def slots(self) -> np.ndarray:
        """The slot of each token."""
        if not self.adapters:
            return np.full(self.tokens, -1)
        return np.repeat(np.sort(np.arange(self.seqs) % self.adapters), self.queries)


class StepTraffic(NamedTuple):
    """Bytes of HBM and FLOPs on one device."""

    weights: int
    kv: int
    adapters: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.weights + self.kv + self.adapters


def routed(model: ModelConfig, shards: int, work: Workload) -> tuple[np.ndarray, np.ndarray, int]:
    """Expert and slot of each row, sorted, and how many experts there are on the device.

    Experts are drawn evenly, which a real router does not do. Where devices have whole experts it
    is the device whose experts are most in use; rows of others come last and are nobody's.
    """
    rng, choices = np.random.default_rng(0), model.num_experts_per_tok
    chosen = np.argsort(rng.random((work.tokens, model.num_experts)), axis=1)[:, :choices]
    expert, slot = chosen.reshape(-1), np.repeat(work.slots(), choices)
    experts = model.num_experts // (shards if model.expert_parallel else 1)
    # Experts in use, pairs of an expert and an adapter, rows: of each device.
    pairs = np.unique(np.stack([expert, slot]), axis=1)[0]
    counts = [
        np.bincount(x // experts, minlength=shards) for x in (np.unique(expert), pairs, expert)
    ]
    own = expert - np.lexsort(counts[::-1])[-1] * experts
    elsewhere = (own < 0) | (own >= experts)
    expert, slot = np.where(elsewhere, experts, own), np.where(elsewhere, -1, slot)
    order = np.lexsort((slot, expert))
    return expert[order], slot[order], experts


def step_traffic(
    model: ModelConfig, described: LoadedModel, shards: int, page_size: int, work: Workload
) -> StepTraffic:
    """Of a forward and its sampler, all layers."""
    rows, layers = ModuleMap(model).projections, model.num_layers
    kv = _kv(model, shards, page_size, work) * layers
    experts, lora = Traffic(), Traffic()
    expert, slot, here = (
        routed(model, shards, work) if model.num_experts else (np.empty(0), np.empty(0), 0)
    )
    for row in rows:
        if row.name in EXPERT_ROWS:
            sizes = np.bincount(expert, minlength=here)[:here]
            d_in, widths = _local(row, shards)
            experts += tpu_traffic.grouped(sizes, d_in=d_in, d_out=sum(widths)) * layers
            slots = np.where(slot < 0, -1, slot * here + expert)
        else:
            slots = work.slots()
        if work.adapters and (row.name not in EXPERT_ROWS or work.experts):
            lora += lora_traffic(row, shards, slots, work.adapters) * layers
    dense, matmuls = _dense(model, described, shards, work)
    return StepTraffic(
        weights=dense + experts.pool,
        kv=kv.pool,
        adapters=lora.pool,
        flops=matmuls + experts.flops + kv.flops + lora.flops,
    )


def _local(row: Projection, shards: int) -> tuple[int, tuple[int, ...]]:
    return row.d_in // (shards if row.shard == "in" else 1), row.local_widths(shards)


def lora_traffic(row: Projection, shards: int, slots: np.ndarray, adapters: int) -> Traffic:
    """Of shrink and expand of one projection in one layer."""
    d_in, widths = _local(row, shards)
    counts, parts = np.ones(adapters * (row.local_experts(shards) or 1), int), len(row.parts)
    return tpu_traffic.shrink(slots, counts, d_in=d_in, parts=parts) + tpu_traffic.expand(
        slots, counts, part_widths=widths, parts=parts
    )


def _kv(model: ModelConfig, shards: int, page_size: int, work: Workload) -> Traffic:
    kv_heads = max(model.num_kv_heads // shards, 1)
    dtype = jnp.dtype(model.dtype)
    page = kv_page_shape(page_size, kv_heads, model.head_dim, dtype, implementation="tpu")
    attention = tpu_traffic.attention(
        np.full(work.seqs, work.queries),
        np.full(work.seqs, work.context),
        heads=model.num_heads // shards,
        page=page,
        max_pages=-(-work.context // page_size),
    )
    return attention + tpu_traffic.write_kv(work.tokens, page=page)


def _dense(
    model: ModelConfig, described: LoadedModel, shards: int, work: Workload
) -> tuple[int, int]:
    """Bytes and FLOPs of everything outside the kernels' pools: all weights but the embedding,
    of which a row a token is read, and the experts; the head multiplies a row a sequence.
    """
    embedding, head = described.weight("embed_tokens", 0)[0], described.weight("lm_head", 0)[0]
    apart = [described.weight(row, at) for row in _expert_rows(model) for at in _layers(model)]
    size = local_bytes(described.params) - local_bytes([array for array, _ in apart])
    if head is not embedding:
        size += work.tokens * model.hidden_size * 2 - local_bytes(embedding)
    rows = (row for row in ModuleMap(model).projections if row.name not in EXPERT_ROWS)
    products = sum(
        local_in * sum(widths) for local_in, widths in (_local(row, shards) for row in rows)
    )
    flops = 2 * work.tokens * products * model.num_layers
    return size, flops + 2 * work.seqs * math.prod(head.sharding.shard_shape(head.shape))


def _expert_rows(model: ModelConfig) -> tuple[str, ...]:
    return EXPERT_ROWS if model.num_experts else ()


def _layers(model: ModelConfig) -> range:
    return range(model.num_layers)


def one_hot_table(model: ModelConfig, cases: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """LoRA of all layers by the kernels and by masked einsums over every slot, on one device.

    cases: tokens, slots of the engine, adapters in use.
    """
    table = []
    for tokens, slots, used in cases:
        kernel, einsum = Traffic(), Traffic()
        names = np.sort(np.arange(tokens) % used)
        for row in ModuleMap(model).projections:
            d_in, widths = _local(row, 1)
            sizes = {"d_in": d_in, "parts": len(row.parts), "d_out": sum(widths)}
            kernel += lora_traffic(row, 1, names, used) * model.num_layers
            einsum += tpu_traffic.one_hot(tokens, slots, **sizes) * model.num_layers
        table.append(
            {
                "tokens": tokens,
                "slots": slots,
                "used": used,
                **{f"kernel_{k}": v for k, v in dataclasses.asdict(kernel).items()},
                **{f"one_hot_{k}": v for k, v in dataclasses.asdict(einsum).items()},
            }
        )
    return table
