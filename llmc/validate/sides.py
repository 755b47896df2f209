"""Define the ways from text to tokens and back: the original's, and those that an artifact offers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmc.artifact.store.codec import Messages, TextCodec
from llmc.artifact.text import TextKind
from llmc.errors import ParityError
from llmc.validate.served import ServedTokenizer


@dataclass(frozen=True)
class Side:
    """The functions of one way from text to tokens and back.

    name: The reader of the tokenizer's files.
    encode: Token ids of a text, with the special tokens before and after it.
        encode: Token ids of a text, with what stands before and after it.
        decode: The text of token ids, without special tokens.
        render: The chat template's text for messages, with the beginning of an answer if the second argument
            says so; None where the template refuses them.
        encode_rendered: Token ids of such a text.
        exceptions: Kinds of texts that it is known to encode differently, which are left out.
        stream: The text of token ids that arrive one by one; None where nothing streams.
        same_library: Whether the library `tokenizers` reads it, as it reads the original's.
    """

    name: str
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    render: Callable[[Messages, bool], str | None] | None
    encode_rendered: Callable[[str], list[int]]
    exceptions: frozenset[TextKind] = frozenset()
    stream: Callable[[Sequence[int]], str] | None = None
    same_library: bool = True


def artifact_sides(own: Any, codec: TextCodec, served: ServedTokenizer | None) -> tuple[Side, ...]:
    """Return the ways that an artifact offers: transformers, `llmc run`, and onnxruntime-genai.

    Args:
        own: transformers' tokenizer from the artifact's files.
        codec: The artifact's tokenizer, as `llmc run` and engines use it.
        served: onnxruntime-genai's tokenizer; None for an artifact whose text it does not serve.
    """
    sides = [
        original_side(own, "transformers"),
        Side(
            "llmc run",
            codec.encode,
            codec.decode,
            None,
            codec.encode_rendered,
            stream=partial(_stream, codec),
        ),
    ]
    if served is not None:
        sides.append(runtime_side(served))
    return tuple(sides)


def runtime_side(served: ServedTokenizer) -> Side:
    """Return onnxruntime-genai's own tokenizer as a side."""
    return Side(
        "onnxruntime-genai",
        served.encode,
        served.decode,
        served.render_chat,
        served.encode_rendered,
        served.exceptions,
        served.stream,
        same_library=False,
    )


def original_side(tokenizer: Any, name: str = "the original") -> Side:
    """Return a tokenizer of transformers as a side."""
    return Side(
        name,
        lambda text: [int(i) for i in tokenizer(text, verbose=False)["input_ids"]],
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        partial(render_messages, tokenizer),
        lambda text: [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]],
    )


def render_messages(
    tokenizer: Any, messages: Sequence[Any], ask: bool, tools: Sequence[Any] | None = None
) -> str | None:
    """Render transformers' chat template; None if there is none, or it refuses the conversation.

    Args:
        ask: Whether to append the beginning of an answer.
        tools: Functions that the model may call, as JSON schemas; None for none.
    """
    from jinja2 import TemplateError

    # Jinja passes on what the expressions of a template raise.
    refusals = (TemplateError, ValueError, TypeError, LookupError, AttributeError)
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=ask,
        )
    except refusals:
        return None
    return text


def load_own(folder: Path) -> Any:
    """Load the tokenizer of an artifact's files with transformers.

    Raises:
        ParityError: transformers cannot read them.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception on files that it cannot read
        raise ParityError(f"transformers cannot read the tokenizer of {folder}: {error}") from error


def _stream(codec: TextCodec, ids: Sequence[int]) -> str:
    stream = codec.stream()
    return "".join([*(stream.step(token) for token in ids), stream.finish()])
