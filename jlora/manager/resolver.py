"""From the name in a request to an adapter's folder, no further than the operator allows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from jlora.errors import AdapterError
from jlora.manager.orbax_adapter import ORBAX_CONFIG_NAME
from jlora.manager.peft import HUB_FILES, WEIGHTS_NAME
from jlora.manager.peft_values import CONFIG_NAME

_PART = r"\w(?:[\w.-]{0,94}\w)?"  # what the Hub lets an owner or a repository be called
_HUB_NAME = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/(?:\*|{_PART})", re.ASCII)


class LoRAResolver(Protocol):
    """Knows where adapters are that nobody has registered."""

    def resolve_lora(self, lora_name: str) -> str | None:
        """The local folder of the adapter of this name, None when it is not known here.

        Raises AdapterError for a name that must be refused, whoever else may know it.
        """


class FolderResolver:
    """Adapters below one folder: `team/sql` is its subfolder of that name.

    Links that stay below the root are followed. Who can write there is trusted not to change an
    adapter between the look and the loading.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Raises ValueError when the root is not a folder."""
        given = os.path.expanduser(os.fspath(root))
        if not os.path.isdir(given):
            raise ValueError(f"{given!r} is not a folder; adapters are looked up below one")
        self.root = Path(os.path.realpath(given))

    def resolve_lora(self, lora_name: str) -> str | None:
        """The folder's real path; None unless it has adapter_config.json or jlora_adapter.json.

        Raises AdapterError for a name that is not one of folders below the root, and for a folder
        that is, or holds at any depth, a link to somewhere else.
        """
        wrong = _fault(lora_name)
        if wrong:
            raise _error(lora_name, f"the name {wrong}; it must be like sql or team/sql")
        folder = self.root.joinpath(*lora_name.split("/"))
        if not any(os.path.isfile(folder / name) for name in (CONFIG_NAME, ORBAX_CONFIG_NAME)):
            return None
        try:
            link = self._link_out(folder)
        except OSError as error:
            raise _error(lora_name, f"its folder cannot be read: {error.strerror}") from error
        if link:
            raise _error(lora_name, f"{link.relative_to(self.root)} leads out of the root; copy it")
        return os.path.realpath(folder)

    def _link_out(self, folder: Path) -> Path | None:
        """The first path, of the folder and all in it, whose real path is not below the root."""
        waiting, seen = [folder], set()
        while waiting:
            path = waiting.pop()
            real = Path(os.path.realpath(path))
            if not real.is_relative_to(self.root):
                return path
            if real not in seen and real.is_dir():
                seen.add(real)
                waiting += real.iterdir()
        return None


class HubResolver:
    """Adapters of the Hub repositories that are allowed; pickled weights are not taken."""

    def __init__(
        self,
        allowed: Iterable[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        """allowed: `owner/name` or `owner/*`, else ValueError; the others: as snapshot_download."""
        self.allowed = tuple(allowed)
        good = (isinstance(one, str) and _HUB_NAME.fullmatch(one) for one in self.allowed)
        if not self.allowed or not all(good):
            raise ValueError(f"allowed must be a list of owner/name or owner/*, not {allowed!r}")
        self._options = {"cache_dir": cache_dir, "revision": revision, "token": token}

    def resolve_lora(self, lora_name: str) -> str | None:
        """The folder of the downloaded repository, None when its name is not allowed.

        Raises AdapterError when it cannot be had, or is not an adapter in safetensors.
        """
        owner, _, name = lora_name.partition("/")
        allowed = lora_name in self.allowed or f"{owner}/*" in self.allowed
        if not allowed or name == "*" or not _HUB_NAME.fullmatch(lora_name):
            return None
        from huggingface_hub import snapshot_download

        files = [*HUB_FILES, WEIGHTS_NAME]
        try:
            folder = snapshot_download(lora_name, allow_patterns=files, **self._options)
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise _error(lora_name, f"no Hub repository that can be read ({cause})") from error
        if not all(os.path.isfile(f"{folder}/{one}") for one in (CONFIG_NAME, WEIGHTS_NAME)):
            raise _error(lora_name, f"its Hub repository lacks {CONFIG_NAME} or {WEIGHTS_NAME}")
        return folder


def resolve(resolvers: Iterable[LoRAResolver], lora_name: str) -> str:
    """The local folder of an adapter, from the first resolver that knows it.

    Raises AdapterError when none does or one refuses the name, ValueError when it is no name.
    """
    if not isinstance(lora_name, str) or not lora_name:
        raise ValueError(f"lora_name must be a string that is not empty, not {lora_name!r}")
    asked = []
    for resolver in resolvers:
        folder = resolver.resolve_lora(lora_name)
        if folder is not None:
            return folder
        asked.append(type(resolver).__name__)
    raise _error(lora_name, f"none of {len(asked)} resolvers knows it ({', '.join(asked)})")


def _fault(name: str) -> str | None:
    """What keeps a name from being one of folders below a root."""
    if not name.isprintable():
        return "has control or other invisible characters"
    if name.startswith("/") or "\\" in name:
        return "is absolute or has a backslash"
    for part in name.split("/"):
        if part in ("", ".", "..") or re.match("~|[A-Za-z]:", part):
            return f"has a part {part[:50]!r}"
        if len(part.encode()) > 255:  # as file systems count
            return "has a part of more than 255 bytes"
    return None


def _error(lora_name: str, what: str) -> AdapterError:
    return AdapterError(f"adapter {lora_name[:200]!r}: {what}")
