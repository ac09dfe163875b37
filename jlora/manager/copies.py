"""Adapters on their way from the host to the device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Set
from typing import Any

from jlora.manager.loads import BackgroundLoads
from jlora.manager.lora_model import LoRAModel
from jlora.manager.manager import LoRAModelManager
from jlora.manager.mixture import Adapter
from jlora.manager.stats import Durations

logger = logging.getLogger(__name__)


class Copies(BackgroundLoads):
    """What threads make of adapters so that the device only has to give them a place.

    Named by LoRAModel.key: a mixture's components are copied one by one, and those that are on the
    device already are not.
    """

    def __init__(
        self,
        manager: LoRAModelManager,
        stage: Callable[[LoRAModel], Any] | None,
        limit: int,
        timeout: float,
    ) -> None:
        """stage: makes a copy, in a thread; None: adapters need none. limit: of copies at a time,
        under way or waiting to be placed.
        """
        super().__init__(limit, timeout)
        self.stage, self._manager = stage, manager
        self.staged: dict[str, Any] = {}
        self.durations = Durations()
        self.failed: dict[str, Exception] = {}
        self.asked_for: dict[str, int] = {}  # by which adapter

    def missing(self, adapter: Adapter) -> list[LoRAModel]:
        """What must be copied before an adapter can be written to the device."""
        if self.stage is None:
            return []
        return [
            lora
            for lora, _ in adapter.components
            if lora.key not in self.staged and not self._manager.is_resident(lora.key)
        ]

    @property
    def full(self) -> bool:
        """Whether as many copies are on their way, or there, as may be."""
        return len(self.staged) + len(self) >= self.limit

    def copy(self, adapter_id: int, adapter: Adapter, at_once: bool = False) -> None:
        """Starts to copy an adapter. at_once: even if as many are on their way as may be."""
        own = {lora.key for lora, _ in adapter.components}
        ahead = len({*self.staged, *map(str, self.keys())} - own)
        new = [lora for lora in self.missing(adapter) if lora.key not in self]
        room = ahead == 0 or ahead + len(new) <= self.limit
        stage = self.stage
        for lora in new if at_once or room else ():
            if stage is not None and lora.key not in self.failed:  # to be said first
                self.asked_for[lora.key] = adapter_id
                self.start(lora.key, functools.partial(stage, lora))

    def take_over(self) -> None:
        """Takes what threads have made."""
        for key, future, seconds in self.collect():
            error = future.exception()
            if key not in self.asked_for:
                continue  # its adapter was removed meanwhile
            if error is None:
                self.staged[str(key)] = future.result()
                self.durations.add(seconds)
            else:
                logger.error("could not copy adapter %s to the device: %s", key, error)
                # Without its traceback, whose frames hold what has been copied.
                self.failed[str(key)] = as_exception(error).with_traceback(None)

    def on_their_way(self, adapter: Adapter) -> bool:
        """Whether copies of an adapter are missing, and nothing was wrong with them."""
        missing = self.missing(adapter)
        return bool(missing) and self.failed.keys().isdisjoint(lora.key for lora in missing)

    def are_there(self, adapter: Adapter) -> bool:
        """Whether an adapter can be written to the device. Raises what was wrong with a copy."""
        missing = self.missing(adapter)
        for lora in missing:
            if lora.key in self.failed:
                raise self.failed.pop(lora.key)
        return not missing

    def drop_all_but(self, wanted: Set[int]) -> None:
        """Lets go of the copies that nobody waits for, as those of an older version."""
        if not self.asked_for:
            return
        keep = self._manager.unwritten
        for key in list(self.staged):
            adapter_id = self.asked_for[key]
            adapter = self._manager.get_adapter(adapter_id) if adapter_id in wanted else None
            if key not in keep | {lora.key for lora, _ in (adapter.components if adapter else ())}:
                del self.staged[key]
        there = {*self.staged, *self.keys()}
        self.asked_for = {key: one for key, one in self.asked_for.items() if key in there}

    def forget(self, adapter_id: int) -> None:
        """Lets go of what an adapter asked for."""
        for key in [key for key, one in self.asked_for.items() if one == adapter_id]:
            self.staged.pop(key, None)
            del self.asked_for[key]


def as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(repr(error))
