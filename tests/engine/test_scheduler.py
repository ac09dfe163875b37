"""Scheduler and engine loop without a device: what runs when, and that nothing is lost."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jlora import LoRARequest, RequestOutputKind, SamplingParams
from tests.engine.fake_device import adapter_of, expected_answer, fake_engine

EMPTY = Path(tempfile.mkdtemp(prefix="jlora-test-"))


def request(adapter: int) -> LoRARequest | None:
    return LoRARequest(f"adapter {adapter}", adapter, f"/nowhere/{adapter}") if adapter else None


def add(engine, name: str, prompt: list[int], adapter: int = 0, max_tokens: int = 4, **params):
    given = SamplingParams(max_tokens=max_tokens, **params)
    engine.add_request(name, {"prompt_token_ids": prompt}, given, lora_request=request(adapter))


def drain(engine) -> dict:
    """Steps until all is done; the last output of each request."""
    outputs = {}
    for _ in range(500):
        if not engine.has_unfinished_requests():
            return outputs
        outputs |= {output.request_id: output for output in engine.step()}
    raise AssertionError("the engine does not come to an end")


def assert_nothing_is_held(engine) -> None:
    assert engine.scheduler.idle
    assert engine.pages.num_free == engine.pages.num_pages
    assert set(engine.pages._references) == {0}
    assert sorted(engine.scheduler._free_rows) == [0, 1, 2]
    assert engine.lora.users.total() == 0


class Serving(RuleBasedStateMachine):
    """Requests of any kind come, go on and are aborted at any time; answers are always right."""

    def __init__(self):
        super().__init__()
        self.engine, self.count, self.expected = fake_engine(EMPTY), 0, {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        adapter=st.integers(0, 3),
        max_tokens=st.integers(1, 8),
        n=st.integers(1, 2),
    )
    def add(self, prompt, adapter, max_tokens, n):
        name, self.count = str(self.count), self.count + 1
        add(
            self.engine,
            name,
            prompt,
            adapter,
            max_tokens,
            n=n,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.expected[name] = [
            expected_answer(prompt, adapter, index, max_tokens, 16) for index in range(n)
        ]

    @rule()
    def step(self):
        self.check(self.engine.step())

    def check(self, outputs):
        for output in outputs:
            found = [(answer.token_ids, answer.finish_reason) for answer in output.outputs]
            assert found == self.expected.pop(output.request_id)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.expected)))
        self.engine.abort_request(name)
        del self.expected[name]

    @invariant()
    def running_sequences_hold_what_they_need(self):
        scheduler = self.engine.scheduler
        assert len(scheduler.running) + len(scheduler._free_rows) == 3
        for sequence in scheduler.running:
            assert len(sequence.pages) * 2 >= sequence.num_computed
        held = {page for sequence in scheduler.running for page in sequence.pages}
        assert len(held) + self.engine.pages.num_free == 8

    def teardown(self):
        for _ in range(1000):
            if not self.engine.has_unfinished_requests():
                break
            self.check(self.engine.step())
        assert not self.expected
        self.engine.step()  # a step may still be in flight
        assert_nothing_is_held(self.engine)


Serving.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestServing = Serving.TestCase


def counts(plan) -> list[tuple[str, int, bool]]:
    return [
        (entry.sequence.request.request_id, entry.count, entry.sample) for entry in plan.entries
    ]


def test_a_long_prompt_runs_in_chunks_of_the_budget():
    engine = fake_engine(EMPTY)
    add(engine, "a", [0] * 10, max_tokens=1)
    drain(engine)
    assert [counts(plan) for plan in engine.runner.plans] == [
        [("a", 4, False)],
        [("a", 4, False)],
        [("a", 2, True)],
    ]


def test_decoding_comes_before_the_next_prompt():
    engine = fake_engine(EMPTY)
    add(engine, "a", [0], max_tokens=3, ignore_eos=True)
    engine.step()
    add(engine, "b", [1] * 8, max_tokens=1)
    drain(engine)
    assert [counts(plan) for plan in engine.runner.plans[1:3]] == [
        [("a", 1, True), ("b", 3, False)],
        [("a", 1, True), ("b", 3, False)],
    ]


def test_first_come_first_served():
    engine = fake_engine(EMPTY)
    for name in "abcde":
        add(engine, name, [0, 1], max_tokens=1)
    drain(engine)
    order = [name for plan in engine.runner.plans for name, *_ in counts(plan)]
    assert order == sorted(order)


def test_adapters_without_a_slot_wait_and_others_pass():
    engine = fake_engine(EMPTY, slots=1)
    for name, adapter in (("a", 1), ("b", 2), ("c", 1), ("d", 0)):
        add(engine, name, [adapter], adapter, max_tokens=2, ignore_eos=True)
    drain(engine)
    first = {name for name, *_ in counts(engine.runner.plans[0])}
    assert first == {"a", "c", "d"}
    assert not any(
        {adapter_of(entry.sequence.request.lora_request) for entry in plan.entries} >= {1, 2}
        for plan in engine.runner.plans
    )


def test_beside_others_an_adapter_is_written_a_step_before_it_is_used():
    engine = fake_engine(EMPTY)
    for name, adapter in (("a", 1), ("b", 0)):  # nobody runs: both start at once
        add(engine, name, [0], adapter, max_tokens=8, ignore_eos=True)
    engine.step()
    add(engine, "c", [0], 2, max_tokens=2, ignore_eos=True)
    for users, names in ((0, "ab"), (1, "abc")):
        engine.step()
        assert {name for name, *_ in counts(engine.runner.plans[-1])} == set(names)
        assert 2 in engine.lora.slots and engine.lora.users[2] == users
    drain(engine)
    assert_nothing_is_held(engine)


def test_who_waits_for_a_write_is_not_emptied_for_others():
    """It is in use by a sequence that has not begun, so that nothing else could empty its slot."""
    engine = fake_engine(EMPTY, slots=1)
    engine.lora.lora_config.max_lora_passes = 0
    add(engine, "runs", [0], max_tokens=8, ignore_eos=True)
    engine.step()
    for name, adapter in (("first", 1), ("second", 2)):
        add(engine, name, [0], adapter, max_tokens=1)
    engine.step()
    assert 1 in engine.lora.slots
    engine.step()
    assert "first" in {name for name, *_ in counts(engine.runner.plans[-1])}
    drain(engine)
    assert_nothing_is_held(engine)


def test_aborted_while_its_adapter_is_written():
    engine = fake_engine(EMPTY)
    add(engine, "runs", [0], max_tokens=8, ignore_eos=True)
    engine.step()
    add(engine, "goes", [0], 1)
    engine.step()
    assert 1 in engine.lora.slots
    assert engine.lora.users[1] == engine.lora.bound[1] == 0  # so it may be replaced
    engine.abort_request(["goes"])
    add(engine, "comes", [0], 1, max_tokens=1)
    engine.step()
    assert "comes" in {name for name, *_ in counts(engine.runner.plans[-1])}
    drain(engine)
    assert_nothing_is_held(engine)


def test_no_more_adapters_are_written_than_there_are_rows():
    """Those that could not start next would only push out adapters that others have."""
    engine = fake_engine(EMPTY, pages=40, max_num_seqs=3, slots=3)
    for name, adapter in (("a", 0), ("b", 0), ("c", 3)):
        add(engine, name, [0], adapter, max_tokens=3 if name == "c" else 14, ignore_eos=True)
    engine.step()
    for name, adapter in (("d", 4), ("e", 5), ("f", 6), ("g", 3)):
        add(engine, name, [0], adapter, max_tokens=2, ignore_eos=True)
    while set(engine.lora.slots) == {3}:
        engine.step()
    assert set(engine.lora.slots) == {3, 4}  # one row is free, so the adapter of one request
    drain(engine)
    assert_nothing_is_held(engine)


def test_without_pages_an_adapter_that_was_written_is_let_go_again():
    engine = fake_engine(EMPTY, pages=3, caching=False)
    add(engine, "runs", [0], max_tokens=5, ignore_eos=True)
    engine.step()
    add(engine, "waits", [0] * 4, 1, max_tokens=1)
    engine.step()
    assert 1 in engine.lora.slots and engine.lora.users[1] == 0
    engine.step()
    assert engine.lora.users[1] == engine.lora.bound[1] == 0
    assert len(engine.scheduler.waiting) == 1
    drain(engine)
    assert_nothing_is_held(engine)


def test_nobody_waits_for_a_slot_for_ever():
    """Requests for the adapter in the only slot keep coming, two or more at any time."""
    engine, outputs = fake_engine(EMPTY, slots=1), []
    add(engine, "first", [0], 1)
    engine.step()
    add(engine, "waits", [0], 2)
    for index in range(600):
        if len(engine.scheduler.waiting) < 4:
            add(engine, str(index), [0, 1], 1, max_tokens=3)
        outputs += engine.step()
        if any(output.request_id == "waits" and output.finished for output in outputs):
            break
    else:
        raise AssertionError("it starves")
    assert index > 20  # the others do pass at first, for the slot's sake
    drain(engine)
    assert_nothing_is_held(engine)


def test_entries_of_one_adapter_lie_together():
    engine = fake_engine(EMPTY)
    for name, adapter in (("a", 1), ("b", 2), ("c", 1)):
        add(engine, name, [0], adapter, max_tokens=1)
    drain(engine)
    slots = [entry.sequence.slot for entry in engine.runner.plans[0].entries]
    assert slots == sorted(slots)


def test_the_last_to_come_is_preempted_and_ends_with_the_same_answer():
    engine = fake_engine(EMPTY, caching=False)
    prompts = {"a": [0, 1, 0], "b": [1, 1, 0, 1]}
    for name, prompt in prompts.items():
        add(engine, name, prompt, max_tokens=12, ignore_eos=True)
    finished = drain(engine)
    assert engine.scheduler.num_preemptions > 0
    by_plan = [[name for name, *_ in counts(plan)] for plan in engine.runner.plans]
    assert max(i for i, plan in enumerate(by_plan) if "a" in plan) < len(by_plan) - 1
    assert all(finished[name].outputs[0].finish_reason == "length" for name in prompts)
    assert len(finished["b"].outputs[0].token_ids) == 12


def prompt_that_stops(max_tokens: int) -> list[int]:
    """Three tokens, whose answer stops by itself after an odd number of tokens, 3 or more."""
    for prompt in itertools.product(range(9), repeat=3):
        answer, reason = expected_answer(list(prompt), 0, 0, max_tokens, 64)
        if reason == "stop" and len(answer) > 2 and len(answer) % 2:
            return list(prompt)
    raise AssertionError("the fake model never stops")


def test_a_stop_token_costs_one_token_that_nobody_sees():
    """The step after the stop is dispatched before the stop is known."""
    engine = fake_engine(EMPTY, max_model_len=64, pages=32)
    prompt = prompt_that_stops(max_tokens=9)
    add(engine, "a", prompt, max_tokens=9)
    answer = drain(engine)["a"].outputs[0].token_ids
    assert answer == expected_answer(prompt, 0, 0, 9, 64)[0]
    assert len(engine.runner.plans) == len(answer) + 1
    assert engine.step() == []
    assert_nothing_is_held(engine)


def test_no_token_runs_beyond_max_tokens():
    engine = fake_engine(EMPTY)
    add(engine, "a", [0], max_tokens=3, ignore_eos=True)
    drain(engine)
    assert sum(plan.num_tokens for plan in engine.runner.plans) == 3


def test_second_prompt_of_a_kind_finds_the_pages_of_the_first():
    engine = fake_engine(EMPTY)
    for name in "ab":
        add(engine, name, [0, 1, 0, 1, 0], 1, max_tokens=1)
        assert drain(engine)[name].num_cached_tokens == (0 if name == "a" else 4)


@pytest.mark.parametrize("adapter", [0, 2])
def test_another_adapter_finds_nothing(adapter):
    engine = fake_engine(EMPTY)
    add(engine, "a", [0, 1, 0, 1, 0], 1, max_tokens=1)
    drain(engine)
    add(engine, "b", [0, 1, 0, 1, 0], adapter, max_tokens=1)
    assert drain(engine)["b"].num_cached_tokens == 0


def test_pages_belong_to_the_version_that_runs():
    """The adapter's files change while a request waits; it finds nothing of the old version."""
    engine = fake_engine(EMPTY)
    add(engine, "a", [0, 1, 0, 1, 0], 1, max_tokens=1)
    drain(engine)
    add(engine, "b", [0, 1, 0, 1, 0], 1, max_tokens=1)
    engine.lora.versions[1] += 1
    assert drain(engine)["b"].num_cached_tokens == 0
    add(engine, "c", [0, 1, 0, 1, 0], 1, max_tokens=1)
    assert drain(engine)["c"].num_cached_tokens == 4


def test_pages_of_an_answer_are_found_by_the_next_turn():
    engine = fake_engine(EMPTY)
    add(engine, "a", [0, 1, 0], max_tokens=5, ignore_eos=True)
    answer = drain(engine)["a"].outputs[0].token_ids
    add(engine, "b", [0, 1, 0, *answer, 1], max_tokens=1)
    assert drain(engine)["b"].num_cached_tokens == 6  # the last token of an answer has no KV


def test_a_page_that_a_stop_token_fills_is_found_too():
    """Its KV is written by the step that was dispatched before the stop was known."""
    engine = fake_engine(EMPTY)
    prompt = prompt_that_stops(max_tokens=9)
    add(engine, "a", prompt, max_tokens=9)
    turn = [*prompt, *drain(engine)["a"].outputs[0].token_ids]
    add(engine, "b", [*turn, 1], max_tokens=1)
    assert drain(engine)["b"].num_cached_tokens == len(turn)


def test_answers_of_one_request_share_the_pages_of_its_prompt():
    engine = fake_engine(EMPTY)
    add(engine, "a", [0, 1, 0, 1, 0], max_tokens=1, n=2)
    drain(engine)
    assert sum(plan.num_tokens for plan in engine.runner.plans) == 5 + 1


def test_deltas_tell_the_end_of_an_answer_once():
    engine = fake_engine(EMPTY)
    prompt = next(
        [a, b]
        for a in range(9)
        for b in range(9)
        if len(expected_answer([a, b], 0, 0, 8, 16)[0])
        < len(expected_answer([a, b], 0, 1, 8, 16)[0]) - 1
    )
    add(engine, "a", prompt, max_tokens=8, n=2, output_kind=RequestOutputKind.DELTA)
    ends, tokens = [], {0: [], 1: []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            for answer in output.outputs:
                tokens[answer.index] += answer.token_ids
                ends += [answer.index] if answer.finished() else []
    assert ends == [0, 1]
    assert tokens == {index: expected_answer(prompt, 0, index, 8, 16)[0] for index in (0, 1)}


def test_a_chunk_of_a_prompt_is_no_news():
    engine = fake_engine(EMPTY)
    add(engine, "a", [0] * 10, max_tokens=1)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1]
