"""An artifact folder that onnxruntime-genai serves: decoder, genai_config.json, tokenizer files."""

import json
from pathlib import Path
from typing import Any

from llmc.graph.interface import Interface

from .decoder import Variant, write_decoder

END = 2


def tiny_tokenizer() -> Any:
    """A byte-level BPE of 256 tokens without merges, the first three special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 256 - 3]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def write_artifact(model: Any, folder: Path, variant: Variant, *, share_buffer: bool) -> Interface:
    interface = write_decoder(model, folder, variant)
    tiny_tokenizer().save_pretrained(folder)
    config = model.config
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
    stated = {
        "model": {
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "bos_token_id": 1,
            "eos_token_id": END,
            "pad_token_id": END,
            "decoder": decoder,
        },
        "search": {"max_length": 160, "do_sample": False, "past_present_share_buffer": share_buffer},
    }
    (folder / "genai_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return interface
