"""PEFTHelper against the installed PEFT: ranks, scales, and which modules have an adapter."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from jlora.manager import PEFTHelper
from jlora.manager.peft_config import pattern_key
from jlora.projections import ModuleMap
from tests.manager.adapters import make_config, model_config

TWELVE = ModuleMap(model_config(num_layers=12)).names()
Q1, Q11, DOWN1 = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
)


def helper(**config) -> PEFTHelper:
    return PEFTHelper.from_dict(make_config(**config))


class Branch(torch.nn.Module):
    """A module tree with the names of a decoder of twelve layers."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        below: dict[str, list[str]] = {}
        for name in names:
            head, _, rest = name.partition(".")
            below.setdefault(head, []).append(rest)
        for head, rest in below.items():
            leaf = rest == [""]
            self.add_module(head, torch.nn.Linear(2, 2, device="meta") if leaf else Branch(rest))


def peft_layers(**config) -> dict[str, tuple[int, float]]:
    """Module -> (rank, scaling), as the installed PEFT makes them."""
    arguments = {key: value for key, value in make_config(**config).items() if key != "peft_type"}
    model = get_peft_model(Branch(TWELVE), LoraConfig(**arguments))
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "scaling"):
            found[name] = (module.r["default"], module.scaling["default"])
    return found


def our_layers(**config) -> dict[str, tuple[int, float]]:
    one = helper(**config)
    return {name: (one.rank(name), one.scaling(name)) for name in TWELVE if one.targets(name)}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 7, "lora_alpha": 3},
        {"use_rslora": True, "lora_alpha": 10},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"rank_pattern": {"layers.1": 2}},
        {"rank_pattern": {"layers.1.*": 2}},
        {"rank_pattern": {"layers.1.*": 2, "q_proj": 3}},
        {"rank_pattern": {"q_proj": 3, "layers.1.*": 2}},
        {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 3}},
        {"rank_pattern": {"layers\\.(1|3)\\.mlp\\..*": 3}, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}, "use_rslora": True},
        {"alpha_pattern": {"proj": 9, "_proj": 7, ".*k_proj": 4.5}},
        {"target_modules": ["q_proj", "layers.3.mlp.up_proj"]},
        {"target_modules": r".*\.1\..*(q|v)_proj"},
        {"target_modules": "q_proj|.*down_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR", "exclude_modules": ["k_proj", "mlp.up_proj"]},
        {"exclude_modules": r".*layers\.1.*"},
        {"layers_to_transform": 1},
        {"layers_to_transform": [1, 11]},
        {"layers_to_transform": []},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1, 2], "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": [1, 2], "layers_pattern": "(layers|h)"},
        {"layers_to_transform": [3], "layers_pattern": ""},
        {"layers_to_transform": [3], "target_modules": ["q_proj", Q1]},
    ],
    ids=str,
)
def test_ranks_and_scales_are_pefts(config):
    if "exclude_modules" not in config and config.get("target_modules") != "all-linear":
        assert our_layers(**config)  # a case that adapts nothing would show nothing
    assert our_layers(**config) == peft_layers(**config)


def test_the_cases_that_surprise():
    exact = helper(rank_pattern={"layers.1": 2})
    assert (exact.rank(Q1), exact.rank(Q11)) == (4, 4)
    wide = helper(rank_pattern={"layers.1.*": 2})
    assert (wide.rank(Q1), wide.rank(Q11)) == (2, 2)
    first = helper(rank_pattern={"layers.1.*": 2, "q_proj": 3})
    assert [first.rank(TWELVE[0]), first.rank(Q1), first.rank(Q11)] == [3, 2, 2]


def test_rslora_divides_by_the_root_of_the_modules_own_rank():
    one = helper(use_rslora=True, lora_alpha=6, rank_pattern={"down_proj": 9})
    assert one.scaling(DOWN1) == 6 / math.sqrt(9)
    assert one.scaling(Q1) == 6 / math.sqrt(4)


PIECES = st.sampled_from(
    [
        "model",
        "layers",
        "layers.1",
        "1",
        "11",
        "self_attn",
        "mlp",
        "q_proj",
        "up_proj",
        "(q|k)_proj",
        ".*",
        "\\d",
        "[a-z]+",
        "_proj",
        "^model",
        "$",
        "(?:layers|h)",
        "x",
    ]
)
PATTERNS = st.lists(PIECES, min_size=1, max_size=4).flatmap(
    lambda pieces: st.sampled_from([".".join(pieces), "".join(pieces)])
)


@given(st.lists(PATTERNS, max_size=4, unique=True), st.sampled_from(TWELVE))
def test_pattern_keys_match_as_pefts_do(patterns, module):
    assert pattern_key(dict.fromkeys(patterns), module) == get_pattern_key(patterns, module)


NAMES = st.lists(
    st.sampled_from(["q_proj", "proj", "attn.q_proj", "1.mlp.up_proj", "down_proj", "mlp", Q1]),
    min_size=1,
    max_size=3,
)
REGEXES = st.sampled_from([".*_proj", "q_proj", ".*layers\\.1\\..*", "model.*(up|v)_proj"])
LAYERS = st.none() | st.integers(0, 11) | st.lists(st.integers(0, 11), max_size=3)
LAYER_PATTERNS = st.sampled_from([None, "", [], "layers", "h", ["h", "layers"], "(layers)", "l.*"])


@given(st.data())
def test_targets_are_pefts(data):
    """Lists, regular expressions, exclusions and layers, module by module."""
    by_list = data.draw(st.booleans())
    config = {"target_modules": data.draw(NAMES if by_list else REGEXES)}
    config["exclude_modules"] = data.draw(st.none() | NAMES | REGEXES)
    if by_list:
        config["layers_to_transform"] = data.draw(LAYERS)
        if config["layers_to_transform"] is not None:
            config["layers_pattern"] = data.draw(LAYER_PATTERNS)
    theirs, ours = LoraConfig(**config), helper(**config)
    for module in TWELVE:
        # PEFT's answer may be a match, or an object that is false for an excluded module.
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


@pytest.mark.parametrize("pattern", [None, "layers", "(?:layers|experts)"])
def test_the_layer_is_the_first_number_of_a_name(pattern):
    config = {"target_modules": ["w1"], "layers_to_transform": [1], "layers_pattern": pattern}
    theirs, ours = LoraConfig(**config), helper(**config)
    for layer, expert in ((1, 0), (0, 1)):
        module = f"model.layers.{layer}.experts.{expert}.w1"
        assert ours.targets(module) == check_target_module_exists(theirs, module) == (layer == 1)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ".*_proj", "layers_to_transform": [1]},
        {"target_modules": ".*_proj", "layers_pattern": "layers"},
        {"layers_pattern": "layers"},
    ],
    ids=str,
)
def test_what_peft_refuses_is_refused(config):
    with pytest.raises(ValueError, match="layers_"):
        LoraConfig(**{"target_modules": ["q_proj"], **config})
    with pytest.raises(ValueError, match="layers_"):
        helper(**config)
