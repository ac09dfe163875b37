"""Adapters named by a Hub repository, found in the cache while offline."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from jlora.errors import AdapterError
from jlora.manager import LRUCacheWorkerLoRAManager
from jlora.manager.peft import resolve_adapter_path
from tests.manager.adapters import MODULES, lora_config, request, write_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline Hub whose cache is an empty folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache(hub: Path, repository: str, commit: str = COMMIT, **config) -> Path:
    """Puts an adapter into the cache, in the layout of huggingface_hub."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = write_adapter(folder / "snapshots" / commit, **config)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


def worker(**options) -> LRUCacheWorkerLoRAManager:
    return LRUCacheWorkerLoRAManager(MODULES, lora_config(**options))


def test_a_repository_in_the_cache_is_served(hub):
    snapshot = cache(hub, "user/sql-lora", r=6)
    assert resolve_adapter_path("user/sql-lora") == snapshot
    one = worker()
    assert one.add_adapter(request(1, "user/sql-lora"))
    assert one.manager.get_adapter(1).rank == 6


def test_a_repository_that_is_not_in_the_cache(hub):
    one = worker()
    with pytest.raises(AdapterError, match=r"'a1'.*user/absent is neither a folder nor") as caught:
        one.add_adapter(request(1, "user/absent"))
    assert "\n" not in str(caught.value)
    assert one.list_adapters() == set()


def test_a_repository_without_weights_in_the_cache(hub):
    (cache(hub, "user/half") / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"'a1'.*has no adapter_model\.safetensors"):
        worker().add_adapter(request(1, "user/half"))


def test_pickled_weights_are_asked_for_only_when_there_are_no_others(hub, monkeypatch):
    snapshot = cache(hub, "user/one")
    asked = []

    def download(path, allow_patterns):
        asked.append(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_adapter_path("user/one")
    tokeniser = ["tokenizer*", "vocab.json"]  # and more of it
    assert [one[0] for one in asked] == ["adapter_config.json"]
    assert asked[0][-1] == "adapter_model.safetensors"
    assert "adapter_model.bin" not in asked[0]
    assert set(tokeniser) <= set(asked[0])
    (snapshot / "adapter_model.safetensors").unlink()
    resolve_adapter_path("user/one")
    assert [one[-1] for one in asked[2:]] == ["adapter_model.bin"]


@pytest.mark.parametrize("path", ["user/na me", "user/a--b", "user/..", "user/na\0me"])
def test_a_name_that_no_repository_can_have(hub, path):
    with pytest.raises(AdapterError, match="'a1'"):
        worker().add_adapter(request(1, path))


def test_a_folder_goes_before_a_repository_of_the_same_name(hub, tmp_path, monkeypatch):
    cache(hub, "user/both", r=2)
    write_adapter(tmp_path / "user" / "both", r=3)
    monkeypatch.chdir(tmp_path)
    one = worker()
    one.add_adapter(request(1, "user/both"))
    assert one.manager.get_adapter(1).rank == 3


def test_an_evicted_adapter_comes_back_without_the_hub(hub, monkeypatch):
    """Also the same version: the Hub is asked again only with load_inplace."""
    cache(hub, "user/one", r=2)
    one = worker(max_loras=1, max_cpu_loras=1)
    one.add_adapter(request(1, "user/one"))
    cache(hub, "user/two", commit=COMMIT[::-1])
    one.add_adapter(request(2, "user/two"))
    assert one.list_adapters() == {2}
    cache(hub, "user/one", commit=COMMIT[::-1], r=5)
    assert one.add_adapter(request(1, "user/one"))
    assert one.manager.get_adapter(1).rank == 2
    assert one.add_adapter(request(1, "user/one", load_inplace=True))
    assert one.manager.get_adapter(1).rank == 5


def test_a_snapshot_that_was_deleted_is_looked_for_again(hub):
    snapshot = cache(hub, "user/one", r=2)
    one = worker(max_loras=1, max_cpu_loras=1)
    one.add_adapter(request(1, "user/one"))
    one.add_adapter(request(2, cache(hub, "user/two")))
    shutil.rmtree(snapshot)
    cache(hub, "user/one", commit=COMMIT[::-1], r=5)
    one.add_adapter(request(1, "user/one"))
    assert one.manager.get_adapter(1).rank == 5
