"""Build the tokenizer that a GGUF file describes, for transformers.

A GGUF file has no tokenizer.json: it has tokens, scores or merges, token types and a few flags under
`tokenizer.*`. Sources: `llama_vocab::impl::load` of llama.cpp for their meaning and defaults,
`integrations.gguf.gguf_tokenizer_mapping` of transformers for the variants of SentencePiece.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from llmc.errors import CheckpointError, UnsupportedError, did_you_mean, first_lines, require_failure

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

_ORIGINAL = "compile the original Hugging Face checkpoint instead"
_TOKENS = "tokenizer.ggml.tokens"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_LEVEL, _SENTENCEPIECE, _UNIGRAM, _GEMMA4 = "gpt2", "llama", "t5", "gemma4"
_KINDS = (_BYTE_LEVEL, _SENTENCEPIECE, _UNIGRAM, _GEMMA4)
_NONE = ("none", "no_vocab")
_BLANK = "\u2581"
_GEMMAS = ("gemma", "gemma2", "gemma3")
_NFC = ("qwen2", "qwen35")  # their models' own tokenizers apply Unicode's composed form (NFC)

# Keys under `tokenizer.` that are read here, or that do not affect the ids of a text.
_KNOWN = re.compile(
    r"ggml\.(model|pre|tokens|token_type|token_type_count|scores|merges|precompiled_charsmap|\w+_token_ids?"
    r"|add_bos_token|add_eos_token|add_sep_token|add_space_prefix|remove_extra_whitespaces|version)"
    r"|chat_template(s|\.\w+)?|huggingface\.json|rwkv\.world"
)

#: Words in other keys that indicate a change of the text before it is split.
_CHANGES_TOKENS = re.compile("normaliz|lowercase|accents|whitespace|prefix|suffix|merges|fallback")


@dataclass(frozen=True)
class Special:
    """Tokens with a role by their text, None for a missing role, and whether they are added to a text."""

    bos: str | None
    eos: str | None
    unknown: str | None
    padding: str | None
    begins: bool
    ends: bool

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for the tokenizer classes of transformers."""
        return {
            "bos_token": self.bos,
            "eos_token": self.eos,
            "unk_token": self.unknown,
            "pad_token": self.padding,
            "add_bos_token": self.begins,
            "add_eos_token": self.ends,
        }


def has_vocabulary(header: GgufHeader) -> bool:
    """Return whether the file holds a tokenizer of any kind."""
    return _TOKENS in header.array_lengths and header.value("tokenizer.ggml.model") not in _NONE


def check_tokenizer(header: GgufHeader) -> None:
    """Refuse a tokenizer that cannot be built, judging by the header alone.

    Raises:
        CheckpointError: Parts of the vocabulary are missing.
        UnsupportedError: The kind of tokenizer, a pre-tokenizer or a flag is not supported.
    """
    file, kind = header.files[0], header.value("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise UnsupportedError(
            f"{file} holds a tokenizer of the kind {kind} (tokenizer.ggml.model); "
            f"supported are {', '.join(_KINDS)}",
            hint=_ORIGINAL,
        )
    needed = "merges" if kind in (_BYTE_LEVEL, _GEMMA4) else "scores"
    if f"tokenizer.ggml.{needed}" not in header.array_lengths:
        raise CheckpointError(
            f"{file} holds a tokenizer of the kind {kind} without tokenizer.ggml.{needed}", hint=_ORIGINAL
        )
    if kind == _BYTE_LEVEL:
        pre_tokenizer(header)
    refused = ["add_sep_token"]
    if kind == _SENTENCEPIECE:
        refused += ["remove_extra_whitespaces", "precompiled_charsmap"]
    keys = [f"tokenizer.ggml.{name}" for name in refused]
    keys += [key for key in _unknown(header) if _CHANGES_TOKENS.search(key) and header.metadata.get(key)]
    for key in keys:
        if header.value(key) or header.array_lengths.get(key):
            raise UnsupportedError(
                f"{file} has {key}, which llmc does not know how to apply to a tokenizer of the kind {kind}",
                hint=_ORIGINAL,
            )


def tokenizer_notes(header: GgufHeader) -> tuple[str, ...]:
    """Return sentences for the user about what the tokenizer leaves out or assumes."""
    notes = []
    if header.value("tokenizer.ggml.model") == _BYTE_LEVEL and not header.value("tokenizer.ggml.pre"):
        notes.append("the GGUF names no pre-tokenizer, so text is split as llama.cpp does by default")
    named = [key for key in header.spans if key.startswith("tokenizer.chat_template.")]
    if named:
        names = ", ".join(key.removeprefix("tokenizer.chat_template.") for key in named)
        notes.append(f"chat templates beside the default one are left out: {names}")
    notes += [f"{key} of the GGUF is not applied" for key in _unknown(header)]
    return tuple(notes)


def _unknown(header: GgufHeader) -> list[str]:
    """Return the keys of the tokenizer that are not read."""
    prefix = "tokenizer."
    own = [key for key in header.spans if key.startswith(prefix)]
    return [key for key in own if not _KNOWN.fullmatch(key.removeprefix(prefix))]


def pre_tokenizer(header: GgufHeader) -> PreTokenizer:
    """Return how a byte-level vocabulary splits text, by the pre-tokenizer name in the file.

    Raises:
        UnsupportedError: llama.cpp does not have that name, or this module does not implement it.
    """
    name = header.value("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{header.files[0]} uses the pre-tokenizer {name} (tokenizer.ggml.pre), which llmc does not have",
            hint=f"{_ORIGINAL}; {did_you_mean(name, PRE_TOKENIZERS)}",
        )
    return PRE_TOKENIZERS[name]


def build_tokenizer(header: GgufHeader) -> PreTrainedTokenizerBase:
    """Build the tokenizer of the file; takes seconds for a SentencePiece vocabulary.

    Raises:
        CheckpointError: The vocabulary is damaged or contradicts itself.
        UnsupportedError: As `check_tokenizer`.
    """
    check_tokenizer(header)
    tokens = _tokens(header)
    kinds = header.array("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{header.files[0]} has {len(tokens)} tokens (tokenizer.ggml.tokens) and {len(kinds)} types of "
            "tokens (token_type)",
            hint=_ORIGINAL,
        )
    special = _special(header, tokens)
    build = {
        _BYTE_LEVEL: _byte_level,
        _SENTENCEPIECE: _sentencepiece,
        _UNIGRAM: _unigram,
        _GEMMA4: _gemma4,
    }[header.value("tokenizer.ggml.model")]
    try:
        tokenizer = build(header, tokens, kinds, special)
    except BaseException as error:  # tokenizers raises a bare Exception, or panics
        require_failure(error)
        raise CheckpointError(
            f"the tokenizer of {header.files[0]} cannot be built: {first_lines(error)}", hint=_ORIGINAL
        ) from error
    template = header.value("tokenizer.chat_template")
    if template:
        tokenizer.chat_template = template
    return tokenizer


def _tokens(header: GgufHeader) -> list[str]:
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(header.array(_TOKENS))]
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise CheckpointError(f"{header.files[0]} has the token {repeated[0]!r} twice in its vocabulary")
    return tokens


def _special(header: GgufHeader, tokens: list[str]) -> Special:
    """Return the tokens with a role and the flags, with llama.cpp's defaults."""
    kind = header.value("tokenizer.ggml.model")
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == _SENTENCEPIECE else {}
    defaults |= {"eos": 1, "unknown": 2} if kind == _UNIGRAM else {}

    def text(role: str) -> str | None:
        key = f"tokenizer.ggml.{role}_token_id"
        index = header.value(key)
        if index is not None and index >= len(tokens):
            raise CheckpointError(f"{header.files[0]} has {key} = {index} but only {len(tokens)} tokens")
        index = defaults.get(role, -1) if index is None else index
        return tokens[index] if 0 <= index < len(tokens) else None

    bos, eos = text("bos"), text("eos")
    begins = kind == _SENTENCEPIECE or (kind == _BYTE_LEVEL and pre_tokenizer(header).begins)
    stated = {side: header.value(f"tokenizer.ggml.add_{side}_token") for side in ("bos", "eos")}
    for side, token in (("bos", bos), ("eos", eos)):
        if stated[side] and token is None:
            raise CheckpointError(
                f"{header.files[0]} has tokenizer.ggml.add_{side}_token but no {side}_token_id",
                hint=_ORIGINAL,
            )
    if kind == _GEMMA4:  # the reference tokenizer adds none, since the chat template begins with it
        stated["bos"] = False
    return Special(
        bos=bos,
        eos=eos,
        unknown=text("unknown"),
        padding=text("padding"),
        begins=bos is not None and (begins if stated["bos"] is None else bool(stated["bos"])),
        ends=eos is not None and (kind == _UNIGRAM if stated["eos"] is None else bool(stated["eos"])),
    )


def _byte_level(
    header: GgufHeader, tokens: list[str], kinds: list[int], special: Special
) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, normalizers

    how = pre_tokenizer(header)
    model = models.BPE(
        vocab=_ids(tokens),
        merges=_merges(header),
        continuing_subword_prefix="",
        end_of_word_suffix="",
        fuse_unk=False,
        ignore_merges=how.whole_words,
    )
    tokenizer = Tokenizer(model)
    if header.value("tokenizer.ggml.pre") in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _splitter(how)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, kinds)
    return _wrap(tokenizer, special)


def _wrap(tokenizer: Tokenizer, special: Special) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = kind(tokenizer_object=tokenizer, **special.arguments())
    return wrapped


def _splitter(how: PreTokenizer) -> Any:
    """Build the splits, as tokenizers' own types where they exist, since more runtimes support them."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if split == r"\p{N}"
        else pre_tokenizers.Split(Regex(split), behavior="isolated")
        for split in how.splits
    ]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if how.ends_as_gpt2:
        steps.pop()
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([*steps, last]) if steps else last


def _sentencepiece(
    header: GgufHeader, tokens: list[str], kinds: list[int], special: Special
) -> PreTrainedTokenizerBase:
    from tokenizers import normalizers
    from transformers import GemmaTokenizer, LlamaTokenizer

    prefix = header.value("tokenizer.ggml.add_space_prefix")
    if header.architecture in _GEMMAS and not prefix:
        return _gemma(header, tokens, kinds, special, GemmaTokenizer)
    llama_tokenizer: Any = LlamaTokenizer(
        vocab=_ids(tokens),
        merges=_implied_merges(tokens, kinds, _scores(header, tokens)),
        add_prefix_space=prefix is not False,
        **special.arguments(),
    )
    backend = llama_tokenizer.backend_tokenizer
    _add_tokens(backend, tokens, kinds)
    if header.architecture != "phi3" or prefix is False:
        llama: PreTrainedTokenizerBase = llama_tokenizer
        return llama
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
    backend.pre_tokenizer = None
    return _wrap(backend, special)


def _gemma(
    header: GgufHeader, tokens: list[str], kinds: list[int], special: Special, tokenizer_class: Any
) -> PreTrainedTokenizerBase:
    """Build Gemma's variant: no leading space, and tokens of several spaces that the file spells as spaces.

    Its scores do not order the tokens; their ids do, including those of tokens of spaces.
    """
    spelled = [_BLANK * len(token) if " " in token and not token.strip() else token for token in tokens]
    if "tokenizer.ggml.merges" in header.array_lengths:
        merges = _merges(header)
    else:
        merges = _implied_merges(spelled, [_NORMAL] * len(kinds), [-float(i) for i in range(len(tokens))])
    mask = "<mask>" if "<mask>" in spelled else None  # else the class would add one after the vocabulary
    arguments = {"vocab": _ids(spelled), "merges": merges, "mask_token": mask, **special.arguments()}
    tokenizer: PreTrainedTokenizerBase = tokenizer_class(**arguments)
    backend: Any = tokenizer
    whole = [
        _NORMAL if kind == _USER_DEFINED and spelling != token else kind
        for token, spelling, kind in zip(tokens, spelled, kinds, strict=True)
    ]
    _add_tokens(backend.backend_tokenizer, spelled, whole)
    return tokenizer


def _gemma4(
    header: GgufHeader, tokens: list[str], kinds: list[int], special: Special
) -> PreTrainedTokenizerBase:
    from transformers import GemmaTokenizer

    return _gemma(header, tokens, kinds, special, GemmaTokenizer)


def _unigram(
    header: GgufHeader, tokens: list[str], kinds: list[int], special: Special
) -> PreTrainedTokenizerBase:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = _scores(header, tokens)
    unknown = None if special.unknown is None else tokens.index(special.unknown)
    model = models.Unigram(
        list(zip(tokens, scores, strict=True)), unk_id=unknown, byte_fallback=_BYTE in kinds
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    charsmap = header.array("tokenizer.ggml.precompiled_charsmap")
    if charsmap:
        steps.append(normalizers.Precompiled(bytes(byte & 0xFF for byte in charsmap)))
    if header.value("tokenizer.ggml.remove_extra_whitespaces"):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "never" if header.value("tokenizer.ggml.add_space_prefix") is False else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    _add_tokens(tokenizer, tokens, kinds)
    return _wrap(tokenizer, special)


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Keep whole the tokens that the file marks as control, unknown or user-defined, under their ids."""
    from tokenizers import AddedToken

    marked: list[AddedToken] = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in marked if token.special])
    tokenizer.add_tokens([token for token in marked if not token.special])


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _merges(header: GgufHeader) -> list[tuple[str, str]]:
    """Read the merges of the file; a space that belongs to a token is written as another character."""
    merges = []
    for text in header.array("tokenizer.ggml.merges"):
        left, space, right = text[1:].partition(" ")
        if not space:
            raise CheckpointError(f"{header.files[0]} has {text!r} as a merge of two tokens")
        merges.append((text[:1] + left, right))
    return merges


def _scores(header: GgufHeader, tokens: list[str]) -> list[float]:
    scores = header.array("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointError(f"{header.files[0]} has {len(tokens)} tokens and {len(scores)} scores")
    return scores


def _implied_merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Derive the merges that SentencePiece's scores imply: best token first, in file order for equal scores.

    Every way to join two normal tokens into a normal token is a merge.
    """
    plain = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (0, _NORMAL)}
    order = sorted(range(len(tokens)), key=lambda index: -scores[index])
    merges: list[tuple[str, str]] = []
    for index in order:
        token = tokens[index]
        if len(token) > 1 and token in plain:
            cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
            pairs = [(left, right) for left, right in cuts if left in plain and right in plain]
            pairs.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
            merges += pairs
    return merges
