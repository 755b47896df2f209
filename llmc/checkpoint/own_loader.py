"""Load a checkpoint with transformers' own reader of config and weights, for comparison with llmc's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmc.architecture import auto_class
from llmc.checkpoint.configuration import from_pretrained, loading
from llmc.checkpoint.gguf import names_of
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.gguf_outline import write_copy
from llmc.checkpoint.skeleton import build_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Loaded = tuple["PreTrainedModel", Mapping[str, Any]]


def load_with_transformers(path: Path, config: PreTrainedConfig) -> Loaded:
    """Load the model, with transformers' report on missing and unexpected names.

    transformers' quantizers are used if their packages are installed.

    Args:
        path: A Hugging Face folder, or a GGUF file.
        config: Selects the class; only a GGUF model is built from it.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    if path.is_file():
        return _load_gguf(path, config)
    loaded: Loaded = from_pretrained(path, auto_class(config), output_loading_info=True)
    return loaded


def _load_gguf(path: Path, config: PreTrainedConfig) -> Loaded:
    """Run the steps of `from_pretrained` for a GGUF file without the two that take nine tenths of its time.

    These read the vocabulary, which the model does not need, and rebuild the map of names for every module.
    """
    import torch
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    header = GgufHeader.parse(path)
    loaded: Loaded
    with TemporaryDirectory() as folder, loading(path):
        copy = Path(folder) / "model.gguf"
        write_copy(header, copy)
        if is_gguf_arch_supported(header.architecture):
            loaded = from_pretrained(copy, auto_class(config), config=config, output_loading_info=True)
            return loaded
        model: Any = build_skeleton(config)
        read: Any = load_gguf_checkpoint
        tensors = read(
            str(copy), return_tensors=True, model_to_load=names_of(model), torch_dtype=torch.float32
        )["tensors"]
        loaded = type(model).from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    return loaded
