"""What the original is asked: logits of the last positions of a sequence, and what is kept of them.

A question says what it depends on, so that its answer can be kept on disk, and questions can be answered many
at a time (`llmc.validate.batch`), which for a model that is streamed from disk is one pass over its weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from llmc.arrays import Array
from llmc.validate.distribution import Distributions, log_softmax


@dataclass(frozen=True, eq=False)
class Question:
    """One question.

    Args:
        what: Kind of the answer, which is part of its key.
        input_ids: (sequence,) int64.
        keep: The last positions, whose logits are looked at.
        pieces: As `Reference.logits` says.
        reduce: What is kept of logits (keep, vocabulary) float32.
        settings: What else the answer depends on.
    """

    what: str
    input_ids: Array
    keep: int
    pieces: tuple[int, ...]
    reduce: Callable[[Array], bytes]
    settings: tuple[str | int, ...] = field(default=())


@dataclass(frozen=True)
class Followed:
    """How the original's choices compare with a text that was given to it.

    One entry for each new token, and a last one for the end of the text, which stands for the end tokens.

    Args:
        best: Its most likely next token.
        gap: Logit of that token less the logit of the text's own.
        rank: Tokens that it holds for likelier than the text's own.
    """

    best: Array
    gap: Array
    rank: Array


@dataclass(frozen=True)
class Score:
    """What a model holds of a continuation: its log-likelihood in nats, and whether greedy text is this."""

    log_likelihood: float
    greedy: bool


def ask_logits(input_ids: Array, keep: int, pieces: Sequence[int] = ()) -> Question:
    """The logits themselves; `read_logits` reads the answer."""
    return Question("logits", input_ids, keep, tuple(pieces), lambda logits: _float32(logits).tobytes())


def read_logits(answer: bytes, keep: int) -> Array:
    """(keep, vocabulary) float32."""
    return np.frombuffer(answer, np.float32).reshape(keep, -1).copy()


def ask_distributions(tokens: Array, keep: int, pieces: Sequence[int] = ()) -> Question:
    """What is held of each of the last `keep` of `tokens` (n,) before it is seen.

    `Distributions.from_bytes` reads the answer.
    """
    targets = tokens[-keep:]

    def reduce(logits: Array) -> bytes:
        return Distributions.of_logits(logits, targets).to_bytes()

    return Question("kept distributions", tokens[:-1], keep, tuple(pieces), reduce, (int(tokens[-1]),))


def ask_divergence(
    tokens: Array, keep: int, original: Callable[[], Distributions], pieces: Sequence[int] = ()
) -> Question:
    """KL divergence at the last `keep` of `tokens` (n,) from the original's; `read_divergence` reads it.

    Args:
        original: Gives the original's answer to `ask_distributions` of the same tokens.
    """

    def reduce(logits: Array) -> bytes:
        return original().divergences(logits).tobytes()

    return Question("divergence", tokens[:-1], keep, tuple(pieces), reduce, (int(tokens[-1]),))


def read_divergence(answer: bytes) -> Array:
    """(keep,) float64, nats."""
    return np.frombuffer(answer, np.float64).copy()


def ask_followed(prompt: Sequence[int], text: Sequence[int], stop: Sequence[int]) -> Question:
    """How the greedy choices after `prompt` compare with `text`; `read_followed` reads the answer.

    Args:
        stop: End tokens, of which the likeliest stands for the end of the text.
    """
    return Question(
        "followed",
        np.array([*prompt, *text], np.int64),
        len(text) + 1,
        (len(prompt),),
        partial(_follow, text=text, stop=stop),
        ("stop", *stop),
    )


def read_followed(answer: bytes) -> Followed:
    """What `ask_followed` asked for."""
    best, gap, rank = np.frombuffer(answer, np.float64).reshape(3, -1)
    return Followed(best.astype(np.int64), gap.copy(), rank.astype(np.int64))


def ask_score(prompt: Array, choice: Array) -> Question:
    """What is held of `choice` (n,), n at least 1, after `prompt` (m,); `read_score` reads the answer."""

    def reduce(logits: Array) -> bytes:
        held = log_softmax(logits)[np.arange(len(choice)), choice]
        greedy = (logits.argmax(axis=1) == choice).all()
        return np.array([held.sum(dtype=np.float64), greedy], np.float64).tobytes()

    sequence = np.concatenate([prompt, choice])
    return Question("score", sequence[:-1], len(choice), (), reduce, (int(choice[-1]),))


def read_score(answer: bytes) -> Score:
    """What `ask_score` asked for."""
    log_likelihood, greedy = np.frombuffer(answer, np.float64).tolist()
    return Score(log_likelihood, bool(greedy))


def _follow(logits: Array, text: Sequence[int], stop: Sequence[int]) -> bytes:
    best = logits.argmax(axis=1)
    chosen = [float(row[token]) for row, token in zip(logits, text, strict=False)]
    chosen.append(max((float(logits[-1][token]) for token in stop), default=-np.inf))
    own = np.array(chosen, np.float64)
    rank = (logits > own[:, None]).sum(axis=1)
    return np.stack([best, logits.max(axis=1) - own, rank]).astype(np.float64).tobytes()


def _float32(logits: Array) -> Array:
    return np.ascontiguousarray(logits, np.float32)
