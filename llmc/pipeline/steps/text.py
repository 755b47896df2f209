"""Check first of all in a build whether every runtime turns text into the original's tokens."""

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
    "--token-ids builds an artifact that is verified by token ids; llmc run tokenizes as transformers does"
)
_TEMPLATE = "--chat-template FILE uses your own Jinja template instead"


def write_text(checkpoint: Checkpoint, plan: BuildPlan, folder: Path, progress: Progress) -> TextRecord:
    """Write the tokenizer's files into `folder`, and test how every runtime reads them.

    Returns:
        How the artifact turns text into tokens.

    Raises:
        CheckpointError: There is no tokenizer, it cannot be read, it has tokens that the model lacks, or the
            chat template cannot be rendered.
        UnsupportedError: The tokens or the text of a runtime differ from those of transformers.
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
            f"of the checkpoint's chat templates, only default is used, not {others}"
            if record.chat
            else f"none of the checkpoint's chat templates ({others}) is the default: prompts are used "
            "unchanged, and --chat-template FILE sets one"
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
    """Refuse a tokenizer or chat template that needs too much time or memory for the texts of the gate."""
    render = original_side(tokenizer).render
    chats = [(messages, ask) for messages in CONVERSATIONS for ask in (True, False)]
    exceeded = exceeded_limit(lambda: "".join(render(*chat) or "" for chat in chats)) if render else None
    if exceeded is not None:
        raise CheckpointError(
            f"the chat template {exceeded}, given {len(CONVERSATIONS)} short chats",
            hint=f"correct it; {_TEMPLATE}",
        )
    exceeded = exceeded_limit(lambda: _texts(tokenizer))
    if exceeded is not None:
        raise CheckpointError(
            f"the tokenizer {exceeded}, given short texts",
            hint="use the tokenizer that belongs to the model; a regex of its pre_tokenizer may never end",
        )
    try:
        _texts(tokenizer)
    except BaseException as error:  # tokenizers raises a bare Exception, or panics
        require_failure(error)
        raise CheckpointError(
            f"the tokenizer, a {type(tokenizer).__name__}, fails on short texts: {first_lines(error)}",
            hint="use the tokenizer_config.json that belongs to its tokenizer.json",
        ) from error


def save_text(checkpoint: Checkpoint, tokenizer: Any, folder: Path) -> TextRecord:
    """Write the original's tokenizer into `folder`; return how transformers treats a text with it."""
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
    """Write the files that `write_text` wrote for the artifact in `artifact` into `folder`, without testing.

    Args:
        artifact: Artifact whose settings name the class by which onnxruntime-genai reads the tokenizer.

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
    """Refuse a chat template that renders no user message: `llmc run` puts every prompt into it."""
    messages = [{"role": "user", "content": "Name three rivers."}]
    try:
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja passes on whatever an expression of the template raises
        raise CheckpointError(
            f"the chat template does not render a user's message in transformers: {first_lines(error)}",
            hint=f"correct it; {_TEMPLATE}",
        ) from error


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids that a tokenizer puts before and after a text."""
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((i for i in starts if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])


def _cleans_up(tokenizer: Any) -> bool:
    """Return whether transformers removes spaces before punctuation, as it does for old tokenizers."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    forced = getattr(
        tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False
    )
    return bool(forced) or type(tokenizer.backend_tokenizer.model).__name__ != "BPE"


def _texts(tokenizer: Any) -> list[str]:
    return sample_texts(tokenizer, eval_text(), prompts())


def _require_own(folder: Path, record: TextRecord, tokenizer: Any) -> None:
    """Refuse a tokenizer that does more than its files say, since no runtime could read them correctly."""
    is_represented = partial(represents, tokenizer)
    try:
        original = original_side(tokenizer)
        sides = artifact_sides(load_own(folder), TextCodec(folder, record), None)
        texts = compare_texts(original, sides, _texts(tokenizer), written_special_tokens(tokenizer))
        different = list(texts.values()) or compare_chats(original, sides, is_represented)[1]
    except (ParityError, ConfigError) as error:
        different = [error.fact]
    if different:
        raise UnsupportedError(
            f"the tokenizer, a {type(tokenizer).__name__}, differs from its files: {_short(different[0])}",
            hint="save it as a complete tokenizer.json with transformers' save_pretrained",
        )


def _try_runtime(
    folder: Path, record: TextRecord, tokenizer: Any, plan: BuildPlan, progress: Progress
) -> TextRecord:
    """Test onnxruntime-genai's own tokenizer on the files."""
    from llmc.backends.onnxruntime.runtime_tokenizer import CLASSES

    if find_spec("onnxruntime_genai") is None:
        _write_settings(folder, record, tokenizer, CLASSES[0])
        progress.note("onnxruntime-genai is not installed here: its tokenizer was not tested")
        return record
    with progress.stage("tokenizer files"):
        problem, tested = _choose_class(folder, record, tokenizer)
    if problem is not None:
        if not plan.token_ids:
            raise problem
        tested = tested.model_copy(update={"served": False, "reason": problem.fact})
    for note in tested.describe():
        progress.note(note)
    return tested


def _choose_class(folder: Path, record: TextRecord, tokenizer: Any) -> tuple[LlmcError | None, TextRecord]:
    """Name the class with which the runtime gives the original's tokens; return the first problem if none."""
    from llmc.backends.onnxruntime.runtime_tokenizer import CLASSES, try_runtime_tokenizer

    first: LlmcError | None = None
    question = _question(record, tokenizer)
    for name in dict.fromkeys((type(tokenizer).__name__, *CLASSES)):
        _write_settings(folder, record, tokenizer, name)
        candidate = record
        try:
            answers = try_runtime_tokenizer(folder, question)
        except ParityError as error:
            problem: LlmcError | None = _unreadable(tokenizer, error.fact)
            if isinstance(error, NoAnswerError):
                first = problem
                break
        else:
            problem, candidate = _compare(answers, record, tokenizer)
        if problem is None:
            return None, candidate
        if first is None or "Unsupported tokenizer class" in first.fact:
            first = problem
    _write_settings(folder, record, tokenizer, CLASSES[0])
    return first, record


def _question(record: TextRecord, tokenizer: Any) -> TokenizerQuestion:
    """Collect everything in which the runtime is compared."""
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
    """Return how the runtime commonly differs from the original, if it does, and the rare cases."""
    apart = record.model_copy(update={"adds_special_tokens": False})
    problem, compared = _compare_texts(answers, apart, tokenizer)
    if problem is not None:
        return problem, compared
    whole, with_special_tokens = _compare_texts(answers, record, tokenizer)
    if whole is None and with_special_tokens.exceptions == compared.exceptions:
        compared = with_special_tokens
    try:
        side = _side(answers, compared)
        original, is_represented = original_side(tokenizer), partial(represents, tokenizer)
        chats = compare_chats(original, [side], is_represented)[1] if record.chat else []
    except ParityError as error:
        chats = [error.fact]
    if not chats:
        return None, compared
    if " in the original; " in chats[0]:
        return _unequal(tokenizer, chats[0]), compared
    problem = UnsupportedError(
        f"onnxruntime-genai does not render the chat template as transformers does: {_short(chats[0])}",
        hint=f"{_TEMPLATE}; {TOKEN_IDS}",
    )
    return problem, compared


def _compare_texts(
    answers: Answers, record: TextRecord, tokenizer: Any
) -> tuple[LlmcError | None, TextRecord]:
    """Compare texts; differences only in rare kinds become the record's exceptions."""
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
    """Wrap the runtime's answers as one side of the comparison."""

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


def _unreadable(tokenizer: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"onnxruntime-genai cannot read this tokenizer ({_kind(tokenizer)}): {_short(reason)}", hint=TOKEN_IDS
    )


def _unequal(tokenizer: Any, difference: str) -> UnsupportedError:
    return UnsupportedError(
        f"onnxruntime-genai does not give this tokenizer's tokens ({_kind(tokenizer)}): {_short(difference)}",
        hint=TOKEN_IDS,
    )


def _kind(tokenizer: Any) -> str:
    """Name the parts of a tokenizer by their classes in the library `tokenizers`."""
    inner = tokenizer.backend_tokenizer
    parts = (inner.model, inner.normalizer, inner.pre_tokenizer)
    return ", ".join(type(part).__name__ for part in parts if part is not None)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
