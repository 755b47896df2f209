"""Methods of quantization: one config class and one handler each, and nothing else that knows them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from llmc.calibration.hessian import InputHessian
from llmc.catalog import load_target
from llmc.config import METHODS, CalibrationText, Method, Quantization, WeightRole, WeightRule, WeightScheme
from llmc.document import render_document
from llmc.errors import ConfigError
from llmc.pipeline import build
from llmc.pipeline.tune.candidates import Space
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.quantize import methods
from llmc.quantize.blocks import PackedBlocks, ScaleType, Workspace, pack
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.methods import CalibratedHandler, Handler, find_calibrated, registered_handlers
from tests.caches import own_cache
from tests.models import save_tiny_model
from tests.quantize.reference import Array, scheme

#: Code of every weight that `Flat` stores.
CODE = 9


class Power(Method):
    """Scales that are powers of two."""

    name = "power"


class PowerHandler(Handler):
    method = Power

    def fit(self, work: Workspace, scheme: WeightScheme, scale_type: ScaleType) -> tuple[Array, Array]:
        spans = np.abs(work.columns).max(0) / 7
        return np.exp2(np.ceil(np.log2(spans))), np.full_like(spans, 8)


class Flat(Method):
    """One code for all weights, and a scale by what the matrix is given on calibration text."""

    name = "flat"
    starts_from = Power


class FlatHandler(CalibratedHandler):
    method = Flat

    def calibrate(
        self, weights: Array, hessian: InputHessian, scheme: WeightScheme, scale_type: ScaleType, name: str
    ) -> PackedBlocks:
        start = quantize_blocks(weights, scheme, scale_type, name)
        codes = pack(np.full((*start.scales.shape, scheme.block_size), CODE, np.uint8), scheme.bits)
        scales = np.full_like(start.scales, np.diagonal(hessian.matrix).mean() * 1e-6)
        return PackedBlocks(codes, scales, start.zero_points, start.in_features, scheme)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two files of a method add: its config class, and its handler."""
    for handler in (PowerHandler(), FlatHandler()):
        monkeypatch.setitem(METHODS, handler.method.name, handler.method)
        monkeypatch.setitem(registered_handlers(), handler.method, handler)


def test_every_method_has_a_handler() -> None:
    assert set(registered_handlers()) == set(METHODS.values())
    assert {m for m, h in registered_handlers().items() if isinstance(h, CalibratedHandler)} == {
        m for m in METHODS.values() if m.starts_from is not None
    }


@pytest.mark.usefixtures("registered")
def test_a_target_is_built_with_methods_that_are_only_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    kinds = {name: {"bits": 4, "block_size": 32, "symmetric": True, "method": name} for name in METHODS}
    quantize = Quantization(
        accuracy_level=4,
        rules=(
            WeightRule(role=WeightRole.RESIDUAL, scheme=WeightScheme.model_validate(kinds["flat"])),
            WeightRule(scheme=WeightScheme.model_validate(kinds["power"])),
        ),
        calibration=CalibrationText(window_tokens=64, max_windows=8),
    )
    mine = load_target("cpu-int4").model_copy(update={"name": "mine", "quantize": quantize})
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "mine.yaml").write_text(render_document(mine))
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True)
    output = tmp_path / "artifact"
    plan = plan_build(str(model), target="mine", profile="local", output=output, verify=False, path=tmp_path)
    assert plan.target == mine
    build(plan, SilentProgress())
    stored = {
        tensor.name: numpy_helper.to_array(tensor, str(output))
        for tensor in onnx.load(output / "model.onnx", load_external_data=False).graph.initializer
    }
    codes = {name: array for name, array in stored.items() if name.endswith("_proj.weight.codes")}
    flat = {name for name, array in codes.items() if (array == CODE * 0x11).all()}
    assert flat == {name for name in codes if "o_proj" in name or "down_proj" in name} != set()
    fitted = [stored[name.replace(".codes", ".scales")] for name in codes.keys() - flat]
    assert fitted
    assert all((np.frexp(scales)[0] == 0.5).all() for scales in fitted)


@pytest.mark.usefixtures("registered")
def test_a_tuning_tries_a_method_that_is_only_registered() -> None:
    seen: dict[str, tuple[object, ...]] = {}

    def choose(name: str, options: tuple[object, ...]) -> object:
        seen[name] = tuple(options)
        return "flat" if name == "method" else options[-1] if name == "head.bits" else options[0]

    target = Space.around((load_target("cpu-int4"),)).target(choose)  # type: ignore[arg-type]
    assert seen["method"] == ("rtn", "mse", "gptq", "power", "flat")
    assert target.quantize is not None
    used = {rule.scheme.bits: rule.scheme.method for rule in target.quantize.rules if rule.scheme is not None}
    assert used == {4: Flat(), 8: Power()}
    assert target.quantize.calibration is not None


@pytest.mark.usefixtures("registered")
def test_calibration_is_stated_for_every_method_that_needs_it() -> None:
    rules = ({"scheme": scheme(method="flat")},)
    with pytest.raises(ValueError, match="a rule or choice has method gptq or flat"):
        Quantization.model_validate({"accuracy_level": 4, "rules": rules})


@pytest.mark.parametrize("stated", ["power", 4, ["mse"], {}])
def test_what_is_not_the_name_of_a_method_is_refused_with_those_that_are(stated: Any) -> None:
    with pytest.raises(ValueError, match="Input should be 'rtn', 'mse' or 'gptq'"):
        scheme(method=stated)


def test_a_method_without_a_handler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Power.name, Power)
    with pytest.raises(ConfigError, match="method power has no handler"):
        quantize_blocks(np.ones((4, 32), np.float32), scheme(method="power"))


def test_a_method_that_is_not_calibrated_is_not_taken_for_one() -> None:
    with pytest.raises(ConfigError, match="method mse is not calibrated"):
        find_calibrated(scheme(method="mse"))


def test_two_handlers_of_one_method_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "again.py").write_text("from llmc.quantize.methods.mse import HANDLER as HANDLER\n")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match="method mse has two handlers"):
        registered_handlers.__wrapped__()
