"""Run the ranks of a split checkpoint as processes that communicate by gloo over the loopback interface."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llmc.arrays import Array
from llmc.errors import ResourceError

_POLL_SECONDS = 0.05
_END_SECONDS = 5.0
#: Longest time that the ranks may take to load and to compute.
SECONDS = 1800.0


@dataclass(frozen=True)
class RankRun:
    """What a run of all ranks gave.

    Args:
        logits: float32 (batch, length, vocabulary), as rank 0 has them.
        weight_bytes: Bytes of the parameters of each rank in float32.
        growth_bytes: Growth of each process's largest memory from before it read weights to the end.
    """

    logits: Array
    weight_bytes: tuple[int, ...]
    growth_bytes: tuple[int, ...]


@dataclass(frozen=True)
class RankAgreement:
    """How the ranks compare with the whole model.

    Args:
        max_abs: Largest difference of a logit.
        weights: Largest ratio of a rank's bytes of weights to those of the whole model.
        growth: Largest ratio of the memory that a rank's weights and run took to the whole model's.
    """

    max_abs: float
    weights: float
    growth: float


def compare_ranks(folder: Path, ranks: int, tokens: Array, seconds: float = SECONDS) -> RankAgreement:
    """Compare the logits of ranks with those of the whole weights.

    Args:
        folder: A folder that is split over `ranks`.
        tokens: Token ids, int64 (batch, length).

    Raises:
        ResourceError: A rank ended early, or all of them took too long.
        CheckpointError: A file is missing or damaged.
    """
    whole = run_ranks(folder, tokens, 1, seconds)
    split = run_ranks(folder, tokens, ranks, seconds)
    return RankAgreement(
        max_abs=float(np.max(np.abs(split.logits - whole.logits))),
        weights=max(split.weight_bytes) / whole.weight_bytes[0],
        growth=max(split.growth_bytes) / max(1, whole.growth_bytes[0]),
    )


def run_ranks(folder: Path, tokens: Array, ranks: int, seconds: float = SECONDS) -> RankRun:
    """Compute logits with one process for each rank; all have ended when this returns.

    The processes find each other by a file, so that no port is chosen, and gloo uses loopback only.

    Args:
        tokens: int64 (batch, length).
        ranks: The folder's number of ranks; 1 to compute with the whole weights in one process.

    Raises:
        ResourceError: A rank ended early, or they took longer than `seconds`.
    """
    with TemporaryDirectory(prefix="llmc-ranks-") as name, ExitStack() as stack:
        scratch = Path(name)
        np.save(scratch / "tokens.npy", tokens)
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, processes)
        for rank in range(ranks):
            log = stack.enter_context((scratch / f"rank-{rank}.log").open("wb"))
            processes.append(_start(folder, rank, ranks, scratch, seconds, log.fileno()))
        _wait(processes, scratch, seconds)
        facts = [json.loads((scratch / f"rank-{rank}.json").read_bytes()) for rank in range(ranks)]
        return RankRun(
            logits=np.load(scratch / "logits.npy"),
            weight_bytes=tuple(each["weight_bytes"] for each in facts),
            growth_bytes=tuple(each["growth_bytes"] for each in facts),
        )


def _start(
    folder: Path, rank: int, ranks: int, scratch: Path, seconds: float, log: int
) -> subprocess.Popen[bytes]:
    arguments = [str(folder), str(rank), str(ranks), str(scratch), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "llmc.pipeline.steps.rank_worker", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"},
    )


def _wait(processes: list[subprocess.Popen[bytes]], scratch: Path, seconds: float) -> None:
    """Wait until every rank has ended well.

    Raises:
        ResourceError: One has not.
    """
    end = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            raise ResourceError(_describe(failed[0], len(codes), codes[failed[0]], scratch))
        if None not in codes:
            return
        if time.monotonic() > end:
            waiting = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            raise ResourceError(f"ranks {waiting} of {len(codes)} did not end within {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)


def _describe(rank: int, ranks: int, code: int | None, scratch: Path) -> str:
    log = (scratch / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace").strip()
    last = log.splitlines()[-1].strip() if log else "without a message"
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
    return f"rank {rank} of {ranks} {how}: {last}"


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the processes that still run."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
