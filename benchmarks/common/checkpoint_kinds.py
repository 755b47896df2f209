"""List small checkpoints of every kind that `checkpoints.py` checks, and the required result of a build.

A checkpoint that must build has an original: a model loaded by transformers without llmc's readers. A
checkpoint that must be refused has an expression for the cause, which the error must contain.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.tiny_checkpoints import (
    GGUF_LINEAR,
    GGUF_YARN,
    PROJECTION,
    REPLACE,
    WEIGHTS,
    YARN,
    Written,
    adapter,
    adapter_alone,
    added,
    by_token_ids,
    changed,
    codes,
    config,
    cut,
    fp8,
    gguf,
    gguf_part,
    gpt_oss,
    in_shards,
    integers,
    lfs_pointer,
    multimodal,
    other_base,
    own_template,
    packed,
    random_merges,
    repeat_tensor,
    rope,
    side_file,
    stored_cosines,
    tensors,
    text,
    whole,
    without_number,
    wrapped,
)
from tests.checkpoint.quantized_folders import (
    compressed_config,
    gptq_config,
    pack_awq,
    pack_compressed,
    pack_gptq,
)
from tests.models import (
    MULTIMODAL_TYPES,
    longrope,
    save_tiny_tokenizer,
)
from tests.texts import CHAT, around, replace_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTED = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "T"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ROTATED = {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}
GROUPED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
LOOK_AHEAD = {"type": "Split", "pattern": {"Regex": r"(?<=\d)(?=(\d{3})+$)"}, "behavior": "Isolated"}
BIAS = f"{PROJECTION}.bias"


@dataclass(frozen=True)
class Kind:
    """A checkpoint and the required result of its build.

    Args:
        name: Group and name, separated by a slash.
        write: Function that writes it into an empty folder.
        refused: Expression that the refusal must match; empty if the checkpoint must build.
        told: Expression that one of the build's notes must match; empty for none.
        target: Name of the target.
    """

    name: str
    write: Callable[[Path], Written]
    refused: str = ""
    told: str = ""
    target: str = "cpu-fp32"


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
