"""A process of its own in which onnxruntime-genai reads a tokenizer, since some files end the process.

The child imports the runtime alone. It is given texts, token ids and conversations, and answers what the
runtime makes of each, or what it said where it failed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.children import die_with_parent
from llmc.errors import ParityError

_SECONDS, _CPU_SECONDS = 300, 30


class NoAnswerError(ParityError):
    """The runtime did not end: a regex of the tokenizer or its chat template may never do."""


@dataclass(frozen=True)
class TokenizerQuestion:
    """What the runtime is asked.

    Args:
        texts: To encode, with special tokens around them and without.
        ids: To decode.
        chats: Messages to render, and whether the beginning of an answer follows.
    """

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    chats: Sequence[tuple[Sequence[dict[str, str]], bool]]


class Answers:
    """What the runtime made of a question, in the form of its tokenizer.

    Each method raises `ParityError` with the runtime's words where it failed.
    """

    def __init__(self, question: TokenizerQuestion, data: dict[str, list[Any]]) -> None:
        self._plain = dict(zip(question.texts, data["plain"], strict=True))
        self._whole = dict(zip(question.texts, data["whole"], strict=True))
        self._decoded = {tuple(ids): text for ids, text in zip(question.ids, data["decoded"], strict=True)}
        chats = [_key(messages, ask) for messages, ask in question.chats]
        self._rendered = dict(zip(chats, data["rendered"], strict=True))

    @classmethod
    def read(cls, question: TokenizerQuestion, data: dict[str, list[Any]]) -> Answers:
        """The answers in what `ask_runtime` returned for a question.

        Raises:
            ParityError: The runtime cannot read the tokenizer, with its own words.
        """
        if "failure" in data:
            raise ParityError(str(data["failure"]))
        return cls(question, data)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text of the question."""
        ids: list[int] = _value((self._whole if special else self._plain)[text])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids of the question."""
        return str(_value(self._decoded[tuple(ids)]))

    def render(self, messages: Any, ask: bool) -> str:
        """The chat template's text for messages of the question."""
        return str(_value(self._rendered[_key(messages, ask)]))


def ask_runtime(folder: Path, question: TokenizerQuestion) -> dict[str, list[Any]]:
    """Ask onnxruntime-genai about the tokenizer of a model folder, in a process of its own.

    Args:
        folder: With genai_config.json, which may name another folder for the tokenizer.

    Returns:
        What `Answers.read` takes.

    Raises:
        ParityError: The runtime ended the process, or gave no answer in time.
    """
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    asked = {
        "texts": list(question.texts),
        "ids": [list(ids) for ids in question.ids],
        "chats": [[list(messages), ask] for messages, ask in question.chats],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-B", "-c", f"from {__name__} import main; main()"],
            input=json.dumps(asked),
            capture_output=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"onnxruntime-genai gave no answer within {_SECONDS} s") from error
    if done.returncode == -signal.SIGXCPU:
        raise NoAnswerError(f"onnxruntime-genai gave no answer within {_CPU_SECONDS} s of CPU time")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ParityError(f"onnxruntime-genai ended its process with {how}: {said[0]}")
    data: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return data


def main() -> None:
    """Entry of the child process."""
    die_with_parent()
    import onnxruntime_genai as og

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, hard))
    og.disable_telemetry_events()
    asked = json.loads(sys.stdin.read())
    try:
        tokenizer = og.Tokenizer(og.Model("."))
    except RuntimeError as error:  # all that the bindings raise
        answer: dict[str, Any] = {"failure": str(error)}
    else:
        answer = _answer(tokenizer, asked)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _answer(tokenizer: Any, asked: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    def attempt(call: Callable[[Any], Any], argument: Any) -> dict[str, Any]:
        try:
            return {"value": call(argument)}
        except RuntimeError as error:
            return {"failure": str(error)}

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text)]

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(np.array(ids, np.int32))) if ids else ""

    def render(chat: tuple[Any, bool]) -> str:
        return str(tokenizer.apply_chat_template(json.dumps(chat[0]), add_generation_prompt=chat[1]))

    plain = [attempt(encode, text) for text in asked["texts"]]
    tokenizer.update_options(add_special_tokens="true")
    return {
        "plain": plain,
        "whole": [attempt(encode, text) for text in asked["texts"]],
        "decoded": [attempt(decode, ids) for ids in asked["ids"]],
        "rendered": [attempt(render, chat) for chat in asked["chats"]],
    }


def _value(answer: dict[str, Any]) -> Any:
    if "failure" in answer:
        raise ParityError(answer["failure"])
    return answer["value"]


def _key(messages: Any, ask: bool) -> str:
    return json.dumps([list(messages), ask], sort_keys=True)
