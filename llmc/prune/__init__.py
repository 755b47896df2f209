"""Pruning on calibration text: which layers, units and weights go, and what makes up for them."""
