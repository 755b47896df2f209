"""Choose the format that a target names."""

from llmc.backends.checkpoint.formats.awq import AwqLayout
from llmc.backends.checkpoint.formats.base import Format
from llmc.backends.checkpoint.formats.compressed_tensors import CompressedTensors
from llmc.backends.checkpoint.formats.gptq import GptqLayout
from llmc.backends.checkpoint.formats.modelopt import ModelOpt
from llmc.config import CheckpointFormat, ServedCheckpoint
from llmc.errors import UnsupportedError


def format_of(section: ServedCheckpoint) -> Format:
    """Return the format that the section `checkpoint` of a target names.

    Raises:
        UnsupportedError: The format has no scales of the KV cache, but the section asks for them.
    """
    match section.format:
        case CheckpointFormat.COMPRESSED_TENSORS:
            return CompressedTensors(section.kv_cache)
        case CheckpointFormat.MODELOPT:
            return ModelOpt(section.kv_cache)
        case CheckpointFormat.GPTQ | CheckpointFormat.AWQ:
            if section.kv_cache is not None:
                raise UnsupportedError(
                    f"format {section.format.value} cannot declare a KV cache in {section.kv_cache}",
                    hint="leave kv_cache out, or use format compressed-tensors or modelopt",
                )
            return GptqLayout() if section.format is CheckpointFormat.GPTQ else AwqLayout()
