"""Define how llama.cpp's pre-tokenizers split a text into words before byte-level BPE merges them.

Source: `llm_tokenizer_bpe` and `llama_vocab::impl::load` of llama.cpp for the names, the order of the
expressions and the flags; where llama.cpp rewrites an expression of a model's tokenizer.json, this module has
the model's own. Each expression splits the pieces left by the expressions before it, matches and gaps alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _SYMBOLS + _BLANKS
_QWEN2 = _CONTRACTIONS + _WORDS + r"|\p{N}" + _SYMBOLS + _BLANKS
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED = f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*"
_CASED_CONTRACTED = f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BLANKS
_GPT4O = _CASED_CONTRACTED + r"|\p{N}{1,3}" + _SLASHES
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_STOPS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _BLANKS
)
# Code points of cased letters as listed in the tokenizer.json of deepseek-llm; no Unicode class matches them.
_DEEPSEEK_LETTERS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 "
    "388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba "
    "1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 "
    "1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec "
    "1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 "
    "213c-213f 2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b "
    "a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f "
    "104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)


def _letters(ranges: str) -> str:
    """Return the character class of `FIRST-LAST` ranges of hexadecimal code points."""
    ends = [[chr(int(end, 16)) for end in part.split("-")] for part in ranges.split()]
    return "[" + "".join("-".join(pair) for pair in ends) + "]"


_WHITESPACE_STEPS = r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers for byte-level BPE.

    Args:
        splits: Expressions in the order in which they split the text.
        whole_words: Whether a word that is a token becomes that token, whatever the merges say
            (`ignore_merges`).
        begins: Whether a text gets the beginning-of-text token if the file does not say.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False

    @property
    def ends_as_gpt2(self) -> bool:
        """Whether the last expression is GPT-2's, which byte-level pre-tokenizers include."""
        return self.splits[-1] == _GPT2


_KINDS: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ): ("default",),
    PreTokenizer((_LLAMA3,), whole_words=True, begins=True): (
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "jina-v5-nano",
    ),
    PreTokenizer((_LLAMA3,)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    PreTokenizer(
        (
            _CONTRACTIONS
            + _WORDS
            + r"|\p{N}{1,3}"
            + _SYMBOLS
            + r"|\s*[\r\n]+"
            + _WHITESPACE_STEPS
            + r"|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        )
    ): ("jais-2",),
    PreTokenizer(
        (
            r"[\r\n]",
            r"\s?" + _letters(_DEEPSEEK_LETTERS) + "+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN_HANGUL,
            r"\p{N}+",
        )
    ): ("deepseek-llm",),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")): ("deepseek-coder",),
    PreTokenizer((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)): (
        "deepseek-v3",
        "hunyuan-dense",
        "joyai-llm",
        "hy_v4",
    ),
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    PreTokenizer((r"\p{N}", _GPT2)): (
        "starcoder",
        "refact",
        "command-r",
        "smollm",
        "codeshell",
        "exaone",
        "minerva-7b",
        "mellum2",
    ),
    PreTokenizer((_GPT2,)): (
        "gpt-2",
        "mpt",
        "olmo",
        "jais",
        "trillion",
        "granite-docling",
        "phi-2",
        "gigachat",
        "a.x-4.0",
        "mellum",
        "exaone4",
    ),
    PreTokenizer((_QWEN2,)): (
        "qwen2",
        "stablelm2",
        "hunyuan",
        "solar-open",
        "deepseek-r1-qwen",
        "kormo",
        "f2llmv2",
        "megrez",
        "grok-2",
    ),
    PreTokenizer(
        (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _BLANKS,)
    ): ("qwen35",),
    PreTokenizer((_STOPS,)): ("poro-chat", "bloom", "gpt3-finnish"),
    PreTokenizer((_STOPS, r"\p{N}")): ("viking",),
    PreTokenizer((_CASED + r"|\p{N}" + _SLASHES,), whole_words=True, begins=True): ("tekken",),
    PreTokenizer((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)): ("tiny_aya", "cohere2moe"),
    PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")): ("superbpe",),
    PreTokenizer(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): ("bailingmoe", "bailingmoe2", "llada-moe"),
    PreTokenizer((_CONTRACTIONS + _WORDS + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _BLANKS,)): ("seed-coder",),
    PreTokenizer((r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _SYMBOLS + _BLANKS,)): ("ufakzeka",),
    PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)): ("laguna",),
    PreTokenizer(
        (
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            + r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): ("exaone-moe",),
    PreTokenizer(
        (r"\p{N}{1,3}", _CONTRACTIONS + _WORDS + r"|\p{N}+" + _SYMBOLS + _BLANKS), whole_words=True
    ): ("minicpm5",),
}

#: llama.cpp's name, as stated in `tokenizer.ggml.pre` -> its pre-tokenizer.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {name: kind for kind, names in _KINDS.items() for name in names}
)
