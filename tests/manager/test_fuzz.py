"""Random configurations and random bytes: an adapter or an AdapterError, nothing else."""

from __future__ import annotations

import dataclasses
import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings
from peft import LoraConfig
from safetensors.numpy import save

from jlora.errors import AdapterError
from jlora.manager import LoRAModel, PEFTHelper
from jlora.manager.requirements import UNLIMITED
from tests.manager.adapters import MODULES, WEIGHTS, make_config, make_tensors, write_adapter

KEYS = sorted({field.name for field in dataclasses.fields(LoraConfig)})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["all", "LORA", "CAUSAL_LM", "q_proj", "(", ".*", "embed_tokens", "lm_head"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
TENSORS = make_tensors(("q_proj", "v_proj"))
WHOLE = save(TENSORS)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
@example({"target_modules": ["q_proj"], "layers_to_transform": [10**400]})
@example({"lora_alpha": -0.0, "use_rslora": True})
@example({"rank_pattern": {"q_proj": 10**30}})
def test_configurations(changes):
    config = json.loads(json.dumps(make_config(**changes)))
    try:
        helper = PEFTHelper.from_dict(config, "adapter 'a'")
        LoRAModel.from_lora_tensors(1, TENSORS, helper, MODULES, UNLIMITED, "adapter 'a'")
    except AdapterError as error:
        message = str(error)
    else:
        return
    assert message.startswith("adapter 'a': ")
    assert len(message) < 3000


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_bytes(data, tmp_path):
    whole = bytearray(WHOLE)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "remove", "insert"]))
        if kind == "set":
            whole[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del whole[max(at, 1) :]
        elif kind == "remove":
            del whole[max(at, 1) : at + data.draw(st.integers(1, 9))]
        else:
            whole[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        header = min(header, len(whole))
    folder = write_adapter(tmp_path, {})
    (folder / WEIGHTS).write_bytes(bytes(whole))
    try:
        lora = LoRAModel.from_local_checkpoint(folder, 1, MODULES, UNLIMITED, "adapter 'a'")
    except AdapterError:
        return
    assert sum(lora.tensor_counts.values()) <= len(TENSORS)


@pytest.mark.parametrize("depth", [10, 1000, 100_000])
def test_deep_configurations(depth, tmp_path):
    folder = write_adapter(tmp_path)
    text = '{"r": 4, "rank_pattern": ' + '{"a": ' * depth + "1" + "}" * depth + "}"
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError):
        LoRAModel.from_local_checkpoint(folder, 1, MODULES, UNLIMITED, "adapter 'a'")


def test_a_configuration_of_many_megabytes(tmp_path):
    folder = write_adapter(tmp_path, revision="x" * (1 << 26))
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not readable.*bytes"):
        LoRAModel.from_local_checkpoint(folder, 1, MODULES, UNLIMITED, "adapter 'a'")
