"""What a step's tokens mean for a sequence, and what the user hears of it."""

from __future__ import annotations

import math
import time
from typing import Any

from jlora.engine.sampler import TokenLogprobs
from jlora.engine.scheduler import Entry
from jlora.engine.sequence import RequestState, Sequence
from jlora.request import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
)

Reason = tuple[str, int | str | None]


def record_token(
    sequence: Sequence,
    token: int,
    logprobs: TokenLogprobs | None,
    index: int,
    max_model_len: int,
) -> Reason | None:
    """Appends a sampled token; why the sequence is finished by it, or None.

    logprobs: of the step, whose row `index` is this token's.
    """
    request = sequence.request
    params = request.params
    sequence.tokens.append(token)
    if request.metrics.first_token_time is None:
        request.metrics.first_token_time = time.time()
    if params.logprobs is not None and logprobs is not None:
        entry = _logprobs(token, logprobs, index, params.logprobs, request.tokenizer)
        sequence.logprobs.append(entry)
        sequence.cumulative_logprob += entry[token].logprob
    count = len(sequence.tokens) - sequence.num_prompt
    counts = count >= params.min_tokens
    if token in request.stop_ids and counts:
        if params.include_stop_str_in_output and sequence.detokenizer is not None:
            sequence.detokenizer.add(token, search=False)
        named = token in (params.stop_token_ids or ())
        return "stop", token if named else None
    detokenizer = sequence.detokenizer
    if detokenizer is not None and detokenizer.add(token, search=count > params.min_tokens):
        return "stop", detokenizer.matched
    if count >= request.max_tokens or len(sequence.tokens) >= max_model_len:
        return "length", None
    return None


def _logprobs(
    token: int, logprobs: TokenLogprobs, row: int, top: int, tokenizer: Any
) -> dict[int, Logprob]:
    """The token's and the `top` best ones'."""
    found = {token: (float(logprobs.logprobs[row]), int(logprobs.ranks[row]))}
    for rank in range(min(top, logprobs.top_ids.shape[1])):
        best, value = int(logprobs.top_ids[row, rank]), float(logprobs.top_logprobs[row, rank])
        if value == -math.inf:  # tokens that only other adapters know
            break
        found.setdefault(best, (value, rank + 1))
    return {
        one: Logprob(value, rank, None if tokenizer is None else tokenizer.decode([one]))
        for one, (value, rank) in found.items()
    }


def record_prompt_logprobs(entry: Entry, logprobs: TokenLogprobs, first: int) -> None:
    """Takes the part of a prompt's log-probabilities that a step has computed.

    first: the row of the entry's first token.
    """
    sequence, request = entry.sequence, entry.sequence.request
    if request.prompt_logprobs is None or sequence.index != 0:
        return
    top = request.params.prompt_logprobs or 0
    for offset in range(entry.count):
        position = entry.start + offset + 1  # whose token this row predicts
        if position < sequence.num_prompt and position == len(request.prompt_logprobs):
            token = sequence.tokens[position]
            request.prompt_logprobs.append(
                _logprobs(token, logprobs, first + offset, top, request.tokenizer)
            )


def request_output(request: RequestState) -> RequestOutput | None:
    """What to say of a request now, by its output_kind; None for nothing."""
    kind, finished = request.params.output_kind, request.finished
    if kind is RequestOutputKind.FINAL_ONLY and not finished:
        return None
    if finished:
        request.metrics.finished_time = time.time()
    completions = [_completion(one, kind) for one in request.sequences if not one.reported_end]
    if kind is RequestOutputKind.DELTA:
        completions = [one for one in completions if one.token_ids or one.text or one.finished()]
    if not completions:
        return None
    return RequestOutput(
        request.request_id,
        request.prompt,
        request.prompt_token_ids,
        None if request.prompt_logprobs is None else list(request.prompt_logprobs),
        completions,
        finished,
        request.lora_request,
        RequestMetrics(**vars(request.metrics)),
        request.num_cached_tokens,
        kind,
        request.error,
    )


def _completion(sequence: Sequence, kind: RequestOutputKind) -> CompletionOutput:
    params, start, start_text = sequence.request.params, 0, 0
    text, finished = sequence.text, sequence.finished
    if sequence.detokenizer is not None and not finished:
        text = text[: sequence.detokenizer.safe_length]
    if kind is RequestOutputKind.DELTA:
        start, start_text = sequence.reported, sequence.reported_text
        sequence.reported = len(sequence.tokens) - sequence.num_prompt
        sequence.reported_text = max(len(text), start_text)
        sequence.reported_end = finished
    return CompletionOutput(
        sequence.index,
        text[start_text:],
        sequence.tokens[sequence.num_prompt + start :],
        sequence.cumulative_logprob if params.logprobs is not None else None,
        sequence.logprobs[start:] if params.logprobs is not None else None,
        sequence.finish_reason,
        sequence.stop_reason,
        sequence.request.lora_request,
    )
