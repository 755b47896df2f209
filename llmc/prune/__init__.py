"""Prune on calibration text: decide which layers, units and weights to remove, and compensate for them."""
