"""The engine: requests in, steps, outputs out. One thread drives it."""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jlora.config import EngineArgs
from jlora.engine import memory
from jlora.engine.adapter_methods import IDLE_SECONDS, AdapterMethods
from jlora.engine.arrivals import Arrival, Arrivals
from jlora.engine.collector import spare_collector
from jlora.engine.device_side import (
    describe,
    make_device_side,
    read_model_config,
    require_same,
)
from jlora.engine.hosts import lead, making
from jlora.engine.inputs import InputProcessor
from jlora.engine.kv_pages import PageAllocator
from jlora.engine.outputs import record_prompt_logprobs, record_token, request_output
from jlora.engine.runner import StepResult
from jlora.engine.sampler import variant_of
from jlora.engine.scheduler import Plan, Scheduler
from jlora.engine.sequence import RequestState, Sequence
from jlora.engine.setup import lora_limits
from jlora.manager import (
    AdapterVersion,
    TieredLoRAManager,
)
from jlora.request import LoRARequest, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)


class LLMEngine(AdapterMethods):
    """Serves requests, each with its own adapter or none, by continuous batching."""

    def __init__(self, args: EngineArgs, *, progress: bool = False) -> None:
        """Loads the model, allocates everything, and compiles (unless enforce_eager)."""
        start = time.perf_counter()
        memory.reserve_fraction(args.gpu_memory_utilization)
        self.args, self.hosts = args, lead(args.host_timeout)
        self._end_sparing: Callable[[], object] = lambda: None
        with making(self.hosts):
            self._make_device_side(progress)
            self._make_host_side()
            if not args.enforce_eager:
                self.warm_up(progress)
                self._end_sparing = spare_collector(self)
            for request in args.lora_modules or ():
                self.add_lora(request)
        logger.info("ready in %.1f s", time.perf_counter() - start)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, *, progress: bool = False) -> LLMEngine:
        """vLLM's constructor."""
        return cls(engine_args, progress=progress)

    # -- construction ----------------------------------------------------------------------

    def _make_device_side(self, progress: bool) -> None:
        args = self.args
        model = read_model_config(args)
        self.lora_config = lora_limits(args, model)
        if self.hosts is not None:
            require_same(self.hosts, args, model, self.lora_config)
        what = describe(args, model, self.lora_config)
        self.model_config = what.model
        self.inputs = InputProcessor(args, what.model)
        device = make_device_side(what, self.hosts, progress)
        self.modules, self.runner, self._base = device.modules, device.runner, device.base

    def _make_host_side(self) -> None:
        args, sizes, pool = self.args, self.runner.config, self.runner.pool
        self.lora: TieredLoRAManager | None = None
        if self.lora_config is not None and pool is not None:
            self.lora = TieredLoRAManager(
                self.modules,
                self.lora_config,
                self._base,
                model_name=args.model,
                stage=pool.stage,
                prepare=self.inputs.read_tokenizer,
            )
        caching = args.enable_prefix_caching is not False
        self.pages = PageAllocator(sizes.num_pages, sizes.page_size, caching)
        self.scheduler = Scheduler(
            self.pages,
            self.lora,
            args.max_num_seqs,
            sizes.max_num_batched_tokens,
            sizes.max_model_len,
            self.model_config.restarts_above,
        )
        self._requests: dict[str, RequestState] = {}
        self._changed: dict[str, RequestState] = {}  # since the last report
        self._arrivals, self._resolved = Arrivals(), {}
        if self.lora is not None:
            follow = weakref.WeakMethod(self._follow_version)  # so that the engine is in no cycle
            self.lora.on_superseded = lambda old, new: follow()(old, new)  # type: ignore[misc]
        self._in_flight: StepResult | None = None
        self._seeds, self._numbers = np.random.default_rng(args.seed), itertools.count()

    def warm_up(self, progress: bool = False) -> None:
        """Compiles every executable, then writes a dummy adapter of full rank into every slot."""
        self.runner.warm_up(progress)
        if self.lora is None or self.runner.pool is None:
            return
        with self.lora.maybe_select_dummy_loras(self.lora_config):
            self.runner.pool.apply(self.lora.manager)
        self.runner.pool.apply(self.lora.manager)
        jax.block_until_ready(self.runner.pool.state)

    def shutdown(self) -> None:
        """Ends what other processes do for this engine, which is of no use then.

        It happens by itself when this process ends. The garbage collector again looks at what there
        was when the engine was made, which it passes over otherwise while the engine lives.
        """
        self._end_sparing()
        if self.hosts is not None:
            self.hosts.close()

    # -- requests --------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokeniser, None with skip_tokenizer_init."""
        return self.inputs.tokenizer

    def get_tokenizer(self, lora_request: LoRARequest | None = None) -> Any:
        """The tokeniser of the base model, or the adapter's own when its folder has one."""
        version = None if lora_request is None else self._read_adapter(lora_request)
        return self.inputs.tokenizer_of(version)

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        *,
        add_special_tokens: bool = True,
        may_wait: bool = True,
    ) -> None:
        """Queues a request. Raises ValueError (AdapterError) and changes nothing if it is bad.

        An adapter that has not been read yet is read in the background while other requests run,
        and what is wrong with it, or with the request for it, is then the `error` of an output that
        ends with "abort". While nobody runs it is read at once, if the call may wait.
        """
        if not isinstance(request_id, str):
            raise ValueError(f"request_id must be a string, not {request_id!r}")
        if request_id in self._requests or request_id in self._arrivals:
            raise ValueError(f"request {request_id} is running already")
        params = params if params is not None else SamplingParams()
        self.inputs.check(prompt, params, lora_request)
        arrival = Arrival(
            request_id,
            prompt,
            params,
            lora_request,
            add_special_tokens,
            next(self._numbers),
            time.time() if arrival_time is None else arrival_time,
        )
        if lora_request is None:
            self._queue(arrival, None)
        elif may_wait and not self.scheduler.running and not len(self._arrivals):
            version = self._read_adapter(lora_request)
            if not self.scheduler.waiting:  # so that it runs in the next step
                self._place_now(lora_request.lora_int_id)
            self._queue(arrival, version)
        else:
            lora = self._lora_of(lora_request)
            known = lora.known(lora_request)
            if known is not None:
                self._queue(arrival, known)
            else:
                self._arrivals.add(arrival, lora.fetch(lora_request))

    def _queue(self, arrival: Arrival, version: AdapterVersion | None) -> None:
        """version: of its adapter, which has been read."""
        request = self.inputs.process(
            arrival.request_id,
            arrival.prompt,
            arrival.params,
            arrival.lora_request,
            version,
            self.runner.config.max_model_len,
            arrival.add_special_tokens,
        )
        request.arrival, request.metrics.arrival_time = arrival.number, arrival.time
        for index in range(request.params.n):
            sequence = self._sequence(request, index)
            request.sequences.append(sequence)
            self.scheduler.add(sequence)
        self._requests[request.request_id] = request

    def _sequence(self, request: RequestState, index: int) -> Sequence:
        seed = request.params.seed
        if seed is None:
            seed = int(self._seeds.integers(2**31))
        mixed = int(np.random.SeedSequence((abs(seed), seed < 0, index)).generate_state(1)[0] >> 1)
        tokens = list(request.prompt_token_ids)
        limit = self.model_config.rope.length_dependent_from
        rope_length = len(tokens) if limit is not None and len(tokens) > limit else 0
        detokenizer = self.inputs.detokenizer(request)
        acts_from = self._acts_from(request)
        return Sequence(
            request, index, mixed, tokens, len(tokens), rope_length, acts_from, detokenizer
        )

    def _acts_from(self, request: RequestState) -> int | None:
        """Where in the prompt the adapter begins to act: at once, or an activated LoRA where its
        invocation tokens come for the last time. None: nowhere.
        """
        if request.lora_request is None or self.lora is None:
            return 0
        wanted = list(self.lora.version(request.lora_request.lora_int_id).invocation_tokens)
        if not wanted:
            return 0
        prompt, count = request.prompt_token_ids, len(wanted)
        starts = range(len(prompt) - count, -1, -1)
        return next((at for at in starts if prompt[at : at + count] == wanted), None)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Ends requests at once; unknown ids are passed over, as they may have just finished."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        for one in ids:
            self._arrivals.drop(one)
            request = self._requests.pop(one, None)
            for sequence in request.sequences if request is not None else ():
                if not sequence.finished:
                    self._finish(sequence, "abort")
        self._remove_leaving()

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._requests) or len(self._arrivals) > 0

    def get_num_unfinished_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._requests) + len(self._arrivals)

    # -- steps -----------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step, then reads the one before: the device never waits.

        Returns what is new of the requests in the step that was read.
        """
        changed = self._changed  # what a step that failed had still to report, too
        self._take_arrivals(changed)
        plan = self.scheduler.schedule(in_flight=self._in_flight is not None)
        if plan is None:  # something must be preempted, and its last token is on the way
            self._collect(changed)
            plan = self.scheduler.schedule(in_flight=False)
            assert plan is not None  # nothing is in flight
        try:
            result = self._dispatch(plan) if plan.entries else None
        except BaseException as error:  # an interrupt too
            self.scheduler.abandon(plan, f"the step failed: {type(error).__name__} {error}")
            if self.lora is not None:
                self.lora.manager.vacate_unwritten()
            raise
        self._collect(changed)
        self._in_flight = result
        for sequence in self.scheduler.failed:
            changed[sequence.request.request_id] = sequence.request
        self.scheduler.failed.clear()
        if result is None and not changed and self.lora is not None and self.lora.busy:
            self.lora.wait(IDLE_SECONDS)  # for an adapter: there is nothing else to do
        self._changed = {}
        outputs = self._report(changed)
        self._remove_leaving()
        return outputs

    def _dispatch(self, plan: Plan) -> StepResult:
        self._write_adapters()
        variants = {variant_of(entry.sequence.request.params) for entry in plan.entries}
        variant = next(one for one in ("full", "random", "greedy") if one in variants)
        wanted = any(
            entry.sequence.request.params.prompt_logprobs is not None
            and entry.start < entry.sequence.num_prompt
            for entry in plan.entries
        )
        return self.runner.dispatch(plan, variant, wanted)  # type: ignore[arg-type]

    def _collect(self, changed: dict[str, RequestState]) -> None:
        """Reads the step in flight and gives its tokens to their sequences."""
        result, self._in_flight = self._in_flight, None
        if result is None:
            return
        tokens, logprobs, prompt_logprobs = result.read()
        drawn = [] if tokens is None else tokens.tolist()
        first = 0
        for index, entry in enumerate(result.entries):
            sequence = entry.sequence
            if not sequence.finished:
                if prompt_logprobs is not None:
                    record_prompt_logprobs(entry, prompt_logprobs, first)
                if entry.sample and drawn:
                    sequence.in_flight -= 1
                    self._append(sequence, drawn[index], logprobs, index)
                    changed[sequence.request.request_id] = sequence.request
            first += entry.count

    def _append(self, sequence: Sequence, token: int, logprobs: Any, index: int) -> None:
        reason = record_token(
            sequence,
            token,
            logprobs,
            index,
            self.runner.config.max_model_len,
        )
        if reason is None:
            self.scheduler.register_pages(sequence)
        else:
            self._finish(sequence, *reason)

    def _finish(
        self, sequence: Sequence, reason: str, stop_reason: int | str | None = None
    ) -> None:
        sequence.finish(reason, stop_reason)
        self.scheduler.register_pages(sequence)
        self.scheduler.remove(sequence)

    def _report(self, changed: dict[str, RequestState]) -> list[RequestOutput]:
        outputs = []
        for request_id, request in changed.items():
            if request_id not in self._requests:
                continue  # aborted
            output = request_output(request)
            if output is not None:
                outputs.append(output)
            if request.finished:
                del self._requests[request_id]
        return outputs

    # -- prefixes --------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix."""
        self.pages.reset()
        return True
