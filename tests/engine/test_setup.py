"""What an engine says of itself at the start."""

from __future__ import annotations

import itertools

import jax

from jlora.config import LoRAConfig
from jlora.engine.memory import GAPS, keep_gaps
from jlora.engine.programs import RunnerConfig
from jlora.engine.setup import memory_table

SIZES = RunnerConfig(8, 16, 96, 8, 64, 20, "xla")


def test_the_memory_table_tells_how_many_adapters_have_room():
    config = LoRAConfig(max_loras=10, max_lora_rank=64, lora_pool_blocks=12, max_cpu_loras=30)
    lines = memory_table(2_000_000, 500_000, 3_000_000, SIZES, config).splitlines()
    assert [line.split()[0] for line in lines] == ["memory", "weights", "adapters", "KV"]
    assert "2.0 MB" in lines[1]
    assert "10 slots, 12 rank blocks a projection" in lines[2]
    assert "10 of rank 8, 10 of rank 16, 3 of rank 64; 30 on the host" in lines[2]
    assert "64 pages of 8 tokens" in lines[3]


def test_the_memory_table_leaves_out_ranks_that_are_not_served():
    table = memory_table(0, 0, 0, SIZES, LoRAConfig(max_loras=2, max_lora_rank=16))
    assert "2 of rank 8, 2 of rank 16;" in table
    assert "64" not in table.replace("64 pages", "")
    assert "LoRA off" in memory_table(0, 0, 0, SIZES, None)


def test_gaps_do_not_join(monkeypatch):
    """Wherever the allocator puts them: here each second one lies far away."""

    class Block:
        def __init__(self, nbytes, address):
            self.nbytes, self.address, self.freed = nbytes, address, False

        def unsafe_buffer_pointer(self):
            return self.address

        def delete(self):
            self.freed = True

    blocks, ends = [], itertools.cycle([0, 1 << 40])
    free = {0: 0, 1 << 40: 1 << 40}

    def put(array, device):
        end = next(ends)
        blocks.append(Block(array.nbytes, free[end]))
        free[end] += array.nbytes
        return blocks[-1]

    monkeypatch.setattr(jax, "device_put", put)
    walls = keep_gaps(jax.devices()[0])
    assert [block for block in blocks if not block.freed] == sorted(walls, key=blocks.index)
    for size, count in GAPS.items():
        same = sorted((b for b in blocks if b.nbytes == size), key=Block.unsafe_buffer_pointer)
        assert [block.freed for block in same] == [True, False] * count
