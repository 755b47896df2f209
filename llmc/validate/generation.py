"""Text that onnxruntime-genai generates from an artifact, against the original."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.validate.measure import measure, measured
from llmc.validate.reference import Reference
from llmc.validate.served import Served

METRICS = (Metric.GENERATE_EQUAL, Metric.GENERATE_GAP, Metric.GENERATE_SEEDED)

#: New tokens for each prompt.
NEW_TOKENS = 32
#: Prompts that are sampled, and how: two runs of one seed, each token out of the `TOP_K` likeliest.
SAMPLED_PROMPTS = 4
TOP_K = 8
SEED = 7


@dataclass(frozen=True)
class OriginalText:
    """A prompt, its tokens, and the original's greedy continuation."""

    prompt: str
    ids: list[int]
    continuation: list[int]


def original_texts(
    original: Reference, tokenizer: Any, prompts: Sequence[str], stop: Sequence[int]
) -> tuple[OriginalText, ...]:
    """What the original makes of each prompt with its own tokenizer and end tokens `stop`."""
    made = []
    for prompt in prompts:
        ids = [int(t) for t in tokenizer(prompt)["input_ids"]]
        continuation = original.generate(np.array(ids, np.int64), NEW_TOKENS, stop).tolist()
        made.append(OriginalText(prompt, ids, continuation))
    return tuple(made)


def measure_generation(
    served: Served, texts: Sequence[OriginalText], own_weights: Reference, stop: Sequence[int]
) -> tuple[Measurement, ...]:
    """Greedy and sampled text, token by token.

    Each side encodes the prompt with its own tokenizer; a prompt that they encode differently counts
    as unequal. Penalties and sampling of the generation config are off on both sides.

    GENERATE_EQUAL is the share of prompts whose greedy text is that of PyTorch. GENERATE_GAP judges
    greedy text that quantization may have led elsewhere: the original with the artifact's weights is
    fed the generated text, and the gap is the most by which it prefers another next token, in logits.
    GENERATE_SEEDED is the share of prompts whose text, sampled with a fixed seed, is the same in two
    runs and keeps to the 2 * TOP_K likeliest tokens of the original with the artifact's weights.

    Args:
        texts: What the original makes of each prompt; at least one.
        own_weights: The original with the artifact's weights.
        stop: The original's end tokens.

    Returns:
        One measurement for each of METRICS.
    """

    def take() -> tuple[Measurement, ...]:
        unequal, strayed, gaps = [], [], {}
        for number, text in enumerate(texts):
            theirs = served.encode(text.prompt)
            made = served.generate(text.ids, NEW_TOKENS)
            if theirs != text.ids:
                unequal.append(
                    f"{text.prompt!r} is encoded as {theirs}, the original's tokens are {text.ids}"
                )
            elif (at := _first_difference(made, text.continuation)) is not None:
                unequal.append(f"{text.prompt!r} differs from new token {at + 1} on")
            gaps[f"prompt_{number + 1}"] = _gap(own_weights, text.ids, made, stop)
        for text in texts[:SAMPLED_PROMPTS]:
            if reason := _stray(served, own_weights, text.ids):
                strayed.append(f"{text.prompt!r} {reason}")
        sampled = len(texts[:SAMPLED_PROMPTS])
        told = f"{len(texts)} prompts, {NEW_TOKENS} new tokens each"
        return (
            _share(METRICS[0], unequal, len(texts), told, served.where),
            measured(METRICS[1], max(gaps.values()), told, served.where, gaps),
            _share(
                METRICS[2],
                strayed,
                sampled,
                f"{sampled} prompts, {NEW_TOKENS} new tokens each, seed {SEED}, top {TOP_K}",
                served.where,
            ),
        )

    return measure(METRICS, served.where, take)


def _share(metric: Metric, found: Sequence[str], count: int, detail: str, where: str) -> Measurement:
    told = f"{detail}; {found[0]}" if found else detail
    return measured(metric, 1 - len(found) / count, told, where)


def _first_difference(made: Sequence[int], expected: Sequence[int]) -> int | None:
    if list(made) == list(expected):
        return None
    pairs = zip(made, expected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(made), len(expected)))


def _gap(own_weights: Reference, ids: list[int], made: list[int], stop: Sequence[int]) -> float:
    """The most by which another next token is preferred to the one that was generated."""
    sequence = np.array([*ids, *made], np.int64)
    logits = own_weights.logits(sequence, keep=len(made) + 1)
    chosen = [float(row[token]) for row, token in zip(logits, made, strict=False)]
    if len(made) < NEW_TOKENS:  # it ended there: one of the end tokens was the choice
        chosen.append(max((float(logits[-1][token]) for token in stop), default=-np.inf))
    return max(float(row.max()) - value for row, value in zip(logits, chosen, strict=False))


def _stray(served: Served, own_weights: Reference, ids: list[int]) -> str | None:
    """What is wrong with text sampled from a prompt; None if nothing is."""
    first, second = (
        served.generate(ids, NEW_TOKENS, do_sample=True, top_k=TOP_K, temperature=1.0, random_seed=SEED)
        for _ in range(2)
    )
    if (at := _first_difference(first, second)) is not None:
        return f"differs between two runs of one seed from new token {at + 1} on"
    if not first:
        return None
    logits = own_weights.logits(np.array([*ids, *first], np.int64), keep=len(first) + 1)
    for step, token in enumerate(first):
        rank = int((logits[step] > logits[step][token]).sum())
        if rank >= 2 * TOP_K:
            return f"draws at new token {step + 1} what is the original's choice number {rank + 1}"
    return None
