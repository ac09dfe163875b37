"""From what a user passes to a request that can run; everything wrong is said here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from jlora.config import EngineArgs, ModelConfig
from jlora.engine.detokenizer import Detokenizer
from jlora.engine.sequence import RequestState
from jlora.errors import AdapterError
from jlora.manager import AdapterVersion
from jlora.request import (
    MAX_LOGIT_BIAS,
    LoRARequest,
    SamplingParams,
    parse_prompt,
)

# A tokeniser's vocabulary is in one of the first; the others change its special tokens, and what
# chats look like.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "added_tokens.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_TOKENIZER_BYTES = 1 << 28  # of the files of an adapter
MAX_TOKENIZERS = 64  # kept, besides the base's


class InputProcessor:
    """Tokenises and checks requests."""

    def __init__(self, args: EngineArgs, model: ModelConfig) -> None:
        """Loads the tokeniser (unless skip_tokenizer_init) and the generation defaults."""
        self._model, self._max_logprobs = model, args.max_logprobs
        self.tokenizer: Any = None
        if not args.skip_tokenizer_init:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(
                args.tokenizer or args.model,
                revision=args.tokenizer_revision if args.tokenizer else args.revision,
            )
        self.generation_defaults = generation_config(args.model, args.revision)
        eos = self.generation_defaults.get("eos_token_id")
        listed = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        self._model_ends = model.eos_token_ids + listed
        self.eos_ids = self._ends(self.tokenizer, model.vocab_size)
        # By what is in the files, so that thousands of adapters may bring copies of one.
        self._tokenizers: dict[bytes, Any] = {b"": self.tokenizer}
        self._contents: dict[
            tuple[str, Path], bytes
        ] = {}  # by the adapters' identities and folders
        self._lock = threading.Lock()
        source = Path(args.tokenizer or args.model)
        if source.is_dir():
            self._tokenizers[_tokenizer_content(_tokenizer_files(source))] = self.tokenizer

    def check(self, prompt: Any, params: Any, lora_request: Any) -> None:
        """What can be said of a request before its adapter is read. Raises ValueError."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, not {type(params).__name__}")
        if lora_request is not None and not isinstance(lora_request, LoRARequest):
            raise ValueError(
                f"lora_request must be a LoRARequest, not {type(lora_request).__name__}"
            )
        _, tokens = parse_prompt(prompt)
        if tokens is None and self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: pass prompt_token_ids instead of text")
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self._max_logprobs:
                raise ValueError(f"{name}={asked} is above max_logprobs={self._max_logprobs}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokeniser, but skip_tokenizer_init=True")

    def process(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        lora_request: LoRARequest | None,
        version: AdapterVersion | None,
        max_model_len: int,
        add_special_tokens: bool = True,
    ) -> RequestState:
        """A checked request, without sequences yet. Raises ValueError that says what is wrong.

        version: of the adapter, which may know more tokens than the base and have a tokeniser.
        """
        tokenizer = self.tokenizer_of(version)
        text, tokens = parse_prompt(prompt)
        if tokens is None:
            tokens = _tokenize(tokenizer, text, add_special_tokens)
        vocab = self._model.vocab_size + (0 if version is None else version.added_tokens)
        _check_tokens(tokens, vocab, max_model_len)
        eos_ids = self.eos_ids if tokenizer is self.tokenizer else self._ends(tokenizer, vocab)
        self._check_token_params(params, vocab, len(eos_ids))
        stops = frozenset(params.stop_token_ids or ())
        room = max_model_len - len(tokens)
        return RequestState(
            request_id,
            text,
            tokens,
            dataclasses.replace(params),
            lora_request,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_ids=stops if params.ignore_eos else stops | eos_ids,
            tokenizer=tokenizer,
            adapter_version=version,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )

    def tokenizer_of(self, version: AdapterVersion | None) -> Any:
        """The adapter's own tokeniser when its folder has one that is not the base's.

        Looks at the folder only for a version that `read_tokenizer` has not been called for.
        """
        if self.tokenizer is None or version is None or version.folder is None:
            return self.tokenizer
        content = self._contents.get((version.identity, version.folder))
        found = None if content is None else self._tokenizers.get(content)
        return self.read_tokenizer(version) if found is None else found

    def read_tokenizer(self, version: AdapterVersion) -> Any:
        """Looks at an adapter's folder, for `tokenizer_of`; from any thread."""
        if self.tokenizer is None or version.folder is None:
            return self.tokenizer
        name, key = f"adapter {version.name!r}", (version.identity, version.folder)
        files = _tokenizer_files(version.folder)
        size = sum(file[1] for file in files)
        if size > MAX_TOKENIZER_BYTES:
            raise AdapterError(
                f"{name}: its tokeniser takes {size} bytes, expected at most {MAX_TOKENIZER_BYTES}"
            )
        if version.folder.is_dir():
            self._contents[key] = _tokenizer_content(files)
        # A folder that is gone: what it held, since the adapter may still be there.
        content = self._contents.get(key, b"")
        found = self._tokenizers.get(content)
        if found is not None:
            return found
        from transformers import AutoTokenizer

        try:
            # False: without it somebody at a terminal is asked whether to run the adapter's code.
            found = AutoTokenizer.from_pretrained(version.folder, trust_remote_code=False)
        except Exception as error:  # tokenizers raises plain ones
            raise AdapterError(
                f"{name}: the tokeniser in {version.folder} cannot be read: {error}"
            ) from error
        with self._lock:
            own = [one for one, kept in self._tokenizers.items() if kept is not self.tokenizer]
            if len(own) >= MAX_TOKENIZERS:
                del self._tokenizers[own[0]]
            self._tokenizers[content] = found
        return found

    def _ends(self, tokenizer: Any, vocab: int) -> frozenset[int]:
        """The tokens that end an answer: the model's, its generation defaults', the tokeniser's."""
        own = getattr(tokenizer, "eos_token_id", None)
        ends = self._model_ends + (() if own is None else (own,))
        return frozenset(token for token in ends if 0 <= token < vocab)

    def _check_token_params(self, params: SamplingParams, vocab: int, num_ends: int) -> None:
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            bad = next((token for token in ids or () if not 0 <= token < vocab), None)
            if bad is not None:
                raise ValueError(f"{name}: token id {bad} is outside 0 .. {vocab - 1}")
        stops = len(params.stop_token_ids or ()) + num_ends if params.min_tokens else 0
        if len(params.logit_bias or ()) + stops > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias has {len(params.logit_bias or ())} entries (and min_tokens {stops} "
                f"stop tokens); at most {MAX_LOGIT_BIAS} are supported"
            )

    def detokenizer(self, request: RequestState) -> Detokenizer | None:
        """A fresh one for an answer to the request; None when no text is wanted."""
        params = request.params
        if request.tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(
            request.tokenizer,
            request.prompt_token_ids,
            tuple(params.stop or ()),
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        )

    def default_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: self.generation_defaults.get(name) for name in names}
        return SamplingParams(**{name: value for name, value in found.items() if value is not None})


def _tokenize(tokenizer: Any, text: str | None, add_special_tokens: bool) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except (TypeError, UnicodeError) as error:  # a lone surrogate
        raise ValueError(f"the prompt is not text that can be encoded: {error}") from error


def _check_tokens(tokens: list[int], vocab: int, max_model_len: int) -> None:
    if not tokens:
        raise ValueError("the prompt has no tokens")
    bad = next((token for token in tokens if not 0 <= token < vocab), None)
    if bad is not None:
        raise ValueError(f"token id {bad} is outside the vocabulary (0 .. {vocab - 1})")
    if len(tokens) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens; with max_model_len={max_model_len} at most "
            f"{max_model_len - 1} leave room for an answer"
        )


def _tokenizer_files(folder: Path) -> tuple[tuple[Path, int, int], ...]:
    """The files of a folder's tokeniser, with size and time of each; none when it has none."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in VOCABULARY_FILES for file in found):
        return ()
    stats = [file.stat() for file in found]
    return tuple(
        (file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(found, stats, strict=True)
    )


@functools.lru_cache(4096)  # a file of many MB is not read for each request
def _tokenizer_content(files: tuple[tuple[Path, int, int], ...]) -> bytes:
    """Names a tokeniser by what its files hold; empty when there are none."""
    digests = (
        file.name.encode() + hashlib.sha256(file.read_bytes()).digest() for file, _, _ in files
    )
    return b"".join(digests)


def generation_config(model: str, revision: str | None) -> dict[str, Any]:
    """The generation_config.json of a folder or Hub repository, empty when it has none."""
    path = Path(model) / "generation_config.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(model, path.name, revision=revision))
        except EntryNotFoundError:  # also: offline, and not in the cache
            return {}
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a table")
    return found
