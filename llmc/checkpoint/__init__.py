"""A checkpoint as it lies on disk: config, tokenizer, and its tensors lazily by name."""

from llmc.checkpoint.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
