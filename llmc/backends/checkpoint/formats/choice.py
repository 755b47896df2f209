"""Choose the format that a target names."""

from llmc.backends.checkpoint.formats.awq import AwqLayout
from llmc.backends.checkpoint.formats.base import Format
from llmc.backends.checkpoint.formats.compressed_tensors import CompressedTensors
from llmc.backends.checkpoint.formats.gptq import GptqLayout
from llmc.backends.checkpoint.formats.modelopt import ModelOpt
from llmc.config import CheckpointFormat, ServedCheckpoint
from llmc.errors import UnsupportedError


def format_of(section: ServedCheckpoint, *, fp8_cache: bool = False) -> Format:
    """Return the format that the section `checkpoint` of a target names.

    Args:
        fp8_cache: Whether the folder has scales of a KV cache in fp8.

    Raises:
        UnsupportedError: The format has none.
    """
    if fp8_cache and not section.format.has_cache_scales:
        raise UnsupportedError(
            f"format {section.format.value} has no scales of a KV cache",
            hint="leave kv_cache out of the target, or use format compressed-tensors or modelopt",
        )
    match section.format:
        case CheckpointFormat.COMPRESSED_TENSORS:
            return CompressedTensors(fp8_cache)
        case CheckpointFormat.MODELOPT:
            return ModelOpt(fp8_cache)
        case CheckpointFormat.GPTQ:
            return GptqLayout()
        case CheckpointFormat.AWQ:
            return AwqLayout()
