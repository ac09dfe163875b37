"""The errors of jlora that a program may want to tell apart; all are ValueErrors."""


class AdapterError(ValueError):
    """An adapter cannot be served. The message names the adapter, what was found and expected."""


class AdapterInUseError(AdapterError, RuntimeError):
    """The adapter, or every adapter that could make room for it, is pinned or in use."""
