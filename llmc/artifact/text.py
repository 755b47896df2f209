"""Turn text into tokens and back for an artifact, exactly as transformers does for the original.

The library `tokenizers`, which transformers calls, reads tokenizer.json, so that every path through llmc
(`llmc run`, engines, the parity gate) gives the same tokens and the same text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from llmc.errors import ConfigError
from llmc.limits import exceeded_limit
from llmc.records import Strict

TOKENIZER = "tokenizer.json"

Messages = Sequence[Mapping[str, str]]

#: The replacements of `clean_up_tokenization` of transformers' tokenizers, in this order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
#: The character that a decoder writes for bytes that are not (yet) UTF-8.
_UNFINISHED = "\ufffd"
#: The pattern of a token of one byte, in vocabularies of SentencePiece.
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class TextKind(StrEnum):
    """The kinds of rare texts that a runtime may treat differently, by the words for the user."""

    LEADING_SPACE = "texts that begin with a space"
    SPECIAL_TOKENS = "texts with special tokens in them"
    NOT_COMPOSED = "texts whose characters are not composed (Unicode NFC)"


def text_kinds(text: str, special_tokens: Sequence[str]) -> set[TextKind]:
    """Return the kinds of a text; most texts have none.

    Args:
        special_tokens: The tokenizer's special tokens, as they are written.
    """
    found = {
        TextKind.LEADING_SPACE: text[:1].isspace(),
        TextKind.SPECIAL_TOKENS: any(token in text for token in special_tokens),
        TextKind.NOT_COMPOSED: not unicodedata.is_normalized("NFC", text),
    }
    return {kind for kind, holds in found.items() if holds}


class TextRecord(Strict):
    """The facts about an artifact's text that its tokenizer files do not state.

    Args:
        chat: Whether there is a chat template for a plain conversation.
        cleans_up: Whether decoding removes spaces before punctuation, as old tokenizers do.
        before: Token ids that the tokenizer puts before a text without a chat template.
        after: Token ids that it puts after such a text.
        served: Whether onnxruntime-genai's own tokenizer gives the same tokens and text. If it does not,
            the artifact is verified by token ids.
        reason: Why it does not; None if it does.
        adds_special_tokens: Whether onnxruntime-genai adds `before` and `after` if it is asked to.
        exceptions: Kinds of texts that onnxruntime-genai's tokenizer encodes as other tokens.
        chat_template: The user's template, which replaces the checkpoint's; None for none.
    """

    chat: bool = False
    cleans_up: bool = False
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    served: bool = True
    reason: str | None = None
    adds_special_tokens: bool = True
    exceptions: tuple[Annotated[TextKind, Field(strict=False)], ...] = ()
    chat_template: str | None = None

    def describe(self) -> tuple[str, ...]:
        """Return what a server with onnxruntime-genai must know, a sentence each; mostly nothing."""
        if not self.served:
            return (f"onnxruntime-genai does not serve its text: {self.reason}",)
        told = []
        if not self.adds_special_tokens and (self.before or self.after):
            told.append(
                "onnxruntime-genai's add_special_tokens does not give the tokens that the tokenizer puts "
                f"around a text, {list(self.before)} before and {list(self.after)} after: llmc run does"
            )
        if self.exceptions:
            told.append(
                "onnxruntime-genai's own tokenizer makes other tokens than transformers and llmc run of "
                + ", ".join(self.exceptions)
            )
        return tuple(told)


class TextCodec:
    """The tokenizer of an artifact.

    Args:
        folder: The artifact, with tokenizer.json.
        record: Its text record.

    Raises:
        ConfigError: tokenizer.json is missing or damaged.
    """

    def __init__(self, folder: Path, record: TextRecord) -> None:
        from tokenizers import Tokenizer

        path = folder / TOKENIZER
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ConfigError(f"{path} cannot be read: {error}", hint="build the artifact again") from error
        self._tokenizer.no_truncation()  # as transformers calls it
        self._tokenizer.no_padding()
        self._falls_back = "ByteFallback" in str(self._tokenizer.decoder)
        self.folder = folder
        self.record = record

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the tokens before and after it."""
        return list(self._tokenizer.encode(text).ids)

    def encode_rendered(self, text: str) -> list[int]:
        """Return the token ids of a rendered chat template, whose special tokens are already in the text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, prompt: str, render: Callable[[Messages], str] | None) -> list[int]:
        """Return the token ids of a user's message.

        Args:
            render: Renders messages by the chat template, up to the beginning of an answer; None to use the
                prompt unchanged.
        """
        if render is None or not self.record.chat:
            return self.encode(prompt)
        return self.encode_rendered(render([{"role": "user", "content": prompt}]))

    def render(self, messages: Messages, *, ask: bool = True) -> str:
        """Render the chat template with transformers, with the beginning of an answer if `ask`.

        Raises:
            ConfigError: transformers cannot read the tokenizer, or the template refuses the messages.
        """
        from jinja2 import TemplateError
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
            render = partial(
                tokenizer.apply_chat_template, list(messages), tokenize=False, add_generation_prompt=ask
            )
            exceeded = exceeded_limit(render)
            if exceeded is not None:
                raise ValueError(f"it {exceeded}")
            text: str = render()
        except (OSError, ValueError, TemplateError) as error:
            raise ConfigError(f"the chat template of {self.folder} cannot be rendered: {error}") from error
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        if self.record.cleans_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text

    def is_open(self, token: int) -> bool:
        """Return whether the text of `token` depends on the next: a byte of a sequence that may be UTF-8.

        Special tokens, which are left out of the text, do not end such a sequence.
        """
        if not self._falls_back:
            return False
        name = self._tokenizer.id_to_token(token) or ""
        return _BYTE.fullmatch(name) is not None or not self.decode([token])

    def stream(self) -> TextStream:
        """Begin a text that arrives token by token."""
        return TextStream(self)


class TextStream:
    """The text that grows by a token at a time; its pieces together equal `decode` of all tokens."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._given = ""
        self._start = self._end = 0  # tokens that are decoded again for their context, and those handed on

    def step(self, token: int) -> str:
        """Return the text that `token` completes; empty in the middle of a character."""
        self._ids.append(token)
        if self._codec.is_open(token):
            return ""
        before = self._codec.decode(self._ids[self._start : self._end])
        now = self._codec.decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_UNFINISHED) or not now.startswith(before):
            return ""
        self._start, self._end = self._end, len(self._ids)
        piece = now[len(before) :]
        self._given += piece
        return piece

    def finish(self) -> str:
        """Return the rest at the end, such as half a character."""
        whole = self._codec.decode(self._ids)
        piece = whole[len(self._given) :] if whole.startswith(self._given) else ""
        self._given += piece
        return piece
