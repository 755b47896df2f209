"""Compare the text that onnxruntime-genai generates from an artifact with the original's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.artifact.store.codec import TextCodec
from llmc.artifact.verdict import Measurement
from llmc.config import Family, Metric
from llmc.validate.measure import measure, measured
from llmc.validate.questions import NEAR, Followed, Question, ask_followed, read_followed
from llmc.validate.reference import Advance, Reference, quietly
from llmc.validate.served import Served

#: Number of new tokens for each prompt.
NEW_TOKENS = 32
#: Number of prompts that are sampled; two runs of one seed draw each token from the `TOP_K` likeliest.
SAMPLED_PROMPTS = 4
TOP_K = 8
SEED = 7


def new_tokens(context: int | None) -> int:
    """Return the new tokens for each prompt: NEW_TOKENS, or half of the context where that is less."""
    return NEW_TOKENS if context is None else max(1, min(NEW_TOKENS, context // 2))


def fitting_prompts(prompts: Sequence[str], tokenizer: Any, context: int | None) -> tuple[str, ...]:
    """Return the prompts, shortened where their tokens and the new ones exceed `context`."""
    fitting = []
    for prompt in prompts:
        while context is not None and len(prompt) > 1:
            if len(tokenizer(prompt, verbose=False)["input_ids"]) + new_tokens(context) <= context:
                break
            prompt = prompt[: len(prompt) // 2]
        fitting.append(prompt)
    return tuple(fitting)


@dataclass(frozen=True)
class ServedText:
    """The text that the artifact generates for a prompt.

    Args:
        prompt: The prompt.
        ids: Its tokens by the original's tokenizer.
        encoded: Its tokens by the artifact's tokenizer.
        continuation: Greedy text after `ids`.
        sampled: Two samples with one seed; empty for prompts that are not sampled.
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
    """Generate greedy and sampled text, with penalties and sampling of the generation config off.

    Args:
        codec: The artifact's tokenizer, as `llmc run` uses it.
        tokenizer: The original's tokenizer.
        count: Maximum number of new tokens.
        advance: Called with the number of prompts done and their total.

    Raises:
        ParityError: The runtime fails.
    """
    texts: list[ServedText] = []
    for number, prompt in enumerate(prompts):
        ids = [int(t) for t in tokenizer(prompt)["input_ids"]]
        options = {"do_sample": True, "top_k": TOP_K, "temperature": 1.0, "random_seed": SEED}
        runs = 2 if number < SAMPLED_PROMPTS else 0
        texts.append(
            ServedText(
                prompt=prompt,
                ids=ids,
                encoded=codec.encode(prompt),
                continuation=served.generate(ids, count),
                sampled=tuple(served.generate(ids, count, **options) for _ in range(runs)),
            )
        )
        advance(len(texts), len(prompts))
    return tuple(texts)


def original_questions(served: Sequence[ServedText], stop: Sequence[int]) -> list[Question]:
    """Return what `measure_generation` asks the original."""
    return [ask_followed(text.ids, text.continuation, stop) for text in served]


def own_questions(served: Sequence[ServedText], stop: Sequence[int]) -> list[Question]:
    """Return what `measure_generation` asks the original with the artifact's weights."""
    sampled = [ask_followed(text.ids, text.sampled[0], stop) for text in served if text.sampled]
    return [*original_questions(served, stop), *sampled]


def measure_generation(
    served: Sequence[ServedText],
    original: Reference,
    own_weights: Reference,
    stop: Sequence[int],
    where: str,
    count: int = NEW_TOKENS,
) -> tuple[Measurement, ...]:
    """Compare greedy and sampled text token by token.

    Both references are given the artifact's own text; one pass shows whether they would have generated the
    same, and where they first diverge. Each side encodes the prompt with its own tokenizer; a prompt that
    they encode differently counts as unequal.

    GENERATE_EQUAL is the share of prompts with greedy text of which every token is the original's most likely
    one after the text before it. That is PyTorch's own greedy text where its steps over a cache agree with
    its pass over the whole text (`llmc.validate.itself`); where they do not, its pass decides.
    GENERATE_GAP judges greedy text that diverges because of quantization, by the largest margin, in logits,
    by which the original with the artifact's weights prefers another next token. GENERATE_SEEDED is the share
    of prompts whose text, sampled with a fixed seed, is the same in two runs, and to none of whose tokens the
    original with the artifact's weights prefers 2 * TOP_K others by more than NEAR logits.

    Args:
        served: The artifact's text for each prompt; at least one.
        original: The unmodified original.
        own_weights: The original with the artifact's weights.
        stop: The original's end tokens.
        where: Runtime of the artifact.
        count: Maximum number of new tokens, as for `served_texts`.

    Returns:
        One measurement for each metric of generation.
    """

    def take() -> tuple[Measurement, ...]:
        unequal, strayed, gaps = [], [], {}
        for number, text in enumerate(served):
            question = ask_followed(text.ids, text.continuation, stop)
            if text.encoded != text.ids:
                unequal.append(
                    f"{text.prompt!r} is encoded as {text.encoded}, the original's tokens are {text.ids}"
                )
            elif (
                at := _parting(read_followed(original.ask(question)), text.continuation, count)
            ) is not None:
                unequal.append(f"{text.prompt!r} differs from new token {at + 1} on")
            gap = read_followed(own_weights.ask(question)).gap
            ended = len(text.continuation) < count  # an end token was chosen
            gaps[f"prompt_{number + 1}"] = float(gap[: len(text.continuation) + ended].max(initial=0.0))
            if text.sampled and (reason := _stray(text, own_weights, stop)):
                strayed.append(f"{text.prompt!r} {reason}")
        sampled = sum(bool(text.sampled) for text in served)
        scope = f"{len(served)} prompts, {count} new tokens each"
        return (
            _share(Metric.GENERATE_EQUAL, unequal, len(served), scope, where),
            measured(Metric.GENERATE_GAP, max(gaps.values()), scope, where, gaps),
            _share(
                Metric.GENERATE_SEEDED,
                strayed,
                sampled,
                f"{sampled} prompts, {count} new tokens each, seed {SEED}, top {TOP_K}",
                where,
            ),
        )

    return measure(Family.GENERATION.metrics, where, take)


def _share(metric: Metric, faults: Sequence[str], count: int, detail: str, where: str) -> Measurement:
    description = f"{detail}; {faults[0]}" if faults else detail
    return measured(metric, 1 - len(faults) / count, description, where)


def _first_difference(actual: Sequence[int], expected: Sequence[int]) -> int | None:
    if list(actual) == list(expected):
        return None
    pairs = zip(actual, expected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(actual), len(expected)))


def _parting(original: Followed, tokens: Sequence[int], count: int) -> int | None:
    """Return the first new token for which the original prefers another one, or the end; None if none."""
    others = np.flatnonzero(original.best[:-1] != np.array(tokens, np.int64))
    if len(others):
        return int(others[0])
    return len(tokens) if len(tokens) < count and original.gap[-1] > 0 else None


def _stray(text: ServedText, own_weights: Reference, stop: Sequence[int]) -> str | None:
    """Describe what is wrong with two samples after a prompt; None if nothing is."""
    first, second = text.sampled
    if (at := _first_difference(first, second)) is not None:
        return f"differs between two runs of one seed from new token {at + 1} on"
    ranks = read_followed(own_weights.ask(ask_followed(text.ids, first, stop))).rank[: len(first)]
    far = np.flatnonzero(ranks >= 2 * TOP_K)
    if len(far):
        others = f"the original prefers {ranks[far[0]]} tokens to it by more than {NEAR:g}"
        return f"draws at new token {far[0] + 1} a token that is unlikely: {others}"
    return None
