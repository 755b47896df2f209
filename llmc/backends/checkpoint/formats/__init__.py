"""Encode quantized matrices as tensors of the formats that servers load, and declare them."""
