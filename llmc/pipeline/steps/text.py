"""The first thing that a build finds out: whether text becomes the original's tokens in every runtime."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.store.codec import TextCodec
from llmc.artifact.text import TextRecord, text_kinds
from llmc.backends import backend_of
from llmc.backends.onnxruntime.tokenizer_worker import Answers, NoAnswerError, TokenizerQuestion
from llmc.config import BuildPlan, Target
from llmc.data import eval_text, prompts
from llmc.errors import (
    CheckpointError,
    ConfigError,
    LlmcError,
    ParityError,
    UnsupportedError,
    first_lines,
    require_failure,
)
from llmc.limits import exceeded_limit
from llmc.progress import Progress
from llmc.validate.sides import Side, artifact_sides, load_own, original_side
from llmc.validate.tokens import (
    CONVERSATIONS,
    compare_chats,
    compare_texts,
    represents,
    sample_texts,
    written_special_tokens,
)

if TYPE_CHECKING:
    from llmc.checkpoint import Checkpoint

TOKEN_IDS = (
    "--token-ids builds an artifact that is verified by token ids; llmc run makes them as transformers does"
)
_TEMPLATE = "--chat-template FILE takes a Jinja template of your own in its place"


def write_text(checkpoint: Checkpoint, plan: BuildPlan, folder: Path, progress: Progress) -> TextRecord:
    """Write the tokenizer's files into `folder`, and try what every runtime makes of them.

    Returns:
        How the artifact turns text into tokens.

    Raises:
        CheckpointError: There is no tokenizer, it cannot be read, it has tokens that the model lacks, or the
            chat template renders nothing.
        UnsupportedError: A runtime gives other tokens or another text than transformers.
    """
    from llmc.backends.onnxruntime.genai import serving_tokens
    from llmc.checkpoint.generation import describe_unserved
    from llmc.checkpoint.token_ids import require_rows

    tokenizer = checkpoint.tokenizer()
    _require_end(tokenizer)
    for note in require_rows(checkpoint, tokenizer):
        progress.note(note)
    if (unserved := describe_unserved(checkpoint.generation_config())) is not None:
        progress.note(unserved)
    record = save_text(checkpoint, tokenizer, folder)
    if isinstance(tokenizer.chat_template, dict) and checkpoint.chat_template is None:
        others = ", ".join(sorted(set(tokenizer.chat_template) - {"default"}))
        progress.note(
            f"of the checkpoint's chat templates, default is used and not {others}"
            if record.chat
            else f"none of the checkpoint's chat templates ({others}) is the default: prompts are taken as "
            "they are, and --chat-template FILE takes one"
        )
    if record.chat:
        _require_template(tokenizer)
    _require_own(folder, record, tokenizer)
    if not backend_of(plan.target).served_by_genai:
        return record
    rows = checkpoint.config.get_text_config(decoder=True).vocab_size
    serving_tokens(folder, checkpoint.config, checkpoint.generation_config(), rows)
    return _try_runtime(folder, record, tokenizer, plan, progress)


def _require_end(tokenizer: Any) -> None:
    """Refuse a tokenizer or a chat template that takes too long or too much for what the gate asks of it."""
    render = original_side(tokenizer).render
    chats = [(messages, ask) for messages in CONVERSATIONS for ask in (True, False)]
    found = exceeded_limit(lambda: "".join(render(*chat) or "" for chat in chats)) if render else None
    if found is not None:
        raise CheckpointError(
            f"the chat template {found}, given {len(CONVERSATIONS)} short chats",
            hint=f"correct it; {_TEMPLATE}",
        )
    found = exceeded_limit(lambda: _texts(tokenizer))
    if found is not None:
        raise CheckpointError(
            f"the tokenizer {found}, given short texts",
            hint="take the tokenizer that belongs to the model; a regex of its pre_tokenizer may never end",
        )
    try:
        _texts(tokenizer)
    except BaseException as error:  # tokenizers raises a bare Exception, or panics
        require_failure(error)
        raise CheckpointError(
            f"the tokenizer, a {type(tokenizer).__name__}, fails on short texts: {first_lines(error)}",
            hint="take the tokenizer_config.json that belongs to its tokenizer.json",
        ) from error


def save_text(checkpoint: Checkpoint, tokenizer: Any, folder: Path) -> TextRecord:
    """Write the original's tokenizer into `folder`; what it does with a text, as transformers has it."""
    from llmc.checkpoint.tokenizer import plain_template

    checkpoint.save_tokenizer(folder, tokenizer)
    before, after = _around(tokenizer)
    return TextRecord(
        chat=plain_template(tokenizer) is not None,
        cleans_up=_cleans_up(tokenizer),
        before=before,
        after=after,
        chat_template=checkpoint.chat_template,
    )


def derive_text(checkpoint: Checkpoint, artifact: Path, folder: Path, target: Target) -> TextRecord:
    """Write what `write_text` wrote for the artifact in folder `artifact` into `folder`; nothing is tried.

    Args:
        artifact: States by which of its classes onnxruntime-genai reads the tokenizer.

    Raises:
        CheckpointError: As `write_text`.
        UnsupportedError: As `write_text`.
    """
    from llmc.backends.onnxruntime.runtime_tokenizer import CLASSES, stated_class

    tokenizer = checkpoint.tokenizer()
    record = save_text(checkpoint, tokenizer, folder)
    if backend_of(target).served_by_genai:
        names = (type(tokenizer).__name__, *CLASSES)
        stated = stated_class(artifact)
        _write_settings(folder, record, tokenizer, stated if stated in names else names[0])
    return record


def _require_template(tokenizer: Any) -> None:
    """Refuse a chat template that takes no message of a user: `llmc run` puts every prompt into it."""
    messages = [{"role": "user", "content": "Name three rivers."}]
    try:
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja passes on whatever an expression of the template raises
        raise CheckpointError(
            f"the chat template does not render a user's message in transformers: {first_lines(error)}",
            hint=f"correct it; {_TEMPLATE}",
        ) from error


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that a tokenizer puts before a text and after it."""
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((i for i in starts if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])


def _cleans_up(tokenizer: Any) -> bool:
    """Whether transformers removes spaces before punctuation, as it does for old tokenizers."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    forced = getattr(
        tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False
    )
    return bool(forced) or type(tokenizer.backend_tokenizer.model).__name__ != "BPE"


def _texts(tokenizer: Any) -> list[str]:
    return sample_texts(tokenizer, eval_text(), prompts())


def _require_own(folder: Path, record: TextRecord, tokenizer: Any) -> None:
    """Refuse a tokenizer that is more than its files say, so that no runtime could read them right."""
    known = partial(represents, tokenizer)
    try:
        original = original_side(tokenizer)
        sides = artifact_sides(load_own(folder), TextCodec(folder, record), None)
        texts = compare_texts(original, sides, _texts(tokenizer), written_special_tokens(tokenizer))
        different = list(texts.values()) or compare_chats(original, sides, known)[1]
    except (ParityError, ConfigError) as error:
        different = [error.fact]
    if different:
        raise UnsupportedError(
            f"the tokenizer, a {type(tokenizer).__name__}, is not what its files say: {_short(different[0])}",
            hint="save it with transformers' save_pretrained as a tokenizer.json that is complete",
        )


def _try_runtime(
    folder: Path, record: TextRecord, tokenizer: Any, plan: BuildPlan, progress: Progress
) -> TextRecord:
    """Try onnxruntime-genai's own tokenizer on the files."""
    from llmc.backends.onnxruntime.runtime_tokenizer import CLASSES

    if find_spec("onnxruntime_genai") is None:
        _write_settings(folder, record, tokenizer, CLASSES[0])
        progress.note("onnxruntime-genai is not installed here: what its tokenizer does was not tried")
        return record
    with progress.stage("tokenizer files"):
        problem, found = _choose_class(folder, record, tokenizer)
    if problem is not None:
        if not plan.token_ids:
            raise problem
        found = found.model_copy(update={"served": False, "reason": problem.fact})
    for note in found.describe():
        progress.note(note)
    return found


def _choose_class(folder: Path, record: TextRecord, tokenizer: Any) -> tuple[LlmcError | None, TextRecord]:
    """Name the class by which the runtime gives the original's tokens; the first problem where none does."""
    from llmc.backends.onnxruntime.runtime_tokenizer import CLASSES, try_runtime_tokenizer

    first: LlmcError | None = None
    question = _question(record, tokenizer)
    for name in dict.fromkeys((type(tokenizer).__name__, *CLASSES)):
        _write_settings(folder, record, tokenizer, name)
        found = record
        try:
            answers = try_runtime_tokenizer(folder, question)
        except ParityError as error:
            problem: LlmcError | None = _unreadable(tokenizer, error.fact)
            if isinstance(error, NoAnswerError):
                first = problem
                break
        else:
            problem, found = _compare(answers, record, tokenizer)
        if problem is None:
            return None, found
        if first is None or "Unsupported tokenizer class" in first.fact:
            first = problem
    _write_settings(folder, record, tokenizer, CLASSES[0])
    return first, record


def _question(record: TextRecord, tokenizer: Any) -> TokenizerQuestion:
    """All that the runtime is compared in."""
    original, texts = original_side(tokenizer), _texts(tokenizer)
    chats = [(messages, ask) for messages in CONVERSATIONS for ask in (True, False)] if record.chat else []
    rendered = [original.render(*chat) for chat in chats] if original.render is not None else []
    return TokenizerQuestion(
        texts=list(dict.fromkeys([*texts, *(text for text in rendered if text is not None)])),
        ids=[original.encode(text) for text in texts],
        chats=chats,
    )


def _write_settings(folder: Path, record: TextRecord, tokenizer: Any, name: str) -> None:
    from llmc.backends.onnxruntime.runtime_tokenizer import write_runtime_settings
    from llmc.checkpoint.tokenizer import plain_template

    write_runtime_settings(
        folder,
        tokenizer,
        name,
        plain_template(tokenizer),
        before=bool(record.before),
        after=bool(record.after),
    )


def _compare(answers: Answers, record: TextRecord, tokenizer: Any) -> tuple[LlmcError | None, TextRecord]:
    """What the runtime does otherwise than the original, if that is common; and the rare cases."""
    apart = record.model_copy(update={"adds_special_tokens": False})
    problem, found = _compare_texts(answers, apart, tokenizer)
    if problem is not None:
        return problem, found
    whole, with_special_tokens = _compare_texts(answers, record, tokenizer)
    if whole is None and with_special_tokens.exceptions == found.exceptions:
        found = with_special_tokens
    try:
        side = _side(answers, found)
        original, known = original_side(tokenizer), partial(represents, tokenizer)
        chats = compare_chats(original, [side], known)[1] if record.chat else []
    except ParityError as error:
        chats = [error.fact]
    if not chats:
        return None, found
    if " in the original; " in chats[0]:
        return _unequal(tokenizer, chats[0]), found
    problem = UnsupportedError(
        f"onnxruntime-genai does not render the chat template as transformers does: {_short(chats[0])}",
        hint=f"{_TEMPLATE}; {TOKEN_IDS}",
    )
    return problem, found


def _compare_texts(
    answers: Answers, record: TextRecord, tokenizer: Any
) -> tuple[LlmcError | None, TextRecord]:
    """Compare texts; differences in rare kinds alone become the record's exceptions."""
    side, special = _side(answers, record), written_special_tokens(tokenizer)
    try:
        different = compare_texts(original_side(tokenizer), [side], _texts(tokenizer), special)
    except ParityError as error:
        return _unequal(tokenizer, error.fact), record
    kinds = {text: text_kinds(text, special) for text in different}
    common = next((text for text in different if not kinds[text]), None)
    if common is not None:
        return _unequal(tokenizer, different[common]), record
    exceptions = tuple(sorted(set().union(*kinds.values())))
    return None, record.model_copy(update={"exceptions": exceptions})


def _side(answers: Answers, record: TextRecord) -> Side:
    """The runtime's answers as a way from text to tokens."""

    def encode(text: str) -> list[int]:
        if record.adds_special_tokens:
            return answers.encode(text, special=True)
        return [*record.before, *answers.encode(text, special=False), *record.after]

    return Side(
        "onnxruntime-genai",
        encode,
        answers.decode,
        answers.render,
        lambda text: answers.encode(text, special=False),
    )


def _unreadable(tokenizer: Any, said: str) -> UnsupportedError:
    return UnsupportedError(
        f"onnxruntime-genai cannot read this tokenizer ({_kind(tokenizer)}): {_short(said)}", hint=TOKEN_IDS
    )


def _unequal(tokenizer: Any, difference: str) -> UnsupportedError:
    return UnsupportedError(
        f"onnxruntime-genai does not give this tokenizer's tokens ({_kind(tokenizer)}): {_short(difference)}",
        hint=TOKEN_IDS,
    )


def _kind(tokenizer: Any) -> str:
    """The parts of a tokenizer by the names of the library `tokenizers`."""
    inner = tokenizer.backend_tokenizer
    parts = (inner.model, inner.normalizer, inner.pre_tokenizer)
    return ", ".join(type(part).__name__ for part in parts if part is not None)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
