"""The whole parity gate of one artifact: every level on one session, then text, then generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.artifact.interface import Interface, Measurement
from llmc.config import Metric
from llmc.errors import ParityError
from llmc.validate.generation import measure_generation
from llmc.validate.measure import broken
from llmc.validate.parity import Parity
from llmc.validate.quality import METRICS, measure_quality
from llmc.validate.reference import TorchModel
from llmc.validate.session import OrtModel, shares_buffer

Array = np.ndarray

#: Metrics of the levels that compare logits.
LOGITS = (
    Metric.PREFILL_MAX_ABS,
    Metric.DECODE_MAX_ABS,
    Metric.DECODE_TOP1,
    Metric.RAGGED_MAX_ABS,
    Metric.WINDOW_MAX_ABS,
)


@dataclass(frozen=True)
class Material:
    """What the models are fed.

    Args:
        parity_text: Text that the parity levels cut prompts from.
        eval_text: Text for KL divergence and perplexity.
        prompts: Prompts for greedy generation; empty for none.
    """

    parity_text: str
    eval_text: str
    prompts: Sequence[str]


def measure_artifact(
    folder: Path,
    interface: Interface,
    reference: Any,
    tokenizer: Any,
    material: Material,
    *,
    threads: int | None,
    note: Callable[[str], None],
) -> tuple[Measurement, ...]:
    """Every parity metric of the artifact in `folder` against the original.

    The KV cache is used the way genai_config.json asks for (one shared buffer, or growing).

    Args:
        reference: The original, a transformers causal LM in float32.
        tokenizer: The original's transformers tokenizer.
        threads: Intra-op threads of onnxruntime; None for its default.
        note: Told what is being measured.

    Returns:
        One measurement per metric. An artifact that breaks its interface gets NaN.

    Raises:
        ConfigError: A text is too short, or there is no model.onnx or genai_config.json.
        ResourceError: onnxruntime or onnxruntime-genai is not installed.
    """
    original = TorchModel(reference)
    try:
        model = OrtModel(folder, interface, threads=threads, share_buffer=shares_buffer(folder))
    except ParityError as error:
        return broken((*LOGITS, *METRICS, Metric.GENERATE_EQUAL), error, "onnxruntime CPUExecutionProvider")
    note("logits")
    levels = Parity(model, original, encode(tokenizer, material.parity_text)).measure()
    note("text quality")
    text = encode(tokenizer, material.eval_text)
    quality = measure_quality(model, original, text, start=start_tokens(tokenizer))
    del model
    if not material.prompts:
        return (*levels, *quality)
    note("greedy generation")
    return (*levels, *quality, *measure_generation(folder, original, tokenizer, material.prompts))


def encode(tokenizer: Any, text: str) -> Array:
    """Token ids (n,) int64 of a text, without special tokens."""
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before a text, such as the beginning-of-sequence token."""
    with_special = [int(t) for t in tokenizer("a")["input_ids"]]
    bare = [int(t) for t in tokenizer("a", add_special_tokens=False)["input_ids"]]
    at = next((i for i in range(len(with_special)) if with_special[i : i + len(bare)] == bare), 0)
    return tuple(with_special[:at])
