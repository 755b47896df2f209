"""Tracing: a model's own transformers code -> `Graph` in the canonical dialect."""

from llmc.trace.tracer import trace_model

__all__ = ["trace_model"]
