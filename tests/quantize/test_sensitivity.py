"""Prices of rounding, against the whole model in memory and against KL divergence itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.calibration.hessian import weigh_features
from llmc.checkpoint.skeleton import build_hollow
from llmc.errors import CheckpointError
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.sensitivity import SensitivityWalk
from tests.models import build_tiny_model
from tests.quantize.reference import Array, scheme
from tests.quantize.test_calibrate import LAYERS, TIED, WINDOWS, Watched

SCHEMES = (scheme(4, 32, False, "gptq"), scheme(8, 128, True, "rtn"))
#: GPTQ is priced with searched scales.
PRICED = (scheme(4, 32, False, "mse"), SCHEMES[1])
HEAD = "model.embed_tokens.weight"


def _walk(model: Any, store: Watched, folder: Path) -> SensitivityWalk:
    names = [n for n, p in model.named_parameters() if p.ndim == 2]
    schemes = dict.fromkeys(names, SCHEMES)
    return SensitivityWalk(build_hollow(model.config), LAYERS, store, TIED, folder, schemes, np.float32)


def _rounded(weight: torch.Tensor, kind: Any, x: torch.Tensor) -> torch.Tensor:
    """As stored; what is to be calibrated is priced with scales searched for its inputs, (tokens, K)."""
    array = weight.detach().numpy()
    squares = x.square().sum(0).numpy()
    important = weigh_features(squares) if kind == PRICED[0] else None
    return torch.from_numpy(dequantize_blocks(quantize_blocks(array, kind, importance=important)))


def _inputs(model: Any, name: str) -> torch.Tensor:
    """What the linear layer of a weight is given on all windows, (tokens, K)."""
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in WINDOWS:
            model(input_ids=torch.from_numpy(row[None]))
    handle.remove()
    return torch.cat(seen)


def _whole_model_prices(model: Any) -> dict[str, Array]:
    """The same by one backward pass through all of the model."""
    generator = torch.Generator().manual_seed(0)
    linears = {
        f"{n}.weight": m
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    }
    prices = {n: np.zeros(len(PRICED)) for n in linears}
    inputs = {n: _inputs(model, n) for n in linears}
    for row in WINDOWS:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        handles = []
        for name, linear in linears.items():

            def keep(_: Any, args: Any, result: torch.Tensor, name: str = name, seen: Any = seen) -> None:
                result.retain_grad()
                seen[name] = (args[0], result)

            handles.append(linear.register_forward_hook(keep))
        model.requires_grad_(True)
        logp = torch.log_softmax(model(input_ids=torch.from_numpy(row[None])).logits[0], -1)
        drawn = torch.multinomial(logp.detach().exp(), 1, generator=generator)
        logp.gather(-1, drawn).sum().backward()
        for handle in handles:
            handle.remove()
        for name, (x, result) in seen.items():
            assert result.grad is not None
            weight = linears[name].weight.detach()
            for i, kind in enumerate(PRICED):
                moved = (x.detach() @ (_rounded(weight, kind, inputs[name]) - weight).T * result.grad).sum(-1)
                prices[name][i] += float(moved.square().sum()) / 2
    return {n: p / WINDOWS.size for n, p in prices.items()}


def _divergence(model: Any, changed: Any) -> float:
    """Nats per token from `model` to `changed`."""
    total = 0.0
    with torch.inference_mode():
        for row in WINDOWS:
            tokens = torch.from_numpy(row[None])
            p, q = (torch.log_softmax(m(input_ids=tokens).logits[0], -1) for m in (model, changed))
            total += float((p.exp() * (p - q)).sum())
    return total / WINDOWS.size


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "stablelm"])
def test_streamed_gradients_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    model = build_tiny_model(model_type, tie_word_embeddings=True)
    model.set_attn_implementation("eager")
    found = _walk(model, Watched(model), tmp_path).measure(WINDOWS, lambda _: None)
    expected = _whole_model_prices(model)
    assert found.keys() == {*expected, HEAD}
    for name, prices in expected.items():
        # Sums in another order decide between scales that are as good.
        np.testing.assert_allclose(found[name], prices, rtol=1e-2, err_msg=name)
    assert not list(tmp_path.glob("states-*"))


def test_the_head_is_priced_by_the_divergence_itself(tmp_path: Path) -> None:
    model = build_tiny_model("llama", tie_word_embeddings=True)
    found = _walk(model, Watched(model), tmp_path).measure(WINDOWS, lambda _: None)
    changed = build_tiny_model("llama", tie_word_embeddings=True)
    for i, kind in enumerate(PRICED):
        rounded = _rounded(model.lm_head.weight, kind, _inputs(model, "lm_head.weight"))
        changed.lm_head.weight = torch.nn.Parameter(rounded)  # the embedding keeps its own
        assert found[HEAD][i] == pytest.approx(_divergence(model, changed), rel=1e-2)


def test_prices_foretell_the_divergence(tmp_path: Path) -> None:
    model = build_tiny_model("llama", tie_word_embeddings=True)
    found = _walk(model, Watched(model), tmp_path).measure(WINDOWS, lambda _: None)
    names = [n for n in found if n != HEAD]
    changed = build_tiny_model("llama", tie_word_embeddings=True)
    for name in names:
        rounded = _rounded(model.get_parameter(name), PRICED[0], _inputs(model, name))
        changed.get_parameter(name).data.copy_(rounded)
    predicted = sum(found[n][0] for n in names)
    assert 0.5 < predicted / _divergence(model, changed) < 2
    assert all(found[n][0] > 20 * found[n][1] for n in names)


def test_a_killed_walk_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = build_tiny_model("llama", tie_word_embeddings=True)
    whole = _walk(model, Watched(model), tmp_path / "whole").measure(WINDOWS, lambda _: None)
    store = Watched(model)
    walk = _walk(model, store, tmp_path / "killed")

    def on_the_way_back() -> None:
        if (tmp_path / "killed" / "prices-2.safetensors").is_file():
            raise KeyboardInterrupt

    walk._load, load = lambda names: (on_the_way_back(), load(names))[1], walk._load  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        walk.measure(WINDOWS, lambda _: None)
    notes: list[str] = []
    again = Watched(model)
    found = _walk(model, again, tmp_path / "killed").measure(WINDOWS, notes.append)
    assert notes == ["2 of 4 parts of the model were priced before", "3 of 3 layers were calibrated before"]
    assert not [n for n in again.reads if n.startswith("model.layers.2.")]
    assert found.keys() == whole.keys()
    for name, prices in whole.items():
        np.testing.assert_array_equal(found[name], prices)


def test_no_more_than_one_layer_is_in_memory(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    walk = _walk(model, Watched(model), tmp_path)
    walk.measure(WINDOWS, lambda _: None)
    held = [n for n, p in walk.model.named_parameters() if not p.is_meta and n.startswith("model.layers.")]
    assert held == []


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = build_tiny_model("llama", tie_word_embeddings=True)
    model.get_parameter("model.norm.weight").data[3] = torch.inf
    with pytest.raises(
        CheckpointError, match=r"the cost of rounding .* on the calibration text is not finite"
    ):
        _walk(model, Watched(model), tmp_path).measure(WINDOWS, lambda _: None)
