"""The gate: an artifact's parity and latency, measured against the original PyTorch model."""
