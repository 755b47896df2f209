"""Measure the ranges of what the experts of a layer read, on calibration text.

Gate and up read the tokens that the router sends to their expert, down reads what its own expert computes of
them. All experts of a layer get one range for each of the two, its largest magnitude over all experts:

- an expert that no token of the text was sent to has a range that was measured;
- vLLM and SGLang keep the largest scale of a layer's experts where their kernels have one scale, and each
  expert's own where they do not: with one scale, every server computes the same.

Source: vLLM 0.32, `quantization/utils/fp8_utils.py` (process_fp8_input_tensor_strategy_moe). ModelOpt gives
experts without tokens the largest range of the others, too (`export/unified_export_hf.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmc.arrays import Array
from llmc.calibration.expert_products import stacked_parameters, visiting_experts
from llmc.config import WeightFormat
from llmc.errors import CheckpointError
from llmc.quantize.rounding import fake_quantize, noise_db

if TYPE_CHECKING:
    import torch

#: Number of rows of each matrix on which the noise of quantization is measured, and most of one expert.
_SAMPLE, _SAMPLE_EACH = 256, 32
_PEAK, _TOKENS, _NOISE = ".experts_peak", ".experts_tokens", ".experts_snr_db"


@dataclass(frozen=True)
class ExpertInput:
    """A stack of experts whose activations are to be quantized.

    Args:
        parameter: Name of the stacked parameter.
        kind: Type of activations and weights.
    """

    parameter: str
    kind: WeightFormat


@dataclass(frozen=True)
class ExpertRange:
    """The calibrated range of what a stack of experts reads.

    Args:
        peak: Largest magnitude over all experts.
        tokens: Number of tokens that each expert received, (experts,).
        snr_db: Mean signal-to-noise ratio of a row as quantized.
    """

    peak: float
    tokens: Array
    snr_db: float


class ExpertInputs:
    """The observed inputs of the experts of one layer at a time."""

    def __init__(self, plans: Sequence[ExpertInput]) -> None:
        self._kinds = {plan.parameter: plan.kind for plan in plans}
        self._peaks: dict[str, float] = {}
        self._tokens: dict[str, Array] = {}
        self._sample: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Observe the experts of `module`, called `name` in the model, within this context."""
        stacks = {k: p for k, p in stacked_parameters(name, module).items() if k in self._kinds and name}
        self._peaks, self._sample = {}, {}
        self._tokens = {key: np.zeros(len(stack), np.int64) for key, stack in stacks.items()}
        if not stacks:
            yield
            return
        with visiting_experts(stacks, self._take):
            yield

    def _take(self, parameter: str, expert: int, rows: torch.Tensor) -> None:
        """Record the rows (n, K) that an expert reads."""
        self._tokens[parameter][expert] += len(rows)
        peak = float(rows.abs().max())
        self._peaks[parameter] = peak if peak != peak else max(self._peaks.get(parameter, 0.0), peak)
        sample = self._sample.setdefault(parameter, [])
        left = _SAMPLE - sum(len(each) for each in sample)
        if left > 0:
            sample.append(rows[: min(left, _SAMPLE_EACH)].float().clone())

    def conclude(self) -> dict[str, Array]:
        """Return the ranges of the layer's experts.

        Raises:
            CheckpointError: An activation is not finite.
        """
        import torch

        data: dict[str, Array] = {}
        for parameter, peak in self._peaks.items():
            if not np.isfinite(peak):
                raise CheckpointError(
                    f"the inputs of {parameter} on the calibration text are not all finite",
                    hint="the checkpoint is damaged, or needs a target without calibration",
                )
            rows = torch.cat(self._sample[parameter])
            quantized = fake_quantize(rows, self._kinds[parameter], peak)
            data[f"{parameter}{_PEAK}"] = np.array([peak])
            data[f"{parameter}{_TOKENS}"] = self._tokens[parameter]
            data[f"{parameter}{_NOISE}"] = np.array([noise_db(rows, quantized)])
        return data


def read_expert_ranges(data: Mapping[str, Array]) -> dict[str, ExpertRange]:
    """Read what `ExpertInputs.conclude` returned, by the name of the stacked parameter."""
    names = [key.removesuffix(_PEAK) for key in data if key.endswith(_PEAK)]
    return {
        name: ExpertRange(
            float(data[f"{name}{_PEAK}"][0]), data[f"{name}{_TOKENS}"], float(data[f"{name}{_NOISE}"][0])
        )
        for name in names
    }


def describe_tokens(ranges: Mapping[str, ExpertRange]) -> Iterator[str]:
    """Yield a sentence on experts that no token of the calibration text was sent to."""
    idle = [(name, int((each.tokens == 0).sum())) for name, each in ranges.items()]
    total = sum(len(each.tokens) for each in ranges.values())
    count = sum(each for _, each in idle)
    if count:
        first = next(name for name, each in idle if each)
        yield (
            f"experts: {count} of {total} matrices are of experts that no token of the calibration text was "
            f"sent to, first in {first}; their activations have the range of their layer's other experts"
        )
