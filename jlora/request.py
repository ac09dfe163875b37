"""What goes into an engine and what comes out of it, under vLLM's names."""

from __future__ import annotations

import enum
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jlora.config import require_bool, require_int

_LARGEST_INT, _LARGEST_FLOAT = 2**31 - 1, 3.4e38  # what int32 and float32 on the device hold
MAX_LOGIT_BIAS = 1024  # entries a request, min_tokens' stop tokens included


COMBINATION_TYPES = ("cat", "linear")


@dataclass(frozen=True)
class LoRARequest:
    """The adapter of a request.

    lora_int_id: from 1, names the adapter in an engine. lora_path: a folder, or a Hub repository.
    The same id with the same path is the same adapter under any lora_name. load_inplace: replace
    what the id holds by what the request holds now. base_model_name: the model it is for; another
    one than the engine's is warned of.

    Instead of a path, an adapter may be in memory: lora_tensors, arrays by the names that PEFT
    gives them, and peft_config, what adapter_config.json would hold. Or it may be a mixture:
    components, (LoRARequest, weight) pairs that act together; combination_type says how, as in
    PEFT's add_weighted_adapter: "cat" is the weighted sum of all, "linear" sums A and B apart.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    components: Sequence[tuple[LoRARequest, float]] | None = None
    combination_type: str = "cat"
    lora_tensors: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    peft_config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    # Arrays do not compare with ==: requests are equal when they hold the same dictionaries.
    _memory: tuple[int, int] = field(init=False, default=(0, 0), repr=False)

    def __post_init__(self) -> None:
        number = self.lora_int_id
        if not isinstance(number, numbers.Integral) or isinstance(number, bool) or number < 1:
            raise ValueError(f"lora_int_id must be an integer from 1, not {number!r}")
        if not self.lora_name or not isinstance(self.lora_name, str):
            raise ValueError(f"lora_name must be a name, not {self.lora_name!r}")
        name = f"adapter {self.lora_name!r}"
        if not isinstance(self.lora_path, str):
            raise ValueError(
                f"{name}: lora_path must be the name of a folder or of a Hub repository, a string, "
                f"not {self.lora_path!r}"
            )
        given = [bool(self.lora_path), self.components is not None, self.lora_tensors is not None]
        if sum(given) != 1:
            raise ValueError(
                f"{name}: give one of lora_path (the name of a folder or of a Hub repository), "
                f"components and lora_tensors, not {sum(given) or 'none'}; lora_path is "
                f"{self.lora_path!r}"
            )
        require_bool(f"{name}: load_inplace", self.load_inplace)
        if self.base_model_name is not None and not isinstance(self.base_model_name, str):
            raise ValueError(f"{name}: base_model_name={self.base_model_name!r} must be a string")
        for option, value in (
            ("lora_tensors", self.lora_tensors),
            ("peft_config", self.peft_config),
        ):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(
                    f"{name}: {option} must be a dictionary, not {type(value).__name__}"
                )
        if not all(isinstance(key, str) for key in self.lora_tensors or ()):
            raise ValueError(f"{name}: the names of lora_tensors must be strings")
        if self.lora_tensors is not None:
            object.__setattr__(self, "_memory", (id(self.lora_tensors), id(self.peft_config)))
        if (self.lora_tensors is None) != (self.peft_config is None):
            raise ValueError(f"{name}: lora_tensors and peft_config belong together")
        if self.combination_type not in COMBINATION_TYPES:
            raise ValueError(
                f"{name}: combination_type={self.combination_type!r} is not supported; use one of "
                f"{', '.join(COMBINATION_TYPES)}"
            )
        if self.components is not None:
            object.__setattr__(self, "components", _components(self.components, name))

    @property
    def adapter_id(self) -> int:
        """vLLM's other name of lora_int_id."""
        return self.lora_int_id

    @property
    def name(self) -> str:
        """vLLM's other name of lora_name."""
        return self.lora_name

    @property
    def path(self) -> str:
        """vLLM's other name of lora_path."""
        return self.lora_path


def _components(components: Any, name: str) -> tuple[tuple[LoRARequest, float], ...]:
    """The components of a mixture, checked."""
    if not isinstance(components, Sequence) or not components:
        raise ValueError(f"{name}: components must be a list of (LoRARequest, weight) pairs")
    ids: set[int] = set()
    for one in components:
        if not isinstance(one, Sequence) or len(one) != 2 or not isinstance(one[0], LoRARequest):
            raise ValueError(
                f"{name}: a component must be a (LoRARequest, weight) pair, not {one!r}"
            )
        request, weight = one
        if request.components is not None:
            raise ValueError(f"{name}: component {request.lora_name!r} is a mixture itself")
        if request.load_inplace:
            raise ValueError(
                f"{name}: component {request.lora_name!r} has load_inplace=True; reload it by "
                "itself first"
            )
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not number or not abs(weight) <= _LARGEST_FLOAT:
            raise ValueError(f"{name}: a weight must be a finite number, not {weight!r}")
        if request.lora_int_id in ids:
            raise ValueError(f"{name}: component id {request.lora_int_id} comes twice")
        ids.add(request.lora_int_id)
    return tuple((request, float(weight)) for request, weight in components)


class RequestOutputKind(enum.Enum):
    """What each RequestOutput holds: everything so far, what is new, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def _listed(name: str, value: Any) -> tuple:
    """A list argument as a tuple; None is empty, a string alone is one entry."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError(f"{name} must be a list, not {value!r}")
    return tuple(value)


@dataclass
class SamplingParams:
    """How to choose tokens, and when to stop.

    n: answers a prompt. temperature: 0 is greedy. top_k: 0 or -1 for all. seed: makes the request
    repeatable, whatever runs beside it. stop, stop_token_ids: ends the answer; the stop string is
    not part of it unless include_stop_str_in_output. logprobs, prompt_logprobs: how many of the
    best tokens come with their log-probability (before temperature and penalties), besides the
    chosen one. Penalties follow the definitions of OpenAI (presence, frequency) and of
    Keskar et al. 2019 (repetition, over prompt and answer).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        require_int("n", self.n, 1)
        require_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            require_int("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise ValueError(
                    f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}"
                )
        self.top_k = 0 if self.top_k == -1 else self.top_k
        require_int("top_k", self.top_k, 0)
        for name in ("min_tokens", "top_k"):
            if getattr(self, name) > _LARGEST_INT:
                raise ValueError(f"{name}={getattr(self, name)} is above {_LARGEST_INT}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 0)
        if not isinstance(self.seed, (numbers.Integral, type(None))) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be an integer, not {self.seed!r}")
        self._check_ranges()
        self.stop = _listed("stop", self.stop)
        if not all(isinstance(one, str) and one for one in self.stop):
            raise ValueError(f"stop must be non-empty strings, not {self.stop!r}")
        self.stop_token_ids = _listed("stop_token_ids", self.stop_token_ids)
        for token in self.stop_token_ids:
            require_int("stop_token_ids", token, 0)
        self.logit_bias = self._checked_bias()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            require_bool(name, getattr(self, name))
        require_bool("detokenize", self.detokenize)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, not {self.output_kind!r}")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, _LARGEST_FLOAT),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.0, _LARGEST_FLOAT),
        ):
            value = getattr(self, name)
            open_end = name in ("top_p", "repetition_penalty") and value == 0
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name} must be a number, not {value!r}")
            if not low <= value <= high or open_end:  # type: ignore[operator]
                raise ValueError(f"{name}={value} is outside {low} .. {high}")

    def _checked_bias(self) -> dict[int, float]:
        if not isinstance(self.logit_bias, (Mapping, type(None))):
            raise ValueError(
                f"logit_bias must be a dictionary of token ids and numbers, not {self.logit_bias!r}"
            )
        for token, value in (self.logit_bias or {}).items():
            require_int("logit_bias token", token, 0)
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            forbidden = number and value == -float("inf")
            if not forbidden and not (number and abs(value) <= _LARGEST_FLOAT):
                raise ValueError(f"logit_bias of token {token} must be a number, not {value!r}")
        return dict(self.logit_bias or {})

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature < 1e-5


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token, its rank in the vocabulary (1 is the best) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = list[dict[int, Logprob]]


@dataclass
class CompletionOutput:
    """One answer to a prompt; finish_reason is None while it goes on, then stop, length, abort."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None

    def finished(self) -> bool:
        """Whether this answer is complete."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times of a request, seconds of `time.time()`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """What an engine says of a request after a step.

    error: why a request that has ended with "abort" could not even begin.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    lora_request: LoRARequest | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    kind: RequestOutputKind = field(default=RequestOutputKind.CUMULATIVE, repr=False)
    error: Exception | None = None


TextPrompt = str
TokensPrompt = Mapping[str, Any]
Prompt = TextPrompt | TokensPrompt


def parse_prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    """A prompt as (text, token ids), one of them None; raises on anything else.

    Accepted: a string, {"prompt": str}, {"prompt_token_ids": [...]} (with or without "prompt").
    """
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        raise ValueError(
            "a prompt is a string or a dictionary with prompt_token_ids, not "
            f"{type(prompt).__name__}"
        )
    unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
    if unknown:
        raise ValueError(f"prompt key {', '.join(map(str, unknown))} is not supported")
    text, tokens = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if not isinstance(text, str if tokens is None else (str, type(None))):
        raise ValueError(
            f"a prompt dictionary needs prompt (a string, not {text!r}) or prompt_token_ids"
        )
    return text, None if tokens is None else _token_ids(tokens)


def _token_ids(tokens: Any) -> list[int]:
    """Integers of any kind as ints; a float is refused, not rounded."""
    if not isinstance(tokens, Iterable):
        raise ValueError(f"prompt_token_ids must be a list of integers, not {tokens!r}")
    ids = []
    for token in tokens:
        try:
            ids.append(operator.index(token))
        except TypeError as error:
            raise ValueError(f"prompt_token_ids must be integers, not {token!r}") from error
    return ids
