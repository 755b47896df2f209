"""Measure how much longer `llmc --help` takes than a bare Python start: python benchmarks/help_time.py"""

import subprocess
import sys

import numpy as np
from common.machine import describe
from common.options import make_parser
from common.timing import seconds_of


def seconds(*arguments: str) -> float:
    command = [sys.executable, *arguments]
    return seconds_of(lambda: subprocess.run(command, check=True, capture_output=True))


def main() -> None:
    make_parser(__doc__).parse_args()
    pairs = [(seconds("-m", "llmc", "--help"), seconds("-c", "pass")) for _ in range(15)]
    ours, bare = np.median(pairs, axis=0)
    print(describe())
    print(
        f"llmc --help {ours:.3f} s, bare {bare:.3f} s, difference {ours - bare:.3f} s (medians of 15 pairs)"
    )


if __name__ == "__main__":
    main()
