"""Measure trace time by depth: python benchmarks/trace_time.py [--layers 4 30] [--rounds 5]

Traces the demo model's shape with so many layers, in turn in one process, without a cache, after one trace
that is not counted.
"""

import argparse
import gc
import time

import numpy as np
from machine import describe
from transformers import LlamaConfig

from llmc.config import Dtype
from llmc.trace import trace_model


def seconds(layers: int) -> float:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    gc.collect()
    start = time.perf_counter()
    trace_model(config, Dtype.FLOAT32)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 30], metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds(options.layers[0])
    rounds = [[seconds(n) for n in options.layers] for _ in range(options.rounds)]
    few, many = np.median(rounds, axis=0)
    ratios = [b / a for a, b in rounds]
    print(describe())
    print(
        f"{options.layers[0]} layers {few:.2f} s, {options.layers[1]} layers {many:.2f} s:"
        f" ratio {many / few:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )
