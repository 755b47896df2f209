"""Compare tokenizer and chat template of an artifact with the original's."""

import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmc.artifact.store.codec import TextCodec
from llmc.artifact.text import text_kinds
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Family, Metric
from llmc.errors import ParityError
from llmc.validate.decoding import compare_ids, compare_streams, quoted
from llmc.validate.measure import measure, measured, unmeasured
from llmc.validate.served import ServedTokenizer
from llmc.validate.sides import Side, artifact_sides, load_own, original_side, render_messages

#: Texts on which tokenizers are known to disagree.
HARD_TEXTS = (
    "",
    " ",
    "  two  spaces ",
    "tab\tand\nline\r\nend\n\n",
    "1234567890 3.14159 1,000,000",
    "naïve café, Straße, ÆØÅ",
    "日本語のテキスト 中文 한국어",
    "مرحبا שלום",
    "🙂👩‍👩‍👧‍👦 x̄",
    unicodedata.normalize("NFD", "résumé"),
    "def f(x):\n    return {'a': [x ** 2]}",
    "http://example.org/a?b=c&d=%20#e",
    "CamelCase snake_case kebab-case",
    "I'll you're don't WE'VE",
    " a leading space",
    "x\u0301y pH NaOH eBay",
    "हिन्दी ไทย",
)
#: Number of characters in each encoded piece of the evaluation text, and number of pieces.
PIECE = 400
PIECES = 24
#: Maximum number of differences that a report describes.
_REPORTED = 3
#: Minimum number of texts that are compared.
FEWEST = 30

CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Name three rivers."},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n"}),
    (
        {"role": "user", "content": "  Hi "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "<b>1 < 2</b> & 'so'"},
    ),
    ({"role": "user", "content": 'He said "naïve 日本 🙂" \\\\ {{ x }}'},),
)
_CALL = {"name": "find_river", "arguments": {"country": "Norway", "longest": True}}
#: Conversations with messages of tools, which are compared only between transformers' tokenizers.
TOOL_CONVERSATIONS: tuple[tuple[dict[str, Any], ...], ...] = (
    (
        {"role": "user", "content": "Which river?"},
        {"role": "tool", "name": "find_river", "content": "Glomma"},
    ),
    (
        {"role": "user", "content": "Which river?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _CALL}]},
        {"role": "tool", "name": "find_river", "content": '{"river": "Glomma"}'},
        {"role": "assistant", "content": "The Glomma."},
        {"role": "user", "content": "Thanks."},
    ),
)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "find_river",
            "description": "Find a river.",
            "parameters": {
                "type": "object",
                "properties": {"country": {"type": "string", "description": "Where."}},
                "required": ["country"],
            },
        },
    },
)


def sample_texts(tokenizer: Any, text: str, prompts: Sequence[str]) -> list[str]:
    """Collect texts that show how a tokenizer works: hard ones, prompts, pieces of `text`, special tokens.

    Texts with characters that the tokenizer lacks are left out; if few texts remain, texts of the tokenizer's
    own tokens take their place.

    Args:
        tokenizer: The original's tokenizer.
        text: The evaluation text.
    """
    step = max(PIECE, len(text) // PIECES)
    pieces = [text[at : at + PIECE] for at in range(0, len(text), step)]
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    tokens = dict.fromkeys([*tokenizer.all_special_tokens[:8], *added[:4], *added[-4:]])
    specials = [f"a{token} b{token}" for token in tokens]
    texts = [t for t in (*HARD_TEXTS, *prompts, *pieces, *specials) if represents(tokenizer, t)]
    if len(texts) >= FEWEST:
        return texts
    return [*texts, *(t for t in _own_texts(tokenizer) if represents(tokenizer, t))]


def _own_texts(tokenizer: Any) -> list[str]:
    """Draw texts of tokens from the vocabulary, the same every time."""
    import random

    draw = random.Random(0)
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return [tokenizer.decode(draw.choices(ids, k=12)) for _ in range(FEWEST)]


def written_special_tokens(tokenizer: Any) -> list[str]:
    """Return the special tokens of a transformers tokenizer as they are written, including unnamed ones."""
    added = tokenizer.added_tokens_decoder.values()
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)]))


def compare_texts(
    original: Side, sides: Sequence[Side], texts: Sequence[str], special: Sequence[str]
) -> dict[str, str]:
    """Describe by text what differs from the original in its tokens, or in the text decoded from them.

    Args:
        special: The original's special tokens, as they are written.

    Raises:
        ParityError: A side cannot encode or decode a text.
    """
    different = {}
    for text in texts:
        golden, kinds = original.encode(text), text_kinds(text, special)
        back = original.decode(golden)
        wrong = []
        for side in sides:
            if kinds & side.exceptions:
                continue
            if (ids := side.encode(text)) != golden:
                wrong.append(f"{side.name}: {ids}")
            elif back and (decoded := side.decode(golden)) != back:
                wrong.append(f"{side.name} decodes it as {quoted(decoded)}, the original as {quoted(back)}")
        if wrong:
            different[text] = f"{quoted(text)} is {golden} in the original; {'; '.join(wrong)}"
    return different


def compare_chats(
    original: Side, sides: Sequence[Side], known: Callable[[str], bool]
) -> tuple[int, list[str]]:
    """Count conversations that the original's template accepts, and describe what differs, a sentence each.

    Args:
        known: Whether the original's vocabulary has the characters of a text; see `represents`.

    Raises:
        ParityError: A side cannot render the template.
    """
    different, count = [], 0
    for messages in CONVERSATIONS:
        for ask in (True, False):
            golden = original.render(messages, ask) if original.render is not None else None
            if golden is None:  # the template refuses this conversation, for instance a system message
                continue
            count += 1
            ids = original.encode_rendered(golden)
            for side in sides:
                if side.render is not None and (rendered := side.render(messages, ask)) != golden:
                    different.append(f"{side.name} renders {rendered!r}, the original {golden!r}")
                    break
                if known(golden) and (tokens := side.encode_rendered(golden)) != ids:
                    different.append(f"{golden!r} is {ids} in the original; {side.name}: {tokens}")
                    break
    return count, different


def compare_tools(original: Any, own: Any) -> tuple[int, list[str]]:
    """Count conversations with tools that the original's template accepts, and describe what differs.

    Args:
        original: The original's tokenizer, by transformers.
        own: The tokenizer of the artifact's files.
    """
    different, count = [], 0
    conversations = [(messages, None) for messages in TOOL_CONVERSATIONS]
    for messages, tools in (*conversations, *((m, TOOLS) for m in (CONVERSATIONS[0], *TOOL_CONVERSATIONS))):
        for ask in (True, False):
            golden = render_messages(original, messages, ask, tools)
            if golden is None:
                continue
            count += 1
            if (rendered := render_messages(own, messages, ask, tools)) != golden:
                different.append(f"with tools transformers renders {rendered!r}, the original {golden!r}")
    return count, different


def measure_tokens(
    folder: Path,
    codec: TextCodec,
    served: ServedTokenizer | None,
    tokenizer: Any,
    text: str,
    prompts: Sequence[str],
    where: str,
    files: Sequence[str] = (),
) -> tuple[Measurement, ...]:
    """Measure TOKENIZER_EQUAL and CHAT_EQUAL: shares of texts and of conversations that equal the original's.

    Every way that the artifact offers is compared with the original; see `artifact_sides` and `sample_texts`.
    A vocabulary that differs in any token, a run of ids with another text, a text that streams differently
    and a file that differs each count as a text that differs.

    Args:
        codec: The artifact's tokenizer, as `llmc run` and engines use it.
        served: onnxruntime-genai's tokenizer; None if it does not serve the artifact's text.
        tokenizer: The original's transformers tokenizer.
        text: The evaluation text, of which pieces are encoded.
        where: The runtime that reads the artifact.
        files: Differences of its files from what a build writes, a sentence each.
    """

    def take() -> tuple[Measurement, ...]:
        own = load_own(folder)
        sides = artifact_sides(own, codec, served)
        equal = partial(_tokenizer, own, sides, codec, tokenizer, texts, where, files)
        chat = partial(_chat, own, sides, codec, tokenizer, where)
        return (
            *measure((Metric.TOKENIZER_EQUAL,), where, lambda: (equal(),)),
            *measure((Metric.CHAT_EQUAL,), where, lambda: (chat(),)),
        )

    texts = sample_texts(tokenizer, text, prompts)
    return measure(Family.TOKENS.metrics, where, take)


def _tokenizer(
    own: Any,
    sides: Sequence[Side],
    codec: TextCodec,
    tokenizer: Any,
    texts: Sequence[str],
    where: str,
    files: Sequence[str],
) -> Measurement:
    original = original_side(tokenizer)
    by_text = compare_texts(original, sides, texts, written_special_tokens(tokenizer))
    ids = sorted(set(tokenizer.get_vocab().values()))
    different = [*files, *by_text.values(), *compare_ids(original, sides, ids)]
    different += compare_streams(sides, [original.encode_rendered(text) for text in texts])
    unequal = sorted(set(own.get_vocab().items()) ^ set(tokenizer.get_vocab().items()))
    if unequal:
        different.append(
            f"the vocabulary differs: {unequal[0][0]!r} with id {unequal[0][1]} is in only one of the two"
        )
    read = f"{len(texts)} texts and {len(ids):,} ids"
    detail = "; ".join([read, *different[:_REPORTED], *codec.record.describe()])
    return measured(Metric.TOKENIZER_EQUAL, 1 - min(1.0, len(different) / len(texts)), detail, where)


def _chat(own: Any, sides: Sequence[Side], codec: TextCodec, tokenizer: Any, where: str) -> Measurement:
    count, different = compare_chats(original_side(tokenizer), sides, partial(represents, tokenizer))
    more, otherwise = compare_tools(tokenizer, own)
    count, different = count + more, [*different, *otherwise]
    if not count:
        if codec.record.chat or any(_renders(side) for side in sides):
            return measured(
                Metric.CHAT_EQUAL, 0.0, "the artifact has a chat template, but the original has none", where
            )
        status = MeasurementStatus.NOT_APPLICABLE
        return unmeasured(Metric.CHAT_EQUAL, status, "the original has no chat template", where)
    if not codec.record.chat:
        return measured(
            Metric.CHAT_EQUAL, 0.0, "the original has a chat template, but llmc run uses none", where
        )
    detail = "; ".join([f"{count} conversations", *different[:1]])
    if codec.record.chat_template is not None:
        detail += "; with the chat template of the build, which replaces the original's"
    return measured(Metric.CHAT_EQUAL, 1 - len(different) / count, detail, where)


def _renders(side: Side) -> bool:
    """Return whether a side renders a conversation."""
    try:
        return side.render is not None and side.render(CONVERSATIONS[0], True) is not None
    except ParityError:
        return False


def represents(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer reproduces a text, except for spaces and compatibility characters."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    back = tokenizer.decode(ids)
    plain = [unicodedata.normalize("NFKC", t).casefold().replace(" ", "") for t in (text, back)]
    return plain[0] == plain[1]
