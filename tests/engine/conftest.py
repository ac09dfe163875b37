"""One model and one engine for all tests of the engine, which must leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from jlora import LLM
from jlora.engine.llm_engine import LLMEngine
from tests.engine.tools import make_adapters, make_text_model, make_tokenizer, small_llm


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> SimpleNamespace:
    """model: a folder; adapters: folders of ranks 4, 8 and 20."""
    folder: Path = tmp_path_factory.mktemp("engine")
    make_text_model(folder / "model")
    return SimpleNamespace(model=folder / "model", adapters=make_adapters(folder / "model", folder))


@pytest.fixture(scope="session")
def shared_llm(files) -> LLM:
    return small_llm(files.model)


def assert_clean(engine: LLMEngine) -> None:
    """Nothing waits, runs, or holds a page, a row or an adapter."""
    scheduler = engine.scheduler
    assert not engine.has_unfinished_requests()
    assert scheduler.idle
    assert engine.pages.num_free == engine.pages.num_pages
    assert sorted(scheduler._free_rows) == list(range(engine.args.max_num_seqs))
    assert not any(engine.lora.manager.in_use(one) for one in engine.lora.manager.list_adapters())


@pytest.fixture
def llm(shared_llm) -> Iterator[LLM]:
    """The shared engine, without cached prefixes and adapters; nothing may be left in it."""
    engine = shared_llm.llm_engine
    engine.reset_prefix_cache()
    yield shared_llm
    assert_clean(engine)
    for adapter in engine.lora_statuses():  # those that are only known, too
        engine.remove_lora(adapter)
