"""Measure how much longer `llmc --help` takes than a bare Python start: python benchmarks/help_time.py"""

import subprocess
import sys
import time

import numpy as np
from machine import describe


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    pairs = [(seconds("-m", "llmc", "--help"), seconds("-c", "pass")) for _ in range(15)]
    ours, bare = np.median(pairs, axis=0)
    print(describe())
    print(
        f"llmc --help {ours:.3f} s, bare {bare:.3f} s, difference {ours - bare:.3f} s (medians of 15 pairs)"
    )
