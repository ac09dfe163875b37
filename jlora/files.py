"""What several parts have to do with files that somebody else made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# A tokeniser's, by patterns.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def first_line(error: Exception) -> str:
    """What an error says, short enough for another error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def read_json(path: Path, largest: int) -> Any:
    """What a file of at most so many bytes holds. Raises ValueError that names it."""
    try:
        if path.stat().st_size > largest:
            raise ValueError(f"it has more than {largest} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {first_line(error)}") from error
