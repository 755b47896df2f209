"""Define the questions to the original: which logits of a sequence are requested, and what is stored of them.

A question states what it depends on, so that its answer can be stored on disk, and many questions can be
answered at a time (`llmc.validate.batch`), which for a model that is streamed from disk is one pass over its
weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from llmc.arrays import Array
from llmc.validate.distribution import Distributions, log_softmax

#: Logits that rounding may decide. Ranks alone depend on the spread: 0.4 logits lie between the 8th and the
#: 16th of 256 tokens where the deviation is 1.2.
NEAR = 0.5


@dataclass(frozen=True, eq=False)
class Question:
    """The definition of one question.

    Args:
        what: Kind of the answer, which is part of its key.
        input_ids: (sequence,) int64.
        keep: Number of last positions whose logits are requested.
        pieces: The steps over one KV cache, as for `Reference.logits`.
        reduce: Returns what is stored of logits (keep, vocabulary) float32.
        settings: Everything else that the answer depends on.
    """

    what: str
    input_ids: Array
    keep: int
    pieces: tuple[int, ...]
    reduce: Callable[[Array], bytes]
    settings: tuple[str | int, ...] = field(default=())


@dataclass(frozen=True)
class Followed:
    """The comparison of the original's choices with a text that was given to it.

    There is one entry for each new token, and a last one for the end of the text, which represents the end
    tokens.

    Args:
        best: The original's most likely next token.
        gap: Logit of that token minus the logit of the text's own token.
        rank: Number of tokens that the original prefers to the text's own by more than NEAR.
    """

    best: Array
    gap: Array
    rank: Array


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation in nats, and whether greedy decoding would generate it."""

    log_likelihood: float
    greedy: bool


def ask_logits(input_ids: Array, keep: int, pieces: Sequence[int] = ()) -> Question:
    """Ask for the logits themselves; `read_logits` reads the answer."""
    return Question("logits", input_ids, keep, tuple(pieces), lambda logits: _float32(logits).tobytes())


def read_logits(answer: bytes, keep: int) -> Array:
    """Return the logits, (keep, vocabulary) float32."""
    return np.frombuffer(answer, np.float32).reshape(keep, -1).copy()


def ask_distributions(tokens: Array, keep: int, pieces: Sequence[int] = ()) -> Question:
    """Ask for the distribution of each of the last `keep` of `tokens` (n,) before it is seen.

    `Distributions.from_bytes` reads the answer.
    """
    targets = tokens[-keep:]

    def reduce(logits: Array) -> bytes:
        return Distributions.of_logits(logits, targets).to_bytes()

    return Question("kept distributions", tokens[:-1], keep, tuple(pieces), reduce, (int(tokens[-1]),))


def ask_divergence(
    tokens: Array, keep: int, original: Callable[[], Distributions], pieces: Sequence[int] = ()
) -> Question:
    """Ask for the KL divergence from the original's at the last `keep` of `tokens`; see `read_divergence`.

    Args:
        original: Returns the original's answer to `ask_distributions` of the same tokens.
    """

    def reduce(logits: Array) -> bytes:
        return original().divergences(logits).tobytes()

    return Question("divergence", tokens[:-1], keep, tuple(pieces), reduce, (int(tokens[-1]),))


def read_divergence(answer: bytes) -> Array:
    """Return the divergences, (keep,) float64, nats."""
    return np.frombuffer(answer, np.float64).copy()


def ask_followed(prompt: Sequence[int], text: Sequence[int], stop: Sequence[int]) -> Question:
    """Ask how the greedy choices after `prompt` compare with `text`; `read_followed` reads the answer.

    Args:
        stop: End tokens, the most likely of which represents the end of the text.
    """
    return Question(
        "followed",
        np.array([*prompt, *text], np.int64),
        len(text) + 1,
        (len(prompt),),
        partial(_follow, text=text, stop=stop),
        ("stop", *stop, "near", str(NEAR)),
    )


def read_followed(answer: bytes) -> Followed:
    """Read the answer to `ask_followed`."""
    best, gap, rank = np.frombuffer(answer, np.float64).reshape(3, -1)
    return Followed(best.astype(np.int64), gap.copy(), rank.astype(np.int64))


def ask_score(prompt: Array, choice: Array) -> Question:
    """Ask for the likelihood of `choice` (n,), n >= 1, after `prompt` (m,); `read_score` reads the answer."""

    def reduce(logits: Array) -> bytes:
        log_probabilities = log_softmax(logits)[np.arange(len(choice)), choice]
        greedy = (logits.argmax(axis=1) == choice).all()
        return np.array([log_probabilities.sum(dtype=np.float64), greedy], np.float64).tobytes()

    sequence = np.concatenate([prompt, choice])
    return Question("score", sequence[:-1], len(choice), (), reduce, (int(choice[-1]),))


def read_score(answer: bytes) -> Score:
    """Read the answer to `ask_score`."""
    log_likelihood, greedy = np.frombuffer(answer, np.float64).tolist()
    return Score(log_likelihood, bool(greedy))


def _follow(logits: Array, text: Sequence[int], stop: Sequence[int]) -> bytes:
    best = logits.argmax(axis=1)
    chosen = [float(row[token]) for row, token in zip(logits, text, strict=False)]
    chosen.append(max((float(logits[-1][token]) for token in stop), default=-np.inf))
    own = np.array(chosen, np.float64)
    rank = (logits > own[:, None] + NEAR).sum(axis=1)
    return np.stack([best, logits.max(axis=1) - own, rank]).astype(np.float64).tobytes()


def _float32(logits: Array) -> Array:
    return np.ascontiguousarray(logits, np.float32)
