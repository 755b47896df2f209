"""llmc: an ahead-of-time compiler for Hugging Face causal language models."""

__version__ = "0.1.0"
