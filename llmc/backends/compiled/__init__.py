"""Compile kernels: regions of a graph become operators of a library, generated for the model and the CPU."""
