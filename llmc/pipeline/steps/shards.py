"""Split the checkpoint of a build over ranks of tensor parallelism."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.artifact.manifest import FileDigest
from llmc.backends.checkpoint.shards import write_ranks
from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.checkpoint.skeleton import build_skeleton
from llmc.checkpoint.splits import require_ranks, split_tensors
from llmc.config import BuildPlan, Target, WeightFormat
from llmc.progress import Progress
from llmc.servers.environment import find_server
from llmc.servers.layout import ask_vllm

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint

_NVFP4_GROUP = 16


def require_shards(plan: BuildPlan, checkpoint: Checkpoint) -> None:
    """Check before any work that a build can be split as it states.

    Raises:
        ConfigError: Sizes cannot be divided by the number of ranks.
        UnsupportedError: The model cannot be split.
        ResourceError: vLLM is to be asked, and is not installed.
    """
    if plan.shards is None:
        return
    model = build_skeleton(checkpoint.config)
    require_ranks(model, checkpoint.tensors.infos(), plan.shards, _group(plan.target))
    if plan.shards_for == "vllm":
        find_server("vllm")


def write_shards(plan: BuildPlan, folder: Path, progress: Progress) -> dict[str, FileDigest]:
    """Write the files of ranks beside the whole weights; none if the plan states no ranks.

    Returns:
        Digest and size by file name.

    Raises:
        ConfigError: As `require_shards`, for tensors that only quantization makes.
        ResourceError: vLLM does not answer, or disk or memory ran out.
        UnsupportedError: The model cannot be split.
    """
    if plan.shards is None:
        return {}
    whole = SafetensorsStore.open(folder)
    with progress.stage(f"layout of {plan.shards} ranks"):
        if plan.shards_for == "vllm":
            layout = ask_vllm(folder, plan.shards)
        else:
            model = build_skeleton(open_checkpoint(str(folder)).config)
            layout = split_tensors(model, whole, plan.shards)
    with progress.stage("shards"):
        return write_ranks(folder, layout, whole, progress.advance)


def _group(target: Target) -> int:
    """Return the number of inputs that every matrix may be cut at: a multiple of every size of a group."""
    sizes = [1]
    if target.quantize is not None:
        sizes += [rule.scheme.block_size for rule in target.quantize.rules if rule.scheme is not None]
    for rule in () if target.checkpoint is None else target.checkpoint.weights:
        if rule.scheme is not None and rule.scheme.format is WeightFormat.NVFP4:
            sizes.append(_NVFP4_GROUP)
    return math.lcm(*sizes)
