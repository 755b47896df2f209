"""Answer a request by DeepSpeed's inference engine on the CPU; `worker.py` runs this in its environment.

DeepSpeed reads a checkpoint through transformers, which dequantizes what compressed-tensors stores; the
other formats need packages that this environment has not, and transformers says so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmc.servers.worker import Channel

#: One rank, on the CPU, of a group of its own on the loopback.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}


def main(request: dict[str, Any], channel: Channel) -> None:
    """Load the folder, count its tensors, and give logits, tokens and text."""
    os.environ.update(ENVIRONMENT)
    os.environ["MASTER_PORT"] = str(_free_port())
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    channel.version(deepspeed.__version__, "CPU, one rank")
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    dtype = torch.float32
    loader: Any = AutoModelForCausalLM
    whole, told = loader.from_pretrained(
        request["folder"], dtype=dtype, output_loading_info=True, **_decompressed(request["folder"])
    )
    engine = deepspeed.init_inference(
        whole.eval(),
        tensor_parallel={"tp_size": 1},
        dtype=dtype,
        replace_with_kernel_inject=False,
    )
    skipped = sorted(told["unexpected_keys"])
    unfilled = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    channel.loaded(len(_names(request["folder"])) - len(skipped), skipped, unfilled, "float32")
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    token_ids = [tokenizer(text, verbose=False)["input_ids"] for text in request["prompts"]]
    total = len(request["sequences"]) + len(request["continue"])
    logits, log_probabilities, greedy = [], [], []
    with torch.inference_mode():
        for number, ids in enumerate(request["sequences"]):
            rows = engine(torch.tensor([ids])).logits[0, :-1].float()
            own = rows.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            logits.append(channel.save(request["scratch"], f"logits-{number}.npy", rows.numpy()))
            log_probabilities.append(
                channel.save(request["scratch"], f"log-probabilities-{number}.npy", own.numpy())
            )
            channel.send("progress", done=number + 1, total=total)
        for number, ids in enumerate(request["continue"]):
            greedy.append(_continue(engine, ids, request["new_tokens"]))
            channel.send("progress", done=len(logits) + number + 1, total=total)
        products = _products(engine.module, request["scratch"], channel)
    channel.send(
        "answer",
        token_ids=token_ids,
        logits=logits,
        log_probabilities=log_probabilities,
        greedy=greedy,
        products=products,
        graph=None,
    )


def _continue(engine: Any, ids: list[int], new_tokens: int) -> list[int]:
    """Return greedy text by DeepSpeed's own `generate`, without penalties of the generation config."""
    import torch

    prompt = torch.tensor([ids])
    out = engine.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
    )
    return [int(token) for token in out[0, len(ids) :]]


def _products(model: Any, scratch: str, channel: Channel) -> list[dict[str, Any]]:
    """Multiply inputs by every matrix that stands in a module with `weight`, as the module does."""
    import torch

    found: list[dict[str, Any]] = []
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if "Linear" not in type(layer).__name__ or weight is None or weight.ndim != 2 or "lm_head" in name:
            continue
        probe = channel.probe(weight.shape[1])
        bias = getattr(layer, "bias", None)
        product = layer(torch.from_numpy(probe).to(weight.dtype)).float()
        product = product if bias is None else product - bias.float()
        found.append(
            {
                "modules": [name],
                "inputs": channel.save(scratch, f"inputs-{weight.shape[1]}.npy", probe),
                "outputs": channel.save(scratch, f"product-{len(found)}.npy", product.numpy()),
            }
        )
    return found


def _decompressed(folder: str) -> dict[str, Any]:
    """Return the argument by which transformers dequantizes what compressed-tensors stores."""
    import json
    from pathlib import Path

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    stated = config.get("quantization_config", {})
    if stated.get("quant_method") != "compressed-tensors":
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}


def _names(folder: str) -> set[str]:
    """Return the names of the tensors in the folder's files."""
    from pathlib import Path

    from safetensors import safe_open

    names: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(str(file), framework="np") as opened:
            names |= set(opened.keys())
    return names


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
