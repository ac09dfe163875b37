"""What the device is given for a rank block: the adapter's values, laid out for the shards."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jlora.config import LORA_BLOCK_RANK
from jlora.manager import BlockWrite, LoRAModel, PEFTHelper, block_arrays, blocks_needed
from jlora.projections import ModuleMap, check_shards
from tests.manager.adapters import (
    ALL,
    MODULES,
    key,
    lora_config,
    make_config,
    make_tensors,
    model_config,
    named,
    widths,
)

ROWS = {row.name: row for row in MODULES.projections}
BF16 = ml_dtypes.bfloat16


def load(tensors, modules=MODULES, **config) -> LoRAModel:
    helper = PEFTHelper.from_dict(make_config(**config))
    return LoRAModel.from_lora_tensors(1, tensors, helper, modules, lora_config(max_lora_rank=64))


def poisoned(shape, dtype):
    """What the memory held before must not matter."""
    return np.full(shape, np.nan, dtype)


def writes(lora, row, shards=1, modules=MODULES):
    """The arrays of every block of a row."""
    count = blocks_needed(lora, modules).get(row.name, 0)
    arrays = list(block_arrays(lora, modules, row, None, range(count), shards, poisoned))
    alone = [one.arrays(shards) for one in BlockWrite.all(lora, modules, row, [9] * count)]
    for one, other in zip(arrays, alone, strict=True):
        for array, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, same)
    assert all(array.shape[1] == 1 for one in arrays for array in one)  # no experts
    return [tuple(array[:, 0] for array in one) for one in arrays]


def hf_columns(row, shards, config) -> list[int]:
    """Which output columns of Hugging Face's modules lie where, told by heads."""
    if row.shard == "in":
        return list(range(sum(part.width for part in row.parts)))
    columns, dim = [], config.head_dim
    for shard in range(shards):
        start = 0
        for part in row.parts:
            if row.name == "qkv":
                heads = part.width // dim
                each = max(heads // shards, 1)
                first, unit = shard * heads // shards, dim
            else:
                each, first, unit = part.width // shards, shard * part.width // shards, 1
            columns += range(start + first * unit, start + (first + each) * unit)
            start += part.width
    return columns


def deltas(lora, row, shards, modules, config) -> np.ndarray:
    """[layers, stored width, d_in]: the delta W that the blocks add up to, scales included."""
    total = 0
    for a, b, scales in writes(lora, row, shards, modules):
        part_of = np.repeat(np.arange(len(row.parts)), [part.width for part in row.parts])
        part_of = part_of[hf_columns(row, shards, config)]
        each = np.einsum("lor,lpri->lpoi", b.astype(np.float64), a.astype(np.float64))
        picked = each[:, part_of, np.arange(len(part_of))]  # [layers, o, i]
        total = total + picked * scales[:, part_of][:, :, None]
    return total


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 16, 20, 40])
def test_the_blocks_add_up_to_the_adapter(rank, shards, kv_heads):
    config = model_config(num_kv_heads=kv_heads)
    check_shards(config, shards)
    modules = ModuleMap(config)
    tensors = make_tensors(rank=rank, modules=modules)
    lora = load(tensors, modules, r=rank, lora_alpha=3, alpha_pattern={"k_proj": 7})
    for row in modules.projections:
        expected = []
        for layer in range(config.num_layers):
            names = [modules.name(row, part, layer) for part in range(len(row.parts))]
            scaled = [
                lora.get_lora(n).scaling * tensors[key(n, "B")].astype(float) @ tensors[key(n, "A")]
                for n in names
            ]
            expected.append(np.concatenate(scaled)[hf_columns(row, shards, config)])
        found = deltas(lora, row, shards, modules, config)
        np.testing.assert_allclose(found, np.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shapes(shards):
    lora = load(make_tensors(rank=20), r=20)
    for row in MODULES.projections:
        for a, b, scales in writes(lora, row, shards):
            assert a.shape == (2, len(row.parts), LORA_BLOCK_RANK, row.d_in)
            assert b.shape == (2, row.stored_width(shards), LORA_BLOCK_RANK)
            assert (scales.shape, scales.dtype) == ((2, len(row.parts)), np.float32)


def test_kv_heads_are_copied_when_there_are_more_shards():
    b = writes(load(make_tensors()), ROWS["qkv"], shards=4)[0][1]
    k = slice(8, 16)  # of each shard's 8 + 8 + 8 columns
    shard = b.reshape(2, 4, 24, LORA_BLOCK_RANK)
    np.testing.assert_array_equal(shard[:, 0, k], shard[:, 1, k])
    np.testing.assert_array_equal(shard[:, 2, k], shard[:, 3, k])
    assert not np.array_equal(shard[:, 1, k], shard[:, 2, k])


def test_ranks_that_do_not_fill_their_blocks_are_padded_with_zeros():
    first, second = writes(load(make_tensors(rank=20), r=20), ROWS["o"])
    assert np.all(first[0] != 0)
    assert np.all(second[0][:, :, :4] != 0)
    assert not second[0][:, :, 4:].any()
    assert not second[1][:, :, 4:].any()


def test_a_block_holds_its_own_ranks():
    tensors = make_tensors(rank=40)
    module = named(["down_proj"])[1]
    for index, (a, b, _) in enumerate(writes(load(tensors, r=40), ROWS["down"])):
        ranks = slice(16 * index, min(16 * index + 16, 40))
        count = ranks.stop - ranks.start
        np.testing.assert_array_equal(a[1, 0, :count], tensors[key(module, "A")][ranks])
        np.testing.assert_array_equal(b[1, :, :count], tensors[key(module, "B")][:, ranks])


def test_a_missing_part_is_zero_and_so_are_the_layers_without_an_adapter():
    tensors = make_tensors(("q_proj", "v_proj"))
    tensors = {name: tensor for name, tensor in tensors.items() if "layers.1." in name}
    a, b, _ = writes(load(tensors), ROWS["qkv"])[0]
    q, kv = widths(named(["q_proj"])[0])[1], widths(named(["k_proj"])[0])[1]
    assert not a[0].any()
    assert not b[0].any()
    assert not a[1, 1].any()
    assert not b[1, q : q + kv].any()
    assert a[1, 0].any()
    assert a[1, 2].any()
    assert b[1, :q].any()
    assert b[1, q + kv :].any()


def test_parts_of_different_rank_share_the_blocks():
    tensors = make_tensors(("q_proj",), 20) | make_tensors(("k_proj",), 4)
    first, second = writes(load(tensors, rank_pattern={"q_proj": 20}), ROWS["qkv"])
    assert first[0][:, 0].all()
    assert second[0][:, 0, :4].all()
    assert first[0][:, 1, :4].all()
    assert not first[0][:, 1, 4:].any()
    assert not second[0][:, 1].any()


def test_scales_are_of_each_part_and_layer():
    tensors = make_tensors(ALL)
    config = {"alpha_pattern": {"layers.1.self_attn.v_proj": 2}, "lora_alpha": 16}
    scales = writes(load(tensors, **config), ROWS["qkv"])[0][2]
    np.testing.assert_array_equal(scales, np.array([[4, 4, 4], [4, 4, 0.5]], np.float32))


@pytest.mark.parametrize(
    ("of_a", "of_b", "staged"),
    [
        (np.float32, np.float32, np.float32),
        (np.float16, np.float16, np.float16),
        (BF16, BF16, BF16),
        (BF16, np.float32, np.float32),
        (np.float16, BF16, np.float32),
        (np.float64, np.float64, np.float32),
        (np.float64, BF16, np.float32),
    ],
)
def test_staging_keeps_the_values(of_a, of_b, staged):
    """One dtype travels as it is; a mixture, or float64, as float32."""
    tensors = {
        name: tensor.astype(of_a if ".lora_A." in name else of_b)
        for name, tensor in make_tensors().items()
    }
    a, b, _ = writes(load(tensors), ROWS["o"])[0]
    assert a.dtype == b.dtype == staged
    module = named(["o_proj"])[0]
    np.testing.assert_array_equal(a[0, 0, :4], tensors[key(module, "A")].astype(staged))
    np.testing.assert_array_equal(b[0, :, :4], tensors[key(module, "B")].astype(staged))


@pytest.mark.parametrize(
    ("kv_heads", "shards", "word"), [(2, 3, "num_attention_heads"), (3, 2, "num_key_value_heads")]
)
def test_shards_that_do_not_divide_the_model(kv_heads, shards, word):
    with pytest.raises(ValueError, match=rf"tensor_parallel_size={shards}.*{word}"):
        check_shards(model_config(num_kv_heads=kv_heads), shards)
