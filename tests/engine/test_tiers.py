"""Adapters come and go while requests run: nobody waits for a disk, and no answer is another's."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from jlora import AdapterError, AsyncLLMEngine, LoRARequest, SamplingParams
from jlora.engine.kv_pages import PageAllocator
from jlora.engine.scheduler import Scheduler
from jlora.engine.sequence import RequestState, Sequence
from jlora.errors import AdapterInUseError
from jlora.manager import AdapterState, FolderResolver, LoRAModel, TieredLoRAManager
from jlora.manager.loads import BackgroundLoads
from tests.engine.fake_device import fake_engine
from tests.engine.test_engine import answer, greedy, run, tokens
from tests.engine.test_scheduler import add as add_fake
from tests.engine.tools import make_adapters, small_llm
from tests.manager.adapters import MODULES, lora_config, make_tensors, write_adapter

RANKS = (4, 5, 6, 7, 8, 9)
TIMEOUT, RETRY = 1.0, 0.4  # of the engine `tiers`
SLOW = 0.5  # a disk's, and no call may take half of it
SOON = 10.0
ALONE = 99  # the id of an adapter that tells what is right
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Disk:
    """The disk that adapters come from: slow, or broken, for those named."""

    def __init__(self) -> None:
        self.reads: list[str] = []  # names of folders, when their reading begins
        self.seconds: dict[str, float] = {}
        self.errors: dict[str, Exception] = {}
        self.hangs: set[str] = set()
        self.open = threading.Event()

    def read(self, folder: str) -> None:
        self.reads.append(folder)
        time.sleep(self.seconds.get(folder, 0))
        if folder in self.hangs:
            self.open.wait(30)
        if folder in self.errors:
            raise self.errors[folder]


@pytest.fixture
def disk(monkeypatch):
    disk, real = Disk(), LoRAModel.from_local_checkpoint

    def read(folder, adapter_id, *arguments, **options):
        if adapter_id != ALONE:  # `expected` has a disk of its own
            disk.read(Path(folder).name)
        return real(folder, adapter_id, *arguments, **options)

    monkeypatch.setattr(LoRAModel, "from_local_checkpoint", staticmethod(read))
    yield disk
    disk.open.set()


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory) -> list[Path]:
    """Six adapters of different ranks, so of different sizes."""
    return make_adapters(files.model, tmp_path_factory.mktemp("tiers"), RANKS)


@pytest.fixture(scope="module")
def expected(shared_llm, folders) -> SimpleNamespace:
    """What an engine answers that holds one adapter only and never reloads."""
    engine, known = shared_llm.llm_engine, {}

    def tell(index: int | None, prompt: dict, count: int) -> list[int]:
        """index: of the adapter, None for none."""
        key = index, str(prompt), count
        if key not in known:
            engine.reset_prefix_cache()
            lora = None if index is None else LoRARequest("alone", ALONE, str(folders[index]))
            output = answer(shared_llm, prompt, greedy(max_tokens=count), lora)
            known[key] = output.outputs[0].token_ids
            if lora is not None:
                engine.remove_lora(ALONE)
        return known[key]

    return tell


@pytest.fixture(scope="module")
def tiers_engine(files, folders):
    llm = small_llm(
        files.model,
        max_lora_loads=2,
        max_lora_passes=4,
        lora_load_timeout=TIMEOUT,
        lora_retry_seconds=RETRY,
        lora_resolvers=[FolderResolver(folders[0].parent)],
    )
    # Compiles: with and without adapters, one and several sequences.
    prompts = [tokens(20), tokens(20), tokens(3)]
    loras = [request(folders, 0), request(folders, 1), None]
    for given in (loras, loras[::-1], [None] * 3):
        llm.generate(prompts, greedy(max_tokens=12), lora_request=given, use_tqdm=False)
    return llm


def let_go(llm) -> None:
    """All requests and adapters, as a user can."""
    engine = llm.llm_engine
    engine.abort_request([*engine._requests, *engine._arrivals._waiting])
    run(engine)
    engine.step()
    for one in [one for one in engine.lora_statuses() if one > 0]:
        engine.remove_lora(one, "abort")
    engine.reset_prefix_cache()


def clean(llm) -> None:
    """Nothing is left of what a test, right or wrong, has done before."""
    engine, lora = llm.llm_engine, llm.llm_engine.lora
    config, manager = lora.lora_config, lora.manager
    lora._loads = BackgroundLoads(config.max_lora_loads, config.lora_load_timeout)
    for left in (lora._loading, lora._failures, lora._versions, lora.leaving):
        left.clear()
    engine._resolved.clear()
    for name in list(engine._arrivals._waiting):
        engine._arrivals.drop(name)
    engine.abort_request(list(engine._requests))
    engine.step()
    manager._users.clear()
    manager._bound.clear()
    for one in manager.list_adapters():
        manager.remove_adapter(one)
    engine.reset_prefix_cache()


def nothing_is_held(llm) -> None:
    engine, manager = llm.llm_engine, llm.llm_engine.lora.manager
    assert engine.pages.num_free == engine.pages.num_pages
    assert len(engine.scheduler._free_rows) == engine.args.max_num_seqs
    assert (manager._users, manager._bound) == ({}, {})
    assert manager.list_adapters() == {}
    assert len(manager.free_slots) == manager.lora_slots
    assert all(pool.num_free == pool.num_blocks for pool in manager.pools.values())


@pytest.fixture
def tiers(tiers_engine, disk):
    """Two slots, four adapters on the host, two reads at a time; empty before each test."""
    clean(tiers_engine)
    yield tiers_engine
    disk.open.set()
    let_go(tiers_engine)
    nothing_is_held(tiers_engine)


@pytest.fixture(scope="module")
def sizes(tiers_engine, folders) -> list[int]:
    """Bytes of each of `folders` on the host."""
    engine, found = tiers_engine.llm_engine, []
    for index in range(len(folders)):
        engine.add_lora(request(folders, index))
        found.append(engine.lora_statuses()[index + 1].host_bytes)
        engine.remove_lora(index + 1)
        engine.step()
    return found


@pytest.fixture(scope="module")
def bytes_engine(files, folders, sizes):
    """One slot, and a host that keeps the first three of `folders`."""
    return small_llm(
        files.model,
        max_loras=1,
        max_cpu_loras=6,
        max_cpu_lora_bytes=sum(sizes[:3]),
        lora_load_timeout=TIMEOUT,
    )


@pytest.fixture
def few_bytes(bytes_engine, disk):
    clean(bytes_engine)
    yield bytes_engine
    let_go(bytes_engine)
    nothing_is_held(bytes_engine)


def request(folders, index: int, **options) -> LoRARequest:
    return LoRARequest(f"a{index}", index + 1, str(folders[index]), **options)


def copy_files(source: Path, target: Path) -> Path:
    """As somebody who writes a new version into a folder."""
    target.mkdir(exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(source / name, target / name)
    return target


class Client:
    """Drives an engine, a step at a time, and keeps the last output of each request."""

    def __init__(self, llm) -> None:
        self.engine = llm.llm_engine
        self.outputs: dict = {}
        self.longest = 0.0  # of the calls
        self.names = itertools.count()

    def call(self, function, *arguments, **options):
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            self.longest = max(self.longest, time.perf_counter() - start)

    def add(self, name: str, lora=None, prompt=None, count: int = 8, **params) -> None:
        prompt = tokens(20) if prompt is None else prompt
        given = greedy(max_tokens=count, **params)
        self.call(self.engine.add_request, name, prompt, given, lora_request=lora)

    def step(self) -> None:
        for output in self.call(self.engine.step):
            self.outputs[output.request_id] = output

    def until(self, condition, pause: float = 0.0, limit: float = SOON) -> None:
        """Steps until it is so; pause: seconds between the steps, as of a larger model."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < limit, "it never comes to that"
            self.step()
            time.sleep(pause)

    def busy(self) -> str:
        """A request for the base that runs, and goes on for long."""
        name = f"busy-{next(self.names)}"
        self.add(name, prompt=tokens(5, 5), count=88)
        self.step()
        assert self.engine.scheduler.running
        return name

    def ended(self, *names: str) -> bool:
        return all(name in self.outputs and self.outputs[name].finished for name in names)

    def finish(self, *names: str, limit: float = SOON) -> None:
        self.until(lambda: self.ended(*names), limit=limit)

    def drain(self) -> None:
        self.until(lambda: not self.engine.has_unfinished_requests())

    def count(self, name: str) -> int:
        return len(self.outputs[name].outputs[0].token_ids) if name in self.outputs else 0

    def tokens(self, name: str) -> list[int]:
        (one,) = self.outputs[name].outputs
        assert one.finish_reason == "length", one.stop_reason
        return one.token_ids

    def status(self, adapter_id: int):
        return self.engine.lora_statuses().get(adapter_id)

    def state(self, adapter_id: int):
        return self.status(adapter_id).state


# -- a slow disk -------------------------------------------------------------------------------


def test_while_an_adapter_is_read_others_go_on_and_no_call_waits(tiers, folders, disk, expected):
    disk.seconds["adapter-6"] = SLOW
    client = Client(tiers)
    name = client.busy()
    client.longest = 0.0
    start = time.monotonic()
    client.add("new", request(folders, 2))
    before = client.count(name)
    client.until(lambda: client.count("new") > 0, pause=0.015)
    assert time.monotonic() - start >= SLOW
    assert client.count(name) >= before + 10
    client.drain()
    assert client.longest < SLOW / 2
    assert client.tokens("new") == expected(2, tokens(20), 8)
    assert client.tokens(name) == expected(None, tokens(5, 5), 88)
    assert disk.reads == ["adapter-6"]


def test_requests_without_and_with_other_adapters_start_while_one_is_read(
    tiers, folders, disk, expected
):
    tiers.llm_engine.add_lora(request(folders, 0))
    wanted = [expected(index, tokens(20), 8) for index in (None, 0, 2)]
    client = Client(tiers)
    client.busy()
    for name, lora in (("first base", None), ("first there", request(folders, 0))):
        client.add(name, lora)  # compiles, which takes longer than a load may
    client.finish("first base", "first there")
    disk.hangs.add("adapter-6")
    client.add("new", request(folders, 2))
    client.add("base")
    client.add("there", request(folders, 0))
    client.finish("base", "there", limit=TIMEOUT)
    assert [client.tokens("base"), client.tokens("there")] == wanted[:2]
    assert "new" not in client.outputs
    disk.open.set()
    client.finish("new")
    assert client.tokens("new") == wanted[2]


def serve(llm, function):
    """Runs a coroutine function with an async engine, at most 20 seconds."""
    engine = AsyncLLMEngine(llm.llm_engine)

    async def main():
        return await asyncio.wait_for(function(engine), 20)

    try:
        return asyncio.run(main())
    finally:
        engine.shutdown()


class Stream:
    """Requests for the base, one after the other, and when their tokens came."""

    def __init__(self, engine) -> None:
        self.engine, self.times = engine, []
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        for name in itertools.count():
            async for _ in self.engine.generate(tokens(5), greedy(max_tokens=88), f"s{name}"):
                self.times.append(time.perf_counter())

    async def until(self, count: int) -> None:
        while len(self.times) < count:
            await asyncio.sleep(0.001)

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def longest_gap(self) -> float:
        return max(b - a for a, b in itertools.pairwise(self.times))


async def last(engine, name: str, lora=None, count: int = 8):
    params = greedy(max_tokens=count)
    stream = engine.generate(tokens(20), params, name, lora_request=lora)
    return [output async for output in stream][-1]


@pytest.mark.parametrize("way", ["generate", "add_lora", "get_tokenizer"])
def test_async_engine_goes_on_while_an_adapter_is_read(tiers, folders, disk, expected, way):
    disk.seconds["adapter-6"] = SLOW
    given = request(folders, 2)

    async def main(engine):
        stream = Stream(engine)
        await stream.until(20)
        before, start = len(stream.times), time.perf_counter()
        if way == "add_lora":
            assert await engine.add_lora(given)
            assert not await engine.add_lora(given)
        elif way == "get_tokenizer":
            assert await engine.get_tokenizer(given) is tiers.llm_engine.tokenizer
        output = await last(engine, "new", given)
        took, during = time.perf_counter() - start, len(stream.times) - before
        await stream.end()
        return output, took, during, stream.longest_gap()

    output, took, during, gap = serve(tiers, main)
    assert output.outputs[0].token_ids == expected(2, tokens(20), 8)
    assert took >= SLOW
    assert during >= 20
    assert gap < SLOW / 2
    assert disk.reads == ["adapter-6"]


def test_several_requests_for_a_new_adapter_read_it_once(tiers, folders, disk, expected):
    disk.seconds["adapter-6"] = 0.1
    client = Client(tiers)
    client.busy()
    for index in range(5):
        client.add(f"new-{index}", request(folders, 2))
        client.step()
    assert client.engine.lora_stats().loading == 1
    client.drain()
    for index in range(5):
        assert client.tokens(f"new-{index}") == expected(2, tokens(20), 8)
    assert disk.reads == ["adapter-6"]
    assert client.engine.lora_stats().loads.count >= 1


def test_adapters_are_read_beside_each_other(tiers, folders, disk):
    """Two at a time: four in the time of two."""
    for rank in RANKS[:4]:
        disk.seconds[f"adapter-{rank}"] = 0.5
    client = Client(tiers)
    client.busy()
    start = time.monotonic()
    for index in range(4):
        client.add(str(index), request(folders, index))
    client.drain()
    assert 1.0 <= time.monotonic() - start < 1.95


# -- what goes wrong ---------------------------------------------------------------------------


def assert_failed(client: Client, name: str, *words: str) -> None:
    output = client.outputs[name]
    assert output.finished
    assert isinstance(output.error, AdapterError)
    assert all(word in str(output.error) for word in words), output.error
    assert {one.finish_reason for one in output.outputs} == {"abort"}
    assert all(one.token_ids == [] for one in output.outputs)


def test_a_load_that_hangs_fails_its_own_request_only(tiers, folders, disk, expected):
    disk.hangs.add("adapter-6")
    client, engine = Client(tiers), tiers.llm_engine
    failures = engine.lora_stats().failures
    name = client.busy()
    client.longest = 0.0
    start = time.monotonic()
    client.add("hangs", request(folders, 2), n=2)
    client.add("good", request(folders, 1))
    assert client.state(3) is AdapterState.LOADING
    client.until(lambda: client.ended("hangs"), pause=0.015, limit=TIMEOUT + 1)
    assert time.monotonic() - start >= TIMEOUT
    assert client.longest < SLOW / 2
    assert_failed(client, "hangs", "'a2'", f"longer than {TIMEOUT:g} s", "lora_load_timeout")
    assert len(client.outputs["hangs"].outputs) == 2
    status = client.status(3)
    assert (status.name, status.state) == ("a2", AdapterState.FAILED)
    assert status.reason == str(client.outputs["hangs"].error)
    assert 0 < status.retry_in <= RETRY
    assert engine.lora_stats().failures == failures + 1
    # For a while others are refused with the same words, and the disk is left alone.
    if client.ended(name):
        client.busy()
    with pytest.raises(AdapterError) as refused:
        client.add("later", request(folders, 2))
    assert str(refused.value) == status.reason
    assert disk.reads.count("adapter-6") == 1
    disk.open.set()
    time.sleep(RETRY)
    assert client.status(3).retry_in == 0
    if not engine.scheduler.running:
        client.busy()
    client.add("again", request(folders, 2))
    client.drain()
    assert disk.reads.count("adapter-6") == 2
    assert client.tokens("again") == expected(2, tokens(20), 8)
    assert client.tokens("good") == expected(1, tokens(20), 8)
    assert client.tokens(name) == expected(None, tokens(5, 5), 88)
    assert client.status(3).reason is None


def test_every_place_may_hang_and_others_are_read(tiers, folders, disk, expected):
    disk.hangs |= {"adapter-4", "adapter-5"}
    client = Client(tiers)
    client.busy()
    for index in range(3):
        client.add(str(index), request(folders, index))
    client.finish("0", "1", "2", limit=TIMEOUT + 2)
    assert_failed(client, "0", "'a0'")
    assert_failed(client, "1", "'a1'")
    assert client.tokens("2") == expected(2, tokens(20), 8)


def test_a_bad_adapter_that_comes_while_others_run_hurts_none(tiers, folders, tmp_path, expected):
    bad = copy_files(folders[0], tmp_path / "bad")
    (bad / WEIGHTS).write_bytes((bad / WEIGHTS).read_bytes()[:200])
    client = Client(tiers)
    name = client.busy()
    client.add("adapted", request(folders, 1), count=30)
    client.add("bad", LoRARequest("broken one", 7, str(bad)))
    client.add("gone", LoRARequest("gone", 8, "/nowhere/at/all"))
    client.drain()
    assert_failed(client, "bad", "'broken one'")
    assert_failed(client, "gone", "'gone'", "/nowhere/at/all")
    assert client.state(7) is client.state(8) is AdapterState.FAILED
    assert client.tokens(name) == expected(None, tokens(5, 5), 88)
    assert client.tokens("adapted") == expected(1, tokens(20), 30)
    assert client.engine.list_loras() == {2}
    assert client.outputs["adapted"].error is None


def test_a_request_that_is_wrong_for_its_adapter_fails_when_that_is_read(tiers, folders):
    """The vocabulary of an adapter is known only then."""
    client = Client(tiers)
    client.busy()
    client.add("wrong", request(folders, 2), prompt={"prompt_token_ids": [5, 3000]})
    client.add("right", request(folders, 2))
    client.drain()
    assert isinstance(client.outputs["wrong"].error, ValueError)
    assert "3000" in str(client.outputs["wrong"].error)
    assert len(client.tokens("right")) == 8


def test_a_reload_that_fails_leaves_the_old_version_serving(tiers, folders, tmp_path, expected):
    """The old one is on the host, and right."""
    folder = copy_files(folders[0], tmp_path / "a")
    given, client = LoRARequest("a", 1, str(folder)), Client(tiers)
    client.engine.add_lora(given)
    (folder / WEIGHTS).write_bytes(b"half of a file")
    client.busy()
    with pytest.raises(AdapterError, match="'a'"):
        client.engine.add_lora(dataclasses.replace(given, load_inplace=True))
    client.add("next", given)
    client.drain()
    assert client.tokens("next") == expected(0, tokens(20), 8)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_reload_that_fails_fails_nobody_who_has_not_asked_for_it(
    tiers, folders, disk, tmp_path, expected, elsewhere
):
    """The known version is on the disk only, and others keep its requests waiting."""
    client, good = Client(tiers), LoRARequest("a", 1, str(copy_files(folders[0], tmp_path / "a")))
    client.engine.add_lora(good)
    for index in (1, 2, 3, 4):  # which evict it
        client.engine.add_lora(request(folders, index))
    for index in (1, 2):
        client.add(f"runs-{index}", request(folders, index), count=60)
    client.until(lambda: client.count("runs-2") > 1)
    real, failing = client.engine.lora._read, itertools.count()

    def read(one):
        if one.load_inplace:
            next(failing)
            raise OSError("the cable is out")
        return real(one)

    client.engine.lora._read = read
    try:
        client.add("waits", good)
        bad = dataclasses.replace(good, load_inplace=True)
        if elsewhere:
            bad = dataclasses.replace(bad, lora_path=str(folders[5]))
        client.add("bad", bad)
        client.finish("bad")
        client.add("later", good)
        with pytest.raises(OSError, match="cable"):  # not read again so soon
            client.add("again", bad)
        assert client.state(1) is not AdapterState.FAILED
        client.drain()
    finally:
        del client.engine.lora._read
    assert next(failing) == 1
    assert "cable" in client.outputs["bad"].outputs[0].stop_reason
    for name in ("waits", "later"):
        assert client.tokens(name) == expected(0, tokens(20), 8)


def test_a_failed_reload_refuses_no_reload_from_elsewhere(tiers, folders, tmp_path, expected):
    client = Client(tiers)
    client.engine.add_lora(request(folders, 0))
    client.busy()
    bad, good = (
        LoRARequest("a", 1, str(folder), load_inplace=True) for folder in (tmp_path, folders[1])
    )
    client.add("bad", bad)
    client.finish("bad")
    client.add("good", good)
    client.drain()
    assert client.outputs["bad"].error is not None
    assert client.tokens("good") == expected(1, tokens(20), 8)


def test_a_failed_read_says_nothing_of_what_replaces_it(tiers, folders, disk, expected):
    """A first read fails after a reload from elsewhere has put another version in its place."""
    client, engine = Client(tiers), tiers.llm_engine
    client.busy()
    disk.hangs.add("adapter-4")
    disk.errors["adapter-4"] = OSError("the cable is out")
    client.add("first", request(folders, 0))
    other = LoRARequest("a0", 1, str(folders[5]))
    engine.add_lora(dataclasses.replace(other, load_inplace=True))
    disk.open.set()
    client.finish("first")
    assert "cable" in str(client.outputs["first"].error)
    client.drain()
    client.add("second", other)
    for index in (1, 2, 3, 4):
        engine.add_lora(request(folders, index))
    client.drain()
    assert client.tokens("second") == expected(5, tokens(20), 8)


def test_a_failed_reading_is_forgotten_when_its_time_is_over(tiers, folders, disk, expected):
    """Also by an engine that was idle then."""
    client = Client(tiers)
    client.engine.add_lora(request(folders, 0))
    for index in range(1, 5):
        client.engine.add_lora(request(folders, index))
    assert client.engine.list_loras() == {2, 3, 4, 5}  # the first was evicted
    disk.errors["adapter-4"] = OSError("the cable is out")
    client.busy()
    client.add("unlucky", request(folders, 0))
    client.drain()
    assert client.outputs["unlucky"].outputs[0].finish_reason == "abort"
    assert "cable" in client.outputs["unlucky"].outputs[0].stop_reason
    disk.errors.clear()
    time.sleep(RETRY)
    client.add("later", request(folders, 0))  # nobody runs
    client.drain()
    assert client.tokens("later") == expected(0, tokens(20), 8)


# -- loads that end when nobody expects it -----------------------------------------------------


def guard(engine, monkeypatch) -> None:
    """A call that waits for a load that never ends fails, instead of hanging."""
    start, real = time.monotonic(), engine.lora._loads.wait

    def wait(seconds):
        assert time.monotonic() - start < 5, "waits for a load for ever"
        real(seconds)

    monkeypatch.setattr(engine.lora._loads, "wait", wait)


@pytest.mark.parametrize("others_run", [True, False])
def test_an_adapter_removed_while_it_is_read_can_be_asked_for_again(
    tiers, folders, disk, expected, monkeypatch, others_run
):
    """Its id may stand for another one by then."""
    disk.seconds["adapter-4"] = 0.3
    client, engine = Client(tiers), tiers.llm_engine
    guard(engine, monkeypatch)
    client.busy()
    client.add("first", LoRARequest("a", 1, str(folders[0])))
    if not others_run:
        engine.abort_request("busy-0")
    assert engine.remove_lora(1, "abort")
    client.add("second", LoRARequest("b", 1, str(folders[1])))
    client.finish("second", limit=3)
    assert "first" not in client.outputs
    assert client.tokens("second") == expected(1, tokens(20), 8)
    time.sleep(0.3)
    client.drain()
    assert client.engine.lora_statuses()[1].name == "b"


def test_what_an_id_stood_for_says_nothing_of_its_next_load(tiers, folders, disk, expected):
    """No step lies between: what the first load was is not told of the second."""
    disk.seconds["adapter-5"] = 0.3
    client, engine = Client(tiers), tiers.llm_engine
    assert engine.add_lora(LoRARequest("a", 1, str(folders[0])))
    assert engine.remove_lora(1)
    assert engine.add_lora(LoRARequest("b", 1, str(folders[1])))
    assert engine.list_loras() == {1}
    client.add("r", LoRARequest("b", 1, str(folders[1])))
    client.drain()
    assert client.tokens("r") == expected(1, tokens(20), 8)


def test_what_an_id_stood_for_says_nothing_to_the_next_request(tiers, folders, disk, expected):
    disk.seconds["adapter-5"] = 0.3
    client, engine = Client(tiers), tiers.llm_engine
    client.busy()
    assert engine.add_lora(LoRARequest("a", 1, str(folders[0])))
    assert engine.remove_lora(1)
    client.add("r", LoRARequest("b", 1, str(folders[1])))
    client.drain()
    assert client.outputs["r"].error is None
    assert client.tokens("r") == expected(1, tokens(20), 8)


def test_two_reloads_without_a_step_between(tiers, folders, disk, tmp_path, expected):
    """The second is waited for like the first."""
    folder, client = copy_files(folders[0], tmp_path / "a"), Client(tiers)
    given = LoRARequest("a", 1, str(folder), load_inplace=True)
    disk.seconds["a"] = 0.2
    for index in (0, 1, 2):
        copy_files(folders[index], folder)
        assert client.engine.add_lora(given)
    client.add("r", LoRARequest("a", 1, str(folder)))
    client.drain()
    assert client.tokens("r") == expected(2, tokens(20), 8)


def test_reloads_that_keep_coming_are_served(tiers, folders, monkeypatch):
    """Though a look at the files takes longer than it takes until the next one comes."""
    client, names = Client(tiers), itertools.count()
    given, loader = request(folders, 0, load_inplace=True), client.engine.lora._loader
    client.engine.add_lora(given)
    real, looks = loader.fingerprint, []

    def fingerprint(*arguments):
        looks.append(time.sleep(0.1))
        return real(*arguments)

    monkeypatch.setattr(loader, "fingerprint", fingerprint)
    client.busy()

    def served() -> bool:
        client.add(f"r{next(names)}", given, count=2)
        return client.ended("r0", "r1")

    client.until(served, pause=0.01, limit=3)
    monkeypatch.setattr(loader, "fingerprint", real)
    client.drain()
    assert client.ended(*(f"r{one}" for one in range(next(names))))
    assert len(looks) < 10  # those that came during a look share the next one


def test_reloads_share_a_read_unless_it_has_begun(tiers, folders, disk):
    client, lora = Client(tiers), tiers.llm_engine.lora
    disk.hangs |= {"adapter-4", "adapter-5"}
    first, second = request(folders, 0, load_inplace=True), request(folders, 1)
    hangs = lora.fetch(first)
    lora.fetch(second)
    client.until(lambda: len(disk.reads) == 2)
    queued = request(folders, 2, load_inplace=True)
    assert lora.fetch(queued) is lora.fetch(queued)  # no thread is free
    later = lora.fetch(first)
    assert later is not hangs
    assert lora.fetch(first) is later
    disk.open.set()
    client.until(lambda: later.done)
    assert hangs.done
    assert (hangs.error, later.error) == (None, None)
    assert disk.reads.count("adapter-4") == 1  # nothing had changed


def test_remove_ends_a_reload_that_has_still_to_begin(tiers, folders, disk):
    client, lora = Client(tiers), tiers.llm_engine.lora
    disk.hangs.add("adapter-4")
    one = request(folders, 0, load_inplace=True)
    lora.fetch(one)
    client.until(lambda: disk.reads == ["adapter-4"])
    later = lora.fetch(one)
    client.engine.remove_lora(1)
    assert later.done
    assert "removed" in str(later.error)


def test_who_stops_waiting_for_an_adapter_hurts_nobody(tiers, folders, disk, expected):
    """As many as there are places for loads, and one waits for the same adapter."""
    disk.seconds |= {"adapter-4": 0.3, "adapter-5": 0.3}

    async def main(engine):
        stream = Stream(engine)
        await stream.until(5)
        waits = asyncio.create_task(last(engine, "waits", request(folders, 0)))
        leave = [
            asyncio.wait_for(engine.add_lora(request(folders, index)), 0.1) for index in (0, 1)
        ]
        left = await asyncio.gather(*leave, return_exceptions=True)
        outputs = [await asyncio.wait_for(waits, 5)]
        for index in (1, 2):
            outputs.append(await asyncio.wait_for(last(engine, "b", request(folders, index)), 5))
        await stream.end()
        return left, outputs

    left, outputs = serve(tiers, main)
    assert [type(error) for error in left] == [TimeoutError, TimeoutError]
    for index, output in enumerate(outputs):
        assert output.outputs[0].token_ids == expected(index, tokens(20), 8)


@pytest.mark.parametrize("idle", [False, True])
def test_add_lora_of_an_async_engine_gives_up_what_hangs(tiers, folders, disk, idle):
    disk.hangs.add("adapter-6")

    async def main(engine):
        stream = None if idle else Stream(engine)
        with pytest.raises(AdapterError, match=r"'a2'.*longer than"):
            await asyncio.wait_for(engine.add_lora(request(folders, 2)), TIMEOUT + 2)
        if stream is not None:
            await stream.end()

    serve(tiers, main)


# -- fairness ----------------------------------------------------------------------------------

EMPTY = Path(tempfile.mkdtemp(prefix="jlora-test-"))
HOT, COLD, EACH, LENGTH = (1, 2, 3), (4, 5, 6), 3, 6
CLIENTS = len(HOT) * EACH


def bound(passes: int, clients: int) -> int:
    """How many may start between the arrival of one that is alone in waiting for a slot and its
    start.

    At most `clients` are in front of it. `passes` of those behind it start until it counts as late,
    and as that is looked at once a step, all the clients but one more. Then an adapter is emptied:
    what runs with it ends in LENGTH + 1 steps (the last token is read a step later), in which each
    client starts at most twice, as each of its requests runs for LENGTH steps.
    """
    return clients + passes + (clients - 1) + 2 * clients


class Hot:
    """Clients of hot adapters: each asks again as soon as it has its answer."""

    def __init__(self, engine, add, adapters=HOT) -> None:
        self.engine, self.add, self.adapters = engine, add, adapters
        self.started: list[str] = []  # requests, in the order of their starts
        self.numbers = itertools.count()
        real = engine.runner.dispatch

        def dispatch(plan, *arguments):
            self.started += [one.request.request_id for one in plan.admitted]
            return real(plan, *arguments)

        engine.runner.dispatch = dispatch
        # A step apart from each other, so that no two end at once: each adapter is always in use.
        for adapter in adapters * EACH:
            self.ask(adapter)
            self.step()

    def ask(self, adapter: int) -> None:
        self.add(f"hot-{adapter}-{next(self.numbers)}", adapter)

    def step(self) -> None:
        if self.engine.lora.busy:
            self.engine.lora.wait(1)  # time does not count here
        for output in self.engine.step():
            kind, adapter, _ = output.request_id.split("-")
            if output.finished and kind == "hot":
                self.ask(int(adapter))

    def waits_of(self, name: str, most: int) -> int:
        """Starts between a request's arrival, which is now, and its own; at most `most`."""
        before = len(self.started)
        while name not in self.started:
            if len(self.started) - before > most:
                return len(self.started) - before
            self.step()
        return self.started.index(name) - before


def fake_hot(passes: int) -> Hot:
    engine = fake_engine(EMPTY, pages=200, max_num_seqs=16, max_tokens=32, slots=len(HOT))
    engine.lora.lora_config.max_lora_passes = passes

    def add(name, adapter):
        add_fake(engine, name, [1], adapter, max_tokens=LENGTH, ignore_eos=True)

    return Hot(engine, add)


def cold_waits(hot: Hot, most: int) -> list[int]:
    """Of cold requests that come now and then."""
    waits = []
    for number in range(12):
        name, adapter = f"cold-{number}-0", COLD[number % len(COLD)]
        hot.add(name, adapter)
        waits.append(hot.waits_of(name, most))
        if waits[-1] > most:
            break
        for _ in range(20 + number):  # other phases of the hot ones
            hot.step()
    return waits


@pytest.mark.parametrize("passes", [1, 4, 16])
def test_a_cold_adapter_starts_within_a_bound(passes):
    waits = cold_waits(fake_hot(passes), 400)
    assert len(waits) == 12
    assert max(waits) <= bound(passes, CLIENTS)
    assert waits[0] >= passes  # hot ones are not stopped earlier


def test_without_max_lora_passes_a_cold_adapter_starves():
    waits = cold_waits(fake_hot(10**9), 400)
    assert waits[0] > 400 > bound(4, CLIENTS)


def test_several_cold_adapters_start_one_after_the_other():
    hot = fake_hot(4)
    for adapter in COLD:
        hot.add(f"cold-{adapter}-0", adapter)
    before = len(hot.started)
    for number, adapter in enumerate(COLD, 1):
        assert hot.waits_of(f"cold-{adapter}-0", 400) <= 400
        count = hot.started.index(f"cold-{adapter}-0") - before
        assert count <= number * bound(4, CLIENTS + len(COLD))


@pytest.mark.parametrize("passes", [4, 10**9])
def test_the_base_never_waits_for_a_slot(passes):
    hot = fake_hot(passes)
    for number, adapter in enumerate(COLD):
        hot.add(f"cold-{adapter}-0", adapter)
        for _ in range(7):
            name = f"base-{number}-{next(hot.numbers)}"
            hot.add(name, 0)
            hot.step()
            assert name in hot.started


@pytest.mark.parametrize("passes", [4, 10**9])
def test_cold_adapters_on_a_real_device(tiers, folders, monkeypatch, passes):
    """As above, with real slots and blocks: two hot adapters, two cold ones."""
    engine, hot_ones = tiers.llm_engine, (1, 2)
    config = dataclasses.replace(engine.lora.lora_config, max_lora_passes=passes)
    monkeypatch.setattr(engine.lora, "lora_config", config)
    monkeypatch.setattr(engine.runner, "dispatch", engine.runner.dispatch)
    for index in range(4):
        engine.add_lora(request(folders, index))

    def add(name, adapter):
        lora = request(folders, adapter - 1)
        prompt, params = {"prompt_token_ids": [5]}, greedy(max_tokens=LENGTH)
        engine.add_request(name, prompt, params, lora_request=lora)

    hot = Hot(engine, add, hot_ones)
    limit, waits = bound(4, len(hot_ones) * EACH), []
    for number in range(4):
        name = f"cold-{number}-0"
        add(name, 3 + number % 2)
        waits.append(hot.waits_of(name, limit))
        if passes > 4:
            assert waits[0] > limit
            return
        assert waits[-1] <= limit
        for _ in range(15 + number):
            hot.step()
    assert waits[0] >= 4  # hot ones are not stopped earlier


# -- reload ------------------------------------------------------------------------------------


def test_an_adapter_for_which_the_host_has_no_bytes_starts_within_a_bound(files, folders, sizes):
    """Requests for another keep coming; a slot is free all the time."""
    room = max(sizes[:2]) + 1000
    llm = small_llm(files.model, max_loras=2, max_cpu_lora_bytes=room, max_lora_passes=2)
    for count in (2, 12):  # compiles
        answer(llm, tokens(20), greedy(max_tokens=count), request(folders, 0))
    engine, client, numbers = llm.llm_engine, Client(llm), itertools.count()
    client.add("first", request(folders, 0))
    client.until(lambda: client.count("first") >= 1)
    client.add("cold", request(folders, 1))

    def cold_has_begun():
        while engine.get_num_unfinished_requests() < 4:
            client.add(f"hot-{next(numbers)}", request(folders, 0), count=6)
        return client.count("cold") >= 1

    client.until(cold_has_begun)
    assert next(numbers) < 40
    client.drain()


def test_pins_that_fill_the_host_refuse_others_by_name(files, folders, sizes):
    llm = small_llm(files.model, max_loras=3, max_cpu_lora_bytes=sum(sizes[:2]) + 1000)
    engine, client, third = llm.llm_engine, Client(llm), request(folders, 2)
    for lora in (third, None):  # compiles, and makes the adapter known
        answer(llm, tokens(20), greedy(max_tokens=2), lora)
    for index in (0, 1):
        engine.add_lora(request(folders, index))
    client.busy()
    client.add("waits", third)  # its adapter is on disk
    for adapter_id in (1, 2):
        engine.pin_lora(adapter_id)
    client.until(lambda: client.ended("waits"))
    assert_failed(client, "waits", "a2", "max_cpu_lora_bytes")
    with pytest.raises(AdapterInUseError, match=r"a2.*max_cpu_lora_bytes"):
        client.add("late", third)
    client.drain()


def test_a_reload_while_a_request_waits_to_begin(files, folders, tmp_path):
    """Its adapter has a slot and is written; it begins with the new one, when it has pages."""
    folder = copy_files(folders[0], tmp_path / "live")
    llm = small_llm(files.model, num_gpu_blocks_override=12, max_num_seqs=4)
    engine, given = llm.llm_engine, LoRARequest("live", 1, str(folder))
    for prompt in (tokens(70), tokens(20)):  # compiles
        for lora in (None, LoRARequest("other", 2, str(folders[1]))):
            answer(llm, prompt, greedy(max_tokens=4), lora)
    engine.reset_prefix_cache()
    engine.add_lora(given, place=False)
    client = Client(llm)
    client.add("runs", prompt=tokens(70), count=20)
    client.until(lambda: client.count("runs") >= 1)
    client.add("waits", given, tokens(30), count=4)
    client.until(lambda: engine.lora.manager.slot_of(1) is not None)
    assert client.count("waits") == 0 and client.count("runs") < 15
    copy_files(folders[1], folder)
    assert engine.add_lora(dataclasses.replace(given, load_inplace=True), place=False)
    client.drain()
    engine.reset_prefix_cache()
    other = LoRARequest("other", 2, str(folders[1]))
    right = answer(llm, tokens(30), greedy(max_tokens=4), other)
    assert client.tokens("waits") == right.outputs[0].token_ids


def test_a_reload_beside_a_running_request(tiers, folders, tmp_path, expected):
    folder, prompt = copy_files(folders[0], tmp_path / "a"), tokens(40)
    given = LoRARequest("a", 1, str(folder))
    client, engine = Client(tiers), tiers.llm_engine
    manager, free = engine.lora.manager, engine.lora_stats().free_blocks
    client.add("before", given, prompt)
    client.drain()
    client.add("old", given, prompt, count=40)
    client.until(lambda: client.count("old") >= 5)
    copy_files(folders[1], folder)
    assert engine.add_lora(dataclasses.replace(given, load_inplace=True))
    client.add("new", given, prompt)
    client.add("also new", given, tokens(40, 1))
    client.until(lambda: client.status(1).requests == 2)
    statuses = engine.lora_statuses()
    (old_id,) = [one for one in statuses if one < 0]
    for one in (old_id, 1):
        assert statuses[one].state is AdapterState.IN_USE
    assert statuses[old_id].identity != statuses[1].identity
    assert (statuses[old_id].requests, statuses[1].requests) == (1, 2)
    assert statuses[old_id].slot != statuses[1].slot
    assert engine.list_loras() == {1}
    client.finish("new", "also new")
    assert "old" in engine._requests
    client.drain()
    # Each ends with the version that it has begun with.
    assert client.tokens("old") == expected(0, prompt, 40)
    for name, seed in (("new", 0), ("also new", 1)):
        assert client.tokens(name) == expected(1, tokens(40, seed), 8)
        assert client.outputs[name].num_cached_tokens == 0
    assert client.outputs["old"].num_cached_tokens == 32
    # And nothing is left of the old one: not its slot, its blocks, its memory, or its name.
    assert manager.list_adapters().keys() == {1}
    adapter, stats = manager.get_adapter(1), engine.lora_stats()
    assert stats.on_host == stats.on_device == 1
    assert stats.host_bytes == adapter.nbytes
    (needs,) = manager.needs(adapter).values()
    assert stats.free_blocks == {name: free[name] - needs.get(name, 0) for name in free}
    placed = (AdapterState.LOADING, AdapterState.ON_DISK, AdapterState.FAILED)
    assert all(one.state in placed for id_, one in engine.lora_statuses().items() if id_ < 0)
    # The new one's pages are found again, by its requests only.
    client.add("next", given, prompt)
    client.drain()
    assert client.outputs["next"].num_cached_tokens == 32
    assert client.tokens("next") == expected(1, prompt, 8)
    assert engine.remove_lora(1)
    assert engine.lora_stats().free_blocks == free


def test_superseded_versions_are_forgotten(tiers, folders, tmp_path):
    """However often an adapter is reloaded, the engine knows no more of it than before."""
    folder, client = copy_files(folders[0], tmp_path / "a"), Client(tiers)
    given = LoRARequest("a", 1, str(folder))
    for index in (1, 0, 1):
        client.add(f"r{index}", given, count=20)
        client.until(lambda index=index: client.count(f"r{index}") > 2)
        copy_files(folders[index], folder)
        client.engine.add_lora(dataclasses.replace(given, load_inplace=True))
        client.drain()
        client.outputs.clear()
    assert client.engine.lora_statuses().keys() == {1}


def test_a_reload_by_a_request_is_done_in_the_background(tiers, folders, disk, tmp_path, expected):
    folder, prompt = copy_files(folders[0], tmp_path / "a"), tokens(40)
    given = LoRARequest("a", 1, str(folder))
    client = Client(tiers)
    client.add("old", given, prompt, count=50)
    client.until(lambda: client.count("old") >= 3)
    copy_files(folders[1], folder)
    disk.seconds["a"] = SLOW
    client.longest = 0.0
    client.add("new", dataclasses.replace(given, load_inplace=True), prompt)
    client.add("between", given, prompt)  # it is not read yet
    client.until(lambda: client.count("new") > 0, pause=0.012)
    client.drain()
    assert client.longest < SLOW / 2
    assert client.tokens("old") == expected(0, prompt, 50)
    assert client.tokens("between") == expected(0, prompt, 8)
    assert client.tokens("new") == expected(1, prompt, 8)
    assert client.outputs["new"].num_cached_tokens == 0


def test_a_request_of_an_old_version_can_be_aborted_at_any_time(tiers, folders, tmp_path, expected):
    """Also before the first step after the reload."""
    folder = copy_files(folders[0], tmp_path / "a")
    given, client = LoRARequest("a", 1, str(folder)), Client(tiers)
    client.add("old", given, count=40)
    client.until(lambda: client.count("old") >= 3)
    copy_files(folders[1], folder)
    client.engine.load_loras([dataclasses.replace(given, load_inplace=True)])
    client.engine.abort_request("old")
    client.add("new", given)
    client.drain()
    assert client.tokens("new") == expected(1, tokens(20), 8)
    assert client.engine.lora.manager.list_adapters().keys() == {1}


# -- removal -----------------------------------------------------------------------------------


def test_remove_refuses_while_the_adapter_is_in_use(tiers, folders, expected):
    client, engine = Client(tiers), tiers.llm_engine
    client.add("r", request(folders, 0), tokens(40), count=20)
    client.until(lambda: client.count("r") >= 3)
    for options in ({}, {"when_in_use": "refuse"}):
        with pytest.raises(AdapterInUseError, match="adapter 1 is in use by 1 running"):
            engine.remove_lora(1, **options)
    with pytest.raises(ValueError, match="when_in_use='later' must be refuse, drain or abort"):
        engine.remove_lora(1, when_in_use="later")
    client.add("next", request(folders, 0), tokens(40))
    client.drain()
    assert client.tokens("r") == expected(0, tokens(40), 20)
    assert client.tokens("next") == expected(0, tokens(40), 8)
    assert engine.remove_lora(1)
    assert not engine.remove_lora(1)
    client.add("again", request(folders, 0), tokens(40))
    client.drain()
    assert client.outputs["again"].num_cached_tokens == 0  # not the pages from before
    assert client.tokens("again") == expected(0, tokens(40), 8)


def test_remove_drains(tiers, folders, expected):
    client, engine = Client(tiers), tiers.llm_engine
    free = engine.lora_stats().free_blocks
    client.add("runs", request(folders, 0), tokens(40), count=30)
    client.add("waits", request(folders, 0), tokens(41, 1), count=10)
    client.until(lambda: client.count("runs") >= 1)
    client.add("other", request(folders, 1), count=40)
    client.step()
    assert engine.remove_lora(1, when_in_use="drain")
    with pytest.raises(AdapterInUseError, match="'a0' is being removed"):
        client.add("refused", request(folders, 0))
    with pytest.raises(AdapterInUseError, match="'a0' is being removed"):
        engine.add_lora(request(folders, 0))
    assert 1 in engine.list_loras()
    client.finish("waits")
    assert client.ended("runs") or 1 in engine.list_loras()
    client.finish("runs")
    assert client.tokens("runs") == expected(0, tokens(40), 30)
    assert client.tokens("waits") == expected(0, tokens(41, 1), 10)
    assert engine.list_loras() == {2}  # in the very step in which the last ended
    assert 1 not in engine.lora_statuses()
    client.drain()
    assert client.tokens("other") == expected(1, tokens(20), 40)
    stats = engine.lora_stats()
    assert (stats.on_host, stats.on_device) == (1, 1)
    engine.remove_lora(2, when_in_use="drain")  # nobody uses it: at once
    assert engine.list_loras() == set()
    assert engine.lora_stats().free_blocks == free
    client.add("again", request(folders, 0), tokens(40))
    client.drain()
    assert client.outputs["again"].num_cached_tokens == 0
    assert client.tokens("again") == expected(0, tokens(40), 8)


def test_drain_ends_with_an_abort(tiers, folders):
    client, engine = Client(tiers), tiers.llm_engine
    client.add("r", request(folders, 0), count=50)
    client.until(lambda: client.count("r") >= 2)
    engine.remove_lora(1, when_in_use="drain")
    engine.abort_request("r")
    assert engine.list_loras() == set()


def test_abort_of_a_draining_adapter_says_that_it_removed_it(tiers, folders):
    client, engine = Client(tiers), tiers.llm_engine
    client.add("r", request(folders, 0), count=50)
    client.until(lambda: client.count("r") >= 2)
    assert engine.remove_lora(1, when_in_use="drain")
    assert engine.remove_lora(1, when_in_use="abort")
    assert engine.lora_statuses() == {}


def test_a_draining_adapter_cannot_be_pinned(tiers, folders):
    client, engine = Client(tiers), tiers.llm_engine
    client.add("r", request(folders, 0), count=50)
    client.until(lambda: client.count("r") >= 2)
    engine.remove_lora(1, when_in_use="drain")
    with pytest.raises(AdapterInUseError, match="'a0' is being removed"):
        engine.pin_lora(1)
    client.drain()
    assert engine.list_loras() == set()


def test_drain_serves_requests_whose_adapter_is_being_read(tiers, folders, disk, expected):
    """Also one whose load has not begun, since others are read before it."""
    disk.seconds |= {"adapter-4": 0.2, "adapter-5": 0.2}
    client, engine = Client(tiers), tiers.llm_engine
    client.busy()
    for index in range(3):
        client.add(str(index), request(folders, index))
    client.until(lambda: len(disk.reads) == 2)
    for adapter_id in (1, 3):
        assert engine.remove_lora(adapter_id, when_in_use="drain")
    client.drain()
    for index in range(3):
        assert client.outputs[str(index)].error is None, index
        assert client.tokens(str(index)) == expected(index, tokens(20), 8)
    assert engine.list_loras() == {2}


def test_drain_serves_a_request_whose_adapter_has_left_the_host(tiers, folders, expected):
    client, engine = Client(tiers), tiers.llm_engine
    engine.add_lora(request(folders, 0))
    client.busy()
    client.add("waits", request(folders, 0))
    assert engine.remove_lora(1, when_in_use="drain")
    for index in range(1, 5):  # before its first step
        engine.add_lora(request(folders, index))
    assert 1 not in engine.list_loras()
    client.drain()
    assert client.tokens("waits") == expected(0, tokens(20), 8)


def test_remove_aborts(tiers, folders, disk, expected):
    client, engine = Client(tiers), tiers.llm_engine
    free = engine.lora_stats().free_blocks
    client.add("runs", request(folders, 0), tokens(40), count=50)
    client.until(lambda: client.count("runs") >= 2)
    disk.hangs.add("adapter-6")
    client.add("waits", request(folders, 0), tokens(40))
    client.add("is read", request(folders, 2))
    name = client.busy()
    assert engine.remove_lora(1, when_in_use="abort")
    assert engine.remove_lora(3, when_in_use="abort")
    assert engine.list_loras() == set()
    assert engine.lora_statuses() == {}
    assert engine.get_num_unfinished_requests() == 1
    stats = engine.lora_stats()
    assert (stats.free_blocks, stats.host_bytes, stats.on_device) == (free, 0, 0)
    disk.open.set()
    known = client.count("runs")
    client.drain()
    assert client.count("runs") == known
    assert client.outputs.keys() == {"runs", name}
    assert client.tokens(name) == expected(None, tokens(5, 5), 88)
    assert engine.list_loras() == set()  # what was read late is not taken in
    client.add("again", request(folders, 0), tokens(40))
    client.drain()
    assert client.outputs["again"].num_cached_tokens == 0
    assert client.tokens("again") == expected(0, tokens(40), 8)


def test_remove_of_an_async_engine_ends_the_streams_it_aborts(tiers, folders):
    async def main(engine):
        outputs = []

        async def listen():
            params = greedy(max_tokens=70)
            async for output in engine.generate(tokens(20), params, "r", request(folders, 0)):
                outputs.append(output)

        adapted = asyncio.create_task(listen())
        stays = asyncio.create_task(last(engine, "stays", None, 70))
        while len(outputs) < 3:
            await asyncio.sleep(0)
        with pytest.raises(AdapterInUseError):
            await engine.remove_lora(1)
        assert await engine.remove_lora(1, "abort")
        await adapted
        return outputs, await stays

    outputs, stays = serve(tiers, main)
    assert 3 <= len(outputs) < 70
    assert not outputs[-1].finished
    assert len(stays.outputs[0].token_ids) == 70


# -- sizes -------------------------------------------------------------------------------------


def test_the_host_keeps_no_more_bytes_than_it_may(few_bytes, folders, sizes):
    engine = few_bytes.llm_engine
    evictions, limit = engine.lora_stats().host_evictions, sum(sizes[:3])
    for index in range(3):
        assert engine.add_lora(request(folders, index))
    assert engine.list_loras() == {1, 2, 3}
    assert engine.lora_stats().host_bytes == limit
    engine.lora.manager.touch(1)
    engine.add_lora(request(folders, 3))  # larger than the second, which goes, by two ranks
    assert engine.list_loras() == {1, 4}
    assert engine.lora_stats().host_evictions == evictions + 2
    assert engine.lora_stats().host_bytes == sizes[0] + sizes[3] <= limit
    engine.add_lora(request(folders, 1))  # no room beside both, but for the first's
    assert engine.lora_stats().host_bytes <= limit
    assert engine.list_loras() == {2, 4}


def test_bytes_of_running_adapters_are_not_evicted(few_bytes, folders, sizes, disk, expected):
    """Who waits for them to end has its adapter read when there is room, not over and over."""
    client = Client(few_bytes)
    client.add("runs", request(folders, 5), count=70)  # rank 9 of 15
    client.until(lambda: client.count("runs") >= 1)
    client.add("waits", request(folders, 4))  # rank 8
    client.until(lambda: client.ended("runs"), pause=0.003)
    client.drain()
    assert client.tokens("runs") == expected(5, tokens(20), 70)
    assert client.tokens("waits") == expected(4, tokens(20), 8)
    assert Counter(disk.reads)["adapter-8"] <= 3


def test_adapters_that_wait_do_not_evict_each_other_by_turns(few_bytes, folders, disk, expected):
    """More bytes wait than the host keeps; the first has to be there when its turn comes."""
    client = Client(few_bytes)
    client.add("runs", request(folders, 0), count=70)  # 4 of 15; 8 and 9 are not both kept
    client.until(lambda: client.count("runs") >= 1)
    client.add("first", request(folders, 4))
    client.add("second", request(folders, 5))
    client.until(lambda: client.ended("runs"), pause=0.003)
    client.drain()
    assert client.tokens("first") == expected(4, tokens(20), 8)
    assert client.tokens("second") == expected(5, tokens(20), 8)
    assert max(Counter(disk.reads).values()) <= 3


@pytest.mark.parametrize("others_run", [False, True])
def test_an_adapter_larger_than_the_host_is_refused(few_bytes, files, others_run):
    client, large = Client(few_bytes), LoRARequest("large", 9, str(files.adapters[2]))
    if others_run:
        client.busy()
        client.add("large", large)
        client.finish("large", limit=3)
        error = client.outputs["large"].error
    else:
        with pytest.raises(AdapterError) as raised:
            client.add("large", large)
        error = raised.value
    assert isinstance(error, AdapterError)
    assert "'large'" in str(error)
    assert "max_cpu_lora_bytes" in str(error)
    client.drain()


def test_a_reload_that_is_too_large_leaves_what_is_there(few_bytes, folders, files, tmp_path):
    folder = copy_files(folders[0], tmp_path / "a")
    given, engine = LoRARequest("a", 1, str(folder)), few_bytes.llm_engine
    engine.add_lora(given)
    before = engine.lora_identity(1)
    copy_files(files.adapters[2], folder)
    with pytest.raises(AdapterError, match="max_cpu_lora_bytes"):
        engine.add_lora(dataclasses.replace(given, load_inplace=True))
    assert engine.lora_identity(1) == before


def test_a_reload_beside_a_running_request_names_the_limit_it_hits(few_bytes, folders, sizes):
    client, engine = Client(few_bytes), few_bytes.llm_engine
    client.add("r", request(folders, 4), count=60)
    client.until(lambda: client.count("r") >= 2)
    other = LoRARequest("a4", 5, str(folders[5]), load_inplace=True)
    pattern = rf"new version of adapter 5 \({sizes[5]} bytes\).*raise max_cpu_lora_bytes"
    with pytest.raises(AdapterInUseError, match=pattern):
        engine.add_lora(other)
    client.drain()


def test_more_adapters_than_the_host_and_the_slots_keep(tiers, folders, expected):
    """Six on two slots, and four on the host: each answer is its adapter's own."""
    client = Client(tiers)
    kinds = [(number, (5 * number + number // 6) % 6) for number in range(30)]
    client.busy()
    for number, index in kinds:
        client.add(str(number), request(folders, index), count=6)
        client.step()
        assert len(client.engine.list_loras()) <= 4
        assert client.engine.lora_stats().on_device <= 2
    client.drain()
    for number, index in kinds:
        assert client.tokens(str(number)) == expected(index, tokens(20), 6), index
    assert len({str(expected(index, tokens(20), 6)) for index in range(6)}) == 6
    assert client.engine.lora_stats().host_evictions > 0


def test_more_adapters_than_there_is_room_for_at_once_offline(tiers, folders, expected):
    order = [5, 0, 3, None, 1, 4, 2, 0, 5, None, 2]
    loras = [None if index is None else request(folders, index) for index in order]
    params = greedy(max_tokens=6)
    outputs = tiers.generate([tokens(20)] * len(order), params, lora_request=loras, use_tqdm=False)
    for index, output in zip(order, outputs, strict=True):
        assert output.outputs[0].token_ids == expected(index, tokens(20), 6)


# -- what there is to see ----------------------------------------------------------------------


def test_stats_count(tiers, folders, disk):
    client, engine = Client(tiers), tiers.llm_engine
    first = engine.lora_stats()
    assert (first.on_host, first.on_device, first.host_bytes) == (0, 0, 0)
    client.busy()
    for name, index in (("a", 0), ("b", 1), ("a again", 0)):
        client.add(name, request(folders, index), count=4)
        client.finish(name)
    now = engine.lora_stats()
    assert now.loads.count - first.loads.count == 2
    assert now.loads.total > first.loads.total
    assert now.activations - first.activations == 2
    assert now.hits - first.hits == 1
    assert now.copies.count - first.copies.count == 2
    assert (now.on_host, now.on_device, now.free_slots) == (2, 2, 0)
    assert now.loading == now.staged == 0
    statuses = engine.lora_statuses()
    assert now.host_bytes == statuses[1].host_bytes + statuses[2].host_bytes > 0
    assert (statuses[1].rank, statuses[2].rank) == (4, 5)
    assert all(now.free_blocks[name] < count for name, count in first.free_blocks.items() if count)
    known = {name: one.count for name, one in first.waits.items()}
    waits = {name: one.count - known.get(name, 0) for name, one in now.waits.items()}
    assert {name: count for name, count in waits.items() if count} == {"a0": 2, "a1": 1}
    # A third one takes a slot from one of them; three more take host memory.
    disk.errors["adapter-9"] = OSError("no")
    for index in (2, 3, 4, 5):
        if not engine.scheduler.running:
            client.busy()
        client.add(str(index), request(folders, index), count=4)
        client.finish(str(index))
    last = engine.lora_stats()
    assert last.slot_evictions - first.slot_evictions == 3
    assert last.host_evictions - first.host_evictions == 1
    assert last.failures - first.failures == 1
    assert last.loads.count - first.loads.count == 5
    assert last.on_host == 4
    assert engine.list_loras() == {1, 3, 4, 5}  # the first was used after the second
    client.drain()
    for adapter_id in engine.list_loras():
        engine.remove_lora(adapter_id)
    end = engine.lora_stats()
    assert (end.free_blocks, end.free_slots) == (first.free_blocks, first.free_slots)
    assert (end.on_host, end.host_bytes, end.on_device) == (0, 0, 0)
    assert now.hits - first.hits == 1  # what was told does not change afterwards


def test_waits_are_from_arrival_to_start(tiers, folders, disk):
    disk.seconds["adapter-6"] = 0.3
    client = Client(tiers)
    client.busy()
    client.add("r", LoRARequest("waits long", 3, str(folders[2])))
    client.drain()
    (wait,) = [w for name, w in client.engine.lora_stats().waits.items() if name == "waits long"]
    assert wait.count == 1
    assert 0.3 <= wait.total == wait.longest == wait.mean < 5


def test_a_sequence_that_waits_for_pages_counts_once(tiers, folders):
    client, engine = Client(tiers), tiers.llm_engine
    client.add("runs", request(folders, 0), tokens(2), count=6)  # in one page
    client.step()
    first, pages = engine.lora_stats(), engine.pages.allocate(engine.pages.num_free)
    client.add("waits", request(folders, 0), tokens(20, 1), count=6)
    try:
        client.until(lambda: client.count("runs") >= 5)
        assert len(engine.scheduler.waiting) == 1
    finally:
        engine.pages.release(pages)
    client.drain()
    now = engine.lora_stats()
    assert (now.hits - first.hits, now.activations - first.activations) == (1, 0)


def test_statuses_through_every_state(tiers, folders, disk, tmp_path):
    client, engine = Client(tiers), tiers.llm_engine
    assert engine.lora_statuses() == {}
    client.busy()
    disk.hangs.add("adapter-4")
    client.add("r", request(folders, 0), count=20)
    status = client.status(1)
    assert (status.name, status.state) == ("a0", AdapterState.LOADING)
    assert (status.slot, status.rank, status.host_bytes, status.requests) == (None, 0, 0, 0)
    disk.open.set()
    client.until(lambda: client.count("r") > 0)
    status = client.status(1)
    assert status.state is AdapterState.IN_USE
    assert (status.slot in (0, 1), status.rank, status.requests) == (True, 4, 1)
    assert status.host_bytes == engine.lora.manager.get_adapter(1).nbytes > 0
    assert status.identity == engine.lora_identity(1)
    assert (status.reason, status.retry_in) == (None, None)
    client.finish("r")
    status = client.status(1)
    assert (status.state, status.requests) == (AdapterState.ON_DEVICE, 0)
    for index in (1, 2):  # which take the two slots
        assert engine.add_lora(request(folders, index))
    assert (client.state(1), client.status(1).slot) == (AdapterState.ON_HOST, None)
    assert client.state(2) is client.state(3) is AdapterState.ON_DEVICE
    assert engine.pin_lora(2)
    assert client.state(2) is AdapterState.PINNED
    for index in (3, 4):  # which take the first's place on the host
        assert engine.add_lora(request(folders, index))
    status = client.status(1)
    assert (status.state, status.host_bytes, status.rank) == (AdapterState.ON_DISK, 0, 0)
    assert status.identity != ""
    with pytest.raises(AdapterError):
        engine.add_lora(LoRARequest("none", 7, str(tmp_path)))
    status = client.status(7)
    assert (status.name, status.state) == ("none", AdapterState.FAILED)
    assert "'none'" in status.reason
    assert 0 < status.retry_in <= RETRY
    client.drain()
    assert engine.lora_statuses().keys() == {1, 2, 3, 4, 5, 7}


def test_statuses_and_stats_are_right_when_nobody_steps(tiers, folders, disk):
    client, engine = Client(tiers), tiers.llm_engine
    client.busy()
    disk.seconds["adapter-4"] = 0.1
    client.add("r", request(folders, 0))
    assert (client.state(1), engine.lora_stats().loading) == (AdapterState.LOADING, 1)
    engine.abort_request(["r", "busy-0"])
    engine.lora._loads.wait(SOON)
    assert engine.lora_stats().loading == 0
    assert client.state(1) is AdapterState.ON_HOST


def test_a_mixture_whose_component_has_left_the_device_is_copied(tiers, folders):
    """Though as many of its own copies are there as may be."""
    lora = TieredLoRAManager(
        tiers.llm_engine.modules,
        dataclasses.replace(
            tiers.llm_engine.lora_config, max_loras=1, max_staged_loras=1, max_lora_blocks=4
        ),
        stage=lambda adapter: adapter.key,
    )
    parts = [request(folders, 0), request(folders, 1)]
    mixture = LoRARequest("m", 9, components=[(part, 1.0) for part in parts])
    for one in (parts[0], request(folders, 2)):
        lora.add_adapter(one, place=False)
    lora.add_adapter(mixture, place=False)

    def acquire(given: LoRARequest) -> int | None:
        for _ in range(20):
            lora.want({given.lora_int_id: given, 9: mixture})
            slot = lora.acquire(given, given.lora_int_id)
            if slot is not None:
                return slot
            lora.wait(1)
            lora.collect()
        return None

    assert acquire(parts[0]) == 0
    lora.manager.take_writes()
    lora.staged.clear()  # it has been written
    lora.want({9: mixture})  # copies what is not on the device: the other component
    while lora.busy:
        lora.wait(1)
        lora.collect()
    assert len(lora.staged) == 1
    lora.manager.release(1)
    lora.manager.deactivate_adapter(1)  # as when another one takes its slot
    assert acquire(mixture) == 0


# -- names -------------------------------------------------------------------------------------


def test_adapters_by_name(tiers, folders, expected):
    client, engine = Client(tiers), tiers.llm_engine
    engine.add_lora(LoRARequest("mine", 4, str(folders[3])))
    given = engine.resolve_lora("adapter-6")
    assert (given.lora_name, Path(given.lora_path)) == ("adapter-6", folders[2].resolve())
    assert given.lora_int_id == 5  # which nobody has
    assert engine.resolve_lora("adapter-6") is given
    other = engine.resolve_lora("adapter-9")
    assert other.lora_int_id == 6
    client.busy()
    client.add("r", given)
    client.add("other", other)
    client.drain()
    assert client.tokens("r") == expected(2, tokens(20), 8)
    assert client.tokens("other") == expected(5, tokens(20), 8)
    assert engine.lora_statuses()[5].name == "adapter-6"
    for name, words in (("adapter-1", "adapter-1"), ("../adapter-6", "the name has a part")):
        with pytest.raises(AdapterError, match=words):
            engine.resolve_lora(name)
    assert engine.remove_lora(5)
    assert engine.resolve_lora("adapter-6").lora_int_id != other.lora_int_id


def test_ids_of_adapters_by_name_start_at_1(tiers, folders, expected):
    """Also while only a superseded version is there, whose id is below 0."""
    client, engine = Client(tiers), tiers.llm_engine
    client.add("r", request(folders, 0), count=60)
    client.until(lambda: client.count("r") >= 2)
    engine.add_lora(LoRARequest("a0", 1, str(folders[1]), load_inplace=True))
    assert engine.remove_lora(1)
    assert max(engine.lora_statuses()) < 0
    named = engine.resolve_lora("adapter-5")
    assert named.lora_int_id == 1
    client.add("named", named)
    client.drain()
    assert client.tokens("r") == expected(0, tokens(20), 60)
    assert client.tokens("named") == expected(1, tokens(20), 8)


def test_adapters_by_name_of_an_async_engine(tiers, folders, expected):
    async def main(engine):
        given = await engine.resolve_lora("adapter-6")
        with pytest.raises(AdapterError, match="adapter-1"):
            await engine.resolve_lora("adapter-1")
        assert await engine.resolve_lora("adapter-6") == given
        return await last(engine, "r", given)

    assert serve(tiers, main).outputs[0].token_ids == expected(2, tokens(20), 8)


# -- the same steps every time ---------------------------------------------------------------


def test_generate_fills_the_slots_before_its_first_step(files, folders, monkeypatch):
    """However long each copy takes: which requests share a step must not depend on that."""
    llm = small_llm(files.model, max_loras=len(folders), max_cpu_loras=len(folders))
    engine, steps = llm.llm_engine, []
    copies, schedule = engine.lora._copies, engine.scheduler.schedule
    stage = copies.stage

    def slow(lora):
        time.sleep(0.02 * lora.id)
        return stage(lora)

    def note(*arguments, **options):
        plan = schedule(*arguments, **options)
        steps.append([entry.sequence.request.request_id for entry in plan.entries])
        return plan

    monkeypatch.setattr(copies, "stage", slow)
    monkeypatch.setattr(engine.scheduler, "schedule", note)
    requests = [request(folders, index) for index in range(len(folders))]
    prompts = [tokens(4 + index, index) for index in range(len(folders))]
    runs = []
    for _ in range(2):
        first = next(llm._ids) + 1
        steps.clear()
        found = llm.generate(prompts, greedy(max_tokens=6), lora_request=requests, use_tqdm=False)
        relative = [[int(one.removeprefix("llm-")) - first for one in step] for step in steps]
        runs.append((relative, [one.outputs[0].token_ids for one in found]))
    assert runs[0] == runs[1]
    assert all(engine.lora.manager.slot_of(one.lora_int_id) is not None for one in requests)


def test_a_copy_that_fails_before_the_first_step_stops_no_later_ones(files, folders, monkeypatch):
    """Copies of the same window have been made meanwhile: somebody must let go of them."""
    llm = small_llm(files.model, max_loras=3, max_cpu_loras=6, max_staged_loras=2)
    copies = llm.llm_engine.lora._copies
    stage = copies.stage

    def fail(lora):
        if lora.id == 1:
            raise RuntimeError("no memory")
        return stage(lora)

    monkeypatch.setattr(copies, "stage", fail)
    requests = [request(folders, index) for index in range(3)]
    with pytest.raises(RuntimeError, match="no memory"):
        llm.generate([tokens(5)] * 3, greedy(), lora_request=requests, use_tqdm=False)
    monkeypatch.setattr(copies, "stage", stage)
    for index in (3, 4, 5):
        (found,) = llm.generate(
            [tokens(5)], greedy(), lora_request=request(folders, index), use_tqdm=False
        )
        assert len(found.outputs[0].token_ids) == 8
    assert not llm.llm_engine.lora._placing


def test_files_written_again_with_the_same_content_are_read_once(tiers, folders, disk, tmp_path):
    folder = copy_files(folders[0], tmp_path / "a")
    one = LoRARequest("a", 1, str(folder), load_inplace=True)
    tiers.llm_engine.add_lora(one)
    (folder / WEIGHTS).touch()
    before = len(disk.reads)
    for _ in range(3):
        tiers.llm_engine.add_lora(one)
    assert len(disk.reads) == before + 1


@pytest.mark.parametrize("limits", [{"max_cpu_loras": 2}, {"max_cpu_loras": 8}])
def test_who_waits_behind_an_adapter_that_fails_is_not_failed_with_it(tmp_path, limits):
    """Nobody runs, the first adapter is gone from the disk, and the host has little room."""
    folders = [write_adapter(tmp_path / str(index), make_tensors(seed=index)) for index in range(4)]
    requests = [LoRARequest(f"a{at}", at + 1, str(one)) for at, one in enumerate(folders)]
    lora = TieredLoRAManager(MODULES, lora_config(max_loras=1, **limits))
    for one in requests:
        lora.load_now([one], onto_host=True)
    for one in requests[:2]:
        lora.manager.remove_adapter(one.lora_int_id)  # from the host
    shutil.rmtree(folders[0])
    scheduler = Scheduler(PageAllocator(64, 4, False), lora, 4, 64, 64)
    for index, one in enumerate(requests[:2]):
        params = SamplingParams(max_tokens=4)
        state = RequestState(
            str(index), None, [1, 2, 3], params, one, max_tokens=4, stop_ids=frozenset()
        )
        state.arrival = index
        sequence = Sequence(state, 0, 0, [1, 2, 3], 3, 0, 0, None)
        state.sequences.append(sequence)
        scheduler.add(sequence)
    for _ in range(100):
        lora.collect()
        if scheduler.schedule(in_flight=False).entries:
            break
        lora.wait(0.05)
    assert [one.adapter_id for one in scheduler.running] == [2]
    assert [one.adapter_id for one in scheduler.failed] == [1]
