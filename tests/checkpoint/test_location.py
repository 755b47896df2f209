"""Checkpoints that are not where they are looked for: folders, files, pointers, the hub."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.checkpoint import open_checkpoint
from tests.checkpoint.refusals import refused


def test_no_such_folder(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere", "nowhere does not exist")
    assert "hub id" in str(error.hint)


def test_no_such_gguf() -> None:
    refused("models/nowhere.gguf", "does not exist")


def test_file_that_is_no_gguf(llama: Path) -> None:
    refused(llama / "config.json", "is a file but not a .gguf")


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")


def test_folder_with_only_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    error = refused(tmp_path, "has no config.json")
    assert error.hint == f"give the file: {tmp_path / 'a.gguf'}"


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs(file: str, llama: Path, damaged: Callable[[Path], Path]) -> None:
    folder = damaged(llama)
    (folder / file).write_text(LFS)
    assert "git lfs pull" in str(refused(folder, f"{file} is a Git LFS pointer").hint)


def test_weights_that_are_a_link_to_nothing(llama: Path, damaged: Callable[[Path], Path]) -> None:
    file = damaged(llama) / "model.safetensors"
    file.unlink()
    file.symlink_to("../blobs/abc")
    refused(file.parent, "model.safetensors is a link to ../blobs/abc, which does not exist")


def test_hub_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = refused(
        "nobody/no-such-model@v1", "nobody/no-such-model is not a local folder, and the hub cannot be reached"
    )
    assert "HF_HUB_OFFLINE" in str(error.hint)


def test_hub_snapshot_in_the_cache(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A repository that was downloaded before opens without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for file in llama.iterdir():
        (repository / "snapshots" / commit / file.name).write_bytes(file.read_bytes())
    checkpoint = open_checkpoint("someone/tiny@v1")
    assert checkpoint.name == "tiny"
    assert checkpoint.path == repository / "snapshots" / commit
