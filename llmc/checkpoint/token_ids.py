"""Token ids of a tokenizer and of generation settings against the rows of the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.errors import CheckpointError

if TYPE_CHECKING:
    from llmc.checkpoint.checkpoint import Checkpoint

_HINT = "take the tokenizer that belongs to the model, or resize the model's embedding"


def require_rows(checkpoint: Checkpoint, tokenizer: Any) -> tuple[str, ...]:
    """Check that what text becomes has a row in the embedding.

    Special tokens beyond it are left to whoever writes them: text-only models keep the tokenizer of their
    multimodal relatives.

    Args:
        tokenizer: The checkpoint's, by transformers.

    Returns:
        Sentences for the user about special tokens that the model does not have.

    Raises:
        CheckpointError: A token that ordinary text can become, or one that begins or ends every text, has
            none.
    """
    rows = checkpoint.config.get_text_config(decoder=True).vocab_size
    for name in ("bos", "eos"):
        _require_stated(checkpoint, tokenizer, name, rows)
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    around = set(tokenizer("a", verbose=False)["input_ids"])
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
        return ()
    told = ", ".join(f"{token} ({i})" for i, token in beyond[:3])
    more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
    return (f"the model's embedding of {rows} rows has none for the special tokens {told}{more}",)


def _require_stated(checkpoint: Checkpoint, tokenizer: Any, name: str, rows: int) -> None:
    """Refuse a token of the beginning or the end of which every stated id is beyond the embedding."""
    inner = checkpoint.config.get_text_config(decoder=True)
    sources = {
        "generation_config.json": checkpoint.generation_config(),
        "config.json": checkpoint.config,
        "its text part": inner,
    }
    for source, settings in sources.items():
        stated = getattr(settings, f"{name}_token_id", None)
        ids: list[int] = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if ids and min(ids) >= rows:
            token = tokenizer.convert_ids_to_tokens(ids[0])
            raise CheckpointError(
                f"{name}_token_id is {stated} in {source}"
                + (f" ({token!r} in the tokenizer)" if token else "")
                + f"; the model's embedding has {rows} rows",
                hint=_HINT,
            )
