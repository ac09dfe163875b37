"""The errors of jlora that a program may want to tell apart; those of adapters are ValueErrors."""


class AdapterError(ValueError):
    """An adapter cannot be served. The message names the adapter, what was found and expected."""


class AdapterInUseError(AdapterError, RuntimeError):
    """The adapter, or every adapter that could make room for it, is pinned or in use."""


class HostError(RuntimeError):
    """One of several hosts that serve a model together has failed or is lost, so none goes on."""
