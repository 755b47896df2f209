"""Trace a model's own transformers code into a `Graph` in the canonical dialect."""

from llmc.trace.tracer import trace_model

__all__ = ["trace_model"]
