"""Tokenizers of GGUF files: the ids of the original, written as llama.cpp's converter writes it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmc.artifact.store.cache import default_cache_folder
from llmc.checkpoint import gguf_tokenizer, gguf_tokenizer_files, open_checkpoint
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from llmc.checkpoint.tokenizer import load_tokenizer, require_tokenizer, save_tokenizer
from llmc.errors import CheckpointError, LlmcError, UnsupportedError
from tests.checkpoint.tiny_gguf import write_gguf

CORPUS = [
    "the quick brown fox jumps over the lazy dog; a compiler reads 12345 models and writes 100 programs.",
    "I'll say you're DON'T WE'VE 3.14 def f(x):\n    return x\n\n  HelloWorld naïve résumé 日本語 один два",
] * 4
TEXTS = (
    "Hello world's 12345 don't WE'VE\n\n  x",
    " lead and trail ",
    "naïve 日本 🙂 a\tb  \n \n c HelloWorld fooBar/// x ½ 1000000",
    "re\u0301sume\u0301 <think>x</think> <|end|>\nhi  </s>y",
)
SPECIAL = ["<pad>", "<s>", "</s>", "<\uff5cbegin\u2581of\uff5c>", "<|end|>"]
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))


def split(expression: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])


def byte_level(cut: Any, normalizer: Any = None, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level tokenizer with special tokens and one that is added without being special."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<think>"])
    return made


def facts_of(original: Tokenizer, **more: Any) -> dict[str, Any]:
    """Metadata as llama.cpp's converter makes it of a tokenizer.json."""
    count = original.get_vocab_size()
    tokens = [original.id_to_token(i) for i in range(count)]
    added = original.get_added_tokens_decoder()
    types = [(3 if added[i].special else 4) if i in added else 1 for i in range(count)]
    facts = {"tokens": tokens, "token_type": types, "bos_token_id": 1, "eos_token_id": 2} | more
    return {f"tokenizer.ggml.{key}": value for key, value in facts.items()}


def merges_of(original: Tokenizer) -> list[str]:
    merges = json.loads(original.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def assert_same(file: Path, original: Tokenizer, first: tuple[int, ...] = ()) -> None:
    tokenizer: Any = load_tokenizer(file)
    for text in TEXTS:
        expected = original.encode(text, add_special_tokens=False)
        ids = tokenizer(text).input_ids
        assert ids == [*first, *expected.ids], text
        assert tokenizer.decode(ids) == original.decode([*first, *expected.ids], skip_special_tokens=False)
    assert len(tokenizer) == original.get_vocab_size()


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
DEEPSEEK = pre_tokenizers.Sequence(
    [
        *(pre_tokenizers.Split(Regex(e), "isolated") for e in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")),
        pre_tokenizers.Split(Regex("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


@pytest.mark.parametrize(
    ("pre", "original", "first"),
    [
        ("gpt-2", byte_level(GPT2), ()),
        ("smollm", byte_level(DIGITS), ()),
        ("llama-bpe", byte_level(split(LLAMA3), ignore_merges=True), (1,)),
        ("dbrx", byte_level(split(LLAMA3)), ()),
        ("qwen2", byte_level(split(QWEN2), normalizers.NFC()), ()),
        ("deepseek-coder", byte_level(DEEPSEEK), ()),
    ],
)
def test_byte_level(pre: str, original: Tokenizer, first: tuple[int, ...], tmp_path: Path) -> None:
    facts = facts_of(original, model="gpt2", pre=pre, merges=merges_of(original))
    file = write_gguf(tmp_path / "x.gguf", vocabulary=False, facts=facts)
    assert_same(file, original, first)


def test_word_that_is_a_token_without_merges(tmp_path: Path) -> None:
    """Llama 3's vocabulary has words that no merge makes."""
    original = byte_level(split(LLAMA3), ignore_merges=True)
    merges = merges_of(original)
    cut = Tokenizer(models.BPE(original.get_vocab(), [], ignore_merges=True))
    cut.pre_tokenizer, cut.decoder = split(LLAMA3), decoders.ByteLevel()
    cut.add_special_tokens(SPECIAL)
    cut.add_tokens(["<think>"])
    facts = facts_of(original, model="gpt2", pre="llama-bpe", merges=merges[:1])
    tokenizer: Any = load_tokenizer(write_gguf(tmp_path / "x.gguf", vocabulary=False, facts=facts))
    assert tokenizer("the the").input_ids == [1, *cut.encode("the the").ids]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_the_text(name: str) -> None:
    text = "".join(TEXTS)
    pieces = gguf_tokenizer._splitter(PRE_TOKENIZERS[name]).pre_tokenize_str(text)
    assert decoders.ByteLevel().decode([piece for piece, _ in pieces]) == text


def sentencepiece(prefix: bool) -> tuple[Tokenizer, dict[str, Any]]:
    special = [*SPECIAL[:3], "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    made.train_from_iterator(["\u2581" + text.replace(" ", "\u2581") for text in CORPUS], trainer)
    rebuilt = Tokenizer(
        models.BPE(made.get_vocab(), [tuple(m.split(" ")) for m in merges_of(made)], byte_fallback=True)
    )
    rebuilt.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if prefix else "never", split=False
    )
    rebuilt.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    rebuilt.add_special_tokens(special[:4])
    rank = {merge.replace(" ", ""): i for i, merge in enumerate(merges_of(made))}
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    types = [3, 3, 3, 2, *[6] * 256, *[1] * (len(tokens) - 260)]
    scores = [float(-rank.get(token, 10**6)) for token in tokens]
    facts = {
        "model": "llama",
        "token_type": types,
        "scores": scores,
        "unknown_token_id": 3,
        "add_space_prefix": prefix,
    }
    return rebuilt, facts_of(made, **facts)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    original, facts = sentencepiece(prefix)
    assert_same(write_gguf(tmp_path / "x.gguf", vocabulary=False, facts=facts), original, (1,))


def test_unigram(tmp_path: Path) -> None:
    original = Tokenizer(models.Unigram())
    original.pre_tokenizer = pre_tokenizers.Metaspace()
    original.decoder = decoders.Metaspace()
    original.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    original.train_from_iterator(CORPUS, trainer)
    scores = [float(np.float32(score)) for _, score in json.loads(original.to_str())["model"]["vocab"]]
    flags = {"add_eos_token": False, "add_space_prefix": True, "remove_extra_whitespaces": True}
    facts = facts_of(original, model="t5", scores=scores, unknown_token_id=5, **flags)
    assert_same(write_gguf(tmp_path / "x.gguf", vocabulary=False, facts=facts), original)


@pytest.mark.parametrize(
    ("facts", "first", "last"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [250], []),
        ({"add_bos_token": True, "add_eos_token": True}, [250], [251]),
        ({"pre": "llama-bpe"}, [250], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_tokens_around_the_text(
    facts: dict[str, Any], first: list[int], last: list[int], tmp_path: Path
) -> None:
    named = {f"tokenizer.ggml.{key}": value for key, value in facts.items()}
    tokenizer: Any = load_tokenizer(write_gguf(tmp_path / "x.gguf", facts=named))
    assert tokenizer("ab").input_ids == [*first, 254, *last]
    assert len(tokenizer) == 256


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"pre": "kimi-k2"}, UnsupportedError, r"uses the pre-tokenizer kimi-k2 \(tokenizer\.ggml\.pre\)"),
        ({"pre": "lama-bpe"}, UnsupportedError, "uses the pre-tokenizer lama-bpe"),
        ({"model": "bert"}, UnsupportedError, "a tokenizer of the kind bert"),
        ({"model": "rwkv"}, UnsupportedError, "a tokenizer of the kind rwkv"),
        ({"model": "none"}, CheckpointError, "has no tokenizer"),
        ({"model": "llama"}, CheckpointError, r"without tokenizer\.ggml\.scores"),
        ({"add_sep_token": True}, UnsupportedError, r"has tokenizer\.ggml\.add_sep_token"),
        ({"normalizer.lowercase": True}, UnsupportedError, r"has tokenizer\.ggml\.normalizer\.lowercase"),
    ],
)
def test_what_is_not_built_is_refused_by_the_header(
    facts: dict[str, Any], error: type[LlmcError], message: str, tmp_path: Path
) -> None:
    named = {f"tokenizer.ggml.{key}": value for key, value in facts.items()}
    with pytest.raises(error, match=message) as caught:
        require_tokenizer(write_gguf(tmp_path / "x.gguf", facts=named))
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"bos_token_id": 400}, r"bos_token_id = 400 but only 256 tokens"),
        ({"tokens": ["a"] * 256}, "has the token 'a' twice"),
        ({"merges": ["a z"]}, "cannot be built: .*out of vocabulary"),
        ({"token_type": [1, 1]}, "256 tokens .* and 2 types"),
    ],
)
def test_vocabulary_that_contradicts_itself(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    named = {f"tokenizer.ggml.{key}": value for key, value in facts.items()}
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write_gguf(tmp_path / "x.gguf", facts=named))


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    facts = {
        "tokenizer.ggml.pre": "",
        "tokenizer.chat_template": "{{ 'x' }}",
        "tokenizer.chat_template.tools": "y",
        "tokenizer.ggml.some_new_flag": True,
    }
    file = write_gguf(tmp_path / "x.gguf", facts=facts)
    assert open_checkpoint(str(file)).notes == (
        "the GGUF names no pre-tokenizer, so text is split as llama.cpp does by default",
        "chat templates beside the default one are left out: tools",
        "tokenizer.ggml.some_new_flag of the GGUF is not applied",
    )
    assert load_tokenizer(file).chat_template == "{{ 'x' }}"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[GgufHeader]:
    calls: list[GgufHeader] = []
    build = gguf_tokenizer.build_tokenizer

    def counting(header: GgufHeader) -> Any:
        calls.append(header)
        return build(header)

    monkeypatch.setattr(gguf_tokenizer_files.gguf_tokenizer, "build_tokenizer", counting)
    return calls


def saved(file: Path, folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in save_tokenizer(file, folder, load_tokenizer(file), None)]


def test_tokenizer_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    file = write_gguf(tmp_path / "x.gguf")
    first = saved(file, tmp_path / "a")
    again = write_gguf(tmp_path / "y.gguf", facts={"context_length": 128})  # the same vocabulary
    assert saved(again, tmp_path / "b") == first
    assert len(calls) == 1
    load_tokenizer(write_gguf(tmp_path / "z.gguf", facts={"tokenizer.ggml.pre": "llama-bpe"}))
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [b"", b"damaged"])
def test_damaged_entry_is_built_again(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    file = write_gguf(tmp_path / "x.gguf")
    load_tokenizer(file)
    (entry,) = (default_cache_folder() / "tokenizer").iterdir()
    entry.write_bytes(damage)
    load_tokenizer(file)
    load_tokenizer(file)
    assert len(calls) == 2


def test_cache_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "taken"))
    assert len(load_tokenizer(write_gguf(tmp_path / "x.gguf"))) == 256
