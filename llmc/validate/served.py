"""Run an artifact as onnxruntime-genai serves it: its tokenizer, its chat template, and text generation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.artifact.store.codec import Messages
from llmc.artifact.text import TextRecord
from llmc.errors import ParityError
from llmc.gpu import Gpu
from llmc.runtime.failures import typed_error
from llmc.runtime.libraries import CUDA_PROVIDER, load_genai


class ServedTokenizer:
    """The tokenizer of onnxruntime-genai, for texts with the tokens that stand before and after them.

    Args:
        tokenizer: An `onnxruntime_genai.Tokenizer`.
        record: The artifact's text record, which states the special tokens that the runtime does not add.
    """

    def __init__(self, tokenizer: Any, record: TextRecord) -> None:
        self._tokenizer = tokenizer
        self.exceptions = frozenset(record.exceptions)
        self._around = ((), ()) if record.adds_special_tokens else (record.before, record.after)
        self._adds = record.adds_special_tokens

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            ParityError: The runtime cannot encode it.
        """
        before, after = self._around
        return [*before, *self._encode(text, special=self._adds), *after]

    def encode_rendered(self, text: str) -> list[int]:
        """Return the token ids of a text that a chat template rendered.

        Raises:
            ParityError: The runtime cannot encode it.
        """
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        try:
            self._tokenizer.update_options(add_special_tokens="true" if special else "false")
            return [int(t) for t in self._tokenizer.encode(text)]
        except Exception as error:
            raise ParityError(f"onnxruntime-genai cannot encode {text[:40]!r}: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens.

        Raises:
            ParityError: The runtime cannot decode them.
        """
        if not ids:
            return ""
        try:
            return str(self._tokenizer.decode(np.array(ids, np.int32)))
        except Exception as error:
            raise ParityError(f"onnxruntime-genai cannot decode {list(ids)[:20]}: {error}") from error

    def stream(self, ids: Sequence[int]) -> str:
        """Return the text of token ids that arrive one by one.

        Raises:
            ParityError: The runtime cannot decode them.
        """
        try:
            stream = self._tokenizer.create_stream()
            return "".join(str(stream.decode(token)) for token in ids)
        except Exception as error:
            raise ParityError(f"onnxruntime-genai cannot stream {list(ids)[:20]}: {error}") from error

    def render_chat(self, messages: Messages, ask: bool) -> str | None:
        """Render the chat template for `messages`, with the beginning of an answer if `ask`.

        Raises:
            ParityError: The template cannot be rendered.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                json.dumps(list(messages)), add_generation_prompt=ask
            )
        except Exception as error:
            raise ParityError(f"onnxruntime-genai cannot render the chat template: {error}") from error
        return text


class Served:
    """The folder as loaded by onnxruntime-genai.

    Args:
        folder: The artifact, with genai_config.json.
        gpu: The GPU on which the provider that genai_config.json names runs it; None for the CPU, whatever
            provider it names.

    Raises:
        ResourceError: onnxruntime-genai is not installed, or the device has not enough memory.
        ParityError: onnxruntime-genai cannot load the folder.
    """

    def __init__(self, folder: Path, gpu: Gpu | None = None) -> None:
        og = load_genai()
        self._og = og
        self.folder = folder
        on = "CPUExecutionProvider" if gpu is None else f"{CUDA_PROVIDER}, {gpu.name}"
        self.where = f"onnxruntime-genai {og.__version__} {on}"
        try:
            config = og.Config(str(folder))
            if gpu is None:
                config.clear_providers()
            self._model = og.Model(config)
        except Exception as error:
            fact = f"onnxruntime-genai {og.__version__} cannot load {folder}"
            raise typed_error(error, fact) from error

    def generate(self, ids: Sequence[int], new_tokens: int, **search: Any) -> list[int]:
        """Generate new tokens after `ids`, greedily unless `search` says otherwise; without the end token.

        Args:
            search: Options of onnxruntime-genai that replace those of a plain greedy search.

        Raises:
            ParityError: The runtime fails.
            ResourceError: The device has not enough memory.
        """
        options = {
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "min_length": 0,
            "max_length": len(ids) + new_tokens,
            **search,
        }
        try:
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(**options)
            generator = self._og.Generator(self._model, params)
            generator.append_tokens(np.array([ids], np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            sequence = [int(t) for t in generator.get_sequence(0)]
        except Exception as error:
            raise typed_error(error, f"onnxruntime-genai cannot generate from {self.folder}") from error
        return sequence[len(ids) :]
