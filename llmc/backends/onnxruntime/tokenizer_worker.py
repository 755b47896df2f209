"""Run onnxruntime-genai's tokenizer in a separate process, since some files crash the process.

The child imports only the runtime. It receives texts, token ids and conversations, and returns the runtime's
result for each, or its error message.
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
    """The error of a runtime that did not finish: a tokenizer's regex or chat template may never end."""


@dataclass(frozen=True)
class TokenizerQuestion:
    """The question to the runtime.

    Args:
        texts: Texts to encode, with special tokens around them and without.
        ids: Token ids to decode.
        chats: Messages to render, and whether the beginning of an answer follows.
    """

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    chats: Sequence[tuple[Sequence[dict[str, str]], bool]]


class Answers:
    """The runtime's results for a question, with the interface of its tokenizer.

    Each method raises `ParityError` with the runtime's message if it failed.
    """

    def __init__(self, question: TokenizerQuestion, data: dict[str, list[Any]]) -> None:
        self._plain = dict(zip(question.texts, data["plain"], strict=True))
        self._whole = dict(zip(question.texts, data["whole"], strict=True))
        self._decoded = {tuple(ids): text for ids, text in zip(question.ids, data["decoded"], strict=True)}
        chats = [_key(messages, ask) for messages, ask in question.chats]
        self._rendered = dict(zip(chats, data["rendered"], strict=True))

    @classmethod
    def read(cls, question: TokenizerQuestion, data: dict[str, list[Any]]) -> Answers:
        """Read the answers from the result of `ask_runtime` for a question.

        Raises:
            ParityError: The runtime cannot read the tokenizer; the error quotes it.
        """
        if "failure" in data:
            raise ParityError(str(data["failure"]))
        return cls(question, data)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text of the question."""
        ids: list[int] = _value((self._whole if special else self._plain)[text])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids of the question."""
        return str(_value(self._decoded[tuple(ids)]))

    def render(self, messages: Any, ask: bool) -> str:
        """Return the chat template's text for messages of the question."""
        return str(_value(self._rendered[_key(messages, ask)]))


def ask_runtime(folder: Path, question: TokenizerQuestion) -> dict[str, list[Any]]:
    """Ask onnxruntime-genai about the tokenizer of a model folder, in a separate process.

    Args:
        folder: Folder with genai_config.json, which may name another folder for the tokenizer.

    Returns:
        The data that `Answers.read` reads.

    Raises:
        ParityError: The runtime ended the process, or gave no answer in time.
    """
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    request = {
        "texts": list(question.texts),
        "ids": [list(ids) for ids in question.ids],
        "chats": [[list(messages), ask] for messages, ask in question.chats],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-B", "-c", f"from {__name__} import main; main()"],
            input=json.dumps(request),
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
        last = done.stderr.strip().splitlines()[-1:] or ["without a message"]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ParityError(f"onnxruntime-genai ended its process with {how}: {last[0]}")
    data: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return data


def main() -> None:
    """Run the child process."""
    die_with_parent()
    import onnxruntime_genai as og

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, hard))
    og.disable_telemetry_events()
    request = json.loads(sys.stdin.read())
    try:
        tokenizer = og.Tokenizer(og.Model("."))
    except RuntimeError as error:  # the only type that the bindings raise
        answer: dict[str, Any] = {"failure": str(error)}
    else:
        answer = _answer(tokenizer, request)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _answer(tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
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

    plain = [attempt(encode, text) for text in request["texts"]]
    tokenizer.update_options(add_special_tokens="true")
    return {
        "plain": plain,
        "whole": [attempt(encode, text) for text in request["texts"]],
        "decoded": [attempt(decode, ids) for ids in request["ids"]],
        "rendered": [attempt(render, chat) for chat in request["chats"]],
    }


def _value(answer: dict[str, Any]) -> Any:
    if "failure" in answer:
        raise ParityError(answer["failure"])
    return answer["value"]


def _key(messages: Any, ask: bool) -> str:
    return json.dumps([list(messages), ask], sort_keys=True)
