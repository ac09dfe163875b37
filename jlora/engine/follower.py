"""The loop of every process but the first, when several hosts serve one model together."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import jax
import numpy as np

from jlora.config import EngineArgs
from jlora.engine import memory
from jlora.engine.adapter_pool import AdapterPool
from jlora.engine.channel import Message
from jlora.engine.device_side import describe, make_device_side, read_model_config, told_limits
from jlora.engine.hosts import Follower
from jlora.engine.runner import ModelRunner
from jlora.engine.staging import PlacedBlock, StagedAdapter, StagingBuffers
from jlora.engine.state import unshortened
from jlora.projections import Feature


def follow(engine_args: EngineArgs, *, progress: bool = False) -> None:
    """Serves, with this process's devices, the engine that the first process makes.

    For every process but the first, after `jax.distributed.initialize()`, with the same EngineArgs
    (of which lora_modules and lora_resolvers are read in the first process only). Returns when the
    first process shuts its engine down, or ends. Raises HostError when another host is lost or
    fails, ValueError when the arguments, or the model's configuration, are not those of the first.
    """
    memory.reserve_fraction(engine_args.gpu_memory_utilization)
    if jax.process_index() == 0:
        raise RuntimeError("the first process leads: it makes an LLM or LLMEngine instead")
    hosts = Follower(engine_args.host_timeout)
    with hosts.all_or_none("following the first"):
        model = read_model_config(engine_args)
        what = describe(engine_args, model, told_limits(hosts, engine_args, model))
        runner = make_device_side(what, hosts, progress).runner
        if not engine_args.enforce_eager:
            runner.warm_up(progress)
        _Following(hosts, runner).run()
    hosts.close()


class _Following:
    """Does to the devices of one host what the first process does to its own."""

    def __init__(self, hosts: Follower, runner: ModelRunner) -> None:
        self._hosts, self._runner = hosts, runner
        self._arrivals = None if runner.pool is None else _Arrivals(hosts, runner.pool)

    def run(self) -> None:
        """Until the first process has no more to do."""
        before = None
        while (message := self._hosts.next_step()).op != "end":
            dropped, *arguments = message.arguments
            if self._arrivals is not None:
                self._arrivals.drop(dropped)
            if message.op == "step":
                result = self._runner.run(message.arrays[0], *arguments)
                # As the first process, which reads a step when the next has been dispatched: so
                # nothing piles up here, and a step that has failed is noticed.
                self._hosts.wait(before)
                before = result
            else:
                self._prepare(message.op, arguments, message.arrays)

    def _prepare(self, op: str, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        runner, pool, arrivals = self._runner, self._runner.pool, self._arrivals
        if op == "admit":
            return runner.admit(unshortened(arrays[1:], runner.config.history), arrays[0])
        assert pool is not None and arrivals is not None  # the first process has a pool, too
        match op, arguments:
            case "blocks", places:
                there = arrivals.adapters
                pool.write_blocks(
                    [
                        PlacedBlock(pool.row(name), layer, block, *there[number].blocks[name, *at])
                        for number, name, *at, layer, block in places
                    ]
                )
            case "tables", ():
                pool.set_tables(arrays)
            case "feature", (number, feature, name, at):
                values = arrivals.adapters[number].features[feature, name]
                pool.write_feature(Feature(feature), name, at, values)
            case _:
                raise RuntimeError(f"the first host wants {op!r}, which is unknown here")
        return None


class _Arrivals:
    """Adapters that the first process has packed and sent; a thread puts them on the devices."""

    def __init__(self, hosts: Follower, pool: AdapterPool) -> None:
        self.adapters: defaultdict[int, StagedAdapter] = defaultdict(StagedAdapter)
        self._sent: defaultdict[int, StagingBuffers] = defaultdict(StagingBuffers)
        self._failed: dict[int, str] = {}
        self._hosts, self._pool, self._bulk = hosts, pool, hosts.leader.bulk
        threading.Thread(target=self._receive, name="jlora-adapters", daemon=True).start()

    def drop(self, numbers: list[int]) -> None:
        """Lets go of adapters that the first process has let go of."""
        for number in numbers:
            self.adapters.pop(number, None)

    def _receive(self) -> None:
        try:
            while True:
                message = self._bulk.receive()
                number = message.arguments[0]
                try:
                    self._take(message)
                except Exception as error:  # of any kind: the adapter's, not the engine's
                    self._failed[number] = f"{type(error).__name__} {error}"
                if message.op == "ready":
                    fault = self._failed.pop(number, None)
                    self._bulk.send("ready" if fault is None else "error", [fault])
        except OSError:  # `hosts` watches
            pass
        except BaseException as error:
            self._hosts.fail(f"adapters can no longer be received: {error!r}")

    def _take(self, message: Message) -> None:
        number, *name = message.arguments
        match message.op:
            case "block":
                row = self._pool.row(name[0])
                sent = self._pool.send_block(row, message.arrays, self._sent[number])
                self.adapters[number].blocks[tuple(name)] = sent
            case "feature":
                self.adapters[number].features[tuple(name)] = tuple(message.arrays)
            case "ready":
                self._sent.pop(number, StagingBuffers()).wait()
