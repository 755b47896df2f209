"""Ranks run as processes over gloo, agree with the whole model, and none is left behind."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llmc.artifact.ranks import rank_file
from llmc.backends.checkpoint.shards import write_ranks
from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.checkpoint.skeleton import build_skeleton
from llmc.checkpoint.splits import split_tensors
from llmc.errors import ResourceError
from llmc.pipeline.steps.ranks import compare_ranks, run_ranks
from tests.checkpoint.quantized_folders import compressed_config, pack_compressed, write_codes

TOKENS = np.arange(16)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with weights of 4 bits, split over 2 ranks."""
    path = tmp_path_factory.mktemp("ranks")
    config = compressed_config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)
    write_codes(path, config, pack_compressed, group=16)
    whole = SafetensorsStore.open(path)
    layout = split_tensors(build_skeleton(open_checkpoint(str(path)).config), whole, 2)
    write_ranks(path, layout, whole)
    return path


def children() -> set[int]:
    """Process ids of this process's children."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def test_ranks_agree_with_the_whole_model(folder: Path) -> None:
    found = compare_ranks(folder, 2, TOKENS)
    assert found.max_abs <= 1e-4
    assert 0.5 < found.weights < 0.55


def test_a_rank_that_cannot_read_its_file_ends_all(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    os.truncate(tmp_path / "copy" / rank_file(1), 1000)
    before = children()
    with pytest.raises(ResourceError, match=r"rank 1 of 2 ended with 1: .*is truncated"):
        run_ranks(tmp_path / "copy", TOKENS, 2)
    assert children() <= before


def test_a_rank_that_is_killed_ends_all(folder: Path) -> None:
    before = children()

    def kill() -> None:
        while len(started := children() - before) < 2:
            time.sleep(0.01)
        os.kill(max(started), signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        with pytest.raises(ResourceError, match=r"rank \d of 2 was killed by signal 9"):
            run_ranks(folder, TOKENS, 2)
        killed.result()
    assert children() <= before


def test_ranks_that_take_too_long_are_ended(folder: Path) -> None:
    before = children()
    with pytest.raises(ResourceError, match=r"ranks 0, 1 of 2 did not end within 0 s"):
        run_ranks(folder, TOKENS, 2, seconds=0.2)
    assert children() <= before
