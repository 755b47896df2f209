"""Generate text and tokens with an artifact through onnxruntime-genai."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmc.artifact.manifest import MODEL
from llmc.artifact.store.codec import Messages, TextCodec
from llmc.artifact.text import TextRecord
from llmc.backends.base import Generated
from llmc.backends.onnxruntime.genai import GENAI_CONFIG
from llmc.backends.onnxruntime.lookup import piece_length, speculative_options, verifying_model
from llmc.errors import ConfigError, ResourceError
from llmc.runtime.failures import missing_resource
from llmc.runtime.libraries import load_genai, require_cuda_for


def generate_text(
    folder: Path,
    prompt: str,
    max_tokens: int,
    emit: Callable[[str], None],
    text: TextRecord,
    lookup: int | None = None,
) -> Generated:
    """Continue `prompt` greedily, and emit each piece of text as soon as it is generated.

    Args:
        folder: An artifact.
        prompt: The user's message; put into the artifact's chat template if it has one.
        max_tokens: Largest number of new tokens; fewer if the model's context ends earlier.
        emit: Receives each piece of the answer, in order.
        text: How the artifact turns text into tokens.
        lookup: Number of tokens drafted in a step by prompt lookup; None for the artifact's setting, which
            usually drafts none.

    Raises:
        ConfigError: The folder cannot be served, no token is requested, or the prompt has no token, one that
            the model does not have, or more than the context.
        UnsupportedError: The graph cannot verify drafts.
        ResourceError: onnxruntime-genai or the GPU that the artifact is built for is missing.
    """
    og, model = _load(folder, lookup)
    codec = TextCodec(folder, text)

    def render(messages: Messages) -> str:
        if not text.served:
            return codec.render(messages)
        with _runtime_errors(folder):
            tokenizer = og.Tokenizer(model)
            rendered: str = tokenizer.apply_chat_template(
                json.dumps(list(messages)), add_generation_prompt=True
            )
        return rendered

    ids = codec.encode_prompt(prompt, render)
    stream = codec.stream()

    def hand_on(piece: str) -> None:
        if piece:
            emit(piece)

    generated = _generate(
        og, model, folder, ids, max_tokens, lookup, lambda token: hand_on(stream.step(token))
    )
    hand_on(stream.finish())
    return generated


def generate_tokens(folder: Path, ids: Sequence[int], max_new: int, lookup: int | None = None) -> list[int]:
    """Continue `ids` greedily, batch 1.

    Args:
        max_new: Largest number of new tokens; fewer if the model's context ends earlier.
        lookup: As for `generate_text`.

    Returns:
        The new tokens, without the token that ends the sequence.

    Raises:
        ConfigError: The folder cannot be served, no token is requested, or `ids` are empty or longer
            than the context.
        UnsupportedError: The graph cannot verify drafts.
        ResourceError: onnxruntime-genai or the GPU that the artifact is built for is missing.
    """
    og, model = _load(folder, lookup)
    tokens: list[int] = []
    _generate(og, model, folder, ids, max_new, lookup, tokens.append)
    return tokens


def _generate(
    og: Any,
    model: Any,
    folder: Path,
    ids: Sequence[int],
    max_new: int,
    lookup: int | None,
    take: Callable[[int], None],
) -> Generated:
    import numpy as np

    config = _genai_config(folder)["model"]
    context, stated = config["context_length"], config["eos_token_id"]
    ends = set(stated) if isinstance(stated, list) else {stated}
    if max_new < 1:
        raise ConfigError(f"{max_new} new tokens are requested", hint="request 1 or more")
    if not ids:
        raise ConfigError("the prompt has no tokens", hint="give a prompt that is not empty")
    _require_rows(ids, config["vocab_size"])
    if len(ids) >= context:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, but {folder} has a context of {context}",
            hint="shorten the prompt",
        )
    with _runtime_errors(folder):
        params = og.GeneratorParams(model)
        params.set_search_options(
            batch_size=1,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_length=min(len(ids) + max_new, context),
        )
        if lookup is not None:
            params.set_speculative_options(**speculative_options(lookup))
            params.set_search_options(chunk_size=piece_length(len(ids)))
        generator = og.Generator(model, params)
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
    tokens = calls = 0
    while not generator.is_done():
        with _runtime_errors(folder):
            generator.generate_next_token()
        calls += 1
        token = int(generator.get_next_tokens()[0])
        if token not in ends:
            tokens += 1
            take(token)
    if lookup is None:
        return Generated(tokens, calls)
    stats = generator.get_speculative_stats()
    return Generated(
        tokens,
        stats["target_forward_passes"] + stats["standard_fallback_steps"],
        stats["draft_tokens_proposed"],
        stats["draft_tokens_accepted"],
    )


def _load(folder: Path, lookup: int | None) -> tuple[Any, Any]:
    """Load the module onnxruntime_genai and the artifact's model; for lookup, one that verifies drafts."""
    config = _genai_config(folder)
    og = load_genai()
    providers = config["model"]["decoder"]["session_options"]["provider_options"]
    if any("cuda" in provider for provider in providers):
        require_cuda_for(folder)
    graph = None if lookup is None else verifying_model(folder / MODEL)
    with _runtime_errors(folder):
        settings = og.Config(str(folder))
        if graph is not None:
            settings.add_model_data(MODEL, graph)  # read by og.Model, not copied
        return og, og.Model(settings)


@contextmanager
def _runtime_errors(folder: Path) -> Iterator[None]:
    """Convert onnxruntime-genai's errors, all of type `RuntimeError`, to typed ones."""
    try:
        yield
    except RuntimeError as error:
        fact = f"onnxruntime-genai cannot run {folder}: {str(error).strip()}"
        if (hint := missing_resource(error)) is not None:
            raise ResourceError(fact, hint=hint) from error
        raise ConfigError(fact, hint="llmc verify finds what is wrong with it") from error


def _genai_config(folder: Path) -> dict[str, Any]:
    path = folder / GENAI_CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{folder} cannot be served: it has no {GENAI_CONFIG}", hint="name the directory of an artifact"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}", hint="build the artifact again") from error
    return config


def _require_rows(ids: Sequence[int], vocabulary: int) -> None:
    """Refuse tokens beyond the embedding, which some tokenizers have for other modalities."""
    beyond = [i for i in ids if not 0 <= i < vocabulary]
    if beyond:
        raise ConfigError(
            f"the prompt has token {beyond[0]}, but the model's embedding has only {vocabulary} rows",
            hint="leave the special token with this id out of the prompt",
        )
