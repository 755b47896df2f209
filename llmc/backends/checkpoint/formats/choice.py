"""Choose the format that a target names."""

from llmc.backends.checkpoint.formats.awq import AwqLayout
from llmc.backends.checkpoint.formats.base import Format
from llmc.backends.checkpoint.formats.compressed_tensors import CompressedTensors
from llmc.backends.checkpoint.formats.gptq import GptqLayout
from llmc.backends.checkpoint.formats.modelopt import ModelOpt
from llmc.config import CheckpointFormat, ServedCheckpoint


def format_of(section: ServedCheckpoint) -> Format:
    """Return the format that the section `checkpoint` of a target names."""
    formats: dict[CheckpointFormat, type[Format]] = {
        CheckpointFormat.COMPRESSED_TENSORS: CompressedTensors,
        CheckpointFormat.GPTQ: GptqLayout,
        CheckpointFormat.AWQ: AwqLayout,
        CheckpointFormat.MODELOPT: ModelOpt,
    }
    return formats[section.format]()
