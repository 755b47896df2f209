"""Read a checkpoint from disk: its config, its tokenizer, and its tensors lazily by name."""

from llmc.checkpoint.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
