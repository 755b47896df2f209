"""Turn text into tokens and back for an artifact, exactly as transformers does for the original.

The library `tokenizers`, which transformers calls, reads tokenizer.json, so that every path through llmc
(`llmc run`, engines, the parity gate) gives the same tokens and the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmc.artifact.text import TextRecord
from llmc.errors import ConfigError
from llmc.limits import exceeded_limit

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
