"""Cut windows of the evaluation text, and compare logits with the original's on them."""

from pathlib import Path

import numpy as np

from llmc.checkpoint import Checkpoint
from llmc.data import eval_text
from llmc.pipeline.steps.original import tokenize
from llmc.validate.distribution import log_softmax
from llmc.validate.reference import TorchModel

#: Number of windows, tokens of each, and tokens that are prefilled before the rest is decoded.
WINDOWS, WINDOW, PREFIX = 8, 512, 32


def cut_windows(source: Checkpoint, most: int = WINDOWS, length: int = WINDOW) -> np.ndarray:
    """Cut windows of the evaluation text, (windows, length), spread evenly over it."""
    tokens, start = tokenize(source.tokenizer(), eval_text())
    own = length - len(start)
    count = min(most, len(tokens) // own)
    stride = len(tokens) // count
    return np.array([[*start, *tokens[i * stride : i * stride + own]] for i in range(count)])


def window_losses(source: Checkpoint, windows: np.ndarray) -> np.ndarray:
    """Return the mean NLL of each window in nats per token, by PyTorch in float32, (windows,).

    A quantized checkpoint computes with the values that llmc's reader gives.
    """
    model = TorchModel(source.fill_reference())
    losses = []
    for row in windows:
        likely = log_softmax(model.logits(row[:-1], keep=len(row) - 1))
        losses.append(-float(likely[np.arange(len(row) - 1), row[1:]].mean()))
    return np.array(losses)


def reference(source: Checkpoint, windows: np.ndarray, file: Path, keep: int = WINDOW - PREFIX) -> np.ndarray:
    """Compute the original's logits for each window's last `keep` tokens, (windows, keep, vocabulary)."""
    if not file.is_file():
        model = TorchModel(source.load_reference())
        np.save(file, np.stack([model.logits(row[:-1], keep=keep) for row in windows]))
    logits: np.ndarray = np.load(file, mmap_mode="r")
    return logits


def compare_logits(
    logits: np.ndarray, windows: np.ndarray, original: np.ndarray
) -> tuple[float, float, float]:
    """Return dNLL and KL divergence in nats per token, and top-1 agreement; shapes as in `reference`."""
    rows = np.arange(len(windows))
    nll, kl, equal = [], [], []
    for step in range(WINDOW - PREFIX):
        p, q = log_softmax(np.asarray(original[:, step])), log_softmax(np.asarray(logits[:, step]))
        following = windows[:, PREFIX + step]
        nll.append(p[rows, following] - q[rows, following])
        kl.append(divergence(p, q))
        equal.append(p.argmax(-1) == q.argmax(-1))
    return float(np.mean(nll)), float(np.mean(kl)), float(np.mean(equal))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Compute the KL divergence of each position, nats, from log-probabilities."""
    return (np.exp(p) * (p - q)).sum(-1)
