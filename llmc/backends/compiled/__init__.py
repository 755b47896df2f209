"""Compiled kernels: regions of a graph as operators of a library, generated for the model and the CPU."""
