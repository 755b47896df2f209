"""Compute the original's logits for many sequences at a time; each gets what it would get alone.

Sequences are padded at their ends and run as one batch. In a causal model no token sees what follows it, so
that no attention mask is needed and padding changes only the rounding of sums. The head computes the
requested positions of every row and no others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.graph.switches import crosses, rope_switches
from llmc.validate.attention import attention_by_rows
from llmc.validate.questions import Question
from llmc.validate.reference import TorchModel, reporting_failures

#: Approximate maximum bytes of activations and logits of one pass: for a model in memory, and for one whose
#: weights are streamed, which needs no memory for them and pays for every pass.
PASS_BYTES, STREAMED_PASS_BYTES = 512 << 20, 1536 << 20
#: Number of tokens whose arithmetic takes as long as the fixed cost of a pass: for a model in memory, and for
#: one streamed from disk, where every weight is read and widened once.
_PASS_TOKENS, _STREAMED_PASS_TOKENS = 16, 320
#: Number of arrays as wide as a feed-forward layer that are alive at a time.
_ALIVE = 3


def answer(model: TorchModel, questions: Sequence[Question]) -> Iterator[dict[int, Array]]:
    """Yield, for each pass over the weights, logits (keep, vocabulary) float32 by the number of the question.

    Raises:
        ParityError: The original itself returns NaN or infinity.
        UnsupportedError: The original fails.
    """
    switches = rope_switches(model.model.config)
    batched = []
    for number, question in enumerate(questions):
        if crosses(question.pieces, len(question.input_ids), switches):
            yield {number: model.logits(question.input_ids, keep=question.keep, pieces=question.pieces)}
        else:
            batched.append(number)
    for group in plan_passes(model, [questions[number] for number in batched], switches):
        numbers = [batched[i] for i in group]
        logits_by_number = dict(zip(numbers, _run(model, [questions[n] for n in numbers]), strict=True))
        for number, logits in logits_by_number.items():
            if not np.isfinite(logits).all():
                length = len(questions[number].input_ids)
                raise ParityError(f"the original's own logits are not finite for {length} tokens")
        yield logits_by_number


def plan_passes(
    model: TorchModel, questions: Sequence[Question], switches: Sequence[int] = ()
) -> list[list[int]]:
    """Group questions of similar length, by number, into passes that fit in memory.

    A shorter sequence joins a longer one where its padding costs less than a pass of its own. Sequences on
    different sides of a switch of rotary embeddings never share a pass.
    """
    streamed = _is_streamed(model.model)
    spare = _STREAMED_PASS_TOKENS if streamed else _PASS_TOKENS
    most = STREAMED_PASS_BYTES if streamed else PASS_BYTES
    per_token, per_logit = _bytes(model.model.config)
    passes: list[list[int]] = []
    longest, used = 0, 0
    for number in sorted(range(len(questions)), key=lambda i: -len(questions[i].input_ids)):
        length, keep = len(questions[number].input_ids), questions[number].keep
        cost = keep * per_logit
        near = longest - length <= spare and not any(length <= at < longest for at in switches)
        if not passes or not near or used + longest * per_token + cost > most:
            passes.append([])
            longest, used = length, 0
        passes[-1].append(number)
        used += longest * per_token + cost
    return passes


def _run(model: TorchModel, questions: Sequence[Question]) -> list[Array]:
    """Compute the logits of each question in one pass."""
    import torch

    longest = max(len(question.input_ids) for question in questions)
    ids = np.stack([np.pad(q.input_ids, (0, longest - len(q.input_ids)), mode="edge") for q in questions])
    spans = [(len(q.input_ids) - q.keep, len(q.input_ids)) for q in questions]
    with (
        torch.inference_mode(),
        reporting_failures(longest),
        attention_by_rows(model.model, len(questions) * longest, longest),
        _head_of(model.model, spans) as headed,
    ):
        logits = model.model(input_ids=torch.from_numpy(ids), use_cache=False).logits
    if not headed:  # the head is not the output embedding: it computed every position
        return [logits[row, start:stop].float().numpy() for row, (start, stop) in enumerate(spans)]
    counts = [stop - start for start, stop in spans]
    return [part.float().numpy() for part in logits[0].split(counts)]


@contextmanager
def _head_of(model: Any, spans: Sequence[tuple[int, int]]) -> Iterator[list[bool]]:
    """Let the head, within this context, compute only the positions in `spans` of each row, as one row.

    It yields a list that is not empty once the head has done so.
    """
    import torch

    head, seen = model.get_output_embeddings(), []

    def gather(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        (hidden, *rest) = args
        if hidden.dim() != 3 or hidden.shape[0] != len(spans):
            return None
        seen.append(True)
        rows = [hidden[row, start:stop] for row, (start, stop) in enumerate(spans)]
        return (torch.cat(rows)[None], *rest)

    handle = None if head is None else head.register_forward_pre_hook(gather)
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def _bytes(config: Any) -> tuple[int, int]:
    """Return the bytes of a token in the widest layers, and of a position's logits with their copy."""
    text = config.get_text_config(decoder=True)
    hidden = getattr(text, "hidden_size", 1024)
    stated = getattr(text, "intermediate_size", None) or 0  # a list has the width of each layer
    wide = max(*(stated if isinstance(stated, (list, tuple)) else (stated,)), 4 * hidden)
    return 4 * _ALIVE * wide, 8 * text.vocab_size


def _is_streamed(model: Any) -> bool:
    return any(parameter.device.type == "meta" for parameter in model.parameters())
