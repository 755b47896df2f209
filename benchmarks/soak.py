"""Send many requests at once to compiled kernels, and check for wrong rows and leaks.

    python benchmarks/soak.py [--checkpoint demo|tiny] [--target cpu-int4-compiled] [--requests 10000]

Four threads share two sessions of onnxruntime, so that each session has two requests at a time and both run
in one process. A request is a batch of 1 to 4 prompts of one random length and up to 4 decode steps; the
logits of every row must equal, bit for bit, those that the prompt had alone before.

Requests run in 40 rounds. Between two of them no request is running, and memory is read: the resident set,
and the bytes that the C library has allocated and not freed. The first half is for memory that grows to the
size of the largest request and stays there. In the second half neither may grow by more than --growth: a leak
makes both grow, and scattered free memory only the resident set. `tiny` is a random llama of three layers and
256 tokens, for many requests per second. A leak of one request is a larger part of so small a process. It
needs --requests
200000: four requests seldom run together there, and each kept workspace grows until it has served the
largest.

The exit code is 1 after a wrong row or a growth beyond the bound.
"""

import copy
import ctypes
import hashlib
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from common.artifacts import build_apart, open_model
from common.machine import describe
from common.options import add_checkpoint, make_parser
from common.sources import checkpoint

from llmc.runtime.ort_model import OrtModel
from llmc.validate.footprint import resident_bytes

THREADS, SESSIONS, ROWS, STEPS, ROUNDS = 4, 2, 4, 4, 40
#: Prompt lengths, most of them short as in a chat, some longer than one piece of the kernels.
LENGTHS = (*range(1, 41), 63, 64, 65, 96, 127, 128, 129, 200)


class Mallinfo(ctypes.Structure):
    """The `struct mallinfo2` of the GNU C library."""

    _names = (
        *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
        *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser)
    parser.add_argument("--target", default="cpu-int4-compiled")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--growth", type=float, default=2.0, help="per cent, in the second half")
    options = parser.parse_args()
    source = checkpoint(options.checkpoint, options.cache)
    output = build_apart(str(source), options.target, options.cache / f"{source.name}-{options.target}")
    sessions = [open_model(output) for _ in range(SESSIONS)]
    vocabulary = sessions[0].interface.vocabulary
    random_ids = np.random.default_rng(0)
    prompts = {n: random_ids.integers(5, vocabulary, (ROWS, n)) for n in LENGTHS}
    alone = {
        n: [answer(sessions[0], rows[i : i + 1], STEPS)[0] for i in range(ROWS)]
        for n, rows in prompts.items()
    }

    def serve(request: int) -> list[str]:
        """Return what is wrong with one request."""
        draw = random.Random(request)
        model = copy.copy(sessions[request % SESSIONS])  # shares the session, but not the cache
        length, steps = draw.choice(LENGTHS), draw.randint(0, STEPS)
        rows = draw.sample(range(ROWS), draw.randint(1, ROWS))
        digests = answer(model, prompts[length][rows], steps)
        bad = [r for r, own in zip(rows, digests, strict=True) if own != alone[length][r][: steps + 1]]
        return [f"length {length}, batch {len(rows)}, prompt {r}" for r in bad]

    each = -(-options.requests // ROUNDS)
    wrong: list[str] = []
    resident, allocated = [], []
    start = time.perf_counter()
    print(describe())
    print("requests  resident MB   allocated MB", flush=True)
    with ThreadPoolExecutor(THREADS) as pool:
        for done in range(0, options.requests, each):
            some = range(done, min(done + each, options.requests))
            wrong += [line for lines in pool.map(serve, some) for line in lines]
            resident.append(resident_bytes()[1] or 0)
            allocated.append(handed_out())
            print(f"{some.stop:8,}  {resident[-1] / 1e6:11.1f}  {allocated[-1] / 1e6:13.2f}", flush=True)
    growths = [growth(resident), growth(allocated)]
    print(
        f"{options.checkpoint}, {options.target}: {options.requests:,} requests in"
        f" {time.perf_counter() - start:.0f} s, {len(wrong)} wrong rows; in the second half the resident set"
        f" grew by {growths[0]:.2f} %, allocated memory by {growths[1]:.2f} %"
    )
    if wrong:
        sys.exit("\n".join(wrong[:20]))
    if max(growths) > options.growth:
        sys.exit(f"memory grew by more than {options.growth} %")


def answer(model: OrtModel, rows: np.ndarray, steps: int) -> list[list[bytes]]:
    """Return digests of the last logits of each prompt, and of `steps` greedy tokens after it."""
    logits = model.prefill(rows, steps=steps)[:, -1]
    digests = [[digest(row)] for row in logits]
    for _ in range(steps):
        logits = model.decode(logits.argmax(-1)[:, None])[:, -1]
        for own, row in zip(digests, logits, strict=True):
            own.append(digest(row))
    return digests


def digest(logits: np.ndarray) -> bytes:
    return hashlib.sha256(logits.tobytes()).digest()


def handed_out() -> int:
    """Return the bytes that the C library has allocated, including mapped ones."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo
    usage = ask()
    return int(usage.uordblks + usage.hblkhd)


def growth(marks: list[int]) -> float:
    """Return the per cent by which the last quarter's median exceeds the median of the quarter before."""
    quarter = len(marks) // 4
    third, last = (float(np.median(part)) for part in (marks[-2 * quarter : -quarter], marks[-quarter:]))
    return 100 * (last / third - 1)


if __name__ == "__main__":
    main()
