"""Tokenizer and chat template of an artifact against those of the original."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmc.artifact.text import Messages, TextCodec, TextKind, text_kinds
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ParityError
from llmc.validate.measure import measure, measured, unmeasured
from llmc.validate.served import ServedTokenizer

#: What tokenizers are known to disagree on.
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
#: Characters of the evaluation text in each piece that is encoded, and how many pieces.
PIECE = 400
PIECES = 24
#: Texts that are compared at least.
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


@dataclass(frozen=True)
class Side:
    """One of the ways from text to tokens and back.

    Args:
        name: What reads the tokenizer's files.
        encode: Token ids of a text, with what stands before and after it.
        decode: The text of token ids, without special tokens.
        render: The chat template's text for messages, with the beginning of an answer if the second argument
            says so; None where the template refuses them.
        encode_rendered: Token ids of such a text.
        exceptions: Kinds of texts that it is known to encode otherwise, which are left out.
    """

    name: str
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    render: Callable[[Messages, bool], str | None] | None
    encode_rendered: Callable[[str], list[int]]
    exceptions: frozenset[TextKind] = frozenset()


def artifact_sides(own: Any, codec: TextCodec, served: ServedTokenizer | None) -> tuple[Side, ...]:
    """The ways that an artifact offers: transformers over its files, `llmc run`, and onnxruntime-genai.

    Args:
        own: transformers' tokenizer from the artifact's files.
        codec: The artifact's tokenizer, as `llmc run` and engines use it.
        served: onnxruntime-genai's tokenizer; None for one that does not serve its text.
    """
    sides = [
        original_side(own, "transformers"),
        Side("llmc run", codec.encode, codec.decode, None, codec.encode_rendered),
    ]
    if served is not None:
        sides.append(runtime_side(served))
    return tuple(sides)


def runtime_side(served: ServedTokenizer) -> Side:
    """onnxruntime-genai's own tokenizer."""
    return Side(
        "onnxruntime-genai",
        served.encode,
        served.decode,
        served.render_chat,
        served.encode_rendered,
        served.exceptions,
    )


def original_side(tokenizer: Any, name: str = "the original") -> Side:
    """A tokenizer of transformers."""
    return Side(
        name,
        lambda text: [int(i) for i in tokenizer(text, verbose=False)["input_ids"]],
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        partial(_render, tokenizer),
        lambda text: [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]],
    )


def sample_texts(tokenizer: Any, text: str, prompts: Sequence[str]) -> list[str]:
    """Texts that show how a tokenizer works: hard ones, prompts, pieces of `text`, and its special tokens.

    Texts with characters that the tokenizer does not have are left out; where that leaves few, texts of its
    own tokens take their place.

    Args:
        tokenizer: The original's.
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
    """Texts of tokens that are drawn from the vocabulary, the same every time."""
    import random

    draw = random.Random(0)
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return [tokenizer.decode(draw.choices(ids, k=12)) for _ in range(FEWEST)]


def special_tokens(tokenizer: Any) -> list[str]:
    """Special tokens of a tokenizer of transformers as they are written, unnamed ones included."""
    added = tokenizer.added_tokens_decoder.values()
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)]))


def compare_texts(
    original: Side, sides: Sequence[Side], texts: Sequence[str], special_tokens: Sequence[str]
) -> dict[str, str]:
    """What differs from the original in tokens, or in the text that they give back: a sentence by text.

    Args:
        special_tokens: The original's, as they are written.

    Raises:
        ParityError: A side cannot read a text.
    """
    different = {}
    for text in texts:
        golden, kinds = original.encode(text), text_kinds(text, special_tokens)
        back = original.decode(golden)
        wrong = []
        for side in sides:
            if kinds & side.exceptions:
                continue
            if (ids := side.encode(text)) != golden:
                wrong.append(f"{side.name}: {ids}")
            elif back and (made := side.decode(golden)) != back:
                wrong.append(f"{side.name} decodes it as {_short(made)}, the original as {_short(back)}")
        if wrong:
            different[text] = f"{_short(text)} is {golden} in the original; {'; '.join(wrong)}"
    return different


def compare_chats(
    original: Side, sides: Sequence[Side], known: Callable[[str], bool]
) -> tuple[int, list[str]]:
    """Conversations that the original's template takes, and what differs from it, a sentence for each.

    Args:
        known: Whether the original's vocabulary has the characters of a text; see `represents`.

    Raises:
        ParityError: A side cannot render the template.
    """
    different, count = [], 0
    for messages in CONVERSATIONS:
        for ask in (True, False):
            golden = original.render(messages, ask) if original.render is not None else None
            if golden is None:  # the template refuses this conversation: a system message, say
                continue
            count += 1
            ids = original.encode_rendered(golden)
            for side in sides:
                if side.render is not None and (made := side.render(messages, ask)) != golden:
                    different.append(f"{side.name} renders {made!r}, the original {golden!r}")
                    break
                if known(golden) and (tokens := side.encode_rendered(golden)) != ids:
                    different.append(f"{golden!r} is {ids} in the original; {side.name}: {tokens}")
                    break
    return count, different


def measure_tokens(
    folder: Path,
    codec: TextCodec,
    served: ServedTokenizer | None,
    tokenizer: Any,
    text: str,
    prompts: Sequence[str],
    where: str,
) -> tuple[Measurement, ...]:
    """TOKENIZER_EQUAL: share of texts with the original's tokens and text; CHAT_EQUAL: of conversations.

    Every way that the artifact offers is held to the original; see `artifact_sides` and `sample_texts`. A
    vocabulary that differs in any token counts as a text that differs.

    Args:
        codec: The artifact's tokenizer, as `llmc run` and engines use it.
        served: onnxruntime-genai's tokenizer; None where that does not serve the artifact's text.
        tokenizer: The original's transformers tokenizer.
        text: The evaluation text, of which pieces are encoded.
        where: What reads the artifact.
    """

    def take() -> tuple[Measurement, ...]:
        own = load_own(folder)
        sides = artifact_sides(own, codec, served)
        equal = partial(_tokenizer, own, sides, codec, tokenizer, texts, where)
        chat = partial(_chat, sides, codec, tokenizer, where)
        return (
            *measure((Metric.TOKENIZER_EQUAL,), where, lambda: (equal(),)),
            *measure((Metric.CHAT_EQUAL,), where, lambda: (chat(),)),
        )

    texts = sample_texts(tokenizer, text, prompts)
    return measure((Metric.TOKENIZER_EQUAL, Metric.CHAT_EQUAL), where, take)


def _tokenizer(
    own: Any, sides: Sequence[Side], codec: TextCodec, tokenizer: Any, texts: Sequence[str], where: str
) -> Measurement:
    found = compare_texts(original_side(tokenizer), sides, texts, special_tokens(tokenizer))
    different = list(found.values())
    other = sorted(set(own.get_vocab().items()) ^ set(tokenizer.get_vocab().items()))
    if other:
        different.append(
            f"the vocabulary differs: {other[0][0]!r} with id {other[0][1]} is in one of the two"
        )
    detail = "; ".join([f"{len(texts)} texts", *different[:2], *codec.record.describe()])
    return measured(Metric.TOKENIZER_EQUAL, 1 - min(1.0, len(different) / len(texts)), detail, where)


def _chat(sides: Sequence[Side], codec: TextCodec, tokenizer: Any, where: str) -> Measurement:
    count, different = compare_chats(original_side(tokenizer), sides, partial(represents, tokenizer))
    if not count:
        if codec.record.chat or any(_renders(side) for side in sides):
            return measured(
                Metric.CHAT_EQUAL, 0.0, "the artifact has a chat template, the original has none", where
            )
        status = MeasurementStatus.NOT_APPLICABLE
        return unmeasured(Metric.CHAT_EQUAL, status, "the original has no chat template", where)
    if not codec.record.chat:
        return measured(Metric.CHAT_EQUAL, 0.0, "the original has a chat template, llmc run uses none", where)
    detail = "; ".join([f"{count} conversations", *different[:1]])
    return measured(Metric.CHAT_EQUAL, 1 - len(different) / count, detail, where)


def _renders(side: Side) -> bool:
    """Whether a side makes a text of a conversation."""
    try:
        return side.render is not None and side.render(CONVERSATIONS[0], True) is not None
    except ParityError:
        return False


def _render(tokenizer: Any, messages: Messages, ask: bool) -> str | None:
    """The template's text; None where there is no template, or it refuses the conversation."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except (TemplateError, ValueError):
        return None
    return text


def represents(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer gives a text back, but for spaces and compatibility characters."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    back = tokenizer.decode(ids)
    plain = [unicodedata.normalize("NFKC", t).casefold().replace(" ", "") for t in (text, back)]
    return plain[0] == plain[1]


def load_own(folder: Path) -> Any:
    """The tokenizer of an artifact's files, by transformers.

    Raises:
        ParityError: It cannot read them.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception on files that it cannot read
        raise ParityError(f"transformers cannot read the tokenizer of {folder}: {error}") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
