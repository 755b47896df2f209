"""Generate tokens and text greedily over a KV cache of fixed length."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llmc.artifact.store.codec import TextCodec
from llmc.errors import ConfigError
from llmc.runtime.static_session import StaticSession


def generate_greedy(
    session: StaticSession, prompts: Sequence[Sequence[int]], max_new: int, stop: Sequence[int]
) -> Iterator[tuple[int | None, ...]]:
    """Continue a batch of prompts, each with its most likely next token.

    Args:
        prompts: Token ids of each row.
        max_new: Largest number of new tokens per row; fewer if the KV cache fills up first.
        stop: Tokens that end a row.

    Yields:
        The next token of each row, None for a row that has ended; generation stops once all rows have ended.

    Raises:
        ConfigError: No token is requested, or a prompt is empty or leaves no room in the KV cache.
        ParityError: The model fails.
    """
    if max_new < 1:
        raise ConfigError(f"{max_new} new tokens are requested", hint="request 1 or more")
    lengths = [len(prompt) for prompt in prompts]
    if not min(lengths, default=0):
        raise ConfigError("the prompt has no tokens", hint="give a prompt that is not empty")
    longest = max(lengths)
    if longest >= session.capacity:
        raise ConfigError(
            f"the prompt has {longest} tokens, but the KV cache has only {session.capacity} slots",
            hint="shorten the prompt, or build with a larger kv_capacity",
        )
    steps = min(max_new, session.capacity - longest)
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    logits = session.prefill(ids, mask, steps=steps - 1)
    every = session.interface.logits == "all"
    last = logits[np.arange(len(prompts)), np.array(lengths) - 1] if every else logits[:, -1]
    tokens = last.argmax(axis=1)
    ended = np.isin(tokens, list(stop))
    for left in reversed(range(steps)):
        if ended.all():
            return
        yield tuple(None if over else int(token) for token, over in zip(tokens, ended, strict=True))
        if left:
            tokens = session.decode(tokens[:, None])[:, -1].argmax(axis=1)
            ended |= np.isin(tokens, list(stop))


def stream_text(
    session: StaticSession,
    codec: TextCodec,
    prompt: str,
    max_tokens: int,
    stop: Sequence[int],
    emit: Callable[[str], None],
) -> int:
    """Answer `prompt` greedily, and emit each piece of text as soon as it is available.

    Args:
        codec: The artifact's tokenizer; its chat template, if there is one, is applied to the prompt.
        max_tokens: Largest number of new tokens; fewer if the KV cache fills up first.
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
