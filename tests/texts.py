"""Checkpoints of tiny models with tokenizers of many kinds, each as people publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.models import save_tiny_model

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
_TEXT = ["the quick brown fox jumps over the lazy dog; a compiler reads a model and writes a program."]
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def save_model(folder: Path, rows: int = 400, **settings: Any) -> Path:
    """A tiny llama with the byte-level tokenizer of `tests.models`, and changed settings of it.

    Args:
        rows: Of its embedding.
        settings: Keys of tokenizer_config.json; `...` removes one.
    """
    save_tiny_model("llama", folder, tokenizer=True, vocab_size=rows)
    (folder / "chat_template.jinja").unlink()
    if settings:
        edit(folder / "tokenizer_config.json", **settings)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    data = json.loads(file.read_text(encoding="utf-8"))
    data |= changes
    kept = {key: value for key, value in data.items() if value is not ...}
    file.write_text(json.dumps(kept), encoding="utf-8")


def around(folder: Path, single: str) -> Path:
    """Let the tokenizer put special tokens around a text, such as `<s> $A </s>`."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(t, _SPECIAL.index(t)) for t in single.split() if t != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=special
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def replace_tokenizer(folder: Path, kind: str) -> Path:
    """Put a tokenizer of another kind into `folder`: unigram, wordlevel, wordpiece, llama2, gemma or nfc."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, name = _KINDS[kind]()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    return folder


def _unigram() -> tuple[Any, str]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer, "PreTrainedTokenizerFast"


def _word_level() -> tuple[Any, str]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer, "PreTrainedTokenizerFast"


def _word_piece() -> tuple[Any, str]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer, "PreTrainedTokenizerFast"


def _pieces() -> Any:
    """A BPE of pieces that begin with ▁, with a token for every byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [*_SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [t for t in trained["added_tokens"] if t["content"] in _SPECIAL]
    return Tokenizer.from_str(json.dumps(trained))


def _llama2() -> tuple[Any, str]:
    from tokenizers import decoders, normalizers, processors

    tokenizer = _pieces()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer, "LlamaTokenizer"


def _gemma() -> tuple[Any, str]:
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer, _ = _llama2()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer, "GemmaTokenizer"


def _nfc() -> tuple[Any, str]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer, "PreTrainedTokenizerFast"


_KINDS = {
    "unigram": _unigram,
    "wordlevel": _word_level,
    "wordpiece": _word_piece,
    "llama2": _llama2,
    "gemma": _gemma,
    "nfc": _nfc,
}
