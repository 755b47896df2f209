"""The record of how an artifact turns text into tokens, and the kinds of texts that it names."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from llmc.records import Strict


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
    applies = {
        TextKind.LEADING_SPACE: text[:1].isspace(),
        TextKind.SPECIAL_TOKENS: any(token in text for token in special_tokens),
        TextKind.NOT_COMPOSED: not unicodedata.is_normalized("NFC", text),
    }
    return {kind for kind, holds in applies.items() if holds}


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
        sentences = []
        if not self.adds_special_tokens and (self.before or self.after):
            sentences.append(
                "onnxruntime-genai's add_special_tokens does not add the tokens that the tokenizer puts "
                f"around a text, {list(self.before)} before and {list(self.after)} after; llmc run adds them"
            )
        if self.exceptions:
            sentences.append(
                "onnxruntime-genai's own tokenizer encodes these differently from transformers and llmc run: "
                + ", ".join(self.exceptions)
            )
        return tuple(sentences)
