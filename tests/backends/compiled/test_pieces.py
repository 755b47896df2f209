"""Steps that run in pieces: every token has the bits that it has without them."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.runtime.ort_model import OrtModel
from tests.backends.compiled.graphs import Array
from tests.models import EOS, VOCAB_SIZE, save_tiny_model

#: Tokens that run at once (kPieceTokens of llmc/kernels/pieces.h).
PIECE = 512
Open = Callable[..., OrtModel]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """One region, and several with activations between them; what opens the artifact."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "model"
    save_tiny_model(request.param, source, tokenizer=True, eos_token_id=EOS, max_position_embeddings=2048)
    output = folder / "out"
    plan = plan_build(str(source), target="cpu-int4-compiled", profile="local", output=output, verify=False)
    build(plan, SilentProgress())
    interface = open_artifact(output).manifest.interface

    def make(*, threads: int = 1, share: bool = True) -> OrtModel:
        return OrtModel(output, interface, threads=threads, share_buffer=share)

    return make


def prompt(batch: int, length: int) -> Array:
    return np.random.default_rng(7).integers(5, VOCAB_SIZE, (batch, length))


@pytest.mark.parametrize("length", [PIECE + 8, PIECE + 9, 2 * PIECE + 88])
@pytest.mark.parametrize("share", [True, False])
def test_pieces_have_the_bits_of_steps_that_are_as_long(length: int, share: bool, opened: Open) -> None:
    ids = prompt(1, length)
    model = opened(threads=2, share=share)
    found = [model.prefill(ids, steps=1), model.decode(ids[:, :1])]
    cuts = [*range(PIECE, length - 8, PIECE), length]
    model = opened(share=share)
    last = model.prefill(ids[:, : cuts[0]], steps=length + 1 - cuts[0])
    for start, stop in pairwise(cuts):
        last = model.decode(ids[:, start:stop])
    np.testing.assert_array_equal(found[0], last)
    np.testing.assert_array_equal(found[1], model.decode(ids[:, :1]))


@pytest.mark.parametrize("lengths", [(600, 530, 300, 20), (110, 100, 90, 100, 7)])
def test_each_prompt_of_a_batch_has_the_bits_that_it_has_alone(
    lengths: tuple[int, ...], opened: Open
) -> None:
    """Prompts that end in different pieces, and more of them than one piece holds."""
    ids = prompt(len(lengths), max(lengths))
    mask = np.array([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    model = opened(threads=2)
    together = [model.prefill(ids, mask, steps=1), model.decode(ids[:, :1])]
    for row, length in enumerate(lengths):
        model, own = opened(), slice(row, row + 1)
        alone = [model.prefill(ids[own], mask[own], steps=1), model.decode(ids[own, :1])]
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(found[row], expected[0], err_msg=f"prompt of {length}")
