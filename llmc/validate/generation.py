"""Text that onnxruntime-genai generates from an artifact, against the original."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.artifact.text import TextCodec
from llmc.artifact.verdict import Measurement
from llmc.config import Family, Metric
from llmc.validate.measure import measure, measured
from llmc.validate.questions import Followed, Question, ask_followed, read_followed
from llmc.validate.reference import Advance, Reference, quietly
from llmc.validate.served import Served

#: New tokens for each prompt.
NEW_TOKENS = 32
#: Prompts that are sampled, and how: two runs of one seed, each token out of the `TOP_K` likeliest.
SAMPLED_PROMPTS = 4
TOP_K = 8
SEED = 7


def new_tokens(context: int | None) -> int:
    """New tokens for each prompt: NEW_TOKENS, or half of the context where that is less."""
    return NEW_TOKENS if context is None else max(1, min(NEW_TOKENS, context // 2))


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
        prompt: The prompt.
        ids: Its tokens by the original's tokenizer.
        encoded: Its tokens by the artifact's tokenizer.
        continuation: Greedy text after `ids`.
        sampled: Two samples with one seed; none of the prompts that are not sampled.
    """

    prompt: str
    ids: list[int]
    encoded: list[int]
    continuation: list[int]
    sampled: tuple[list[int], ...]


def served_texts(
    served: Served,
    codec: TextCodec,
    tokenizer: Any,
    prompts: Sequence[str],
    count: int = NEW_TOKENS,
    advance: Advance = quietly,
) -> tuple[ServedText, ...]:
    """Greedy and sampled text, penalties and sampling of the generation config off.

    Args:
        codec: The artifact's tokenizer, as `llmc run` uses it.
        tokenizer: The original's.
        count: New tokens at most.
        advance: Told how many prompts of how many are done.

    Raises:
        ParityError: The runtime fails.
    """
    made: list[ServedText] = []
    for number, prompt in enumerate(prompts):
        ids = [int(t) for t in tokenizer(prompt)["input_ids"]]
        options = {"do_sample": True, "top_k": TOP_K, "temperature": 1.0, "random_seed": SEED}
        runs = 2 if number < SAMPLED_PROMPTS else 0
        made.append(
            ServedText(
                prompt=prompt,
                ids=ids,
                encoded=codec.encode(prompt),
                continuation=served.generate(ids, count),
                sampled=tuple(served.generate(ids, count, **options) for _ in range(runs)),
            )
        )
        advance(len(made), len(prompts))
    return tuple(made)


def original_questions(served: Sequence[ServedText], stop: Sequence[int]) -> list[Question]:
    """What `measure_generation` asks the original."""
    return [ask_followed(made.ids, made.continuation, stop) for made in served]


def own_questions(served: Sequence[ServedText], stop: Sequence[int]) -> list[Question]:
    """What `measure_generation` asks the original with the artifact's weights."""
    sampled = [ask_followed(made.ids, made.sampled[0], stop) for made in served if made.sampled]
    return [*original_questions(served, stop), *sampled]


def measure_generation(
    served: Sequence[ServedText],
    original: Reference,
    own_weights: Reference,
    stop: Sequence[int],
    where: str,
    count: int = NEW_TOKENS,
) -> tuple[Measurement, ...]:
    """Greedy and sampled text, token by token.

    Both references are given the artifact's own text, which shows in one pass whether they would have made
    the same, and where they part first. Each side encodes the prompt with its own tokenizer; a prompt that
    they encode differently counts as unequal.

    GENERATE_EQUAL is the share of prompts whose greedy text is that of PyTorch. GENERATE_GAP judges
    greedy text that quantization may have led elsewhere: the most by which the original with the artifact's
    weights prefers another next token, in logits. GENERATE_SEEDED is the share of prompts whose text,
    sampled with a fixed seed, is the same in two runs and keeps to the 2 * TOP_K likeliest tokens of the
    original with the artifact's weights.

    Args:
        served: What the artifact makes of each prompt; at least one.
        original: The original as it is.
        own_weights: The original with the artifact's weights.
        stop: The original's end tokens.
        where: Runtime of the artifact.
        count: New tokens at most, as for `served_texts`.

    Returns:
        One measurement for each metric of generation.
    """

    def take() -> tuple[Measurement, ...]:
        unequal, strayed, gaps = [], [], {}
        for number, made in enumerate(served):
            question = ask_followed(made.ids, made.continuation, stop)
            if made.encoded != made.ids:
                unequal.append(
                    f"{made.prompt!r} is encoded as {made.encoded}, the original's tokens are {made.ids}"
                )
            elif (
                at := _parting(read_followed(original.ask(question)), made.continuation, count)
            ) is not None:
                unequal.append(f"{made.prompt!r} differs from new token {at + 1} on")
            gap = read_followed(own_weights.ask(question)).gap
            ended = len(made.continuation) < count  # one of the end tokens was the choice
            gaps[f"prompt_{number + 1}"] = float(gap[: len(made.continuation) + ended].max(initial=0.0))
            if made.sampled and (reason := _stray(made, own_weights, stop)):
                strayed.append(f"{made.prompt!r} {reason}")
        sampled = sum(bool(made.sampled) for made in served)
        told = f"{len(served)} prompts, {count} new tokens each"
        return (
            _share(Metric.GENERATE_EQUAL, unequal, len(served), told, where),
            measured(Metric.GENERATE_GAP, max(gaps.values()), told, where, gaps),
            _share(
                Metric.GENERATE_SEEDED,
                strayed,
                sampled,
                f"{sampled} prompts, {count} new tokens each, seed {SEED}, top {TOP_K}",
                where,
            ),
        )

    return measure(Family.GENERATION.metrics, where, take)


def _share(metric: Metric, found: Sequence[str], count: int, detail: str, where: str) -> Measurement:
    told = f"{detail}; {found[0]}" if found else detail
    return measured(metric, 1 - len(found) / count, told, where)


def _first_difference(made: Sequence[int], expected: Sequence[int]) -> int | None:
    if list(made) == list(expected):
        return None
    pairs = zip(made, expected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(made), len(expected)))


def _parting(original: Followed, made: Sequence[int], count: int) -> int | None:
    """The first new token that the original would have chosen otherwise, the end included; None if none."""
    others = np.flatnonzero(original.best[:-1] != np.array(made, np.int64))
    if len(others):
        return int(others[0])
    return len(made) if len(made) < count and original.gap[-1] > 0 else None


def _stray(made: ServedText, own_weights: Reference, stop: Sequence[int]) -> str | None:
    """What is wrong with two samples after a prompt; None if nothing is."""
    first, second = made.sampled
    if (at := _first_difference(first, second)) is not None:
        return f"differs between two runs of one seed from new token {at + 1} on"
    ranks = read_followed(own_weights.ask(ask_followed(made.ids, first, stop))).rank[: len(first)]
    far = np.flatnonzero(ranks >= 2 * TOP_K)
    if len(far):
        return f"draws at new token {far[0] + 1} what is the original's choice number {ranks[far[0]] + 1}"
    return None
