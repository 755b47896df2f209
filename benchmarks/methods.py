"""Measure the error of quantization methods in products of a few layers, on text not used for calibration.

    python benchmarks/methods.py [--checkpoint rescaled|demo] [--off-grid] [--layers 1,12,22,28]

The figure is the relative squared error of the products in thousandths, by kind of matrix and as a geometric
mean, with the original's own activations: calibrated on all of the calibration text, measured on 12 windows
of 512 tokens of the evaluation text. `--off-grid` adds to every weight what 4 bits by block of 32 may have
rounded away, since scaled channels otherwise return to the grid on which the demo's file has its weights.
"""

from collections.abc import Callable

import numpy as np
import torch
from common.options import add_checkpoint, make_parser
from common.sources import checkpoint

from llmc.calibration.hessian import weigh_features
from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.config import WeightScheme
from llmc.data import calibration_text, eval_text
from llmc.pipeline.steps.original import tokenize
from llmc.quantize.awq import search_channels
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.methods.gptq import quantize_gptq

WINDOW, HELD = 512, 12
#: Matrices that read one activation, and whether its channels can be divided at no cost.
GROUPS = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): True,
    ("self_attn.o_proj",): False,
    ("mlp.gate_proj", "mlp.up_proj"): True,
    ("mlp.down_proj",): True,
}
Matrices = list[np.ndarray]
Method = Callable[[Matrices, np.ndarray, list[WeightScheme], bool], Matrices]


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser, "rescaled", ("demo", "rescaled"))
    parser.add_argument("--off-grid", action="store_true")
    parser.add_argument("--layers", default="1,12,22,28")
    options = parser.parse_args()
    layers = [int(i) for i in options.layers.split(",")]
    file = options.cache / f"{options.checkpoint}-products-{'-'.join(map(str, layers))}.npz"
    if not file.is_file():
        source = open_checkpoint(str(checkpoint(options.checkpoint, options.cache)))
        np.savez(file, **collect(source, layers))
    data = np.load(file)
    for label, method in METHODS.items():
        print(f"{label:14} {tell(data, layers, method, off_grid=options.off_grid)}", flush=True)


def collect(source: Checkpoint, layers: list[int]) -> dict[str, np.ndarray]:
    """Return weights of the layers, and sum(x x') of their inputs, by the kind of text."""
    model = source.load_reference().float().eval()
    arrays: dict[str, np.ndarray] = {}
    kind = ""

    def watch(name: str) -> Callable[..., None]:
        def add(_: object, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            arrays[f"{kind}|{name}"] = arrays.get(f"{kind}|{name}", 0) + (x.T @ x).numpy()

        return add

    for name in (f"model.layers.{i}.{part}" for i in layers for group in GROUPS for part in group):
        linear = model.get_submodule(name)
        arrays[f"weights|{name}"] = linear.weight.detach().numpy().copy()
        linear.register_forward_pre_hook(watch(name))
    texts = {"calibration": (calibration_text(), None), "held": (eval_text(), HELD)}
    with torch.inference_mode():
        for kind, (text, most) in texts.items():  # noqa: B007 (read by the hooks)
            tokens, start = tokenize(source.tokenizer(), text)
            length = WINDOW - len(start)
            for i in range(min(len(tokens) // length, most or len(tokens))):
                row = [*start, *tokens[i * length : (i + 1) * length]]
                model.model(input_ids=torch.tensor([row]), use_cache=False)
    return arrays


def tell(data: dict[str, np.ndarray], layers: list[int], method: Method, *, off_grid: bool) -> str:
    errors: dict[str, list[float]] = {}
    for layer in layers:
        for group, foldable in GROUPS.items():
            names = [f"model.layers.{layer}.{part}" for part in group]
            weights = [data[f"weights|{n}"] for n in names]
            if off_grid:
                weights = [blur(w) for w in weights]
            size = 64 if names[0].endswith(("o_proj", "down_proj")) else 32
            kind = {"bits": 4, "block_size": size, "symmetric": False, "method": "gptq"}
            schemes = [WeightScheme.model_validate(kind)] * len(names)
            heldout = data[f"held|{names[0]}"]
            quantized = method(weights, data[f"calibration|{names[0]}"], schemes, foldable)
            for part, before, after in zip(group, weights, quantized, strict=True):
                lost = after - before
                error = np.sum((lost @ heldout) * lost) / np.sum((before @ heldout) * before)
                errors.setdefault(part.split(".")[1], []).append(1e3 * float(error))
    mean = np.exp(np.mean([np.log(e) for each in errors.values() for e in each]))
    return f"{mean:.3f}: " + ", ".join(f"{part} {np.mean(each):.3f}" for part, each in errors.items())


def blur(weights: np.ndarray) -> np.ndarray:
    """Return weights with up to half a step of 4 bits by block of 32 added to each."""
    blocks = weights.reshape(len(weights), -1, 32)
    step = np.abs(blocks).max(2, keepdims=True) / 8
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, blocks.shape)
    return (blocks + noise * step).astype(np.float32).reshape(weights.shape)


def searched(weights: Matrices, hessian: np.ndarray, schemes: list[WeightScheme], _: bool) -> Matrices:
    important = weigh_features(np.diagonal(hessian))
    return [
        dequantize_blocks(quantize_blocks(w, s, np.float16, "w", important))
        for w, s in zip(weights, schemes, strict=True)
    ]


def gptq(weights: Matrices, hessian: np.ndarray, schemes: list[WeightScheme], _: bool) -> Matrices:
    return [
        dequantize_blocks(quantize_gptq(w, hessian, s, np.float16, "w"))
        for w, s in zip(weights, schemes, strict=True)
    ]


def awq_gptq(weights: Matrices, hessian: np.ndarray, schemes: list[WeightScheme], foldable: bool) -> Matrices:
    factors = search_channels(weights, hessian, schemes, "w") if foldable else None
    if factors is None:
        return gptq(weights, hessian, schemes, foldable)
    scaled = hessian / np.outer(factors, factors)
    return [w / factors for w in gptq([w * factors for w in weights], scaled, schemes, foldable)]


METHODS: dict[str, Method] = {"searched": searched, "GPTQ": gptq, "AWQ, then GPTQ": awq_gptq}


if __name__ == "__main__":
    main()
