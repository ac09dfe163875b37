"""The TPU kernels: interpreted on the CPU, compiled by the real compiler, and run on a TPU."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as shipped_kernel

from jlora import kernels
from jlora.kernels import attention_tpu, lora_tpu
from tests.kernels import cases, tpu_compile

by_id = operator.attrgetter("id")


def all_of(cases, *ids: str):
    """The cases that the backend takes, or those of the ids."""
    taken = [case for case in cases if case.dtype != "float16"]
    return [case for case in taken if case.id in ids] if ids else taken


LORA, ATTENTION, WRITE = map(all_of, (cases.LORA_CASES, cases.ATTENTION_CASES, cases.WRITE_CASES))
GROUPED = all_of(cases.GROUPED_CASES)
LORA_CHECKS = [cases.check_shrink, cases.check_expand, cases.check_shrink_expand]


# ---------------------------------------------------------------------- interpreted on the CPU


@pytest.fixture
def interpretable(monkeypatch):
    """Changes JAX's attention kernel where JAX's plain interpreter cannot follow it.

    It does not take masked stores to `ref.at[int]`, and from one grid step to the next it forgets
    which buffer the keys were copied to: here one step takes all queries and heads.
    """

    def store(ref, value, *, mask):
        ref[...] = jnp.where(mask, value, ref[...])

    def all_heads(heads, kv_heads, *_):
        return heads, kv_heads

    monkeypatch.setattr(shipped_kernel.pltpu, "store", store)
    monkeypatch.setattr(shipped_kernel, "get_min_heads_per_blk", all_heads)
    monkeypatch.setattr(attention_tpu, "BLOCK_QUERIES", 2**16)
    shipped_kernel.ragged_paged_attention.clear_cache()
    yield True
    shipped_kernel.ragged_paged_attention.clear_cache()


def plain_keys_values(kv_ref, head):
    """`attention_tpu._keys_values` without the views that the race detector does not know."""
    chunks = range(kv_ref.shape[0])
    return tuple(
        jnp.concatenate([kv_ref[c, :, 2 * head + which] for c in chunks], axis=1)
        for which in (0, 1)
    )


SHRINK_EXPAND = ("mixed-shuffled-bfloat16", "distinct-qkv", "layer-traced")
EXPAND = ("only-absent", "one-token", "mixed-sorted-float32", "parts-uneven", "block8")


@pytest.mark.parametrize("case", all_of(LORA, *SHRINK_EXPAND), ids=by_id)
def test_shrink_expand(case, races):
    cases.check_shrink_expand(case, "tpu", races)


@pytest.mark.parametrize("case", all_of(LORA, *EXPAND), ids=by_id)
def test_expand(case, races):
    cases.check_expand(case, "tpu", races)


def set_tiles(monkeypatch, tokens: int, columns: int):
    monkeypatch.setattr(lora_tpu, "TOKEN_TILE", tokens)
    monkeypatch.setattr(lora_tpu, "COLUMN_TILE", columns)


@pytest.mark.parametrize(("case", "tokens"), [("gate-up", 11), ("experts-40", 8)])
def test_many_tiles(case, tokens, races, monkeypatch):
    """33 tokens and 3072 columns, or 40 tokens of many slots; a part ends within a tile."""
    set_tiles(monkeypatch, tokens, 1024)
    cases.check_shrink_expand(*all_of(LORA, case), "tpu", races)


def test_narrow_last_tiles(monkeypatch):
    """The race detector's interpreter does not take an aliased array that ends within a tile."""
    set_tiles(monkeypatch, 16, 2048)
    cases.check_shrink_expand(*all_of(LORA, "gate-up"), "tpu", True)


@pytest.mark.slow
@pytest.mark.parametrize("case", LORA, ids=by_id)
@pytest.mark.parametrize("check", LORA_CHECKS)
def test_every_lora_case(check, case, races):
    """The race detector's interpreter does not take an aliased array that ends within a tile."""
    sizes = (case.tokens, lora_tpu.TOKEN_TILE), (sum(case.part_widths), lora_tpu.COLUMN_TILE)
    whole = all(size <= tile or size % tile == 0 for size, tile in sizes)
    check(case, "tpu", races if whole else True)


FLASH = [case for case in ATTENTION if case.head_dim > 128]
QUICK_ATTENTION = (
    *("ragged-bfloat16", "padding", "head-dim80-f32", "head-dim256", "head-dim256-f32"),
    *("kv6-group1-bfloat16", "smollm-decode", "window4", "soft-cap-window"),
)


@pytest.mark.parametrize("case", all_of(ATTENTION, *QUICK_ATTENTION), ids=by_id)
def test_attention(case, interpretable):
    cases.check_attention(case, "tpu", interpretable)


def test_attention_races(races, monkeypatch):
    monkeypatch.setattr(attention_tpu, "_keys_values", plain_keys_values)
    monkeypatch.setattr(attention_tpu, "FLASH_BLOCK_KEYS", 16)
    cases.check_attention(all_of(ATTENTION, "head-dim256")[0], "tpu", races)


@pytest.mark.slow
@pytest.mark.parametrize("case", ATTENTION, ids=by_id)
def test_every_attention_case(case, interpretable):
    cases.check_attention(case, "tpu", interpretable)


@pytest.mark.slow
@pytest.mark.parametrize("case", FLASH, ids=by_id)
def test_every_flash_case_races(case, races, monkeypatch):
    monkeypatch.setattr(attention_tpu, "_keys_values", plain_keys_values)
    cases.check_attention(case, "tpu", races)


@pytest.mark.parametrize("case", WRITE, ids=by_id)
def test_write_kv(case, races):
    cases.check_write_kv(case, "tpu", races)


@pytest.mark.parametrize("case", GROUPED, ids=by_id)
def test_grouped_matmul(case, races):
    cases.check_grouped(case, "tpu", races)


def test_float16_is_refused_by_name():
    (lora,) = (case for case in cases.LORA_CASES if case.id == "2-tokens")
    (attention,) = (case for case in cases.ATTENTION_CASES if case.id == "page-full")
    (write,) = (case for case in cases.WRITE_CASES if case.id == "scattered-float16")
    (grouped,) = (case for case in cases.GROUPED_CASES if case.id == "mixed-float16")
    for check, case in (
        *((check, lora) for check in LORA_CHECKS),
        (cases.check_attention, attention),
        (cases.check_write_kv, write),
        (cases.check_grouped, grouped),
    ):
        with pytest.raises(NotImplementedError, match="float16"):
            check(case, "tpu")


# ------------------------------------------------------------------ compiled, without a TPU

# What may have an array as its result without being a copy of it; kernels write in place.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "tpu_custom_call"}
S, BF16 = jax.ShapeDtypeStruct, jnp.dtype(jnp.bfloat16)
LAYERS, BLOCKS, SLOTS, MAX_BLOCKS = 32, 64, 32, 16
PAGES, PAGE_SIZE, SEQS, PAGES_PER_SEQ = 8192, 16, 64, 128  # 2048 positions a sequence
LLAMA_8B = {  # d_in, part_widths
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
ODD = {"qwen2.5-72b, 4 devices": (8192, (7392, 7392)), "vocabulary": (4096, (32128,))}
MODELS = {  # heads, kv_heads, head_dim, options
    "llama-8b": (32, 8, 128, {}),
    "smollm-135m": (9, 3, 64, {}),
    "phi-4": (40, 10, 128, {}),
    "gemma-2-9b": (16, 8, 256, {"sliding_window": 4096, "soft_cap": 50.0}),
}


EXPERTS = {  # shapes of w: experts, then d_out, d_in of "up" (transpose_rhs), d_in, d_out of "down"
    "mixtral-8x7b-up": (8, 28672, 4096),
    "mixtral-8x7b-down": (8, 14336, 4096),
    "qwen3-30b-a3b-up": (128, 1536, 2048),
    "qwen3-30b-a3b-down": (128, 768, 2048),
    "qwen3-30b-a3b-up-on-8": (128, 192, 2048),
    "qwen3-30b-a3b-down-on-8": (128, 96, 2048),
    "olmoe-up": (64, 2048, 2048),
    "olmoe-down": (64, 1024, 2048),
}


def lora_shapes(tokens: int, d_in: int, part_widths: tuple[int, ...]):
    """-> x, y, A, B, layer, token_slots, slots."""
    d_out, table = sum(part_widths), (SLOTS, MAX_BLOCKS)
    a = S((LAYERS, BLOCKS, len(part_widths), 16, d_in), BF16)
    b = S((LAYERS, BLOCKS, 16, d_out), BF16)
    slots = kernels.SlotTable(S(table, "int32"), S((SLOTS,), "int32"), S(table, "float32"))
    x, y = S((tokens, d_in), BF16), S((tokens, d_out), BF16)
    return x, y, a, b, S((), "int32"), S((tokens,), "int32"), slots


def lora(part_widths, x, y, a, b, layer, token_slots, slots):
    routing = kernels.lora_routing(token_slots, implementation="tpu")
    h = kernels.lora_shrink(x, a, layer, routing, slots, implementation="tpu")
    delta = kernels.LoRADelta(h, b, layer, routing, slots)
    return kernels.lora_expand(y, delta, part_widths, implementation="tpu")


def attention_shapes(tokens: int, heads: int, kv_heads: int, head_dim: int):
    """-> q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs; k and v; destinations."""
    page = kernels.kv_page_shape(PAGE_SIZE, kv_heads, head_dim, BF16, implementation="tpu")
    tables = (S((SEQS,), "int32"), S((SEQS, PAGES_PER_SEQ), "int32"), S((SEQS + 1,), "int32"))
    q, new = S((tokens, heads, head_dim), BF16), S((tokens, kv_heads, head_dim), BF16)
    pages = S((PAGES, *page), BF16)
    return (q, pages, *tables, S((1,), "int32")), new, S((tokens,), "int32")


def compiles_in_place(chip, function, *shapes, donated: tuple[int, ...], whole: tuple[int, ...]):
    """Compiles; of the arguments in `whole` nothing is copied, those in `donated` are written."""
    executable = tpu_compile.compile_for(chip, function, *shapes, donate=donated)
    memory = executable.memory_analysis()
    for argument in whole:
        assert tpu_compile.makers(executable, shapes[argument]) <= IN_PLACE
    smallest = min(tpu_compile.size(shapes[argument]) for argument in whole)
    assert memory.temp_size_in_bytes < smallest / LAYERS
    assert memory.alias_size_in_bytes >= sum(tpu_compile.size(shapes[i]) for i in donated)


@pytest.mark.parametrize(
    ("tokens", "projection"), [(32, "qkv"), (32, "down"), (512, "o"), (512, "gate_up")]
)
def test_lora_compiles_for_serving(tokens, projection, chip):
    d_in, part_widths = LLAMA_8B[projection]
    function, shapes = functools.partial(lora, part_widths), lora_shapes(tokens, d_in, part_widths)
    compiles_in_place(chip, function, *shapes, donated=(1,), whole=(2, 3))


@pytest.mark.parametrize("projection", ODD)
@pytest.mark.parametrize("tokens", [8, pytest.param(2048, marks=pytest.mark.slow)])
def test_lora_of_odd_widths_compiles(tokens, projection, chip):
    d_in, part_widths = ODD[projection]
    function, shapes = functools.partial(lora, part_widths), lora_shapes(tokens, d_in, part_widths)
    compiles_in_place(chip, function, *shapes, donated=(1,), whole=(2, 3))


@pytest.mark.parametrize("model", MODELS)
def test_attention_compiles_for_serving(model, chip):
    heads, kv_heads, head_dim, options = MODELS[model]
    attend = functools.partial(
        kernels.ragged_paged_attention,
        kv_heads=kv_heads,
        sm_scale=head_dim**-0.5,
        implementation="tpu",
        **options,
    )
    shapes, _, _ = attention_shapes(512, heads, kv_heads, head_dim)
    compiles_in_place(chip, attend, *shapes, donated=(), whole=(1,))


@pytest.mark.parametrize("model", MODELS)
def test_write_kv_compiles_for_serving(model, chip):
    (_, pages, *_), new, destinations = attention_shapes(512, *MODELS[model][:3])
    write = functools.partial(kernels.write_kv, implementation="tpu")
    compiles_in_place(chip, write, pages, new, new, destinations, donated=(0,), whole=(0,))


@pytest.mark.parametrize("tokens", [256, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("experts", EXPERTS)
def test_grouped_matmul_compiles_for_serving(experts, tokens, chip):
    up, shape = "up" in experts, EXPERTS[experts]
    multiply = functools.partial(kernels.grouped_matmul, transpose_rhs=up, implementation="tpu")
    d_in = shape[2 if up else 1]
    x, w, sizes = S((tokens, d_in), BF16), S(shape, BF16), S(shape[:1], "int32")
    compiles_in_place(chip, multiply, x, w, sizes, donated=(), whole=(1,))


@pytest.mark.parametrize("scanned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_layers_copy_nothing(scanned, chip):
    """The pool and the KV of all layers pass through a loop over the layers as they are."""
    heads, kv_heads, head_dim, _ = MODELS["llama-8b"]
    d_in, part_widths = LLAMA_8B["qkv"]
    x, _, a, b, _, token_slots, slots = lora_shapes(32, d_in, part_widths)
    (_, pages, *tables), _, destinations = attention_shapes(32, heads, kv_heads, head_dim)

    def step(pages, x, a, b, token_slots, slots, destinations, kv_lens, page_indices, *lens):
        def layer(carry, index):
            pages, x = carry
            y = jnp.tile(x, (1, 2))[:, : sum(part_widths)]
            y = lora(part_widths, x, y, a, b, index, token_slots, slots)
            q, k, v = (
                part.reshape(len(x), -1, head_dim) for part in jnp.split(y, (4096, 5120), axis=1)
            )
            first = index * (PAGES // LAYERS)
            at = destinations + first * PAGE_SIZE
            pages = kernels.write_kv(pages, k, v, at, implementation="tpu")
            out = kernels.ragged_paged_attention(
                *(q, pages, kv_lens, page_indices + first, *lens),
                kv_heads=kv_heads,
                sm_scale=1.0,
                implementation="tpu",
            )
            return (pages, out.reshape(x.shape)), None

        if scanned:
            return jax.lax.scan(layer, (pages, x), jnp.arange(LAYERS, dtype=jnp.int32))[0]
        for index in range(4):
            (pages, x), _ = layer((pages, x), index)
        return pages, x

    shapes = (pages, x, a, b, token_slots, slots, destinations, *tables)
    compiles_in_place(chip, step, *shapes, donated=(0,), whole=(0, 2, 3))


COMPILED_LORA = (*("one-token", "7-tokens", "distinct-qkv", "parts-uneven", "block8", "block32"),)
COMPILED_ATTENTION = (
    *("decode-one", "ragged-page32", "head-dim80-f32", "head-dim256", "head-dim256-f32"),
    *("kv1-group8-bfloat16", "kv6-group1-bfloat16", "soft-cap-window"),
)
COMPILED_WRITE = ("one", "scattered-float32", "cast", "kv1", "kv3", "head-dim256")


def lora_compiles(case, chip):
    inputs = cases.draw_lora(case)
    tpu_compile.compile_for(chip, *flat(cases.shrink_call(case, inputs, "tpu")))
    tpu_compile.compile_for(chip, *flat(cases.expand_call(case, inputs, inputs.h, "tpu")))


def attention_compiles(case, chip):
    call = cases.attention_call(case, cases.draw_attention(case), "tpu")
    tpu_compile.compile_for(chip, *flat(call))


def flat(call: cases.Call):
    return (call.function, *call.arguments)


@pytest.mark.parametrize("case", all_of(LORA, *COMPILED_LORA), ids=by_id)
def test_lora_compiles(case, chip):
    lora_compiles(case, chip)


@pytest.mark.parametrize("case", all_of(ATTENTION, *COMPILED_ATTENTION), ids=by_id)
def test_attention_compiles(case, chip):
    attention_compiles(case, chip)


@pytest.mark.parametrize("case", all_of(WRITE, *COMPILED_WRITE), ids=by_id)
def test_write_kv_compiles(case, chip):
    tpu_compile.compile_for(chip, *flat(cases.write_call(case, "tpu")))


COMPILED_GROUPED = (
    "one-row",
    "mixed-float32",
    "nothing-divides",
    "decode-64-experts",
    "transposed",
    "transposed-experts",
)


@pytest.mark.parametrize("case", all_of(GROUPED, *COMPILED_GROUPED), ids=by_id)
def test_grouped_matmul_compiles(case, chip):
    tpu_compile.compile_for(chip, *flat(cases.grouped_call(case, "tpu")))


@pytest.mark.slow
@pytest.mark.parametrize("case", LORA, ids=by_id)
def test_every_lora_case_compiles(case, chip):
    lora_compiles(case, chip)


@pytest.mark.slow
@pytest.mark.parametrize("case", ATTENTION, ids=by_id)
def test_every_attention_case_compiles(case, chip):
    attention_compiles(case, chip)


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITE, ids=by_id)
def test_every_write_case_compiles(case, chip):
    tpu_compile.compile_for(chip, *flat(cases.write_call(case, "tpu")))


# ------------------------------------------------------------------------------- on a TPU


@pytest.mark.tpu
@pytest.mark.parametrize("case", LORA, ids=by_id)
@pytest.mark.parametrize("check", LORA_CHECKS)
def test_lora_on_tpu(check, case):
    check(case, "tpu")


@pytest.mark.tpu
@pytest.mark.parametrize("case", ATTENTION, ids=by_id)
def test_attention_on_tpu(case):
    cases.check_attention(case, "tpu")


@pytest.mark.tpu
@pytest.mark.parametrize("case", WRITE, ids=by_id)
def test_write_kv_on_tpu(case):
    cases.check_write_kv(case, "tpu")


@pytest.mark.tpu
@pytest.mark.parametrize("case", GROUPED, ids=by_id)
def test_grouped_matmul_on_tpu(case):
    cases.check_grouped(case, "tpu")
