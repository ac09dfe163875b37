"""Tiny models of transformers with adapters of the installed PEFT, to be read and applied."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from jlora.config import LoRAConfig
from jlora.manager import LoRAModel
from jlora.manager.requirements import UNLIMITED
from jlora.projections import ModuleMap
from tests.manager.adapters import model_config

IDS = torch.arange(50)[None]


def llama(tied: bool = False, bias: bool = False, vocab: int = 50) -> PreTrainedModel:
    """The model of `adapters.model_config`, with random weights (biases too)."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            attention_bias=bias,
            mlp_bias=bias,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    return model.eval()


def modules_of(tied: bool = False, bias: bool = False) -> ModuleMap:
    """The table of `llama`."""
    return ModuleMap(
        model_config(tie_word_embeddings=tied, qkv_bias=bias, o_bias=bias, mlp_bias=bias)
    )


def base_weight(model: PreTrainedModel):
    """What the reader compares whole matrices with."""
    tensors = {name: one.detach().numpy().copy() for name, one in model.state_dict().items()}
    return lambda name: tensors[name]


def save(
    model: PreTrainedModel, folder: Path, train: float = 0.3, saving: dict | None = None, **config
) -> PeftModel:
    """Puts a trained adapter (random numbers are added to all of it) on the model; saves it."""
    config = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**config)).eval()
        torch.manual_seed(3)
        for one in peft.parameters():
            if one.requires_grad:
                one.data += torch.randn_like(one) * train
        peft.save_pretrained(folder, **(saving or {}))
    return peft


def read(folder: Path, modules: ModuleMap, model=None, config: LoRAConfig = UNLIMITED, **options):
    """The adapter as jlora reads it; model: the base, for comparisons."""
    if model is not None:
        options["base_weight"] = base_weight(model)
    return LoRAModel.from_local_checkpoint(folder, 1, modules, config, "adapter 'a'", **options)


def logits(model) -> np.ndarray:
    """Of one fixed prompt, [tokens, vocabulary]."""
    with torch.no_grad():
        return model(IDS).logits[0].numpy()


def applied(model: PreTrainedModel, lora: LoRAModel) -> PreTrainedModel:
    """The base model with everything that the adapter changes written into its weights."""
    head_tied = model.config.tie_word_embeddings
    matrices = {"model.embed_tokens": model.model.embed_tokens, "lm_head": model.lm_head}
    if lora.added_tokens:
        model.resize_token_embeddings(50 + lora.added_tokens, mean_resizing=False)
        matrices = {"model.embed_tokens": model.model.embed_tokens, "lm_head": model.lm_head}
    if head_tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for name, rows in lora.vocab_rows.items():
        weight = matrices["lm_head" if name == "lm_head" else "model.embed_tokens"].weight
        weight.data[torch.tensor(rows.ids.astype(np.int64))] = tensor(rows.rows)
    for name, value in lora.biases.items():
        model.get_submodule(name).bias.data = tensor(value)
    for name, layer in lora.loras.items():
        module = model.get_submodule(name)
        delta = tensor(layer.lora_b) @ tensor(layer.lora_a) * layer.scaling
        embedding = name == "model.embed_tokens"
        weight = (module.weight.data.T if embedding else module.weight.data) + delta
        if layer.magnitude is not None:
            weight = weight * (tensor(layer.magnitude) / weight.norm(dim=1))[:, None]
        module.weight.data = (weight.T if embedding else weight).contiguous()
        if layer.bias is not None:
            old = torch.zeros(len(layer.bias)) if module.bias is None else module.bias.data
            module.bias = torch.nn.Parameter(old + tensor(layer.bias) * layer.scaling)
    return model


def tensor(array: np.ndarray) -> torch.Tensor:
    """As float32."""
    return torch.from_numpy(np.array(array, np.float32))


def saved_config(folder: Path) -> dict:
    """adapter_config.json."""
    return json.loads((folder / "adapter_config.json").read_text())
