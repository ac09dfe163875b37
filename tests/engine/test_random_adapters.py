"""Adapters that come, change, break and go at random beside requests, on a tiny real model."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jlora import AdapterError, LoRARequest, RequestOutput, SamplingParams
from jlora.engine.llm_engine import LLMEngine
from jlora.errors import AdapterInUseError
from tests.engine.fake_device import VOCAB as FAKE_VOCAB
from tests.engine.fake_device import fake_engine
from tests.engine.test_compilation import compilations
from tests.engine.tools import make_text_model, small_llm
from tests.manager.adapters import MODULES as TABLE
from tests.manager.adapters import WEIGHTS, WaitingLoRAManager, lora_config, request, write_adapter
from tests.reference import make_adapter

ADAPTERS, CONTENTS, MOST_TOKENS = 10, 3, 8
SIZES = {
    "skip_tokenizer_init": True,
    "max_loras": 3,
    "max_cpu_loras": 5,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 8,
    "block_size": 4,
    "max_model_len": 32,
    "num_gpu_blocks_override": 14,  # one sequence takes up to 7
}
PATIENCE = 15.0  # seconds without any end, after which an engine is said to hang
BROKEN_STEP = "a step that fails"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """model: a folder; contents: of each adapter, folders of what it may hold."""
    folder = tmp_path_factory.mktemp("random")
    make_text_model(folder / "model")
    ranks, contents = np.random.default_rng(0).integers(4, 25, (ADAPTERS, CONTENTS)), []
    for index in range(ADAPTERS):
        contents.append([folder / f"{index}-{version}" for version in range(CONTENTS)])
        for version, path in enumerate(contents[-1]):
            rank = int(ranks[index, version])
            seed = index * CONTENTS + version
            kind = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
            make_adapter(folder / "model", path, seed=seed, **kind)
    return SimpleNamespace(model=folder / "model", contents=contents)


def put(content: Path, folder: Path) -> None:
    """The folder holds the content, never half of it; for a moment it may be away."""
    new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    shutil.copytree(content, new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclasses.dataclass
class Asked:
    """A request that runs. adapter: its index, None for the base.

    versions: of its adapter that were current since it came and before its first token.
    excuses: why it may fail.
    """

    prompt: tuple[int, ...]
    adapter: int | None
    max_tokens: int
    versions: set[int]
    excuses: set[str]
    begun: bool = False


class Walk:
    """One engine, and what is known of it from outside."""

    def __init__(self, files: SimpleNamespace, folder: Path, seed: int, **options) -> None:
        self.rng = np.random.default_rng(seed)
        sizes = {**SIZES, "enforce_eager": False, "lora_retry_seconds": 0.0, **options}
        self.engine: LLMEngine = small_llm(files.model, **sizes).llm_engine
        self.contents, self.log, self.names = files.contents, [], 0
        self.folders = [folder / f"a{index}" for index in range(ADAPTERS)]
        self.disk = [0] * ADAPTERS  # which content the folder holds
        self.current = [{0} for _ in range(ADAPTERS)]  # the versions that may act
        self.state = ["whole"] * ADAPTERS  # or "away" or "corrupt"
        self.asked: dict[str, Asked] = {}
        self.answers: list[tuple[Asked, RequestOutput]] = []
        self.counts: Counter[str] = Counter()
        self.delay = 0.0
        self.last_end = self.last_call = time.monotonic()
        for index, path in enumerate(self.folders):
            put(self.contents[index][0], path)
        lora = self.engine.lora
        lora._loader.load = self._slowed(lora._loader.load)
        lora._copies.stage = self._slowed(lora._copies.stage)
        for jobs in (lora._loads, lora._copies):
            jobs.wait = self._ending(jobs.wait)
        self.prefixes = [self.tokens(12) for _ in range(3)]

    def _slowed(self, function: Callable) -> Callable:
        def slow(*arguments, **options):
            time.sleep(self.delay)
            return function(*arguments, **options)

        return slow

    def _ending(self, wait: Callable) -> Callable:
        """So that a call that waits for ever ends the test instead."""

        def checked(seconds: float) -> None:
            assert time.monotonic() - self.last_call < PATIENCE, "a call does not end"
            wait(seconds)

        return checked

    def tokens(self, count: int) -> list[int]:
        return self.rng.integers(3, 300, count).tolist()

    def adapter(self) -> int:
        """Some far more often than others."""
        return min(int(self.rng.exponential(3.0)), ADAPTERS - 1)

    def lora(self, index: int, **options) -> LoRARequest:
        return LoRARequest(f"a{index}", index + 1, str(self.folders[index]), **options)

    def requests_of(self, index: int) -> list[Asked]:
        return [one for one in self.asked.values() if one.adapter == index]

    def may_fail(self, index: int, excuse: str) -> None:
        for one in self.requests_of(index):
            one.excuses.add(excuse)

    def now_current(self, index: int, versions: set[int]) -> None:
        """From now on one of these acts in requests that have not begun."""
        self.current[index] = versions
        for one in self.requests_of(index):
            if not one.begun:
                one.versions |= versions

    # -- what is done ------------------------------------------------------------------------

    def step(self) -> None:
        for output in self.engine.step():
            one = self.asked[output.request_id]
            one.begun = one.begun or any(answer.token_ids for answer in output.outputs)
            if output.finished:
                self.last_end = time.monotonic()
                self.end(output.request_id, output)
        assert time.monotonic() - self.last_end < PATIENCE or not self.asked, "no progress"

    def end(self, name: str, output: RequestOutput) -> None:
        one = self.asked.pop(name)
        self.answers.append((one, output))
        failed = [answer for answer in output.outputs if answer.finish_reason == "abort"]
        self.counts["failed" if failed else "answered"] += 1
        for answer in failed:
            why = answer.stop_reason or ""
            excused = any(excuse in why for excuse in one.excuses | {"pinned"})
            assert excused, f"request {name} for adapter {one.adapter} failed: {why}"

    def add(self) -> None:
        index = None if self.rng.random() < 0.2 else self.adapter()
        start = self.prefixes[int(self.rng.integers(3))] if self.rng.random() < 0.5 else []
        prompt = [*start, *self.tokens(int(self.rng.integers(3, 21 - len(start))))]
        count = int(self.rng.integers(1, MOST_TOKENS + 1))
        params = SamplingParams(temperature=0, max_tokens=count, n=1 + int(self.rng.random() < 0.3))
        name, self.names = f"r{self.names}", self.names + 1
        self.log.append(f"add {name}: adapter {index}, {len(prompt)} + {count}, n={params.n}")
        excuses = set() if index is None or self.state[index] == "whole" else {f"a{index}"}
        versions = {0} if index is None else set(self.current[index])
        self.asked[name] = Asked(tuple(prompt), index, count, versions, excuses)
        lora_request = None if index is None else self.lora(index)
        if len(self.asked) == 1:
            self.last_end = time.monotonic()
        try:
            self.engine.add_request(
                name, {"prompt_token_ids": prompt}, params, lora_request=lora_request
            )
        except AdapterError as error:
            self.refused(error, index)
            del self.asked[name]

    def refused(self, error: Exception, index: int) -> None:
        self.log.append(f"  refused: {error}")
        self.counts["refused"] += 1
        assert isinstance(error, AdapterInUseError) or self.state[index] != "whole", error

    def abort(self) -> None:
        if self.asked:
            name = list(self.asked)[int(self.rng.integers(len(self.asked)))]
            self.log.append(f"abort {name}")
            self.engine.abort_request(name)
            del self.asked[name]

    def pin(self) -> None:
        index = self.adapter()
        pinned = self.engine.lora.manager.pinned
        self.log.append(f"pin {index}, beside {pinned}")
        if len(pinned - {index + 1}) > 1:
            self.remove(min(pinned) - 1, "refuse")
            return
        try:
            self.engine.pin_lora(index + 1)
        except (AdapterError, ValueError) as error:
            self.log.append(f"  refused: {error}")
            if not isinstance(error, AdapterInUseError) and "not registered" not in str(error):
                raise

    def reload(self) -> None:
        index, version = self.adapter(), int(self.rng.integers(CONTENTS))
        if self.state[index] != "whole":
            return
        self.log.append(f"reload {index} as version {version}")
        self.may_fail(index, f"a{index}")  # a load may find the folder away, or changing
        put(self.contents[index][version], self.folders[index])
        self.disk[index] = version
        self.now_current(index, self.current[index] | {version})
        try:
            self.engine.add_lora(self.lora(index, load_inplace=True))
        except AdapterInUseError as error:
            self.refused(error, index)
        else:
            self.now_current(index, {version})
            identity = self.engine.lora_identity(index + 1)
            loads = identity is not None
            self.counts["reloads"] += loads

    def remove(self, index: int | None = None, how: str | None = None) -> None:
        index = self.adapter() if index is None else index
        how = how or ("refuse", "drain", "abort")[int(self.rng.integers(3))]
        self.log.append(f"remove {index}: {how}")
        users = set(self.engine.requests_of(index + 1))  # not those of superseded versions
        named = set(self.engine.requests_naming(index + 1))
        try:
            self.engine.remove_lora(index + 1, how)
        except AdapterInUseError:
            if how != "refuse" or not users:
                raise
            return
        if how == "abort":
            for name in named:
                del self.asked[name]
        if how != "drain" or not users:
            assert index + 1 not in self.engine.list_loras()
            self.now_current(index, {self.disk[index]})
        self.counts["removals"] += 1

    def vanish(self) -> None:
        index = self.adapter()
        folder = self.folders[index]
        if self.state[index] == "corrupt":
            return
        self.log.append(f"{index} {'vanishes' if self.state[index] == 'whole' else 'comes back'}")
        if self.state[index] == "whole":
            self.may_fail(index, f"a{index}")
            folder.rename(folder.with_suffix(".away"))
            self.state[index] = "away"
        else:
            folder.with_suffix(".away").rename(folder)
            self.state[index] = "whole"

    def corrupt(self) -> None:
        index = self.adapter()
        path = self.folders[index] / WEIGHTS
        if self.state[index] == "away":
            return
        self.log.append(f"{index} {'breaks' if self.state[index] == 'whole' else 'is mended'}")
        if self.state[index] == "whole":
            self.may_fail(index, f"a{index}")
            path.with_suffix(".new").write_bytes(b"this is no adapter")
            path.with_suffix(".new").replace(path)
            self.state[index] = "corrupt"
        else:
            put(self.contents[index][self.disk[index]], self.folders[index])
            self.state[index] = "whole"

    def slow(self) -> None:
        self.delay = 0.0 if self.delay else float(self.rng.uniform(0.002, 0.02))
        self.log.append(f"loads take {self.delay * 1e3:.0f} ms longer")

    def break_step(self) -> None:
        runner, error = self.engine.runner, RuntimeError(BROKEN_STEP)
        self.log.append("the next step fails")

        def dispatch(*_):
            raise error

        for one in self.asked.values():
            one.excuses.add(BROKEN_STEP)
        real, runner.dispatch = runner.dispatch, dispatch
        try:
            self.step()
        except RuntimeError as caught:
            if caught is not error:
                raise
        finally:
            runner.dispatch = real

    # -- what is true ------------------------------------------------------------------------

    def check_books(self) -> None:
        """Users, bindings, blocks and pages are those of the requests that there are."""
        engine, manager = self.engine, self.engine.lora.manager
        scheduler, requests = engine.scheduler, engine._requests.values()
        users = Counter(one.adapter_id for one in scheduler.running if one.adapter_id is not None)
        bound = Counter(one.adapter_id for one in requests if one.adapter_identity)
        assert manager._users == users
        assert manager._bound == bound
        assert set(engine._requests) | set(engine._arrivals._waiting) == set(self.asked)
        held = {page for one in scheduler.running for page in one.pages}
        assert engine.pages.num_pages - engine.pages.num_free == len(held)
        assert set(manager._slots.values()) | manager.free_slots == set(range(manager.lora_slots))
        for name, pool in manager.pools.items():
            taken = [
                block for one in manager._resident.values() for block in one.blocks.get(name, [])
            ]
            assert sorted(taken + pool._free) == list(range(pool.num_blocks))
        assert len(manager.list_adapters()) <= manager.capacity
        superseded = {one for one in manager.list_adapters() if one < 0}
        assert superseded <= bound.keys()

    def run(self, steps: int, without: tuple[str, ...] = ()) -> None:
        often = {
            "step": 0.6,
            "add": 0.17,
            "abort": 0.03,
            "pin": 0.03,
            "reload": 0.05,
            "remove": 0.05,
            "vanish": 0.02,
            "corrupt": 0.02,
            "slow": 0.02,
            "break_step": 0.01,
        }
        names = [name for name in often if name not in without]
        chances = np.array([often[name] for name in names])
        for _ in range(steps):
            self.last_call = time.monotonic()
            getattr(self, str(self.rng.choice(names, p=chances / chances.sum())))()
            self.check_books()

    def finish(self) -> None:
        """Mends everything, answers everybody and removes every adapter."""
        engine, self.delay = self.engine, 0.0
        for index, state in enumerate(self.state):
            if state == "away":
                self.folders[index].with_suffix(".away").rename(self.folders[index])
            elif state == "corrupt":
                put(self.contents[index][self.disk[index]], self.folders[index])
            self.state[index] = "whole"
        for adapter in engine.lora.manager.pinned:
            engine.remove_lora(adapter, "drain")
        self.log.append("all is mended and unpinned")
        self.last_end = self.last_call = time.monotonic()
        while engine.has_unfinished_requests():
            self.last_call = time.monotonic()
            self.step()
            self.check_books()
        assert not self.asked
        for adapter in engine.lora_statuses():
            assert adapter > 0, f"a superseded version lives on: {engine.lora_statuses()[adapter]}"
            engine.remove_lora(adapter)
        end = time.monotonic() + PATIENCE
        while engine.lora.busy or load_threads():
            assert time.monotonic() < end, "a thread does not end"
            engine.step()
            time.sleep(0.001)
        engine.step()
        assert_nothing_is_left(engine)


def load_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jlora-load"]


def assert_nothing_is_left(engine: LLMEngine) -> None:
    lora, scheduler = engine.lora, engine.scheduler
    manager = lora.manager
    assert engine.get_num_unfinished_requests() == 0 and scheduler.idle
    assert engine.pages.num_free == engine.pages.num_pages
    assert sorted(scheduler._free_rows) == list(range(engine.args.max_num_seqs))
    assert all(pool.num_free == pool.num_blocks for pool in manager.pools.values())
    assert manager.free_slots == set(range(manager.lora_slots))
    for held in (manager._users, manager._bound, manager._adapters, manager._resident):
        assert not held
    assert not manager._writes and not manager.pinned
    left = {
        name: value
        for name, value in {**vars(lora), **vars(lora._copies)}.items()
        if isinstance(value, (dict, set, list)) and value
    }
    assert left == {}
    assert not len(engine._arrivals) and not len(lora._loads) and not len(lora._copies)


def check_answers(files: SimpleNamespace, answers: list[tuple[Asked, RequestOutput]]) -> int:
    """Every answer is that of one version that it may have; how many depend on the version.

    Compared with an engine that keeps every version apart, and neither shares pages nor preempts.
    """
    wanted = sorted(
        {
            (one.prompt, -1 if one.adapter is None else one.adapter, version)
            for one, _ in answers
            for version in one.versions
        }
    )
    plain = small_llm(
        files.model,
        **{
            **SIZES,
            "max_loras": 8,
            "max_cpu_loras": ADAPTERS * CONTENTS,
            "max_num_seqs": 8,
            "num_gpu_blocks_override": 8 * 8,
            "enable_prefix_caching": False,
        },
    )
    outputs = plain.generate(
        [{"prompt_token_ids": list(prompt)} for prompt, _, _ in wanted],
        SamplingParams(temperature=0, max_tokens=MOST_TOKENS),
        lora_request=[
            None
            if index < 0
            else LoRARequest(
                f"{index}-{version}",
                index * CONTENTS + version + 1,
                str(files.contents[index][version]),
            )
            for _, index, version in wanted
        ],
        use_tqdm=False,
    )
    right = {one: output.outputs[0].token_ids for one, output in zip(wanted, outputs, strict=True)}
    telling = 0
    for one, output in answers:
        index = -1 if one.adapter is None else one.adapter
        possible = {v: right[one.prompt, index, v][: one.max_tokens] for v in one.versions}
        whole = [a for a in output.outputs if a.finish_reason in ("length", "stop")]
        got = [answer.token_ids for answer in whole]
        assert all(tokens == got[0] for tokens in got), (output.request_id, got)
        assert not got or got[0] in possible.values(), (output.request_id, one, got, possible)
        every = [right.get((one.prompt, index, v)) for v in range(CONTENTS)]
        telling += len({str(tokens) for tokens in every}) > 1
    return telling


def random_walk(files, folder, seed: int, steps: int, without: tuple[str, ...] = ()) -> Walk:
    walk = Walk(files, folder, seed)
    try:
        for _ in range(3):
            walk.add()
            walk.step()
        with compilations() as events:
            walk.run(steps, without)
            walk.finish()
        assert events == []
        check_answers(files, walk.answers)
    except BaseException as error:
        print("\n".join(walk.log))
        error.add_note(f"seed {seed}; the last of what was done:\n" + "\n".join(walk.log[-40:]))
        raise
    return walk


@pytest.mark.parametrize("seed", [0, 1])
def test_adapters_at_random(files, tmp_path, seed):
    walk = random_walk(files, tmp_path, seed, 400)
    assert walk.counts["answered"] > 20
    assert walk.engine.scheduler.num_preemptions > 0
    assert walk.counts["reloads"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_adapters_at_random_for_long(files, tmp_path, seed):
    random_walk(files, tmp_path, seed, 10_000)


# -- by hand -----------------------------------------------------------------------------------


@pytest.fixture
def engine(files) -> Iterator[LLMEngine]:
    """Of its own; nobody may be left in it."""
    engine = small_llm(files.model, skip_tokenizer_init=True, lora_retry_seconds=0.0).llm_engine
    yield engine
    assert not engine.has_unfinished_requests()
    assert engine.pages.num_free == engine.pages.num_pages
    assert not engine.lora.manager._users and not engine.lora.manager._bound


def ask(
    engine: LLMEngine, name: str, lora_request: LoRARequest | None = None, count: int = 4
) -> None:
    prompt = {"prompt_token_ids": [5, 6, 7, 8]}
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    engine.add_request(name, prompt, params, lora_request=lora_request)


def begin(engine: LLMEngine, name: str, lora_request: LoRARequest | None = None) -> None:
    """A request that runs for long."""
    ask(engine, name, lora_request, 60)
    while not any(output.request_id == name for output in engine.step()):
        pass


def drain(engine: LLMEngine) -> dict[str, RequestOutput]:
    outputs, last = {}, time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
            last = time.monotonic()
        if time.monotonic() - last > PATIENCE:
            left = [*engine._requests, *engine._arrivals._waiting]
            engine.abort_request(left)
            raise AssertionError(f"{left} make no progress")
    return outputs


def assert_answered(output: RequestOutput) -> None:
    (answer,) = output.outputs
    assert answer.finish_reason == "length", answer.stop_reason


def lora_of(folder: Path, adapter_id: int = 1, **options) -> LoRARequest:
    return LoRARequest(f"a{adapter_id}", adapter_id, str(folder), **options)


class Gate:
    """A function that waits, before or after it has done its work, until it may go on."""

    def __init__(
        self, monkeypatch, owner, name: str, after: bool = False, which=lambda _: True
    ) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        real = getattr(owner, name)

        def wait() -> None:
            self.reached.set()
            assert self.opened.wait(PATIENCE)

        def function(first, *arguments, **options):
            if which(first) and not after:
                wait()
            result = real(first, *arguments, **options)
            if which(first) and after:
                wait()
            return result

        monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("again", ["request", "add_lora"])
def test_asked_for_again_after_it_was_removed_while_it_was_read(engine, files, monkeypatch, again):
    one = lora_of(files.contents[0][0])
    begin(engine, "base")
    gate = Gate(monkeypatch, engine.lora._loader, "load")
    ask(engine, "first", one)
    assert gate.reached.wait(PATIENCE)
    engine.remove_lora(1, "abort")
    gate.opened.set()
    end, wait = time.monotonic() + PATIENCE, engine.lora._loads.wait

    def checked(seconds: float) -> None:
        assert time.monotonic() < end, "add_lora does not end"
        wait(seconds)

    monkeypatch.setattr(engine.lora._loads, "wait", checked)
    try:
        if again == "add_lora":
            engine.add_lora(one)
        ask(engine, "second", one)
    finally:
        outputs = drain(engine)
    assert_answered(outputs["second"])


def test_added_and_removed_and_asked_for_between_two_steps(engine, files):
    one = lora_of(files.contents[0][0])
    begin(engine, "base")
    engine.add_lora(one)
    engine.remove_lora(1)
    ask(engine, "a", one)
    assert_answered(drain(engine)["a"])


def test_mended_after_add_lora_failed_between_two_steps(engine, files, tmp_path):
    begin(engine, "base")
    with pytest.raises(AdapterError, match="is not a folder"):
        engine.add_lora(lora_of(tmp_path / "a"))
    put(files.contents[0][0], tmp_path / "a")
    ask(engine, "a", lora_of(tmp_path / "a"))
    assert_answered(drain(engine)["a"])


def test_a_request_that_reloads_is_not_told_of_an_earlier_reload(engine, files, tmp_path):
    begin(engine, "base")
    put(files.contents[0][0], tmp_path / "a")
    again = lora_of(tmp_path / "a", load_inplace=True)
    engine.add_lora(again)
    old = engine.lora_identity(1)
    put(files.contents[0][1], tmp_path / "a")
    ask(engine, "a", again)
    while "a" not in engine._requests:
        engine.step()
    new = engine.lora_identity(1)
    drain(engine)
    assert new != old


def test_an_older_read_never_replaces_what_was_reloaded(engine, files, tmp_path, monkeypatch):
    begin(engine, "base")
    put(files.contents[0][0], tmp_path / "a")
    loader = engine.lora._loader
    gate = Gate(monkeypatch, loader, "load", after=True, which=lambda one: not one.load_inplace)
    ask(engine, "a", lora_of(tmp_path / "a"))
    assert gate.reached.wait(PATIENCE)
    put(files.contents[0][1], tmp_path / "a")
    engine.add_lora(lora_of(tmp_path / "a", load_inplace=True))
    new = engine.lora_identity(1)
    gate.opened.set()
    drain(engine)
    assert engine.lora_identity(1) == new


def under_way(engine, key):
    """What ends when the thread has that reads an adapter: (id, load_inplace)."""
    load = engine.lora._loading[key]
    return engine.lora._loads._jobs[load].future


def test_a_reload_is_not_served_with_an_older_read(engine, files, tmp_path):
    """A request's load has ended, and not been collected, when the files change."""
    begin(engine, "base")
    put(files.contents[0][0], tmp_path / "a")
    again = lora_of(tmp_path / "a", load_inplace=True)
    ask(engine, "a", again)
    under_way(engine, (1, True)).result(PATIENCE)
    put(files.contents[0][1], tmp_path / "a")
    engine.add_lora(again)
    identity = engine.lora_identity(1)
    drain(engine)
    engine.add_lora(again)
    assert engine.lora_identity(1) == identity


@pytest.mark.parametrize("call", ["pin_lora", "place_lora", "get_tokenizer", "load_loras"])
def test_abort_after_another_call_has_found_a_new_version(engine, files, tmp_path, call):
    put(files.contents[0][0], tmp_path / "a")
    begin(engine, "a", lora_of(tmp_path / "a"))
    put(files.contents[0][1], tmp_path / "a")
    again = lora_of(tmp_path / "a", load_inplace=True)
    ask(engine, "b", again)
    under_way(engine, (1, True)).result(PATIENCE)
    argument = {"get_tokenizer": again, "load_loras": [again]}.get(call, 1)
    getattr(engine, call)(argument)
    engine.abort_request("a")
    assert_answered(drain(engine)["b"])
    assert set(engine.lora_statuses()) == {1}  # the old version went with its request


def step_that_fails(engine, monkeypatch):
    def dispatch(*_):
        raise ValueError(BROKEN_STEP)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "dispatch", dispatch)
        with pytest.raises(ValueError, match=BROKEN_STEP):
            engine.step()


def test_a_step_that_fails_beside_a_superseded_version(engine, files, tmp_path, monkeypatch):
    put(files.contents[0][0], tmp_path / "a")
    begin(engine, "a", lora_of(tmp_path / "a"))
    begin(engine, "base")
    put(files.contents[0][1], tmp_path / "a")
    engine.add_lora(lora_of(tmp_path / "a", load_inplace=True))

    step_that_fails(engine, monkeypatch)
    outputs = drain(engine)
    assert all(BROKEN_STEP in outputs[name].outputs[0].stop_reason for name in ("a", "base"))
    assert list(engine.lora.manager.list_adapters()) == [1]


def test_what_a_step_that_fails_had_to_say_is_said_by_the_next(engine, tmp_path, monkeypatch):
    """An adapter could not be read, and the step that found it out fails."""
    begin(engine, "base")
    missing = lora_of(tmp_path / "missing")
    ask(engine, "a", missing)
    with pytest.raises(AdapterError):
        under_way(engine, (1, False)).result(PATIENCE)

    step_that_fails(engine, monkeypatch)
    outputs = drain(engine)
    assert BROKEN_STEP in outputs["base"].outputs[0].stop_reason
    assert "is not a folder" in outputs["a"].outputs[0].stop_reason


def test_a_copy_that_fails_hurts_its_requests_only(engine, files, monkeypatch):
    ask(engine, "alone", count=60)
    expected = drain(engine)["alone"].outputs[0].token_ids
    begin(engine, "base")

    def stage(_):
        raise MemoryError("no room on the device")

    monkeypatch.setattr(engine.lora._copies, "stage", stage)
    ask(engine, "a", lora_of(files.contents[0][0]))
    outputs = drain(engine)
    assert "no room on the device" in outputs["a"].outputs[0].stop_reason
    assert outputs["base"].outputs[0].token_ids == expected


def test_an_interrupt_of_add_lora_takes_no_news_from_others(engine, files, monkeypatch):
    begin(engine, "base")
    gate = Gate(monkeypatch, engine.lora._loader, "load")
    loads = engine.lora._loads
    ask(engine, "a", lora_of(files.contents[0][0]))
    assert gate.reached.wait(PATIENCE)
    monkeypatch.setattr(engine.lora._loader, "load", lambda *_: time.sleep(PATIENCE))
    first, waits = under_way(engine, (1, False)), []

    def wait(_):
        if waits:
            raise KeyboardInterrupt
        waits.append(1)
        gate.opened.set()
        first.result(PATIENCE)

    with monkeypatch.context() as patch:
        patch.setattr(loads, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            engine.add_lora(lora_of(files.contents[1][0], 2))
    assert_answered(drain(engine)["a"])


@pytest.mark.parametrize("known", [False, True])
def test_drained_while_it_waits_to_be_read(files, monkeypatch, known):
    """Its requests end as they would have."""
    options = {"max_loras": 1, "max_cpu_loras": 1, "max_lora_loads": 1}
    engine = small_llm(files.model, skip_tokenizer_init=True, **options).llm_engine
    one, other = (lora_of(files.contents[index][0], index + 1) for index in (0, 1))
    gate = None
    if known:  # was on the host, and was evicted
        ask(engine, "before", one)
        drain(engine)
        begin(engine, "other", other)
    else:  # its turn to be read has not come
        begin(engine, "base")
        gate = Gate(monkeypatch, engine.lora._loader, "load")
        ask(engine, "other", other)
        assert gate.reached.wait(PATIENCE)
    ask(engine, "a", one)
    engine.remove_lora(1, "drain")
    if gate is not None:
        gate.opened.set()
    assert_answered(drain(engine)["a"])
    assert 1 not in engine.lora_statuses()


def test_a_reload_that_fails_leaves_the_old_version_in_service(engine, files, tmp_path):
    engine.lora.lora_config = dataclasses.replace(engine.lora.lora_config, lora_retry_seconds=60)
    begin(engine, "base")
    put(files.contents[0][0], tmp_path / "a")
    one = lora_of(tmp_path / "a")
    engine.add_lora(one)
    (tmp_path / "a" / WEIGHTS).write_bytes(b"this is no adapter")
    with pytest.raises(AdapterError, match="not a readable"):
        engine.add_lora(lora_of(tmp_path / "a", load_inplace=True))
    try:
        ask(engine, "a", one)
    finally:
        outputs = drain(engine)
    assert_answered(outputs["a"])


def test_placing_beside_requests_that_wait(engine, files):
    """A copy that nobody who waits has asked for is still there when it is asked for again."""
    copies, real = [], engine.lora._copies.stage

    def stage(lora):
        copies.append(lora)
        return real(lora)

    engine.lora._copies.stage = stage
    for index in range(12):
        ask(engine, str(index), count=60)
    engine.step()
    engine.add_lora(lora_of(files.contents[0][0]), place=False)
    for _ in range(5):
        if engine.place_lora(1):
            break
        while len(engine.lora._copies):
            engine.step()
        assert engine.scheduler.waiting
    drain(engine)
    assert len(copies) == 1


def test_copies_of_what_was_removed_do_not_stay_on_the_device(engine, files, monkeypatch):
    begin(engine, "base")
    gate = Gate(monkeypatch, engine.lora._copies, "stage")
    ask(engine, "a", lora_of(files.contents[0][0]))
    while not gate.reached.is_set():
        engine.step()
    engine.abort_request("a")
    engine.remove_lora(1)
    gate.opened.set()
    drain(engine)
    while engine.lora.busy:
        engine.step()
    engine.step()
    assert not engine.lora.staged


def test_a_reload_while_the_copy_waits_for_a_slot(files, tmp_path):
    """The copy of the version before takes no place from the new one's."""
    sizes = {"max_loras": 1, "max_staged_loras": 1}
    engine = small_llm(files.model, skip_tokenizer_init=True, **sizes).llm_engine
    put(files.contents[0][0], tmp_path / "a")
    one = lora_of(tmp_path / "a")
    begin(engine, "other", lora_of(files.contents[3][0], 4))
    engine.add_lora(one, place=False)
    ask(engine, "a", one)
    while not engine.lora.staged:
        engine.step()
    put(files.contents[0][1], tmp_path / "a")
    engine.add_lora(dataclasses.replace(one, load_inplace=True), place=False)
    assert_answered(drain(engine)["a"])


def test_a_mixture_whose_component_leaves_the_device_while_it_waits(files):
    """More components than are copied at a time; one need not be copied until it is evicted."""
    sizes = {"max_lora_blocks": 8, "lora_pool_blocks": 8, "max_cpu_loras": 8}
    engine = small_llm(files.model, skip_tokenizer_init=True, **sizes).llm_engine
    parts = [lora_of(files.contents[index][0], index + 1) for index in range(3)]
    mixture = LoRARequest("m", 50, components=[(one, 1.0) for one in parts])
    engine.add_lora(mixture, place=False)
    engine.add_lora(parts[0])
    engine.pin_lora(1)
    begin(engine, "other", lora_of(files.contents[3][0], 4))
    ask(engine, "m", mixture)
    end = time.monotonic() + 1
    while len(engine.lora.staged) < 2 and time.monotonic() < end:
        engine.step()
    engine.remove_lora(1)
    ask(engine, "another", lora_of(files.contents[5][0], 6))
    assert_answered(drain(engine)["m"])


def test_hundreds_of_adapters_on_two_slots(engine, files):
    """Of which the host keeps four; all are asked for at once, then some again."""
    requests = [lora_of(files.contents[i % ADAPTERS][i % CONTENTS], i + 1) for i in range(200)]
    for every in (1, 7):
        for one in requests[::every]:
            ask(engine, f"{every}-{one.lora_int_id}", one, count=1)
        for output in drain(engine).values():
            assert_answered(output)
    assert len(engine.lora.manager.list_adapters()) <= 4


# -- memory ------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Flat:
    """What python objects take between 20 % and 100 % of a run must not grow."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.first = rounds, 0

    def __enter__(self) -> Flat:
        tracemalloc.start()
        return self

    def __exit__(self, *_) -> None:
        tracemalloc.stop()

    def look(self, done: int) -> None:
        if done in (self.rounds // 5, self.rounds):
            gc.collect()
            now = tracemalloc.get_traced_memory()[0]
            if done == self.rounds:
                limit = max(self.first // 100, 2**20 if self.rounds < 10_000 else 2**21)
                assert now - self.first <= limit, f"{self.first} bytes became {now}"
            self.first = now


def serve_on_a_fake_device(folder: Path, rounds: int) -> None:
    """One-token requests for 200 adapters on two slots, some aborted."""
    engine, rng = fake_engine(folder), np.random.default_rng(0)
    done = 0
    with Flat(rounds) as flat:
        for number in range(1, rounds + 1):
            name, index = str(number), int(rng.integers(0, 201))
            prompt = {"prompt_token_ids": rng.integers(0, FAKE_VOCAB - 1, 3).tolist()}
            lora_request = LoRARequest(str(index), index, f"/{index}") if index else None
            params = SamplingParams(temperature=0, max_tokens=1)
            engine.add_request(name, prompt, params, lora_request=lora_request)
            if number % 7 == 0:
                engine.abort_request(name)
            while engine.get_num_unfinished_requests() > 6:
                done += sum(output.finished for output in engine.step())
            engine.runner.plans.clear()  # which only this device keeps
            flat.look(number)
    while engine.has_unfinished_requests():
        done += sum(output.finished for output in engine.step())
    assert done == rounds - rounds // 7
    assert engine.pages.num_free == engine.pages.num_pages
    assert not +engine.lora.users and not +engine.lora.bound


def change_adapters(folder: Path, rounds: int) -> None:
    """Twenty adapters on two slots: started, replaced while they run, ended, removed."""
    staged = Counter()

    def stage(lora):
        staged["made"] += 1
        return np.zeros(1000, np.float32)

    manager = WaitingLoRAManager(TABLE, lora_config(max_cpu_loras=4), stage=stage)
    superseded: dict[int, int] = {}
    manager.on_superseded = superseded.__setitem__
    rng, small = np.random.default_rng(0), {"target_modules": ["q_proj"]}
    paths = [write_adapter(folder / str(index), **small, r=4) for index in range(20)]
    kept = manager.manager
    with Flat(rounds) as flat:
        for number in range(1, rounds + 1):
            adapter_id = int(rng.integers(1, 21))
            path = paths[adapter_id - 1]
            if number % 5 == 0:
                write_adapter(path, **small, r=int(rng.integers(1, 17)))
            one = request(adapter_id, path, load_inplace=number % 5 == 0)
            manager.read(one)
            started = dataclasses.replace(one, load_inplace=False)
            assert manager.start(started) is not None
            kept.bind(adapter_id)
            now = adapter_id
            if number % 3 == 0:  # a new version comes while it runs
                write_adapter(path, **small, r=int(rng.integers(1, 17)))
                manager.add_adapter(request(adapter_id, path, load_inplace=True), place=False)
                now = superseded.pop(adapter_id, adapter_id)
            kept.take_writes()
            kept.release(now)
            manager.unbind(now)
            if number % 11 == 0:
                manager.remove_adapter(adapter_id)
            flat.look(number)
    manager.collect()
    for adapter_id in manager.statuses():
        assert adapter_id > 0, "a superseded version lives on"
        manager.remove_adapter(adapter_id)
    assert not kept.list_adapters() and kept.free_slots == {0, 1}
    assert all(pool.num_free == pool.num_blocks for pool in kept.pools.values())
    assert not manager._versions and not manager._loading
    assert len(manager._loads) == len(manager._copies) == 0


SOAKS = [serve_on_a_fake_device, change_adapters]


@pytest.mark.parametrize("soak", SOAKS)
def test_memory_stays_flat(soak, tmp_path):
    soak(tmp_path, 3000 if soak is serve_on_a_fake_device else 600)


@pytest.mark.slow
@pytest.mark.parametrize(("soak", "rounds"), [*zip(SOAKS, (100_000, 20_000), strict=True)])
def test_memory_stays_flat_for_long(soak, rounds, tmp_path):
    before = resident_bytes()
    soak(tmp_path, rounds)
    assert resident_bytes() - before < 2**26  # of everything, caches of the first steps included
