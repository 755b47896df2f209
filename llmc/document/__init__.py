"""YAML files read into strict pydantic models and written back; a file may extend another one."""

from llmc.document.extension import Extension, find_origins
from llmc.document.load import load_document
from llmc.document.render import render_document

__all__ = ["Extension", "find_origins", "load_document", "render_document"]
