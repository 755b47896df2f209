"""Quantize a Hugging Face folder with llm-compressor or AutoRound, in an environment that has both.

    python peer_quantize.py gptq|autoround SOURCE TOKENS.npy OUTPUT --group 128 [--asymmetric] [--iters 200]

TOKENS.npy has the calibration windows, int64 (windows, length). Linear layers of decoder layers are stored at
4 bits by group, and the head and the embedding in float; every other setting is the tool's default. Models
are loaded in the checkpoint's own type, as both tools' guides do.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=("gptq", "autoround"))
    parser.add_argument("source", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--iters", type=int, default=200)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    windows = np.load(options.tokens)
    run = run_gptq if options.tool == "gptq" else run_autoround
    run(model, tokenizer, windows, options)


def run_gptq(model: object, tokenizer: object, windows: np.ndarray, options: argparse.Namespace) -> None:
    """Run llm-compressor's GPTQ with its defaults: static activation order, dampening of 0.01."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(
        num_bits=4, strategy="group", group_size=options.group, symmetric=not options.asymmetric
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    rows = {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        output_dir=str(options.output),
    )


def run_autoround(model: object, tokenizer: object, windows: np.ndarray, options: argparse.Namespace) -> None:
    """Run AutoRound with its defaults except for the text and the number of steps."""
    from auto_round import AutoRound

    quantizer = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=options.group,
        sym=not options.asymmetric,
        iters=options.iters,
        dataset=[torch.from_numpy(row[None]) for row in windows],
        nsamples=len(windows),
        seqlen=windows.shape[1],
    )
    quantizer.quantize_and_save(str(options.output), format="auto_gptq")


if __name__ == "__main__":
    main()
