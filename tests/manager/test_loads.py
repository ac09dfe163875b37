"""Work in the background: once for each key, few at a time, and nobody waits for what hangs."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections import Counter

import pytest

from jlora.manager.loads import BackgroundLoads, LoadTimeout

SOON = 10.0  # seconds within which everything here must have happened


def collect_all(loads: BackgroundLoads, count: int) -> dict:
    """(future, seconds) by key of the next `count` jobs that end; in the order of their ends."""
    ended: dict = {}
    start = time.monotonic()
    while len(ended) < count:
        assert time.monotonic() - start < SOON, f"only {sorted(map(str, ended))} have ended"
        loads.wait(0.02)
        for key, future, seconds in loads.collect():
            assert key not in ended
            assert future.done()
            ended[key] = future, seconds
    return ended


def results(loads: BackgroundLoads, count: int) -> dict:
    return {key: future.result() for key, (future, _) in collect_all(loads, count).items()}


@pytest.fixture
def gate():
    """What functions wait for; open at the end, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


def test_a_key_runs_once_however_often_it_is_started(gate):
    loads, calls = BackgroundLoads(4, SOON), []

    def work():
        calls.append(threading.current_thread())
        assert gate.wait(SOON)
        return "done"

    futures = [loads.start("a", work) for _ in range(5)]
    assert all(one is futures[0] for one in futures)
    assert ("a" in loads, "b" in loads, len(loads)) == (True, False, 1)
    gate.set()
    futures[0].result(SOON)
    loads.start("a", work)  # it has ended, and is not collected
    assert results(loads, 1) == {"a": "done"}
    assert len(calls) == 1
    assert calls[0] is not threading.main_thread()
    assert ("a" in loads, len(loads), loads.collect()) == (False, 0, [])
    loads.start("a", work)  # now it is another job
    assert results(loads, 1) == {"a": "done"}
    assert len(calls) == 2


def test_no_more_than_the_limit_run_at_once_and_all_get_their_turn_in_order():
    loads, lock, running, most, order = BackgroundLoads(3, SOON), threading.Lock(), set(), [], []

    def work(key):
        with lock:
            running.add(key)
            order.append(key)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(key)
        return key

    for key in range(12):
        loads.start(key, lambda key=key: work(key))
    assert results(loads, 12) == {key: key for key in range(12)}
    assert max(most) == 3
    for place, key in enumerate(order):  # first come, first served
        assert abs(place - key) < 3


def test_one_thread_does_one_thing_after_the_other():
    loads, order = BackgroundLoads(1, SOON), []
    for key in range(6):
        loads.start(key, lambda key=key: order.append(key))
    collect_all(loads, 6)
    assert order == list(range(6))


class Interrupt(BaseException):
    """Not an Exception, as KeyboardInterrupt and SystemExit are not."""


@pytest.mark.parametrize("error", [ValueError("no such file"), Interrupt("now")])
def test_what_a_function_raises_is_kept_for_its_key_and_hurts_no_other(error):
    loads = BackgroundLoads(1, SOON)

    def fail():
        raise error

    loads.start("bad", fail)
    loads.start("good", lambda: 7)
    ended = collect_all(loads, 2)
    assert ended["bad"][0].exception() is error
    assert ended["good"][0].result() == 7
    loads.start("bad", lambda: "better")
    assert results(loads, 1) == {"bad": "better"}


def test_seconds_are_those_of_the_work_not_of_the_queue():
    loads = BackgroundLoads(1, SOON)
    for key in "ab":
        loads.start(key, lambda: time.sleep(0.2))
    for _, seconds in collect_all(loads, 2).values():
        assert 0.19 < seconds < 0.39  # the second has also waited 0.2 s for the first


def test_what_hangs_is_given_up_and_its_place_is_filled(gate):
    loads, returned = BackgroundLoads(2, 0.2), threading.Event()

    def hang():
        gate.wait(SOON)
        returned.set()
        return "too late"

    started = time.monotonic()
    loads.start("hangs", hang)
    for key in range(6):
        loads.start(key, lambda key=key: key)
    assert results(loads, 6) == {key: key for key in range(6)}  # by the other thread
    assert "hangs" in loads
    (ended,) = collect_all(loads, 1).items()
    assert 0.2 <= time.monotonic() - started < SOON
    key, (future, seconds) = ended
    assert (key, seconds) == ("hangs", 0.2)
    with pytest.raises(LoadTimeout, match=r"took longer than 0\.2 s"):
        future.result()
    # Two places are there again, though a thread still hangs: these two wait for each other.
    both = threading.Barrier(2)
    for key in "ab":
        loads.start(key, lambda: both.wait(SOON) is not None)
    loads.start("hangs", lambda: "anew")
    assert results(loads, 3) == {"a": True, "b": True, "hangs": "anew"}
    gate.set()  # what it returns now is dropped
    assert returned.wait(SOON)
    time.sleep(0.05)
    assert loads.collect() == []
    assert len(loads) == 0
    # And its thread has neither stayed as a third nor taken a place along.
    assert most_at_once(loads, 6) == 2


def most_at_once(loads: BackgroundLoads, count: int) -> int:
    lock, running, most = threading.Lock(), Counter(), []

    def work():
        with lock:
            running["now"] += 1
            most.append(running["now"])
        time.sleep(0.03)
        with lock:
            running["now"] -= 1

    for key in range(count):
        loads.start(("probe", key), work)
    collect_all(loads, count)
    return max(most)


def test_every_thread_may_hang_and_the_queue_is_served(gate):
    loads = BackgroundLoads(2, 0.1)
    for key in "abc":  # c's time begins when it is started, in the place of a or b
        loads.start(key, lambda: gate.wait(SOON))
    loads.start("good", lambda: "good")
    ended = collect_all(loads, 4)
    assert ended["good"][0].result() == "good"
    assert [type(ended[key][0].exception()) for key in "abc"] == [LoadTimeout] * 3
    gate.set()
    time.sleep(0.05)
    assert most_at_once(loads, 6) == 2


def test_wait_returns_when_something_ends_and_not_before(gate):
    loads = BackgroundLoads(2, SOON)
    start = time.monotonic()
    loads.wait(SOON)  # for nothing
    assert time.monotonic() - start < 1
    loads.start("slow", lambda: gate.wait(SOON))
    start = time.monotonic()
    loads.wait(0.1)
    assert 0.09 < time.monotonic() - start < 1
    loads.start("quick", lambda: time.sleep(0.1))
    start = time.monotonic()
    loads.wait(SOON)
    assert 0.05 < time.monotonic() - start < 1
    start = time.monotonic()
    loads.wait(SOON)  # it has ended already, and nobody has collected it
    assert time.monotonic() - start < 1
    assert [key for key, _, _ in loads.collect()] == ["quick"]


def test_two_hundred_jobs_of_any_kind(gate):
    """Starts and collects mixed at random: each job ends once, with what is its own."""
    rng, loads = random.Random(0), BackgroundLoads(4, 0.5)
    lock, running, most = threading.Lock(), Counter(), []
    kinds = {key: rng.choice(["result"] * 6 + ["error"] * 3) for key in range(200)}
    for key in rng.sample(range(200), 3):
        kinds[key] = "hangs"
    runs: Counter[int] = Counter()

    def work(key):
        if kinds[key] == "hangs":
            return gate.wait(SOON)
        with lock:
            runs[key] += 1
            running["now"] += 1
            most.append(running["now"])
        time.sleep(rng.random() * 0.004)
        with lock:
            running["now"] -= 1
        if kinds[key] == "error":
            raise KeyError(key)
        return key * key

    ended: dict = {}

    def collect():
        for key, future, seconds in loads.collect():
            assert key not in ended
            ended[key] = future
            assert 0 <= seconds <= SOON

    for key in range(200):
        for _ in range(rng.choice([1, 1, 2])):
            loads.start(key, lambda key=key: work(key))
        if rng.random() < 0.3:
            collect()
    start = time.monotonic()
    while len(loads):
        assert time.monotonic() - start < SOON
        loads.wait(0.05)
        collect()
    assert ended.keys() == kinds.keys()
    for key, future in ended.items():
        error = future.exception()
        if kinds[key] == "result":
            assert future.result() == key * key
        else:
            assert type(error) is (KeyError if kinds[key] == "error" else LoadTimeout)
    assert all(count == 1 for count in runs.values())
    assert 1 < max(most) <= 4
    gate.set()
    time.sleep(0.05)
    assert most_at_once(loads, 8) == 4  # all four places are there at the end


def test_who_stops_waiting_for_a_job_does_not_end_it(gate):
    """A coroutine that awaits a job's future and is cancelled takes no place along."""
    loads = BackgroundLoads(1, SOON)
    shared = loads.start("shared", lambda: gate.wait(SOON) and "done")

    async def leave():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(shared), 0.05)

    asyncio.run(leave())
    gate.set()
    assert results(loads, 1) == {"shared": "done"}
    loads.start("next", lambda: "next")
    assert results(loads, 1) == {"next": "next"}


def test_a_thread_does_one_job_after_the_other():
    loads, threads = BackgroundLoads(2, SOON), set()
    for key in range(5):
        loads.start(key, lambda: threads.add(threading.get_ident()))
        collect_all(loads, 1)
    assert len(threads) == 1


def test_threads_that_have_nothing_to_do_end(monkeypatch):
    monkeypatch.setattr("jlora.manager.loads._IDLE_SECONDS", 0.05)
    loads, threads = BackgroundLoads(3, SOON), []
    for _ in range(2):
        for key in range(3):
            loads.start(key, lambda: threads.append(threading.current_thread()))
        collect_all(loads, 3)
        for thread in threads:
            thread.join(SOON)
        assert not any(thread.is_alive() for thread in threads)


def test_nothing_of_a_job_is_kept_while_threads_wait_for_another():
    class Thing:
        pass

    loads, thing = BackgroundLoads(2, SOON), Thing()
    alive = weakref.ref(thing), weakref.ref(loads)

    def use(one=thing):
        raise ValueError(str(one))

    loads.start("a", lambda one=thing: one)
    loads.start("b", use)
    collect_all(loads, 2)
    gc.disable()
    try:
        del thing, use, loads
        for _ in range(100):
            if all(one() is None for one in alive):
                break
            time.sleep(0.01)
        assert [one() for one in alive] == [None, None]
    finally:
        gc.enable()


def test_a_thread_that_cannot_be_started_takes_nobodys_place(monkeypatch):
    loads = BackgroundLoads(1, SOON)

    def fail(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as no_threads:
        no_threads.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="start new thread"):
            loads.start("a", lambda: 1)
    assert len(loads) == 0
    loads.start("b", lambda: 2)
    assert results(loads, 1) == {"b": 2}
