"""Write small checkpoints of many kinds to a folder, with the model that transformers loads from them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from tests.checkpoint.quantized_folders import (
    draw_fp8,
    gptq_config,
    pack_gptq,
    write_codes,
    write_folder,
)
from tests.checkpoint.test_adapter import on_q, product, save_adapter
from tests.checkpoint.test_quantized_formats import FORMATS, write_gpt_oss
from tests.checkpoint.tiny_gguf import write_gguf
from tests.models import (
    EOS,
    VOCAB_SIZE,
    build_tiny_model,
    save_tiny_model,
    save_tiny_tokenizer,
    tiny_multimodal_fields,
)
from tests.texts import CHAT, edit, replace_tokenizer, save_model

WEIGHTS = "model.safetensors"
PROJECTION = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]
REPLACE = "{% for m in messages %}{{ m.content.replace('a', 'b') }}{% endfor %}"
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
GGUF_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
GGUF_YARN |= {"rope.scaling.original_context_length": 64}
GGUF_LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}


@dataclass(frozen=True)
class Written:
    """The paths and settings of a checkpoint on disk.

    Args:
        model: The argument of `llmc build`.
        original: Builds transformers' model; None for `from_pretrained` of the folder.
        tokenizer: Folder of transformers' tokenizer; None for the model's.
        options: Further arguments of `plan_build`.
        template: The chat template of the original; None for the tokenizer's own.
    """

    model: Path
    original: Callable[[], Any] | None = None
    tokenizer: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None


def model(folder: Path, model_type: str = "llama", **fields: Any) -> Path:
    """Write a tiny model with a tokenizer."""
    return save_tiny_model(model_type, folder, tokenizer=True, **{"eos_token_id": EOS, **fields})


def whole(model_type: str, folder: Path, **fields: Any) -> Written:
    return Written(model(folder, model_type, **fields))


def multimodal(model_type: str, folder: Path) -> Written:
    return whole(model_type, folder, **tiny_multimodal_fields(model_type))


def text(change: Callable[[Path], Any], folder: Path, **settings: Any) -> Written:
    """Write a model without a chat template whose tokenizer is changed."""
    change(save_model(folder, **settings))
    return Written(folder)


def changed(change: Callable[[Path], Any], folder: Path, **fields: Any) -> Written:
    """Write a model, and change something of it afterwards."""
    change(model(folder, **fields))
    return Written(folder)


def config(folder: Path, file: str = "config.json", **fields: Any) -> None:
    edit(folder / file, **fields)


def tensors(change: Callable[[Tensors], Tensors], folder: Path) -> None:
    """Change the stored tensors."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def rope(folder: Path, *, context: int = 256, **scaling: Any) -> Written:
    """Write a llama with a scaled rotary embedding, in the spelling of earlier versions of transformers."""
    fields = {"rope_parameters": ..., "rope_scaling": scaling, "rope_theta": 1e4}
    return changed(partial(config, **fields), folder, max_position_embeddings=context)


def quantized(folder: Path, values: Mapping[str, np.ndarray], **fields: Any) -> Written:
    """Write a folder of `write_folder` beside the model that its values represent."""

    def original() -> Any:
        original_model = build_tiny_model("llama", eos_token_id=EOS, num_hidden_layers=1)
        original_model.load_state_dict(
            {n: torch.from_numpy(np.array(a)) for n, a in values.items()}, strict=False
        )
        return original_model

    return Written(folder, original, **fields)


def codes(config: Mapping[str, Any], pack: Any, folder: Path, **drawn: Any) -> Written:
    return quantized(folder, write_codes(folder, config, pack, **drawn))


def packed(name: str, folder: Path) -> Written:
    settings, pack = FORMATS[name]
    return quantized(folder, write_folder(folder, settings, lambda _, shape: pack(shape)))


def side_file(folder: Path) -> Written:
    """Write a GPTQ model whose description is only in quantize_config.json, as AutoGPTQ wrote it."""
    written = codes(gptq_config(sym=False), pack_gptq(), folder)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    config(folder, quantization_config=...)
    (folder / "quantize_config.json").write_text(json.dumps(described))
    return written


def fp8(folder: Path) -> Written:
    def pack(_: str, shape: tuple[int, int]) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        stored, scale = draw_fp8(shape[0], shape), np.array(0.005, np.float32)
        return {"weight": stored, "weight_scale": scale}, stored.astype(np.float32) * scale

    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    return quantized(folder, write_folder(folder, settings, pack))


def gpt_oss(folder: Path) -> Written:
    """Write mxfp4 experts as they were published; transformers dequantizes them."""
    values = write_gpt_oss(folder, eos_token_id=EOS)
    save_tiny_tokenizer(folder)

    def original() -> Any:
        original_model = build_tiny_model("gpt_oss", num_hidden_layers=1, eos_token_id=EOS)
        original_model.load_state_dict({n: torch.from_numpy(a) for n, a in values.items()}, strict=False)
        return original_model

    return Written(folder, original)


def gguf(folder: Path, type_: str = "F32", rope: Mapping[str, Any] | None = None, **more: Any) -> Written:
    """Write a GGUF file with the tokenizer of `tests.models`; its original is what transformers reads.

    Args:
        rope: Parameters of the rotary embedding, which transformers does not read.
    """
    settings = save_tiny_tokenizer(folder / "tokenizer")
    stored = json.loads((settings / "tokenizer.json").read_text())["model"]
    used = sorted(stored["vocab"], key=stored["vocab"].__getitem__)
    tokens = used + [f"<unused{i}>" for i in range(len(used), VOCAB_SIZE)]
    facts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(used) - 3) + [3] * (len(tokens) - len(used)),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in stored["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": (settings / "chat_template.jinja").read_text(),
    }
    options = {"kind": Type[type_], "vocabulary": False, "deviation": 0.15, **more}
    options["facts"] = facts | options.get("facts", {})
    write_gguf(folder / "m.gguf", **options)

    def original() -> Any:
        from transformers import AutoModelForCausalLM

        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
        if rope is None:
            return read
        read.config.rope_parameters = {"rope_theta": 1e4, **rope}
        scaled = type(read)(read.config)
        scaled.load_state_dict(read.state_dict())
        return scaled

    return Written(folder / "m.gguf", original, settings)


def gguf_part(folder: Path) -> Written:
    """Write the first of two parts, but not the second."""
    written = gguf(folder, facts={"split.no": 0, "split.count": 2, "split.tensors.count": 40})
    return Written(written.model.rename(folder / "m-00001-of-00002.gguf"))


def adapter(folder: Path, **fields: Any) -> Written:
    """Write a base with a LoRA adapter of rank 4; its original has the product added in float64."""
    base, lora = model(folder / "base"), save_adapter(folder / "lora", on_q(), **fields)
    scale = 8.0 if fields.get("use_rslora") else 4.0

    def original() -> Any:
        original_model = build_tiny_model("llama", eos_token_id=EOS)
        state = original_model.state_dict()
        for name in [name for name in state if "q_proj" in name]:
            change = scale * product(on_q(), name.removesuffix(".weight"))
            state[name] = (state[name].double() + torch.from_numpy(change)).float()
        original_model.load_state_dict(state)
        return original_model

    return Written(base, original, base, {"adapter": str(lora)})


def other_base(folder: Path) -> Written:
    base, lora = model(folder / "base", num_hidden_layers=2), save_adapter(folder / "lora", on_q())
    return Written(base, options={"adapter": str(lora)})


def adapter_alone(folder: Path) -> Written:
    return Written(save_adapter(folder, on_q()))


def own_template(folder: Path) -> Written:
    save_model(folder, chat_template=REPLACE)
    (folder / "own.jinja").write_text(CHAT)
    return Written(folder, options={"chat_template": folder / "own.jinja"}, template=CHAT)


def by_token_ids(kind: str, folder: Path) -> Written:
    replace_tokenizer(save_model(folder), kind)
    return Written(folder, options={"token_ids": True})


def in_shards(folder: Path, damage: Callable[[list[Path]], None]) -> Written:
    """Write a model in several files, some of which are changed."""
    model(folder, max_shard_size=150_000)
    damage(sorted(folder.glob("model-*.safetensors")))
    return Written(folder)


def repeat_tensor(shards: list[Path]) -> None:
    """Copy a tensor of the first file into the last, with other values."""
    first, last = load_file(shards[0]), load_file(shards[-1])
    name = next(iter(first))
    save_file(last | {name: first[name] + 1}, shards[-1], {"format": "pt"})


def integers(stored: Tensors) -> Tensors:
    """Store codes and scales of 8 bits without a description."""
    changed_tensors = dict(stored)
    for name in [name for name in stored if "_proj" in name]:
        scale = stored[name].abs().amax(1, keepdim=True) / 127
        changed_tensors[name] = (stored[name] / scale).round().to(torch.int8)
        changed_tensors[f"{name}_scale"] = scale
    return changed_tensors


def without_number(stored: Tensors) -> Tensors:
    broken = stored[f"{PROJECTION}.weight"].clone()
    broken[3, 5] = float("nan")
    return stored | {f"{PROJECTION}.weight": broken}


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def added(name: str, *shape: int) -> Callable[[Path], None]:
    return partial(tensors, lambda stored: stored | {name: torch.ones(shape)})


def wrapped(folder: Path) -> Written:
    """Write a model that was saved with the wrapper of data-parallel training around it."""
    model(folder)
    tensors(lambda stored: {f"module.{name}": value for name, value in stored.items()}, folder)
    return Written(folder, partial(build_tiny_model, "llama", eos_token_id=EOS))


def lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def random_merges(folder: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]
    config(folder, "tokenizer.json", model=stored | {"dropout": 0.1})


def stored_cosines(stored: Tensors) -> Tensors:
    return stored | {f"{PROJECTION.removesuffix('q_proj')}rotary_emb.cos_cached": torch.ones(1, 1, 256, 16)}
