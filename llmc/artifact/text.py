"""How an artifact turns text into tokens and back: exactly as transformers does for the original.

tokenizer.json is read by the library `tokenizers`, which is what transformers calls, so that every way
through llmc (`llmc run`, engines, the parity gate) gives the same tokens and the same text.
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

#: `clean_up_tokenization` of transformers' tokenizers: applied in this order.
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
#: What a decoder writes for bytes that are not (yet) UTF-8.
_UNFINISHED = "\ufffd"
#: Token of one byte, in vocabularies of SentencePiece.
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class TextKind(StrEnum):
    """Kinds of rare texts that a runtime may treat in its own way, by the words for the user."""

    LEADING_SPACE = "texts that begin with a space"
    SPECIAL_TOKENS = "texts with special tokens in them"
    NOT_COMPOSED = "texts whose characters are not composed (Unicode NFC)"


def text_kinds(text: str, special_tokens: Sequence[str]) -> set[TextKind]:
    """Find the kinds that a text is of; none for most texts.

    Args:
        special_tokens: The tokenizer's, as they are written.
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
        after: Token ids that it puts after one.
        served: Whether onnxruntime-genai's own tokenizer gives the same tokens and text. Where it does not,
            the artifact is verified by token ids.
        reason: Why it does not; None where it does.
        adds_special_tokens: Whether onnxruntime-genai adds `before` and `after` if it is asked to.
        exceptions: Kinds of texts of which onnxruntime-genai's tokenizer makes other tokens.
        chat_template: The template that the user gave in the place of the checkpoint's; None for none.
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
        """What a server with onnxruntime-genai must know, a sentence each; mostly nothing."""
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
        record: Its facts.

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
        """Token ids of a text, with the tokens that stand before and after it."""
        return list(self._tokenizer.encode(text).ids)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what a chat template gave: its special tokens are in the text already."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, prompt: str, render: Callable[[Messages], str] | None) -> list[int]:
        """Token ids of a user's message.

        Args:
            render: Puts messages into the chat template, up to the beginning of an answer; None to take the
                prompt as it is.
        """
        if render is None or not self.record.chat:
            return self.encode(prompt)
        return self.encode_rendered(render([{"role": "user", "content": prompt}]))

    def render(self, messages: Messages, *, ask: bool = True) -> str:
        """The chat template's text by transformers, with the beginning of an answer if `ask`.

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
        """The text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        if self.record.cleans_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text

    def is_open(self, token: int) -> bool:
        """Whether the text of `token` depends on the next: a byte of a run that may be UTF-8 as a whole.

        Special tokens, which are left out of the text, do not end such a run.
        """
        if not self._falls_back:
            return False
        name = self._tokenizer.id_to_token(token) or ""
        return _BYTE.fullmatch(name) is not None or not self.decode([token])

    def stream(self) -> TextStream:
        """Begin a text that comes token by token."""
        return TextStream(self)


class TextStream:
    """A text that grows by a token at a time; its pieces together are what `decode` gives for all tokens."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._given = ""
        self._start = self._end = 0  # tokens that are decoded again for their context, and those handed on

    def step(self, token: int) -> str:
        """The text that `token` completes; empty in the middle of a character."""
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
        """What is left at the end, such as half a character."""
        whole = self._codec.decode(self._ids)
        piece = whole[len(self._given) :] if whole.startswith(self._given) else ""
        self._given += piece
        return piece
