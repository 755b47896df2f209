"""Stage cache: what was put comes back, unless it was damaged or had to go."""

import os
from pathlib import Path

import pytest

from llmc.artifact.cache import StageCache, content_key, default_cache_folder
from llmc.errors import ConfigError

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


def test_a_key_that_is_no_digest_and_a_folder_that_is_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache key '\.\./x' is not a sha256"):
        StageCache(tmp_path).get("../x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not a directory") as caught:
        StageCache(tmp_path / "file").put(KEYS[0], b"")
    assert caught.value.hint == "set LLMC_CACHE to a directory"
