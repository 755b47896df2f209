"""Define what a server is asked about a checkpoint, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.arrays import Array


@dataclass(frozen=True)
class Request:
    """The questions to a server.

    Args:
        sequences: Token ids, two or more each, whose log-probabilities are asked.
        prompts: Texts to encode by the server's own tokenizer.
        continued: Token ids that the server continues greedily.
        new_tokens: Maximum number of new tokens.
        dtype: `auto` for the type that the checkpoint states, or `float32`.
        threads: Threads to compute with; None for the server's default.
        gpu_only: Whether the server is known to need a GPU for the format: it is then enough that it reads.
    """

    sequences: Sequence[Sequence[int]] = ()
    prompts: Sequence[str] = ()
    continued: Sequence[Sequence[int]] = ()
    new_tokens: int = 16
    dtype: str = "auto"
    threads: int | None = None
    gpu_only: bool = False


@dataclass(frozen=True)
class Product:
    """What a server's matrices make of given inputs, by the kernels that serve them.

    Args:
        modules: Names of matrices, the outputs of which stand one after the other.
        inputs: (rows, inputs) float32.
        outputs: (rows, outputs) float32.
    """

    modules: tuple[str, ...]
    inputs: Array
    outputs: Array


@dataclass(frozen=True)
class Answer:
    """What a server did with a checkpoint.

    Args:
        server: Name of the server.
        version: Its version.
        where: The device that it computes on, or that it only read the checkpoint.
        dtype: The type of its activations.
        taken: Number of tensors of the files that it took.
        skipped: Names of tensors of the files that it did not take.
        unfilled: Names of its parameters that no tensor filled.
        token_ids: Token ids of each prompt; None if it has no tokenizer.
        logits: (tokens - 1, vocabulary) float32 for each sequence; None if it only reads.
        log_probabilities: (tokens - 1,) float32 for each sequence, as it gives them to its users.
        greedy: New token ids after each of `continued`, with the end token if it chose one.
        products: What its matrices compute; None if it does not execute, or does not tell.
        graph: The ONNX file that it exported; None if it exports none.
        cache_scales: The scales of keys and values with which its modules of attention compute; none of those
            that cache in float. None if it does not tell.
    """

    server: str
    version: str
    where: str
    dtype: str
    taken: int
    skipped: tuple[str, ...]
    unfilled: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...] | None
    logits: tuple[Array, ...] | None
    log_probabilities: tuple[Array, ...] | None
    greedy: tuple[tuple[int, ...], ...] | None
    products: tuple[Product, ...] | None = None
    graph: Path | None = None
    cache_scales: Mapping[str, tuple[float, float]] | None = None
