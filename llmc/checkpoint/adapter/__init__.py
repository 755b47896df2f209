"""Merge LoRA adapters in peft's layout into a base model while its rows are read.

https://huggingface.co/docs/peft/developer_guides/checkpoint describes the files. A merged row is computed in
float32 when it is read; neither the model nor a whole matrix is kept in memory.
"""

from llmc.checkpoint.adapter.folder import open_adapter, refuse_adapter_beside
from llmc.checkpoint.adapter.merge import AdaptedStore, Merge
from llmc.checkpoint.adapter.plan import plan_merge

__all__ = ["AdaptedStore", "Merge", "open_adapter", "plan_merge", "refuse_adapter_beside"]
