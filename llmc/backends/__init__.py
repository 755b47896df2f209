"""Runtimes: a lowered graph into files, and text out of them."""
