"""Tokenizer and chat template of an artifact against golden token ids of the original."""

import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ParityError
from llmc.validate.measure import measure, measured, unmeasured
from llmc.validate.served import Served

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
)
#: Characters of the evaluation text in each piece that is encoded, and how many pieces.
PIECE = 400
PIECES = 24

CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Name three rivers."},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n"}),
    (
        {"role": "user", "content": "  Hi "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "<b>1 < 2</b> & 'so'"},
    ),
)


def measure_tokens(
    folder: Path, served: Served | None, tokenizer: Any, text: str, prompts: Sequence[str]
) -> tuple[Measurement, ...]:
    """TOKENIZER_EQUAL: share of texts with the original's token ids; CHAT_EQUAL: of conversations.

    Both through onnxruntime-genai and through transformers from the artifact's own files. Texts with
    characters that the original's vocabulary does not have are left out.

    Args:
        served: The artifact in onnxruntime-genai; None for one that it does not serve.
        tokenizer: The original's transformers tokenizer.
        text: The evaluation text, of which pieces are encoded.
    """
    step = max(PIECE, len(text) // PIECES)
    pieces = [text[at : at + PIECE] for at in range(0, len(text), step)]
    specials = [f"a{token} b{token}" for token in tokenizer.all_special_tokens[:8]]
    texts = [t for t in (*HARD_TEXTS, *prompts, *pieces, *specials) if _represents(tokenizer, t)]
    where = "transformers" if served is None else f"{served.where}, and transformers"
    return (
        *measure(
            (Metric.TOKENIZER_EQUAL,), where, lambda: (_tokenizer(folder, served, tokenizer, texts, where),)
        ),
        *measure((Metric.CHAT_EQUAL,), where, lambda: (_chat(folder, served, tokenizer, where),)),
    )


def _tokenizer(
    folder: Path, served: Served | None, tokenizer: Any, texts: Sequence[str], where: str
) -> Measurement:
    own = _load(folder)
    different = []
    for text in texts:
        golden = [int(t) for t in tokenizer(text, verbose=False)["input_ids"]]
        sides = {"transformers": [int(t) for t in own(text, verbose=False)["input_ids"]]}
        if served is not None:
            sides["onnxruntime-genai"] = served.encode(text)
        wrong = [f"{side}: {ids}" for side, ids in sides.items() if ids != golden]
        if wrong:
            different.append(f"{_short(text)} is {golden} in the original; {'; '.join(wrong)}")
    detail = "; ".join([f"{len(texts)} texts", *different[:2]])
    return measured(Metric.TOKENIZER_EQUAL, 1 - len(different) / len(texts), detail, where)


def _chat(folder: Path, served: Served | None, tokenizer: Any, where: str) -> Measurement:
    own = _load(folder)
    if not tokenizer.chat_template:
        if own.chat_template:
            return measured(
                Metric.CHAT_EQUAL, 0.0, "the artifact has a chat template, the original has none", where
            )
        status = MeasurementStatus.NOT_APPLICABLE
        return unmeasured(Metric.CHAT_EQUAL, status, "the original has no chat template", where)
    different, count = [], 0
    for messages in CONVERSATIONS:
        for ask in (True, False):
            golden = _render(tokenizer, messages, ask)
            if golden is None:  # the template refuses this conversation: a system message, say
                continue
            count += 1
            sides: dict[str, Callable[[], str | None]] = {
                "transformers": partial(_render, own, messages, ask)
            }
            if served is not None:
                sides["onnxruntime-genai"] = partial(served.render_chat, messages, ask=ask)
            for side, render in sides.items():
                made = render()
                if made != golden:
                    different.append(f"{side} renders {made!r}, the original {golden!r}")
                    break
    detail = "; ".join([f"{count} conversations", *different[:1]])
    share = 1 - len(different) / count if count else 0.0
    return measured(Metric.CHAT_EQUAL, share, detail, where)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], ask: bool) -> str | None:
    """The template's text; None where the template refuses the conversation."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except (TemplateError, ValueError):
        return None
    return text


def _represents(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer gives a text back, but for spaces and compatibility characters."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    back = tokenizer.decode(ids)
    plain = [unicodedata.normalize("NFKC", t).casefold().replace(" ", "") for t in (text, back)]
    return plain[0] == plain[1]


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception on files that it cannot read
        raise ParityError(f"transformers cannot read the tokenizer of {folder}: {error}") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
