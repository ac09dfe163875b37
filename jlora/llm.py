"""The offline API: a list of prompts in, a list of answers out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jlora.config import EngineArgs
from jlora.engine import LLMEngine
from jlora.request import LoRARequest, RequestOutput, RequestOutputKind, SamplingParams

# vLLM's other ways of running a model.
UNSUPPORTED = ("beam_search", "classify", "embed", "encode", "reward", "score")


class LLM:
    """A model, its adapters, and everything to answer prompts with them."""

    def __init__(self, model: str, *, use_tqdm: bool = True, **options: Any) -> None:
        """options: the fields of EngineArgs; an unknown one is an error that names it."""
        args = EngineArgs.from_options(model=model, **options)
        self.llm_engine = LLMEngine.from_engine_args(args, progress=use_tqdm)
        self._ids = itertools.count()

    def __getattr__(self, name: str) -> Any:
        if name in UNSUPPORTED:
            raise AttributeError(f"LLM.{name} is not supported by jlora; generate and chat are")
        raise AttributeError(f"LLM has no attribute {name!r}")

    def get_tokenizer(self) -> Any:
        """The model's tokeniser."""
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return self.llm_engine.inputs.default_params()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt, in order.

        prompts: one or a list of strings or {"prompt_token_ids": [...]}. sampling_params and
        lora_request: one for all, or a list with one for each. Raises ValueError, and runs
        nothing, when any of them is wrong.
        """
        if isinstance(prompts, (str, Mapping)):
            prompts = [prompts]
        return self._run(list(prompts), sampling_params, lora_request, use_tqdm, True)

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix."""
        return self.llm_engine.reset_prefix_cache()

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations: one, or a list, of lists of {"role": ..., "content": ...}."""
        if self.get_tokenizer() is None:
            raise ValueError("chat needs a tokeniser, but skip_tokenizer_init=True")
        if messages and isinstance(messages[0], dict):
            messages = [messages]
        adapters = _one_each("lora_request", lora_request, len(messages))
        engine = self.llm_engine
        prompts = [
            engine.get_tokenizer(adapter).apply_chat_template(
                conversation,
                tokenize=False,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation, adapter in zip(messages, adapters, strict=True)
        ]
        return self._run(prompts, sampling_params, adapters, use_tqdm, False)

    def _run(
        self, prompts: list, sampling_params: Any, lora_request: Any, use_tqdm: bool, special: bool
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _one_each("sampling_params", sampling_params, len(prompts))
        adapters = _one_each("lora_request", lora_request, len(prompts))
        engine, ids = self.llm_engine, []
        engine.load_loras(one for one in adapters if isinstance(one, LoRARequest))
        try:
            for prompt, one, adapter in zip(prompts, params, adapters, strict=True):
                if not isinstance(one, SamplingParams):
                    raise ValueError(f"sampling_params must be SamplingParams, not {one!r}")
                one = dataclasses.replace(one, output_kind=RequestOutputKind.FINAL_ONLY)
                request_id = f"llm-{next(self._ids)}"
                engine.add_request(
                    request_id, prompt, one, lora_request=adapter, add_special_tokens=special
                )
                ids.append(request_id)
            done = self._drain(set(ids), use_tqdm)
        except BaseException:  # an interrupt too: leave nothing behind
            engine.abort_request(ids)
            raise
        return [done[request_id] for request_id in ids]

    def _drain(self, ids: set[str], use_tqdm: bool) -> dict[str, RequestOutput]:
        done: dict[str, RequestOutput] = {}
        tokens = 0
        with tqdm(total=len(ids), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            while len(done) < len(ids):
                for output in self.llm_engine.step():
                    if output.request_id not in ids:
                        continue
                    if output.error is not None:
                        raise output.error
                    done[output.request_id] = output
                    tokens += sum(len(answer.token_ids) for answer in output.outputs)
                    rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
                    bar.update()
        return done


def _one_each(name: str, value: Any, count: int) -> list:
    if isinstance(value, Sequence):
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} entries for {count} prompts")
        return list(value)
    return [value] * count
