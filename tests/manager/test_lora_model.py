"""One adapter on the host: reading, placing, packing, folding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jlora.errors import AdapterError
from jlora.manager import (
    LoRALayerWeights,
    LoRAModel,
    PackedLoRALayerWeights,
    PEFTHelper,
    blocks_needed,
)
from jlora.manager.blocks import packed_layers
from jlora.projections import ModuleMap
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
    write_adapter,
)

Q0, GATE1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"


def load(tensors, **config) -> LoRAModel:
    helper = PEFTHelper.from_dict(make_config(**config))
    return LoRAModel.from_lora_tensors(3, tensors, helper, MODULES, lora_config(), "adapter 'a'")


def test_from_local_checkpoint_keeps_every_tensor(tmp_path):
    tensors = make_tensors(seed=5)
    lora = LoRAModel.from_local_checkpoint(
        write_adapter(tmp_path / "a", tensors), 7, MODULES, lora_config()
    )
    assert (lora.id, lora.rank) == (7, 4)
    assert set(lora.loras) == set(MODULES.names())
    for module in MODULES.names():
        layer = lora.get_lora(module)
        np.testing.assert_array_equal(layer.lora_a, tensors[key(module, "A")])
        np.testing.assert_array_equal(layer.lora_b, tensors[key(module, "B")])
        assert (layer.input_dim, layer.output_dim) == widths(module)
        assert (layer.rank, layer.lora_alpha, layer.scaling) == (4, 8.0, 2.0)
    assert lora.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_an_adapter_of_attention_only_has_nothing_elsewhere():
    lora = load(make_tensors(("q_proj", "v_proj")))
    assert lora.get_lora(GATE1) is None
    assert lora.get_lora("model.layers.9.self_attn.q_proj") is None
    assert set(lora.loras) == set(named(("q_proj", "v_proj")))
    assert blocks_needed(lora, MODULES) == {"qkv": 1}


def test_names_without_pefts_prefix_are_the_same_modules():
    tensors = make_tensors()
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    assert set(load(bare).loras) == set(load(tensors).loras)


def test_the_same_module_under_two_names_is_refused():
    tensors = make_tensors()
    twice = key(Q0, "A")
    tensors[twice.removeprefix("base_model.model.")] = tensors[twice] * 2
    with pytest.raises(AdapterError, match=r"adapter 'a': .*q_proj.*lora_A.*twice"):
        load(tensors)


def test_rank_is_the_largest_of_the_layers():
    tensors = make_tensors(("q_proj",), 4) | make_tensors(("o_proj",), 20)
    lora = load(tensors, rank_pattern={"o_proj": 20})
    assert lora.rank == 20
    assert lora.get_lora(Q0).rank == 4
    assert blocks_needed(lora, MODULES) == {"qkv": 1, "o": 2}


@pytest.mark.parametrize(("rank", "blocks"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_of_a_rank(rank, blocks):
    lora = load(make_tensors(rank=rank), r=rank)
    assert set(blocks_needed(lora, MODULES).values()) == {blocks}


def test_one_layer_of_large_rank_decides_the_blocks_of_its_projection():
    tensors = make_tensors()
    d_in, d_out = widths(GATE1)
    tensors[key(GATE1, "A")] = np.ones((30, d_in), np.float32)
    tensors[key(GATE1, "B")] = np.ones((d_out, 30), np.float32)
    lora = load(tensors, rank_pattern={"layers.1.mlp.gate_proj": 30})
    assert blocks_needed(lora, MODULES) == {"qkv": 1, "o": 1, "gate_up": 2, "down": 1}


# -- layers ----------------------------------------------------------------------------------


def layer(dtype=np.float32, scaling=0.5, rank=3) -> LoRALayerWeights:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((rank, 5), (7, rank)))
    return LoRALayerWeights("m", rank, scaling * rank, a, b, scaling)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_optimize_folds_the_scale_into_b_once(dtype):
    plain, folded = layer(dtype), layer(dtype).optimize()
    assert folded.scaling == 1.0
    assert folded.lora_b.dtype == dtype
    np.testing.assert_array_equal(folded.lora_a, plain.lora_a)
    expected = (plain.lora_b.astype(np.float32) * np.float32(0.5)).astype(dtype)
    np.testing.assert_array_equal(folded.lora_b, expected)
    again = folded.lora_b.copy()
    np.testing.assert_array_equal(folded.optimize().lora_b, again)


def test_widths_of_a_layer():
    one = layer()
    assert (one.input_dim, one.output_dim, one.is_packed) == (5, 7, False)


def test_pack_keeps_the_parts_apart():
    first, third = layer(rank=3), layer(rank=20, scaling=2.0)
    packed = PackedLoRALayerWeights.pack("qkv", [first, None, third])
    assert packed.is_packed
    assert packed.parts == (first, None, third)
    assert packed.rank == 20
    assert [part and part.scaling for part in packed.parts] == [0.5, None, 2.0]


def test_pack_of_nothing_has_rank_zero():
    assert PackedLoRALayerWeights.pack("qkv", [None, None, None]).rank == 0


@pytest.mark.parametrize("missing", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_packing_with_a_part_missing(missing):
    lora = load(make_tensors([name for name in ALL if name != missing]))
    for row in MODULES.projections:
        for index, (packed,) in enumerate(packed_layers(lora, MODULES, row)):
            prefix = f"model.layers.{index}.{row.module}"
            expected = [lora.get_lora(f"{prefix}.{part.name}") for part in row.parts]
            assert list(packed.parts) == expected
            assert [part is None for part in packed.parts] == [p.name == missing for p in row.parts]


# -- the table of modules --------------------------------------------------------------------


def test_every_module_has_one_place():
    assert len(set(MODULES.names())) == len(MODULES.names()) == 2 * len(ALL)
    for name in MODULES.names():
        place = MODULES.place(name)
        assert MODULES.name(place.projection, place.part, place.layer) == name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_proj",
        "model.layers.-1.self_attn.q_proj",
        "model.layers.00.self_attn.q_proj",
        "model.layers.01.self_attn.q_proj",
        "model.layers.\N{ARABIC-INDIC DIGIT ONE}.self_attn.q_proj",
        f"model.layers.{'9' * 5000}.self_attn.q_proj",
        "model.layers.0.mlp.q_proj",
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn",
        "layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj.base_layer",
        "",
    ],
)
def test_other_names_have_none(name):
    assert MODULES.place(name) is None


def test_a_module_under_another_spelling_is_refused_not_lost():
    """It would be registered under a name that nobody asks for: a silent no-op."""
    tensors = {name.replace("layers.1.", "layers.01."): t for name, t in make_tensors().items()}
    with pytest.raises(AdapterError, match=r"layers\.01\.self_attn"):
        load(tensors)


def test_the_table_follows_the_models_widths():
    modules = ModuleMap(model_config(num_heads=6, num_kv_heads=3, head_dim=4, hidden_size=20))
    assert widths("model.layers.0.self_attn.q_proj", modules) == (20, 24)
    assert widths("model.layers.0.self_attn.v_proj", modules) == (20, 12)
    assert widths("model.layers.1.self_attn.o_proj", modules) == (24, 20)
    assert widths("model.layers.1.mlp.up_proj", modules) == (20, 40)
    assert widths("model.layers.1.mlp.down_proj", modules) == (40, 20)
