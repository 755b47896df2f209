"""Measure a hybrid of linear and full attention with compiled kernels, with ONNX Runtime's, and in PyTorch.

    python benchmarks/hybrid.py [--threads 2] [--steps 32] [--rounds 5] [--tokens 1024] [--layers 24]

Builds a checkpoint with random weights in the shape of a Qwen 3.5 of 0.6 B parameters: hidden size 1024,
three layers of linear attention with 16 heads of 128 x 128 to one of full attention. The two artifacts differ
only in their kernels: both have 4-bit weights of one scheme and a float32 KV cache. transformers runs the
checkpoint in float32 with its own implementation in PyTorch. The three take turns at a prompt and at decode
steps after it; ratios are of times, with the range over the rounds.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.artifacts import open_model, show_progress
from common.machine import describe
from common.options import add_cache, add_timing, make_parser
from common.timing import ratio
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from llmc.checkpoint import open_checkpoint
from llmc.config import CacheType, Quantization, WeightScheme
from llmc.pipeline import build
from llmc.plan import plan_build

VOCABULARY = 49152
#: One scheme, rounded to nearest: speed does not depend on the values.
SCHEME = WeightScheme(bits=4, block_size=32, symmetric=False, method="rtn")  # type: ignore[arg-type]
Side = Callable[[np.ndarray, int], tuple[float, float]]


def main() -> None:
    parser = make_parser(__doc__)
    add_cache(parser)
    add_timing(parser, steps=32, rounds=5)
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--no-torch", action="store_true", help="leave out transformers")
    options = parser.parse_args()
    source = make_checkpoint(options.cache / f"hybrid-{options.layers}", options.layers)
    sides: dict[str, Side] = {
        name: artifact(make(source, name, options), options.threads)
        for name in ("cpu-int4-compiled", "cpu-int4")
    }
    if not options.no_torch:
        sides["transformers"] = original(source, options.threads)
    print(describe())
    print(f"prompt of {options.tokens} tokens, then {options.steps} steps; {options.threads} threads")
    compare(sides, options)


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write the checkpoint, with the demo's tokenizer, unless it is there."""
    if folder.exists():
        return folder
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        max_position_embeddings=4096,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    open_checkpoint("demo").tokenizer().save_pretrained(folder)
    return folder


def make(source: Path, target: str, options: argparse.Namespace) -> Path:
    """Build for one kind of kernels, unless it is built."""
    output: Path = options.cache / f"{source.name}-{target}"
    plan = plan_build(str(source), target=target, profile="local", output=output, verify=False)
    stated = {"accuracy_level": 4, "rules": ({"match": "*", "scheme": SCHEME},)}
    changes: dict[str, Any] = {"quantize": Quantization.model_validate(stated)}
    if plan.target.kv_cache is not None:
        changes["kv_cache"] = CacheType.FLOAT32
    build(plan.model_copy(update={"target": plan.target.model_copy(update=changes)}), show_progress())
    return output


def artifact(folder: Path, threads: int) -> Side:
    """Return how to time an artifact: the seconds of a prompt and of each of so many steps."""
    model = open_model(folder, threads)

    def run(ids: np.ndarray, steps: int) -> tuple[float, float]:
        start = time.perf_counter()
        logits = model.prefill(ids, steps=steps)
        middle = time.perf_counter()
        for _ in range(steps):
            logits = model.decode(logits[:, -1:].argmax(-1))
        return middle - start, (time.perf_counter() - middle) / steps

    return run


def original(source: Path, threads: int) -> Side:
    """Return how to time transformers, which decodes a quarter of the steps."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    def run(ids: np.ndarray, steps: int) -> tuple[float, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            result = model(torch.from_numpy(ids), use_cache=True, logits_to_keep=1)
            middle = time.perf_counter()
            for _ in range(steps // 4):
                token = result.logits[:, -1:].argmax(-1)
                result = model(token, cache=result.cache, use_cache=True)
        return middle - start, (time.perf_counter() - middle) / (steps // 4)

    return run


def compare(sides: dict[str, Side], options: argparse.Namespace) -> None:
    """Let the sides take turns, and print their times and the ratios to the first."""
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, options.tokens))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name, run in sides.items():
            measured = run(ids, options.steps)
            if turn > 0:  # the first warms up
                times[name].append(measured)
    first = next(iter(times.values()))
    for name, rounds in times.items():
        for kind, index in (("prompt", 0), ("step", 1)):
            own = [x[index] for x in rounds]
            against = "" if rounds is first else f", {ratio(own, [x[index] for x in first])} times the first"
            print(f"{name:18} {kind:6} {np.median(own) * 1000:9.1f} ms{against}")


if __name__ == "__main__":
    main()
