"""Compare GPTQ on the tokens of one expert with rounding, on held-out tokens, by the number of tokens.

    python benchmarks/expert_calibration.py [--model demo] [--layer 20] [--outputs 96]

An MLP of a dense model stands for an expert: its tokens are those of the largest of four clusters, as behind
a router. It prints the error of the product in relation to the error of rounding with scales of least
squares, for each number of tokens: without shrinking the Hessian towards its diagonal, and as
`calibrate_experts` shrinks it.
"""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from common.options import make_parser

from llmc.checkpoint import open_checkpoint
from llmc.config import WeightScheme
from llmc.data import calibration_text
from llmc.pipeline.steps.original import tokenize
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.methods import find_calibrated

HELD_OUT = 512
WINDOW, WINDOWS = 512, 16
TOKENS = (64, 256, 512, 1024)
EXPERTS = 4


def route(rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the rows of the largest of EXPERTS clusters, by the angle between rows, in random order."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centres = units[generator.choice(len(units), EXPERTS, replace=False)]
    for _ in range(5):
        owner = (units @ centres.T).argmax(1)
        centres = np.stack(
            [units[owner == e].mean(0) if (owner == e).any() else centres[e] for e in range(4)]
        )
    owner = (units @ centres.T).argmax(1)
    own = rows[owner == np.bincount(owner).argmax()]
    return own[generator.permutation(len(own))]


def relative_errors(weights: np.ndarray, rows: np.ndarray) -> list[str]:
    """Return `tokens: error without shrinking, error with it` for a matrix (N, K) and inputs (tokens, K)."""
    scheme = WeightScheme.model_validate({"bits": 4, "block_size": 64, "symmetric": True, "method": "gptq"})
    rounded = scheme.model_copy(update={"method": scheme.method.uncalibrated()})
    held, known, features = rows[:HELD_OUT], rows[HELD_OUT:], weights.shape[1]

    def error(blocks: Any) -> float:
        return float(np.square(held @ (dequantize_blocks(blocks) - weights).T).sum())

    plain = error(quantize_blocks(weights, rounded, ml_dtypes.bfloat16, "w"))
    lines = []
    for tokens in (*TOKENS, len(known)):
        used = known[:tokens]
        hessian = used.T @ used
        found = []
        for share in (0.0, features / (features + tokens)):
            shrunk = ((1 - share) * hessian + share * np.diag(np.diag(hessian))).astype(np.float32)
            calibrated = find_calibrated(scheme).calibrate(weights, shrunk, scheme, ml_dtypes.bfloat16, "w")
            found.append(f"{error(calibrated) / plain:.3f}")
        lines.append(f"{tokens}: {', '.join(found)}")
    return lines


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--outputs", type=int, default=96)
    asked = parser.parse_args()
    checkpoint = open_checkpoint(asked.model)
    model: Any = checkpoint.fill_reference().eval()
    ids, _ = tokenize(checkpoint.tokenizer(), calibration_text())
    mlp, seen = model.model.layers[asked.layer].mlp, []
    mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        for start in range(0, WINDOW * WINDOWS, WINDOW):
            window = np.array([ids[start : start + WINDOW]], np.int64)
            model.model(input_ids=torch.from_numpy(window), use_cache=False)
        rows = torch.from_numpy(route(torch.cat(seen).numpy(), np.random.default_rng(0)))
        inner = (mlp.act_fn(mlp.gate_proj(rows)) * mlp.up_proj(rows)).numpy()
    for name, given in (("down_proj", inner), ("up_proj", rows.numpy())):
        weights = mlp.get_submodule(name).weight.detach().numpy()[: asked.outputs]
        print(f"{name} {list(weights.shape)}:", "; ".join(relative_errors(weights, given)), flush=True)


if __name__ == "__main__":
    main()
