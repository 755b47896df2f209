"""Greedy text: what onnxruntime-genai generates from an artifact against PyTorch's `generate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.artifact.verdict import Measurement
from llmc.config import Metric
from llmc.errors import ParityError, ResourceError
from llmc.validate.measure import measure, measured
from llmc.validate.reference import TorchModel

#: New tokens for each prompt.
NEW_TOKENS = 32


def measure_generation(
    folder: Path, reference: TorchModel, tokenizer: Any, prompts: Sequence[str]
) -> tuple[Measurement, ...]:
    """Share of prompts whose greedy continuation is identical, token by token.

    Each side encodes the prompt with its own tokenizer, onnxruntime-genai's from the artifact's
    tokenizer files; a prompt that they encode differently counts as unequal. Penalties and sampling
    of the generation config are off on both sides.

    Args:
        folder: The artifact, with genai_config.json and tokenizer files.
        tokenizer: The original's transformers tokenizer.
        prompts: At least one.

    Returns:
        One measurement of GENERATE_EQUAL; its detail names the first prompt that differs and where.

    Raises:
        ResourceError: onnxruntime-genai is not installed.
    """
    try:
        import onnxruntime_genai as og
    except ImportError as error:
        raise ResourceError(
            "onnxruntime-genai is not installed, greedy text cannot be compared",
            hint="pip install onnxruntime-genai-cuda (x86-64) or onnxruntime-genai (elsewhere)",
        ) from error
    where = f"onnxruntime-genai {og.__version__} CPUExecutionProvider"

    def take() -> tuple[Measurement, ...]:
        model, encoder = _load(og, folder)
        differences = []
        for prompt in prompts:
            ids = [int(t) for t in tokenizer(prompt)["input_ids"]]
            theirs = [int(t) for t in encoder.encode(prompt)]
            if theirs != ids:
                differences.append(f"{prompt!r} is encoded as {theirs}, the original's tokens are {ids}")
                continue
            stop = _end_tokens(reference)
            expected = _without_end(_original(reference, ids, stop), stop)
            actual = _artifact(og, model, folder, ids)
            if expected != actual:
                at = next(
                    (i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b),
                    min(len(expected), len(actual)),
                )
                differences.append(f"{prompt!r} differs from new token {at + 1} on")
        share = 1 - len(differences) / len(prompts)
        detail = f"{len(prompts)} prompts, {NEW_TOKENS} new tokens each"
        if differences:
            detail += f"; {differences[0]}"
        return (measured(Metric.GENERATE_EQUAL, share, detail, where),)

    return measure((Metric.GENERATE_EQUAL,), where, take)


def _load(og: Any, folder: Path) -> tuple[Any, Any]:
    try:
        model = og.Model(str(folder))
        return model, og.Tokenizer(model)
    except Exception as error:
        raise ParityError(f"onnxruntime-genai {og.__version__} cannot load {folder}: {error}") from error


def _artifact(og: Any, model: Any, folder: Path, ids: list[int]) -> list[int]:
    """New tokens of the artifact; onnxruntime-genai leaves the end token out."""
    try:
        params = og.GeneratorParams(model)
        params.set_search_options(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            min_length=0,
            max_length=len(ids) + NEW_TOKENS,
        )
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([ids], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        sequence = [int(t) for t in generator.get_sequence(0)]
    except Exception as error:
        raise ParityError(f"onnxruntime-genai cannot generate from {folder}: {error}") from error
    return sequence[len(ids) :]


def _end_tokens(reference: TorchModel) -> list[int]:
    stop = reference.model.generation_config.eos_token_id
    return stop if isinstance(stop, list) else [] if stop is None else [stop]


def _without_end(tokens: list[int], stop: list[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in stop else tokens


def _original(reference: TorchModel, ids: list[int], stop: list[int]) -> list[int]:
    """New tokens of PyTorch's `generate`, greedy, with the model's own end tokens."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        min_length=0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
    )
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        out = reference.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config
        )
    return [int(t) for t in out[0, len(ids) :]]
