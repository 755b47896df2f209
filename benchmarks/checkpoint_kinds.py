"""Define small checkpoints of every kind that `checkpoints.py` judges, and what a build must do with each.

A checkpoint that must build has an original: a transformers model that llmc's readers had no part in. A
checkpoint that must be refused has an expression for its cause, which the refusal must match.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.checkpoint.quantized_folders import (
    compressed_config,
    draw_fp8,
    gptq_config,
    pack_awq,
    pack_compressed,
    pack_gptq,
    write_codes,
    write_folder,
)
from tests.checkpoint.test_adapter import on_q, product, save_adapter
from tests.checkpoint.test_quantized_formats import FORMATS, write_gpt_oss
from tests.checkpoint.tiny_gguf import write_gguf
from tests.models import (
    EOS,
    MULTIMODAL_TYPES,
    VOCAB_SIZE,
    build_tiny_model,
    longrope,
    save_tiny_model,
    save_tiny_tokenizer,
    tiny_multimodal_fields,
)
from tests.texts import CHAT, around, edit, replace_tokenizer, save_model

WEIGHTS = "model.safetensors"
PROJECTION = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


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


@dataclass(frozen=True)
class Kind:
    """The definition of a checkpoint, and of what a build must do with it.

    Args:
        name: Group and name, separated by a slash.
        write: Writes the checkpoint into an empty folder.
        refused: Expression that the refusal matches; empty if the checkpoint must build.
        told: Expression that one of the build's notes matches; empty for none.
        target: Name of the target.
    """

    name: str
    write: Callable[[Path], Written]
    refused: str = ""
    told: str = ""
    target: str = "cpu-fp32"


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


REPLACE = "{% for m in messages %}{{ m.content.replace('a', 'b') }}{% endfor %}"
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
GGUF_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
GGUF_YARN |= {"rope.scaling.original_context_length": 64}
GGUF_LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTED = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "T"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ROTATED = {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}
GROUPED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
LOOK_AHEAD = {"type": "Split", "pattern": {"Regex": r"(?<=\d)(?=(\d{3})+$)"}, "behavior": "Isolated"}
BIAS = f"{PROJECTION}.bias"

KINDS: tuple[Kind, ...] = (
    *(
        Kind(f"model/{name}", partial(whole, name))
        for name in ("llama", "qwen2", "gemma2", "gemma3_text", "phi3", "gpt2", "mixtral")
    ),
    Kind("model/on cpu-int8-compiled", partial(whole, "llama"), target="cpu-int8-compiled"),
    *(
        Kind(f"multimodal/{name}", partial(multimodal, name), told="^text only: ")
        for name in MULTIMODAL_TYPES
    ),
    Kind("multimodal/mllama", partial(changed, partial(config, model_type="mllama")), "cross-attention"),
    Kind("rope/linear", partial(rope, type="linear", factor=4.0)),
    Kind("rope/yarn", partial(rope, rope_type="yarn", **YARN)),
    Kind("rope/llama3", partial(rope, **LLAMA3, original_max_position_embeddings=64)),
    Kind("rope/longrope", partial(whole, "phi3", rope_parameters=longrope(64))),
    Kind("rope/dynamic", partial(rope, context=128, type="dynamic", factor=2.0)),
    Kind("rope/theta of 0", partial(changed, partial(config, rope_theta=0.0)), "rope_theta"),
    Kind("rope/unknown", partial(rope, type="su2", factor=2.0), "rope_type su2"),
    Kind(
        "rope/two types", partial(rope, type="linear", rope_type="yarn", factor=4.0), "type linear and rope_"
    ),
    Kind("text/<s> before it", partial(text, partial(around, single="<s> $A"))),
    Kind("text/</s> after it", partial(text, partial(around, single="<s> $A </s>"))),
    Kind("text/llama 2", partial(text, partial(replace_tokenizer, kind="llama2")), told="begin with a space"),
    Kind("text/gemma", partial(text, partial(replace_tokenizer, kind="gemma"))),
    Kind("text/two templates", partial(text, lambda _: None, chat_template=LISTED), told="default is used"),
    Kind("text/template null", partial(text, lambda _: None, chat_template=None)),
    Kind("text/class null", partial(text, lambda _: None, tokenizer_class=None)),
    Kind("text/no settings", partial(text, lambda folder: (folder / "tokenizer_config.json").unlink())),
    Kind("text/template empty", partial(text, lambda _: None, chat_template="")),
    Kind("text/template without end", partial(text, lambda _: None, chat_template=ENDLESS), "does not end"),
    Kind(
        "text/template of gigabytes", partial(text, lambda _: None, chat_template="{{ 'a' * 10**10 }}"), "GiB"
    ),
    Kind("text/random merges", partial(text, random_merges), "dropout"),
    Kind("text/template's method", partial(text, lambda _: None, chat_template=REPLACE), "method: replace"),
    Kind(
        "text/template's syntax", partial(text, lambda _: None, chat_template="{{ messages"), "TemplateSyntax"
    ),
    Kind("text/--chat-template", own_template),
    *(
        Kind(f"text/{kind}", partial(text, partial(replace_tokenizer, kind=kind)), f"(?i){kind}")
        for kind in ("unigram", "wordlevel", "wordpiece")
    ),
    Kind("text/--token-ids", partial(by_token_ids, "wordlevel"), told="does not serve its text"),
    Kind(
        "text/look-ahead",
        partial(text, partial(config, file="tokenizer.json", pre_tokenizer={**LOOK_AHEAD, "invert": False})),
        "onnxruntime-genai .*Split",
    ),
    Kind(
        "text/remote class",
        partial(
            text, lambda _: None, tokenizer_class="Remote", auto_map={"AutoTokenizer": ["x.Remote", None]}
        ),
        "class Remote of code",
    ),
    Kind(
        "text/ids beyond the embedding",
        partial(changed, save_tiny_tokenizer, vocab_size=100),
        "embedding.*100",
    ),
    Kind(
        "text/settings of generation",
        partial(changed, partial(config, file="generation_config.json", num_beams=4, suppress_tokens=[7])),
        told="num_beams = 4, suppress_tokens",
    ),
    *(
        Kind(f"gguf/{name}", partial(gguf, type_=name, scale=8 if name.endswith("_K") else 2))
        for name in ("F16", "BF16", "Q8_0", "Q5_1", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL")
    ),
    Kind("gguf/Q4_1 on cpu-int4", partial(gguf, type_="Q4_1"), told="kept for", target="cpu-int4"),
    Kind("gguf/yarn", partial(gguf, facts=GGUF_YARN, rope={"rope_type": "yarn", **YARN})),
    Kind("gguf/linear", partial(gguf, facts=GGUF_LINEAR, rope={"rope_type": "linear", "factor": 4.0})),
    Kind("gguf/one part of two", gguf_part, "m-00002-of-00002"),
    Kind("gguf/unknown model", partial(gguf, architecture="madeup"), "architecture madeup"),
    Kind("gguf/lower case", partial(gguf, facts={"tokenizer.ggml.normalizer.lowercase": True}), "lowercase"),
    Kind("gguf/unknown cut", partial(gguf, facts={"tokenizer.ggml.pre": "made-up"}), "made-up"),
    Kind("gguf/unknown scaling", partial(gguf, facts={"rope.scaling.type": "made-up"}), "made-up"),
    Kind("codes/gptq", partial(codes, gptq_config(sym=False), pack_gptq())),
    Kind("codes/gptq by its side file", side_file),
    Kind("codes/gptq on cpu-int4", partial(codes, gptq_config(sym=False), pack_gptq()), target="cpu-int4"),
    Kind(
        "codes/awq",
        partial(codes, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, pack_awq),
    ),
    Kind(
        "codes/compressed-tensors",
        partial(
            codes,
            compressed_config(
                "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True
            ),
            pack_compressed,
            symmetric=True,
        ),
    ),
    Kind(
        "codes/of rotated activations",
        partial(
            codes,
            compressed_config("pack-quantized", **GROUPED) | {"transform_config": {"config_groups": ROTATED}},
            pack_compressed,
            symmetric=True,
        ),
        "rotated",
    ),
    Kind("codes/fp8", fp8),
    Kind("codes/gpt-oss mxfp4", gpt_oss),
    *(
        Kind(f"codes/{name}", partial(packed, name))
        for name in ("modelopt-nvfp4", "compressed-nvfp4", "nf4-nested", "llm-int8", "mlx-4")
    ),
    Kind(
        "codes/unknown method",
        partial(changed, partial(config, quantization_config={"quant_method": "exl3", "bits": 4})),
        "exl3",
    ),
    Kind("codes/described nowhere", partial(changed, partial(tensors, integers)), "quantiz"),
    Kind("adapter/merged", adapter, told="LoRA of rank 4"),
    Kind("adapter/rslora", partial(adapter, use_rslora=True), told="LoRA of rank 4"),
    Kind("adapter/of another base", other_base, r"layers\.2"),
    Kind(
        "adapter/of other layers",
        partial(adapter, target_modules=["q_proj"], layers_to_transform=[1]),
        "layers_to_transform",
    ),
    Kind("adapter/alone", adapter_alone, "--adapter"),
    Kind("adapter/beside a model", partial(changed, added(f"{PROJECTION}.lora_A.weight", 4, 64)), "adapter"),
    Kind("tensors/pointer of Git LFS", partial(changed, lfs_pointer), "git lfs pull"),
    Kind("tensors/stored cosines", partial(changed, partial(tensors, stored_cosines)), told="rotary tables"),
    Kind("tensors/a million layers", partial(changed, partial(config, num_hidden_layers=10**6)), "1,000,000"),
    Kind("tensors/another width", partial(changed, partial(config, hidden_size=128)), "hidden_size is 128"),
    Kind("tensors/of a wrapper", wrapped, told="wrapper"),
    Kind(
        "tensors/prediction of several",
        partial(changed, added("mtp.layers.0.up_proj.weight", 8, 8)),
        told="multi-token",
    ),
    Kind("tensors/biases switched off", partial(changed, added(BIAS, 64)), "attention_bias"),
    Kind("tensors/half of the layers", partial(changed, partial(config, num_hidden_layers=2)), "3 decoder"),
    Kind("tensors/without a place", partial(changed, added("v_head.summary.weight", 8, 8)), "v_head.summary"),
    Kind("tensors/not a number", partial(changed, partial(tensors, without_number)), f"{PROJECTION}.*row 3"),
    Kind("tensors/cut file", partial(changed, cut), f"{WEIGHTS}.*(truncated|incomplete|bytes)"),
    Kind("tensors/two values", partial(in_shards, damage=repeat_tensor), "model-0000"),
    Kind("tensors/missing shard", partial(in_shards, damage=lambda s: s[1].unlink()), "model-00002-of"),
    Kind(
        "purpose/classifier",
        partial(changed, partial(config, architectures=["LlamaForSequenceClassification"])),
        "classifies texts",
    ),
    Kind(
        "purpose/embedding model",
        partial(changed, lambda folder: (folder / "modules.json").write_text("[]")),
        "sentence-transformers",
    ),
    Kind("purpose/both directions", partial(changed, partial(config, is_causal=False)), "both directions"),
    Kind("purpose/encoder-decoder", partial(changed, partial(config, model_type="t5")), "encoder-decoder"),
)
