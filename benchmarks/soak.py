"""Many requests at once on compiled kernels: no wrong row, no leak.

    python benchmarks/soak.py [--checkpoint demo] [--target cpu-int4-compiled] [--requests 10000]

Four threads over two sessions of onnxruntime, so that each session has two requests at a time and both run
in one process. A request is a batch of 1 to 4 prompts of one random length and up to 4 decode steps; the
logits of every row must be, bit for bit, those that the prompt had alone, before. Memory is the resident set
after the first tenth of the requests and at the end.
"""

import argparse
import copy
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
from machine import describe
from sources import NAMES, checkpoint

from artifacts import build_target, open_model
from llmc.validate.footprint import resident_bytes
from llmc.validate.session import OrtModel

THREADS, SESSIONS, ROWS, STEPS = 4, 2, 4, 4
#: Lengths of prompts, most of them short as in a chat, some beyond what kernels take in one piece.
LENGTHS = (*range(1, 41), 63, 64, 65, 96, 127, 128, 129, 200)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=NAMES, default="demo")
    parser.add_argument("--target", default="cpu-int4-compiled")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--cache", type=Path, default=Path("artifacts/benchmarks"))
    options = parser.parse_args()
    source = checkpoint(options.checkpoint, options.cache)
    output = build_target(source, options.target, options.cache)
    sessions = [open_model(output) for _ in range(SESSIONS)]
    vocabulary = sessions[0].interface.vocabulary
    random_ids = np.random.default_rng(0)
    prompts = {n: random_ids.integers(5, vocabulary, (ROWS, n)) for n in LENGTHS}
    alone = {
        n: [answer(sessions[0], rows[i : i + 1], STEPS)[0] for i in range(ROWS)]
        for n, rows in prompts.items()
    }

    wrong: list[str] = []
    done = 0
    early = 0
    lock = threading.Lock()

    def serve(seed: int) -> None:
        nonlocal done, early
        own = copy.copy(sessions[seed % SESSIONS])  # the session is shared, the cache is not
        draw = random.Random(seed)
        while True:
            length, steps = draw.choice(LENGTHS), draw.randint(0, STEPS)
            rows = draw.sample(range(ROWS), draw.randint(1, ROWS))
            found = answer(own, prompts[length][rows], steps)
            wanted = [alone[length][r][: steps + 1] for r in rows]
            bad = [r for r, *both in zip(rows, found, wanted, strict=True) if not np.array_equal(*both)]
            with lock:
                if done >= options.requests:
                    return
                done += 1
                wrong.extend(f"length {length}, batch {len(rows)}, prompt {r}" for r in bad)
                if done == options.requests // 10:
                    early = resident_bytes()[1] or 0
                if done % 100 == 0:
                    print(f"\r{done:,} of {options.requests:,} ", end="", file=sys.stderr)

    start = time.perf_counter()
    workers = [threading.Thread(target=serve, args=(seed,)) for seed in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    late = resident_bytes()[1] or 0
    print(file=sys.stderr)
    print(describe())
    print(
        f"{options.checkpoint}, {options.target}: {done:,} requests in {time.perf_counter() - start:.0f} s, "
        f"{len(wrong)} wrong rows; {early / 1e6:.1f} MB after a tenth, {late / 1e6:.1f} MB at the end"
    )
    if wrong:
        sys.exit("\n".join(wrong[:20]))


def answer(model: OrtModel, rows: np.ndarray, steps: int) -> np.ndarray:
    """Last logits of a prompt and of `steps` greedy tokens after it, (batch, 1 + steps, vocabulary)."""
    logits = [model.prefill(rows, steps=steps)[:, -1].copy()]
    for _ in range(steps):
        logits.append(model.decode(logits[-1].argmax(-1)[:, None])[:, -1].copy())
    return np.stack(logits, 1)


if __name__ == "__main__":
    main()
