"""Read the quantized matrices of a folder as floats by a library that is not llmc.

    python read_folder.py compressed-tensors|auto-round|modelopt FOLDER OUTPUT.npz

OUTPUT has each matrix as float32 (outputs, inputs), by the name of its module, and the library's version. It
runs in the library's own environment, and imports nothing of llmc.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def main() -> None:
    library, folder, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    readers = {
        "compressed-tensors": read_compressed,
        "auto-round": read_gptq,
        "modelopt": read_modelopt,
    }
    package = {"modelopt": "nvidia-modelopt"}.get(library, library)
    matrices = {name: value.float().numpy() for name, value in readers[library](tensors, declared).items()}
    np.savez(output, **matrices, __version__=np.array(version(package)))


def modules_with(tensors: dict[str, torch.Tensor], part: str) -> list[str]:
    """Return the modules that have a tensor of this last name."""
    return [name.removesuffix(f".{part}") for name in tensors if name.endswith(f".{part}")]


def parts_of(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a module by their last names, small scales as float32."""
    parts = {n.rpartition(".")[2]: v for n, v in tensors.items() if n.rpartition(".")[0] == module}
    halves = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in halves else value for name, value in parts.items()}


def read_compressed(tensors: dict[str, torch.Tensor], declared: dict) -> dict[str, torch.Tensor]:
    """Decompress by compressed-tensors; folders of AWQ are converted by its own converter first."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    if declared["quant_method"] == "awq":
        from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

        converter = AutoAWQConverter.from_autoawq_config(declared)
        tensors, config = converter.process(dict(tensors)), converter.update_config(None)
    else:
        config = QuantizationConfig.model_validate(declared)
    found = {}
    for module in modules_with(tensors, "weight_scale"):
        of_name = [s for s in config.config_groups.values() if any(match_name(module, t) for t in s.targets)]
        (scheme,) = of_name or [s for s in config.config_groups.values() if "Linear" in s.targets]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        found[module] = compressor.decompress(parts_of(tensors, module), scheme)["weight"]
    return found


def read_gptq(tensors: dict[str, torch.Tensor], declared: dict) -> dict[str, torch.Tensor]:
    """Multiply the identity with each layer of AutoRound's that computes from GPTQ's tensors."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    if declared["checkpoint_format"] != "gptq":
        raise SystemExit("AutoRound's layer reads zero points that are stored less one")
    found = {}
    for module in modules_with(tensors, "qweight"):
        parts = parts_of(tensors, module)
        order, outputs = parts.pop("g_idx"), parts["scales"].shape[1]
        inputs = len(order)
        if not torch.equal(order, torch.arange(inputs) // (inputs // len(parts["scales"]))):
            raise SystemExit(f"{module} has groups that are not in order")
        layer = QuantLinear(declared["bits"], declared["group_size"], inputs, outputs, bias=False)
        for name, value in parts.items():
            setattr(layer, name, value)
        found[module] = layer(torch.eye(inputs)).T
    return found


def read_modelopt(tensors: dict[str, torch.Tensor], declared: dict) -> dict[str, torch.Tensor]:
    """Dequantize by ModelOpt's tensors of fp8 and nvfp4."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    found = {}
    for module in modules_with(tensors, "weight_scale"):
        parts = parts_of(tensors, module)
        weight, scale = parts["weight"], parts["weight_scale"]
        if "weight_scale_2" in parts:
            shape = torch.Size((weight.shape[0], 2 * weight.shape[1]))
            packed = NVFP4QTensor(shape, torch.float32, weight)
            double, sizes = parts["weight_scale_2"], {-1: declared["group_size"]}
            found[module] = packed.dequantize(scale=scale, double_scale=double, block_sizes=sizes)
        else:
            found[module] = FP8QTensor(weight.shape, torch.float32, weight).dequantize(scale=scale)
    return found


if __name__ == "__main__":
    main()
