"""Verify an artifact: its parity and its latency, measured against the original PyTorch model."""
