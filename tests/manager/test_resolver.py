"""Names of unknown adapters: what a resolver finds, refuses and leaves to the next one."""

from __future__ import annotations

import os
import traceback
from itertools import chain
from pathlib import Path

import huggingface_hub.constants
import hypothesis.strategies as st
import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given, settings

from jlora.errors import AdapterError
from jlora.manager import LoRAModel
from jlora.manager.peft import resolve_adapter_path
from jlora.manager.requirements import UNLIMITED
from jlora.manager.resolver import FolderResolver, HubResolver, LoRAResolver, resolve
from tests.manager.adapters import CONFIG, MODULES, WEIGHTS, write_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# -- folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Adapters in root/, others in root-other/ that links in root/ lead to; by-link is root."""
    place = tmp_path_factory.mktemp("place").resolve()
    root, other = place / "root", place / "root-other"
    secret = write_adapter(other / "secret")
    (secret / "tokenizer.json").write_text("{}")
    good = write_adapter(root / "good")
    (good / "tokenizer.json").write_text("{}")
    write_adapter(root / "team" / "sql")
    write_adapter(root / "team" / "naïve 模型")
    (root / "empty").mkdir()
    (root / "file").write_text("")
    (root / "a-pipe").mkdir()
    os.mkfifo(root / "a-pipe" / CONFIG)
    (root / "alias").symlink_to(good)
    (root / "loop").symlink_to(root / "loop")
    (write_adapter(root / "round") / "again").symlink_to(root / "round")
    (write_adapter(root / "shared") / "more").symlink_to(good)
    (root / "shared" / "tokenizer.json").symlink_to(good / "tokenizer.json")
    (root / "broken").mkdir()
    (root / "broken" / CONFIG).symlink_to(root / "nowhere")
    # The links out.
    (root / "out").symlink_to(secret)
    (root / "up").symlink_to("..")
    (root / "out-twice").symlink_to(root / "out")
    (root / "others").symlink_to(other)
    for name in (CONFIG, WEIGHTS, "tokenizer.json"):
        folder = write_adapter(root / f"out-{name}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret / name)
    (write_adapter(root / "out-deep") / "a" / "b").mkdir(parents=True)
    (root / "out-deep" / "a" / "b" / "weights").symlink_to(secret / WEIGHTS)
    (write_adapter(root / "out-folder") / "templates").symlink_to(other)
    (root / "joins").mkdir()
    (root / "joins" / "weights").symlink_to(secret / WEIGHTS)
    (write_adapter(root / "out-by-two") / "more").symlink_to(root / "joins")
    (write_adapter(root / "out-dangling") / "lost").symlink_to(place / "nowhere")
    (place / "by-link").symlink_to(root)
    return place


@pytest.fixture(scope="module")
def folders(place) -> FolderResolver:
    return FolderResolver(place / "root")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("good", "good"),
        ("team/sql", "team/sql"),
        ("team/naïve 模型", "team/naïve 模型"),
        ("alias", "good"),
        ("round", "round"),
        ("round/again/again", "round"),
        ("shared", "shared"),
    ],
)
@pytest.mark.parametrize("given_root", ["root", "by-link"])
def test_a_folder_below_the_root_is_found(place, given_root, name, folder):
    found = FolderResolver(str(place / given_root)).resolve_lora(name)
    assert found == str(place / "root" / folder)
    LoRAModel.from_local_checkpoint(Path(found), 1, MODULES, UNLIMITED, name)


ABSENT = {
    "nothing": ["nobody", "team/nobody", "good ", "*", "$HOME"],
    "no folder": ["file", "file/more", f"good/{CONFIG}"],
    "no configuration": ["team", "empty", "loop", "broken", "a-pipe"],
    "too long for the system": ["a" * 255, "/".join(["a" * 200] * 25)],
}


@pytest.mark.parametrize("name", [*chain(*ABSENT.values())])
def test_what_is_not_there_is_left_to_others(folders, name):
    assert folders.resolve_lora(name) is None


FAULTS = {
    "is absolute or has a backslash": ["/", "/etc", "//good", "team\\sql", "..\\good", "\\\\a\\b"],
    "has a part '..'": ["..", "../root/good", "good/../good", "good/.."],
    "has a part '.'": [".", "./good", "good/.", "team/./sql"],
    "has a part ''": ["", "good/", "team//sql"],
    "has control": ["good\0", "good\n", "\x1b[2Jgood", "good\x7f"],
    "has control or other invisible": ["good\u202e", "a\u200b", "a\ud800", "a\xa0"],
    "has a part '~": ["~", "~root/good", "team/~"],
    "has a part 'C:": ["C:", "C:good", "team/C:sql"],
    "has a part of more than 255 bytes": ["a" * 256, "é" * 128, "team/" + "a" * 999],
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for wrong, names in FAULTS.items() for name in names]
)
def test_a_name_that_is_no_folder_below_the_root_is_refused(folders, name, wrong):
    with pytest.raises(AdapterError, match="it must be like sql or team/sql") as caught:
        folders.resolve_lora(name)
    assert str(caught.value).startswith(f"adapter {name[:200]!r}: the name {wrong}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("out", "out"),
        ("out-twice", "out-twice"),
        ("others/secret", "others/secret"),
        ("up/root-other/secret", "up/root-other/secret"),
        (f"out-{CONFIG}", f"out-{CONFIG}/{CONFIG}"),
        (f"out-{WEIGHTS}", f"out-{WEIGHTS}/{WEIGHTS}"),
        ("out-tokenizer.json", "out-tokenizer.json/tokenizer.json"),
        ("out-deep", "out-deep/a/b/weights"),
        ("out-folder", "out-folder/templates"),
        ("out-by-two", "joins/weights"),
        ("out-dangling", "out-dangling/lost"),
    ],
)
@pytest.mark.parametrize("given_root", ["root", "by-link"])
def test_a_link_out_of_the_root_is_refused(place, given_root, name, link):
    with pytest.raises(AdapterError, match="leads out of the root") as caught:
        FolderResolver(place / given_root).resolve_lora(name)
    message = str(caught.value)
    assert message.startswith(f"adapter {name!r}: {link} leads")
    assert str(place) not in message  # a client may read it


def test_back_into_the_root_by_a_way_outside_is_not_out(place, folders):
    assert folders.resolve_lora("up/root/good") == str(place / "root" / "good")


def test_a_folder_that_changes_is_looked_at_anew(tmp_path):
    one = FolderResolver(tmp_path)
    assert one.resolve_lora("late") is None
    folder = write_adapter(tmp_path / "late")
    assert one.resolve_lora("late") == os.path.realpath(folder)
    (folder / "extra").symlink_to("/")
    with pytest.raises(AdapterError, match=r"late/extra leads out"):
        one.resolve_lora("late")


def test_a_folder_that_cannot_be_listed(folders, monkeypatch):
    def iterdir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(AdapterError, match=r"'good': its folder cannot be read: Permission denied"):
        folders.resolve_lora("good")


@pytest.mark.parametrize("root", ["", "missing", "file", "nul\0"])
def test_a_root_must_be_a_folder(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder") as caught:
        FolderResolver(root)
    assert repr(root) in str(caught.value)
    assert not isinstance(caught.value, AdapterError)


def test_a_root_stays_where_it_was(tmp_path, monkeypatch):
    """Neither a change of folder nor of the link to the root moves it; ~ is the operator's."""
    adapter = write_adapter(tmp_path / "root" / "one")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    resolvers = [FolderResolver(root) for root in ("root", "link", "~/root", Path("~/link"))]
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("/")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert {one.resolve_lora("one") for one in resolvers} == {os.path.realpath(adapter)}


THERE = ("good", "team", "sql", "alias", "round", "again", "shared", "root", CONFIG)
OUT = ("out", "up", "others", "secret", "root-other", "out-deep", "out-folder", "out-by-two")
HOSTILE = ("", ".", "..", "...", "~", "~root", "C:", "\\", "..\\", "\0", "\n", "%2e%2e", "\uff0e")
PARTS = st.sampled_from([*THERE, *OUT, *HOSTILE, "<place>", "a" * 256]) | st.text(max_size=4)
NAMES = st.builds(
    str.join, st.sampled_from(["/", "/", "/", "\\", "//", "/../", "/./"]), st.lists(PARTS)
) | st.text(max_size=20)


def real_files(folder: Path) -> set[Path]:
    """Where everything in a folder really is, by way of links too."""
    found: set[Path] = set()
    waiting = [folder.resolve()]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += [entry.resolve() for entry in one.iterdir()] if one.is_dir() else []
    return found


@settings(max_examples=800, deadline=None)
@given(NAMES)
@example("<place>/root-other/secret")
@example("../root-other/secret")
@example("good/../../root-other/secret")
@example("up/root-other/secret")
@example("others/secret")
def test_no_name_leads_out_of_the_root(place, folders, name):
    name = name.replace("<place>", str(place))
    try:
        found = folders.resolve_lora(name)
    except AdapterError as error:
        found, message = None, str(error)
    else:
        message = ""
    assert message.isprintable()
    assert len(message) < 500
    if found is not None:
        assert (Path(found) / CONFIG).is_file()
        assert all(file.is_relative_to(place / "root") for file in real_files(Path(found)))


# -- the Hub ---------------------------------------------------------------------------------


class Download:
    """Stands for snapshot_download: notes what it is asked for, and gives one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []

    def __call__(self, repo_id, **options):
        validate_repo_id(repo_id)
        self.asked.append((repo_id, options))
        return str(self.folder)


@pytest.fixture
def download(tmp_path, monkeypatch) -> Download:
    one = Download(write_adapter(tmp_path / "snapshot"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", one)
    return one


def hub(*allowed: str, **options) -> HubResolver:
    return HubResolver(list(allowed or ("user/one", "org/*")), **options)


@pytest.mark.parametrize("name", ["user/one", "org/one", "org/a.b-c_D9", "org/" + "a" * 96])
def test_an_allowed_repository_is_downloaded(download, name):
    assert hub().resolve_lora(name) == str(download.folder)
    assert [asked for asked, _ in download.asked] == [name]


NOT_ALLOWED = {
    "another": ["user/two", "org2/one", "or/one", "user/on", "user/one2"],
    "letter case": ["User/one", "user/One", "ORG/one"],
    "patterns": ["org/*", "user/*", "*/one", "*", "*/*", "org/a*"],
    "parts": ["", "/", "one", "org", "org/", "/one", "/org/one", "org//one", "user/one/"],
    "more parts": ["user/one/two", "datasets/org/one", "https://host/org/one", "../org/one"],
    "dots": ["org/..", "org/.", "org/a..b", "org/.a", "org/a.", "./one", "../one", "~/one"],
    "dashes": ["org/a--b", "org/-a", "org/a-", "user--one", "org/a\\b", "org\\a"],
    "spaces": ["user/one ", " user/one", "org/a b", "org/a\n", "user/one\n", "org/a\0"],
    "others": ["org/ä", "org/a@main", "org/a:main", "org/a?b", "org/a%2fb", "org/" + "a" * 97],
}


@pytest.mark.parametrize("name", [*chain(*NOT_ALLOWED.values())])
def test_a_repository_that_is_not_allowed_is_left_to_others(download, name):
    assert hub().resolve_lora(name) is None
    assert download.asked == []


def test_the_same_files_are_downloaded_as_for_a_path_but_no_pickle(download):
    resolve_adapter_path("user/one")
    hub().resolve_lora("user/one")
    (_, by_path), (_, by_name) = download.asked
    assert by_name["allow_patterns"] == by_path["allow_patterns"]
    assert {CONFIG, WEIGHTS, "tokenizer*", "chat_template*"} <= set(by_name["allow_patterns"])
    assert not any("bin" in pattern for pattern in by_name["allow_patterns"])


def test_options_of_the_download(download, tmp_path):
    options = {"cache_dir": tmp_path / "cache", "revision": "v2", "token": "hf_secret"}
    one = hub("user/one", **options)
    one.resolve_lora("user/one")
    asked = download.asked[0][1]
    assert {name: asked[name] for name in options} == options
    assert "hf_secret" not in repr(one)


def test_a_name_is_never_a_local_path(download, tmp_path, monkeypatch):
    write_adapter(tmp_path / "org" / "one")
    monkeypatch.chdir(tmp_path)
    assert hub().resolve_lora("org/one") == str(download.folder)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_repository_without_an_adapter(download, missing):
    (download.folder / missing).rename(download.folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=rf"^adapter 'user/one': its Hub repository .*{missing}"):
        hub().resolve_lora("user/one")


@pytest.mark.parametrize(
    "error",
    [OSError("no route\nto host"), ValueError(""), RuntimeError("x" * 9000), TimeoutError()],
)
def test_a_failing_network_names_the_repository_and_the_cause(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        AdapterError, match=rf"^adapter 'user/one': .*Hub.*{type(error).__name__}"
    ) as caught:
        hub(token="hf_secret").resolve_lora("user/one")
    assert caught.value.__cause__ is error
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    assert "hf_secret" not in "".join(traceback.format_exception_only(caught.value))


def test_a_cached_repository_while_offline(tmp_path, monkeypatch):
    """With the real snapshot_download."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--org--one"
    snapshot = write_adapter(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    one = hub(cache_dir=tmp_path)
    assert one.resolve_lora("org/one") == str(snapshot)
    assert hub(cache_dir=tmp_path, revision=COMMIT).resolve_lora("org/one") == str(snapshot)
    with pytest.raises(AdapterError, match=r"^adapter 'org/two': no Hub repository") as caught:
        one.resolve_lora("org/two")
    assert caught.value.__cause__ is not None
    with pytest.raises(AdapterError, match=r"^adapter 'org/one': no Hub repository"):
        hub(cache_dir=tmp_path, revision="v2").resolve_lora("org/one")


NO_ENTRIES = ["*", "*/*", "*/one", "one", "", "org/", "/one", "org/a*", "org/**", "org/one/*"]
NO_ENTRIES += ["org/one/two", "../one", "org/..", "https://a/org", "user/one\n", "org/*\n", "a b/*"]


@pytest.mark.parametrize(
    "allowed",
    [[], (), "", "user/one", "org/*", [None], [1], *(["user/one", one] for one in NO_ENTRIES)],
)
def test_allowed_must_list_repositories_or_owners(allowed):
    with pytest.raises(ValueError, match="owner/name or owner/\\*") as caught:
        HubResolver(allowed)
    assert repr(allowed) in str(caught.value)
    assert not isinstance(caught.value, AdapterError)


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from(["org/", "org/", "user/", "user/one", "Org/", "", "/", "org//", "org/../"]),
    st.text("aZ09._-/*~\\ \n\0é", max_size=6) | st.text(max_size=4),
)
def test_only_allowed_repositories_are_asked_for(start, end):
    name = start + end
    with pytest.MonkeyPatch.context() as patch:
        download = Download(Path("/nowhere"))
        patch.setattr("huggingface_hub.snapshot_download", download)
        try:
            assert hub().resolve_lora(name) is None
        except AdapterError:
            assert name == "user/one" or name.startswith("org/")
            assert [asked for asked, _ in download.asked] in ([name], [])
        else:
            assert download.asked == []


# -- several ---------------------------------------------------------------------------------


class Known:
    """A resolver of somebody's own."""

    def __init__(self, **folders: str) -> None:
        self.folders, self.asked = folders, []

    def resolve_lora(self, lora_name: str) -> str | None:
        self.asked.append(lora_name)
        return self.folders.get(lora_name)


def test_the_first_resolver_that_knows_the_name_answers():
    resolvers: list[LoRAResolver] = [Known(b="/1"), Known(a="/2", b="/2"), Known(a="/3")]
    assert resolve(resolvers, "a") == "/2"
    assert resolve(iter(resolvers), "b") == "/1"
    assert [one.asked for one in resolvers] == [["a", "b"], ["a"], []]


def test_a_refusal_ends_the_search(folders):
    last = Known()
    with pytest.raises(AdapterError, match="is absolute"):
        resolve([folders, last], "/etc")
    assert last.asked == []


def test_a_name_that_nobody_knows(folders, download):
    with pytest.raises(
        AdapterError,
        match=r"^adapter 'no/body': none of 3 resolvers knows it \(FolderResolver, Hub.*, Known\)",
    ):
        resolve([folders, hub(), Known()], "no/body")
    with pytest.raises(AdapterError, match="'a': none of 0 resolvers knows it"):
        resolve([], "a")


def test_folders_and_the_hub_together(place, folders, download):
    both = [folders, hub("org/*")]
    assert resolve(both, "team/sql") == str(place / "root" / "team" / "sql")
    assert resolve(both, "org/one") == str(download.folder)


@pytest.mark.parametrize("name", ["", None, 3, b"good", ["good"], Path("good")])
def test_a_name_must_be_a_string(name):
    known = Known()
    with pytest.raises(ValueError, match="lora_name must be a string that is not empty") as caught:
        resolve([known], name)
    assert not isinstance(caught.value, AdapterError)
    assert known.asked == []
