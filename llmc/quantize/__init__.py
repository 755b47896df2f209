"""Quantize weights by block: decide which tensor gets which bits, and compute the codes."""
