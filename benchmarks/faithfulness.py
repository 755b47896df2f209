"""Measure what a target's weights cost: NLL, KL divergence and top-1 agreement over stored bits per weight.

    python benchmarks/faithfulness.py [--checkpoint rescaled|demo] [--targets cpu-int4,cpu-mixed]

8 windows of 512 tokens of the evaluation text are measured; 32 tokens of each are prefilled and the rest is
decoded one by one, all windows as one batch. Differences are to PyTorch in float32; bits count every matrix
with its scales and zero points. The build itself reports its time and peak memory, without verification.
"""

import argparse
from pathlib import Path

import numpy as np
from machine import describe
from rich.console import Console
from sources import checkpoint

from artifacts import open_model
from llmc.artifact.store.folder import Artifact, open_artifact
from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.data import eval_text
from llmc.pipeline import build
from llmc.pipeline.steps.original import tokenize
from llmc.plan import plan_build
from llmc.progress import TerminalProgress
from llmc.validate.distribution import log_softmax
from llmc.validate.reference import TorchModel

WINDOWS, WINDOW, PREFIX = 8, 512, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=("demo", "rescaled"), default="rescaled")
    parser.add_argument("--targets", default="cpu-int4,cpu-int4-gptq,cpu-mixed")
    parser.add_argument("--cache", type=Path, default=Path("artifacts/benchmarks"))
    options = parser.parse_args()
    source = open_checkpoint(str(checkpoint(options.checkpoint, options.cache)))
    windows = cut_windows(source)
    original = reference(source, windows, options.cache / f"{options.checkpoint}-logits.npy")
    print(describe())
    for name in options.targets.split(","):
        output = options.cache / f"{options.checkpoint}-{name}"
        plan = plan_build(str(source.path), target=name, profile="local", output=output, verify=False)
        result = build(plan, TerminalProgress(Console(stderr=True)))
        figures = compare(open_artifact(output), windows, original)
        memory = (result.peak_rss_bytes or 0) / 1e9
        print(f"{name:16} {figures}, built in {result.seconds:.0f} s, {memory:.2f} GB", flush=True)


def cut_windows(source: Checkpoint) -> np.ndarray:
    """Return tokens of the evaluation text, (WINDOWS, WINDOW), spread over all of it."""
    tokens, start = tokenize(source.tokenizer(), eval_text())
    stride = len(tokens) // WINDOWS
    length = WINDOW - len(start)
    return np.array([[*start, *tokens[i * stride : i * stride + length]] for i in range(WINDOWS)])


def reference(source: Checkpoint, windows: np.ndarray, file: Path) -> np.ndarray:
    """Return logits of the original, (windows, WINDOW - PREFIX, vocabulary), from position PREFIX - 1 on."""
    if not file.is_file():
        model = TorchModel(source.load_reference())
        np.save(file, np.stack([model.logits(row[:-1], keep=WINDOW - PREFIX) for row in windows]))
    logits: np.ndarray = np.load(file, mmap_mode="r")
    return logits


def compare(artifact: Artifact, windows: np.ndarray, original: np.ndarray) -> str:
    """Return the figures of one artifact."""
    weights = artifact.manifest.weights
    bits = 8 * sum(w.bytes for w in weights) / sum(int(np.prod(w.shape)) for w in weights)
    model = open_model(artifact.path)
    logits = np.empty_like(original)
    logits[:, 0] = model.prefill(windows[:, :PREFIX], steps=WINDOW - PREFIX)[:, -1]
    for step in range(1, WINDOW - PREFIX):
        logits[:, step] = model.decode(windows[:, PREFIX + step - 1 : PREFIX + step])[:, -1]
    nll, kl, top1 = compare_logits(logits, windows, original)
    return f"{bits:.2f} bits, dNLL {nll:+.4f}, KL {kl:.4f}, top-1 {top1:.3f}"


def compare_logits(
    logits: np.ndarray, windows: np.ndarray, original: np.ndarray
) -> tuple[float, float, float]:
    """Return dNLL and KL divergence in nats per token, and top-1 agreement, of logits as from `reference`."""
    rows = np.arange(len(windows))
    nll, kl, equal = [], [], []
    for step in range(WINDOW - PREFIX):
        p, q = log_softmax(np.asarray(original[:, step])), log_softmax(np.asarray(logits[:, step]))
        following = windows[:, PREFIX + step]
        nll.append(p[rows, following] - q[rows, following])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        equal.append(p.argmax(-1) == q.argmax(-1))
    return float(np.mean(nll)), float(np.mean(kl)), float(np.mean(equal))


if __name__ == "__main__":
    main()
