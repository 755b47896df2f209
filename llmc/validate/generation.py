"""Text that onnxruntime-genai generates from an artifact, against the original."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.artifact.text import TextCodec
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


def new_tokens(context: int | None) -> int:
    """New tokens for each prompt: NEW_TOKENS, or half of the context where that is less."""
    return NEW_TOKENS if context is None else max(1, min(NEW_TOKENS, context // 2))


def original_texts(
    original: Reference, tokenizer: Any, prompts: Sequence[str], stop: Sequence[int], count: int = NEW_TOKENS
) -> tuple[OriginalText, ...]:
    """What the original makes of each prompt with its own tokenizer and end tokens `stop`.

    Args:
        count: New tokens at most.
    """
    made = []
    for prompt in prompts:
        ids = [int(t) for t in tokenizer(prompt)["input_ids"]]
        continuation = original.generate(np.array(ids, np.int64), count, stop).tolist()
        made.append(OriginalText(prompt, ids, continuation))
    return tuple(made)


def fitting_prompts(prompts: Sequence[str], tokenizer: Any, context: int | None) -> tuple[str, ...]:
    """The prompts, shortened where their tokens and the new ones are more than `context`."""
    made = []
    for prompt in prompts:
        while context is not None and len(prompt) > 1:
            if len(tokenizer(prompt, verbose=False)["input_ids"]) + new_tokens(context) <= context:
                break
            prompt = prompt[: len(prompt) // 2]
        made.append(prompt)
    return tuple(made)


@dataclass(frozen=True)
class ServedText:
    """What the artifact makes of a prompt.

    Args:
        encoded: The prompt's tokens by the artifact's tokenizer.
        continuation: Greedy text after the original's tokens of the prompt.
        sampled: Two samples with one seed; none of the prompts that are not sampled.
    """

    encoded: list[int]
    continuation: list[int]
    sampled: tuple[list[int], ...]


def served_texts(
    served: Served, codec: TextCodec, tokenizer: Any, prompts: Sequence[str], count: int = NEW_TOKENS
) -> tuple[ServedText, ...]:
    """Greedy and sampled text, penalties and sampling of the generation config off.

    Args:
        codec: The artifact's tokenizer, as `llmc run` uses it.
        tokenizer: The original's.
        count: New tokens at most.

    Raises:
        ParityError: The runtime fails.
    """
    made = []
    for number, prompt in enumerate(prompts):
        ids = [int(t) for t in tokenizer(prompt)["input_ids"]]
        options = {"do_sample": True, "top_k": TOP_K, "temperature": 1.0, "random_seed": SEED}
        runs = 2 if number < SAMPLED_PROMPTS else 0
        made.append(
            ServedText(
                encoded=codec.encode(prompt),
                continuation=served.generate(ids, count),
                sampled=tuple(served.generate(ids, count, **options) for _ in range(runs)),
            )
        )
    return tuple(made)


def measure_generation(
    served: Sequence[ServedText],
    texts: Sequence[OriginalText],
    own_weights: Reference,
    stop: Sequence[int],
    where: str,
) -> tuple[Measurement, ...]:
    """Greedy and sampled text, token by token.

    Each side encodes the prompt with its own tokenizer; a prompt that they encode differently counts
    as unequal.

    GENERATE_EQUAL is the share of prompts whose greedy text is that of PyTorch. GENERATE_GAP judges
    greedy text that quantization may have led elsewhere: the original with the artifact's weights is
    fed the generated text, and the gap is the most by which it prefers another next token, in logits.
    GENERATE_SEEDED is the share of prompts whose text, sampled with a fixed seed, is the same in two
    runs and keeps to the 2 * TOP_K likeliest tokens of the original with the artifact's weights.

    Args:
        served: What the artifact makes of each prompt; at least one.
        texts: What the original makes of the same prompts.
        own_weights: The original with the artifact's weights.
        stop: The original's end tokens.
        where: Runtime of the artifact.

    Returns:
        One measurement for each of METRICS.
    """

    def take() -> tuple[Measurement, ...]:
        unequal, strayed, gaps = [], [], {}
        for number, (made, text) in enumerate(zip(served, texts, strict=True)):
            if made.encoded != text.ids:
                unequal.append(
                    f"{text.prompt!r} is encoded as {made.encoded}, the original's tokens are {text.ids}"
                )
            elif (at := _first_difference(made.continuation, text.continuation)) is not None:
                unequal.append(f"{text.prompt!r} differs from new token {at + 1} on")
            gaps[f"prompt_{number + 1}"] = _gap(own_weights, text.ids, made.continuation, stop)
            if made.sampled and (reason := _stray(made.sampled, own_weights, text.ids)):
                strayed.append(f"{text.prompt!r} {reason}")
        sampled = sum(bool(made.sampled) for made in served)
        told = f"{len(texts)} prompts, {NEW_TOKENS} new tokens each"
        return (
            _share(METRICS[0], unequal, len(texts), told, where),
            measured(METRICS[1], max(gaps.values()), told, where, gaps),
            _share(
                METRICS[2],
                strayed,
                sampled,
                f"{sampled} prompts, {NEW_TOKENS} new tokens each, seed {SEED}, top {TOP_K}",
                where,
            ),
        )

    return measure(METRICS, where, take)


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
    logits = own_weights.logits(sequence, keep=len(made) + 1, pieces=(len(ids),))
    chosen = [float(row[token]) for row, token in zip(logits, made, strict=False)]
    if len(made) < NEW_TOKENS:  # it ended there: one of the end tokens was the choice
        chosen.append(max((float(logits[-1][token]) for token in stop), default=-np.inf))
    return max(float(row.max()) - value for row, value in zip(logits, chosen, strict=False))


def _stray(sampled: Sequence[list[int]], own_weights: Reference, ids: list[int]) -> str | None:
    """What is wrong with two samples after a prompt; None if nothing is."""
    first, second = sampled
    if (at := _first_difference(first, second)) is not None:
        return f"differs between two runs of one seed from new token {at + 1} on"
    if not first:
        return None
    sequence = np.array([*ids, *first], np.int64)
    logits = own_weights.logits(sequence, keep=len(first) + 1, pieces=(len(ids),))
    for step, token in enumerate(first):
        rank = int((logits[step] > logits[step][token]).sum())
        if rank >= 2 * TOP_K:
            return f"draws at new token {step + 1} what is the original's choice number {rank + 1}"
    return None
