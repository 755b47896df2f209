"""Measure trace time by depth: python benchmarks/trace_time.py [--layers 4 30] [--rounds 5]

Traces the demo model's shape with so many layers, in turn in one process, without a cache, after one trace
that is not counted.
"""

import gc

import numpy as np
from common.machine import describe
from common.options import make_parser
from common.timing import ratio, seconds_of
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
    return seconds_of(lambda: trace_model(config, Dtype.FLOAT32))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 30], metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds(options.layers[0])
    rounds = [[seconds(n) for n in options.layers] for _ in range(options.rounds)]
    few, many = zip(*rounds, strict=True)
    sides = zip(options.layers, (few, many), strict=True)
    medians = [f"{count} layers {np.median(times):.2f} s" for count, times in sides]
    print(describe())
    print(f"{', '.join(medians)}: ratio {ratio(many, few)}")


if __name__ == "__main__":
    main()
