"""Tests of quantized checkpoints for servers."""
