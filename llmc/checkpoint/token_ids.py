"""Check token ids of a tokenizer and of generation settings against the rows of the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.errors import CheckpointError

if TYPE_CHECKING:
    from llmc.checkpoint.checkpoint import Checkpoint

_HINT = "take the tokenizer that belongs to the model, or resize the model's embedding"


def require_rows(checkpoint: Checkpoint, tokenizer: Any) -> tuple[str, ...]:
    """Check that the embedding has a row for every token that text can produce.

    Special tokens without a row are the caller's concern: text-only models keep the tokenizer of their
    multimodal relatives.

    Args:
        tokenizer: The checkpoint's tokenizer, loaded by transformers.

    Returns:
        Sentences for the user about tokens that the model does not have.

    Raises:
        CheckpointError: There is no row for a token that ordinary text can produce, for a token that
            surrounds every text, or for any token that ends a text.
    """
    rows = checkpoint.config.get_text_config(decoder=True).vocab_size
    notes = _stated_beyond(checkpoint, tokenizer, rows)
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    around = set(tokenizer("a", verbose=False)["input_ids"])
    if max(around, default=0) >= rows:
        raise CheckpointError(
            f"the tokenizer puts the token with id {max(around)} around a text, but the model's embedding "
            f"has only {rows} rows",
            hint=_HINT,
        )
    decoder = tokenizer.added_tokens_decoder
    common = [(i, t) for i, t in beyond if i in around or i not in decoder or not decoder[i].special]
    if common:
        number, token = common[0]
        raise CheckpointError(
            f"the tokenizer has {len(common)} tokens beyond the model's embedding of {rows} rows, such as "
            f"{token!r} with id {number}",
            hint=_HINT,
        )
    if not beyond:
        return tuple(notes)
    listed = ", ".join(f"{token} ({i})" for i, token in beyond[:3])
    more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
    notes.append(f"the model's embedding of {rows} rows has no row for the special tokens {listed}{more}")
    return tuple(notes)


def _stated_beyond(checkpoint: Checkpoint, tokenizer: Any, rows: int) -> list[str]:
    """Describe in sentences the begin and end tokens that are stated beyond the embedding.

    Raises:
        CheckpointError: Every token that ends a text is beyond it, including the tokenizer's own.
    """
    sources = {
        "generation_config.json": checkpoint.generation_config(),
        "config.json": checkpoint.config,
        "the text part of config.json": checkpoint.config.get_text_config(decoder=True),
    }
    notes = []
    for name in ("bos", "eos"):
        stated = {source: getattr(settings, f"{name}_token_id", None) for source, settings in sources.items()}
        source, value = next(((s, v) for s, v in stated.items() if v is not None), ("", None))
        ids: list[int] = value if isinstance(value, list) else [] if value is None else [value]
        if not ids or min(ids) < rows:
            continue
        token = tokenizer.convert_ids_to_tokens(ids[0])
        fact = f"{name}_token_id is {value} in {source}" + (f" ({token!r} in the tokenizer)" if token else "")
        fact = f"{fact}; the model's embedding has {rows} rows"
        own = tokenizer.eos_token_id
        if name == "eos" and (own is None or own >= rows):
            raise CheckpointError(fact, hint=_HINT)
        notes.append(fact)
    return notes
