"""Checkpoints of tiny models, and copies that a test may damage."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import save_tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("sharded"), max_shard_size=150_000)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder so that a test may damage it."""

    def copy(folder: Path) -> Path:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy
