"""The builder of onnxruntime-genai, as its users run it: the peer of the benchmarks."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmc.graph.interface import CacheSlot, Interface, TensorSpec

#: Settings of the peer: precision and `key=value` of --extra_options. `int4` is block 32 with int8
#: activations; `int4-tuned` adds what its documentation offers for speed.
SETTINGS = {
    "fp32": ("fp32", ()),
    "int8": ("int8", ()),
    "int4": ("int4", ("int4_block_size=32", "int4_accuracy_level=4")),
    "int4-tuned": (
        "int4",
        ("int4_block_size=32", "int4_accuracy_level=4", "prune_lm_head=true", "fuse_mlp_gate_up=true"),
    ),
}


def genai_command(checkpoint: Path, output: Path, setting: str) -> list[str]:
    """The command line that builds `output` with one of SETTINGS."""
    precision, options = SETTINGS[setting]
    return [
        sys.executable,
        *("-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision),
        *("-i", str(checkpoint), "-o", str(output), "-c", str(output.with_name(f"{output.name}.cache"))),
        *("--extra_options", *options, "hf_token=false"),
    ]


def genai_interface(folder: Path) -> Interface:
    """The inputs and outputs of a model that onnxruntime-genai's builder made."""
    import onnx

    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    decoder = config["decoder"]
    graph = onnx.load(folder / decoder["filename"], load_external_data=False).graph

    def specs(values: Iterable[Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                shape=tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    cache = tuple(
        CacheSlot(
            layer=i,
            past_key=decoder["inputs"]["past_key_names"] % i,
            past_value=decoder["inputs"]["past_value_names"] % i,
            present_key=decoder["outputs"]["present_key_names"] % i,
            present_value=decoder["outputs"]["present_value_names"] % i,
            kv_heads=decoder["num_key_value_heads"],
            key_width=decoder["head_size"],
            value_width=decoder["head_size"],
            window=None,
        )
        for i in range(decoder["num_hidden_layers"])
    )
    inputs = specs(graph.input)
    outputs = specs(graph.output)
    logits = next(spec for spec in outputs if spec.name == "logits")
    return Interface(
        inputs=inputs,
        outputs=outputs,
        cache=cache,
        logits="last" if logits.shape[1] == 1 else "all",
        position_ids=any(spec.name == "position_ids" for spec in inputs),
        padding="right",
        max_length=config["context_length"],
    )
