"""The engine behind an event loop: one thread steps it, coroutines add requests and listen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jlora.config import EngineArgs
from jlora.engine.llm_engine import LLMEngine
from jlora.manager import AdapterStatus, LoRAStats, resolve
from jlora.request import LoRARequest, RequestOutput, SamplingParams

WAIT_SECONDS = 0.002  # between looks whether an adapter has arrived
Stream = asyncio.Queue[RequestOutput | Exception | None]  # None: aborted, nothing more comes


class AsyncLLMEngine:
    """LLMEngine's methods, awaitable; `generate` yields a request's outputs as they come."""

    def __init__(self, engine: LLMEngine) -> None:
        """Takes the engine over: nobody else may call it."""
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jlora-engine")
        self._streams: dict[str, Stream] = {}
        self._stepping: asyncio.Task[None] | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLMEngine:
        """vLLM's constructor."""
        return cls(LLMEngine.from_engine_args(engine_args))

    async def _call(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*arguments, **options))

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None,
        request_id: str,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields outputs until the request is finished; leaving the loop early aborts it."""
        if request_id in self._streams:
            raise ValueError(f"request {request_id} is running already")
        stream = self._streams[request_id] = Stream()
        finished = False
        try:
            await self._call(
                self.engine.add_request,
                request_id,
                prompt,
                sampling_params,
                lora_request=lora_request,
                may_wait=False,
            )
            self._wake()
            while not finished:
                output = await stream.get()
                if output is None:
                    return
                if isinstance(output, Exception):
                    raise output
                finished = output.finished
                yield output
        finally:
            self._streams.pop(request_id, None)
            if not finished:
                # Not awaited: a cancelled task could not wait, and the thread works in order.
                self._thread.submit(self.engine.abort_request, request_id)

    def _wake(self) -> None:
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._streams and await self._call(self.engine.has_unfinished_requests):
                for output in await self._call(self.engine.step):
                    if output.request_id in self._streams:
                        self._streams[output.request_id].put_nowait(output.error or output)
        except Exception as error:
            for stream in self._streams.values():
                stream.put_nowait(error)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests; their streams end after the outputs that they have."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        await self._call(self.engine.abort_request, ids)
        for stream in (self._streams[one] for one in ids if one in self._streams):
            stream.put_nowait(None)

    async def _load(self, lora_request: LoRARequest) -> None:
        """Reads an adapter while the engine goes on."""
        load = await self._call(self.engine.start_loading, lora_request)
        while load is not None and not load.done:
            await asyncio.sleep(WAIT_SECONDS)
            await self._call(self.engine.collect_loads)
        if load is not None and load.error is not None:
            raise load.error

    async def _place(self, lora_id: int) -> None:
        try:
            while not await self._call(self.engine.place_lora, lora_id):
                await asyncio.sleep(WAIT_SECONDS)
        except BaseException:  # a client that has gone, too
            self._thread.submit(self.engine.stop_placing, lora_id)
            raise

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """See LLMEngine.add_lora; the engine goes on meanwhile."""
        adapter_id = lora_request.lora_int_id
        before = await self._call(self.engine.lora_identity, adapter_id)
        await self._load(lora_request)
        await self._call(self.engine.add_lora, lora_request, place=False)
        await self._place(adapter_id)
        return await self._call(self.engine.lora_identity, adapter_id) != before

    async def resolve_lora(self, lora_name: str) -> LoRARequest:
        """See LLMEngine.resolve_lora; the engine goes on meanwhile."""
        path = await asyncio.to_thread(resolve, self.engine.resolvers, lora_name)
        return await self._call(self.engine.name_lora, lora_name, path)

    async def remove_lora(self, lora_id: int, when_in_use: str = "refuse") -> bool:
        """See LLMEngine.remove_lora; streams of requests that it aborts end."""
        users = await self._call(self.engine.requests_naming, lora_id)
        removed = await self._call(self.engine.remove_lora, lora_id, when_in_use)
        for stream in (self._streams[one] for one in users if one in self._streams):
            if when_in_use == "abort":
                stream.put_nowait(None)
        return removed

    async def pin_lora(self, lora_id: int) -> bool:
        """See LLMEngine.pin_lora."""
        await self._place(lora_id)
        return await self._call(self.engine.pin_lora, lora_id)

    async def list_loras(self) -> set[int]:
        """See LLMEngine.list_loras."""
        return await self._call(self.engine.list_loras)

    async def lora_statuses(self) -> dict[int, AdapterStatus]:
        """See LLMEngine.lora_statuses."""
        return await self._call(self.engine.lora_statuses)

    async def lora_stats(self) -> LoRAStats:
        """See LLMEngine.lora_stats."""
        return await self._call(self.engine.lora_stats)

    async def reset_prefix_cache(self) -> bool:
        """See LLMEngine.reset_prefix_cache."""
        return await self._call(self.engine.reset_prefix_cache)

    async def get_tokenizer(self, lora_request: LoRARequest | None = None) -> Any:
        """See LLMEngine.get_tokenizer."""
        if lora_request is None:
            return self.engine.tokenizer
        await self._load(lora_request)
        return await self._call(self.engine.get_tokenizer, lora_request)

    def shutdown(self) -> None:
        """Ends the thread when what it does now is done, and what other hosts do for the engine."""
        self._thread.shutdown()
        self.engine.shutdown()
