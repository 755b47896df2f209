"""Stage cache: what was put comes back, unless it was damaged or had to go."""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder
from llmc.artifact.store.substitute import with_working_folders, working_folder
from llmc.errors import ConfigError, ResourceError

KEYS = [content_key("trace", {"number": n}) for n in range(4)]


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "cache")
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], b"graph")
    cache.put(KEYS[1], b"")
    assert cache.get(KEYS[0]) == b"graph"
    assert cache.get(KEYS[1]) == b""
    assert StageCache(tmp_path / "cache").get(KEYS[0]) == b"graph"
    cache.put(KEYS[0], b"another")
    assert cache.get(KEYS[0]) == b"another"


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_entry_is_a_miss_and_is_removed(tmp_path: Path, damage: str) -> None:
    cache = StageCache(tmp_path)
    cache.put(KEYS[0], b"graph" * 100)
    (entry,) = tmp_path.iterdir()
    data = entry.read_bytes()
    entry.write_bytes({"flip": data[:-1] + b"?", "truncate": data[:-1], "empty": b""}[damage])
    assert cache.get(KEYS[0]) is None
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_go_first_and_the_newest_stays(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, max_bytes=3 * (32 + 100))
    for age, key in enumerate(KEYS[:3]):
        cache.put(key, bytes(100))
        os.utime(tmp_path / key, ns=(age * 10**9, age * 10**9))
    cache.put(KEYS[3], bytes(100))
    assert [cache.get(key) is not None for key in KEYS] == [False, True, True, True]
    cache.put(KEYS[0], bytes(1000))
    assert [p.name for p in tmp_path.iterdir()] == [KEYS[0]]


def test_a_failed_put_leaves_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StageCache(tmp_path)
    cache.put(KEYS[0], b"one")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEYS[0], b"two")
    assert cache.get(KEYS[0]) == b"one"
    assert [p.name for p in tmp_path.iterdir()] == [KEYS[0]]


def test_keys_depend_on_stage_and_facts_and_not_on_their_order() -> None:
    assert content_key("trace", {"a": 1, "b": 2}) == content_key("trace", {"b": 2, "a": 1})
    assert content_key("trace", {"a": 1}) != content_key("passes", {"a": 1})
    assert content_key("trace", {"a": 1}) != content_key("trace", {"a": 2})


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    assert default_cache_folder() == tmp_path
    monkeypatch.delenv("LLMC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "llmc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache" / "llmc"


def test_a_key_that_is_no_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache key '\.\./x' is not a sha256"):
        StageCache(tmp_path).get("../x")


def _below_a_file(folder: Path) -> None:
    folder.parent.write_text("")


def _read_only(folder: Path) -> None:
    folder.parent.symlink_to("/proc")


def _of_nobody(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / KEYS[0]).mkdir()


@pytest.mark.parametrize("spoil", [_below_a_file, _read_only, _of_nobody])
def test_a_folder_that_cannot_be_used_is_told_once_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    folder = tmp_path / "spoilt" / "cache"
    spoil(folder)
    cache = StageCache(folder)
    for key in KEYS[:2]:
        assert cache.get(key) is None
        cache.put(key, b"graph")
        assert cache.holds(key)
        assert StageCache(folder).get(key) == b"graph"
    assert [f"continues without the cache in {folder}" in m for m in caplog.messages] == [True]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    cache = StageCache(tmp_path)
    cache.put(KEYS[0], b"graph")
    assert cache.get(KEYS[0]) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_an_entry_that_others_may_write_is_not_taken(tmp_path: Path, mode: int) -> None:
    cache = StageCache(tmp_path)
    cache.put(KEYS[0], b"library")
    (tmp_path / KEYS[0]).chmod(mode)
    assert not cache.holds(KEYS[0])
    assert cache.get(KEYS[0]) is None


def test_an_entry_of_another_user_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StageCache(tmp_path)
    cache.put(KEYS[0], b"library")
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / KEYS[0]).stat().st_uid + 1)
    assert cache.get(KEYS[0]) is None


def test_an_entry_under_another_key_and_a_link_are_not_taken(tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "cache")
    cache.put(KEYS[0], b"library")
    (tmp_path / "cache" / KEYS[1]).symlink_to(tmp_path / "cache" / KEYS[0])
    assert cache.get(KEYS[1]) is None
    (tmp_path / "cache" / KEYS[0]).replace(tmp_path / "cache" / KEYS[2])
    assert cache.get(KEYS[2]) is None


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "old.partial").touch()
    (tmp_path / "new.partial").touch()
    os.utime(tmp_path / "old.partial", (0, 0))
    StageCache(tmp_path).put(KEYS[0], b"graph")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([KEYS[0], "new.partial"])


def test_a_working_folder_in_use_is_not_evicted(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(shelf)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    for key in "abc":
        working_folder(shelf, key, 1)
    assert {p.name for p in shelf.iterdir()} == {"a", "b", "c", "used"}, "all four are in use"
    process.communicate()
    working_folder(shelf, "a", 1)
    assert {p.name for p in shelf.iterdir()} == {"a", "b", "c"}


HOLDER = """
import sys
from pathlib import Path
from llmc.artifact.store.substitute import working_folder
working_folder(Path(sys.argv[1]), "used", 1)
print("holds", flush=True)
sys.stdin.read()
"""


def test_work_without_room_goes_to_a_temporary_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = tmp_path / "shelf"

    def work() -> Path:
        folder = working_folder(shelf, "key", 1)
        if folder.is_relative_to(shelf):
            raise ResourceError("no space left")
        return folder

    assert with_working_folders(shelf, work).is_dir()
    assert caplog.messages == [f"continues without the cache in {shelf}: no space left"]
