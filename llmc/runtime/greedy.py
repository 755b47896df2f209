"""Generate tokens and text greedily with any session."""

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llmc.artifact.store.codec import TextCodec
from llmc.errors import ConfigError
from llmc.graph.interface import Interface
from llmc.runtime.session import Rewindable


def generate_greedy(
    session: Rewindable, prompts: Sequence[Sequence[int]], max_new: int, stop: Sequence[int]
) -> Iterator[tuple[int | None, ...]]:
    """Continue a batch of prompts, each with its most likely next token.

    Args:
        prompts: Token ids of each row, equally many where the interface allows no padding.
        max_new: Largest number of new tokens per row; fewer if the context ends first.
        stop: Tokens that end a row.

    Yields:
        The next token of each row, None for a row that has ended; generation stops once all rows have ended.

    Raises:
        ConfigError: No token is requested, or a prompt is empty or leaves no room in the context.
        ParityError: The model fails.
    """
    if max_new < 1:
        raise ConfigError(f"{max_new} new tokens are requested", hint="request 1 or more")
    lengths = [len(prompt) for prompt in prompts]
    if not min(lengths, default=0):
        raise ConfigError("the prompt has no tokens", hint="give a prompt that is not empty")
    longest = max(lengths)
    steps = min(max_new, _room(session.interface, longest))
    # A fixed cache is filled from slot 0 on. In a growing one a window may count slots, also those of padding
    # between tokens.
    left = not session.interface.static_cache and session.interface.padding != "right"
    starts = [longest - length if left else 0 for length in lengths]
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, (start, prompt) in enumerate(zip(starts, prompts, strict=True)):
        ids[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    logits = session.prefill(ids, mask, steps=steps - 1)
    every = session.interface.logits == "all"
    ends = np.array(starts) + np.array(lengths)
    last = logits[np.arange(len(prompts)), ends - 1] if every else logits[:, -1]
    tokens = last.argmax(axis=1)
    ended = np.isin(tokens, list(stop))
    for more in reversed(range(steps)):
        if ended.all():
            return
        yield tuple(None if over else int(token) for token, over in zip(tokens, ended, strict=True))
        if more:
            tokens = session.next_tokens(tokens)
            ended |= np.isin(tokens, list(stop))


def _room(interface: Interface, longest: int) -> int:
    """Return the largest number of tokens that can follow a prompt of `longest` tokens.

    Raises:
        ConfigError: None can.
    """
    if interface.max_length is None:
        return sys.maxsize
    if longest < interface.max_length:
        return interface.max_length - longest
    if interface.static_cache:
        raise ConfigError(
            f"the prompt has {longest} tokens, but the KV cache has only {interface.max_length} slots",
            hint="shorten the prompt, or build with a larger kv_capacity",
        )
    raise ConfigError(
        f"the prompt has {longest} tokens, but the model's context ends at {interface.max_length}",
        hint="shorten the prompt",
    )


def stream_text(
    session: Rewindable,
    codec: TextCodec,
    prompt: str,
    max_tokens: int,
    stop: Sequence[int],
    emit: Callable[[str], None],
) -> int:
    """Answer `prompt` greedily, and emit each piece of text as soon as it is available.

    Args:
        codec: The artifact's tokenizer; its chat template, if there is one, is applied to the prompt.
        max_tokens: Largest number of new tokens; fewer if the context ends first.
        stop: Tokens that end the answer.
        emit: Receives each piece of the answer, in order.

    Returns:
        The number of new tokens.

    Raises:
        ConfigError: As for `generate_greedy`.
        ParityError: The model fails.
    """
    stream = codec.stream()
    count = 0
    for (token,) in generate_greedy(session, [codec.encode_prompt(prompt, codec.render)], max_tokens, stop):
        if token is None:
            continue
        count += 1
        if text := stream.step(token):
            emit(text)
    if text := stream.finish():
        emit(text)
    return count
