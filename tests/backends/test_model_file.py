"""write_model: the bytes, how they are computed, and what happens when they are not."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from llmc.arrays import Array
from llmc.artifact.manifest import FileDigest
from llmc.backends.model_file import write_model
from llmc.errors import CheckpointError, GraphError, ResourceError
from llmc.graph.weights import LazyWeight, WeightGroup

Compute = Callable[[], Mapping[str, Array]]


def value_of(tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )


def lazy(name: str, group: WeightGroup, key: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    return value_of(LazyWeight(name=name, dtype=dtype, shape=shape, group=group, key=key))


def model_of(*weights: ir.Value) -> ir.Model:
    """A model that returns its weights as they are."""
    outputs = [ir.Value(name=f"{w.name}.out", type=w.type, shape=w.shape) for w in weights]
    nodes = [ir.Node("", "Identity", [w], outputs=[out]) for w, out in zip(weights, outputs, strict=True)]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=weights, opset_imports={"": 21}, name="weights")
    return ir.Model(graph, ir_version=10)


def run(folder: Path) -> list[Array]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return list(session.run(None, {}))


def array(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def floats(name: str, compute: Compute, *shape: int) -> ir.Value:
    return lazy(name, WeightGroup((name,), compute), "value", shape, ir.DataType.FLOAT)


def sample() -> tuple[ir.Model, list[Array]]:
    """Weights of one group, one alone, one with data, and a small one; and their values."""
    codes = np.arange(64 * 24, dtype=np.int64).astype(np.uint8).reshape(64, 24)
    scales, zeros, alone, ready = array(1, 64, 8), array(2, 3), array(3, 300, 7), array(4, 40, 30)
    group = WeightGroup(("w",), lambda: {"scales": scales, "codes": codes, "zeros": zeros})
    weights = [
        lazy("codes", group, "codes", (64, 24), ir.DataType.UINT8),
        floats("alone", lambda: {"value": alone}, 300, 7),
        lazy("scales", group, "scales", (64, 8), ir.DataType.FLOAT),
        lazy("zeros", group, "zeros", (3,), ir.DataType.FLOAT),
        value_of(ir.tensor(ready, name="ready")),
        value_of(ir.tensor(np.array([1, 2], dtype=np.int64), name="shape")),
    ]
    return model_of(*weights), [codes, alone, scales, zeros, ready, np.array([1, 2])]


def test_onnxruntime_reads_back_what_was_computed(tmp_path: Path) -> None:
    model, expected = sample()
    write_model(model, tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    for got, want in zip(run(tmp_path), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_large_tensors_lie_aligned_in_the_data_file_and_small_ones_in_the_model(tmp_path: Path) -> None:
    model, _ = sample()
    write_model(model, tmp_path)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    places = {
        t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data
    }
    assert places == {
        "codes": {"location": "model.onnx.data", "offset": "0", "length": "1536"},
        "scales": {"location": "model.onnx.data", "offset": "1536", "length": "2048"},
        "alone": {"location": "model.onnx.data", "offset": "3584", "length": "8400"},
        "ready": {"location": "model.onnx.data", "offset": "12032", "length": "4800"},
    }
    assert {t.name for t in proto.graph.initializer} - places.keys() == {"zeros", "shape"}


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    model, _ = sample()
    files = write_model(model, tmp_path)
    assert files == {
        path.name: FileDigest(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bytes=path.stat().st_size)
        for path in tmp_path.iterdir()
    }
    assert files.keys() == {"model.onnx", "model.onnx.data"}


def test_the_same_model_gives_the_same_bytes_and_keeps_its_weights_lazy(tmp_path: Path) -> None:
    model, _ = sample()
    again, _ = sample()
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    for folder, graph in ((first, model), (second, again), (third, model)):
        folder.mkdir()
        write_model(graph, folder)
        assert isinstance(graph.graph.initializers["codes"].const_value, LazyWeight)
    for name in ("model.onnx", "model.onnx.data"):
        assert (first / name).read_bytes() == (second / name).read_bytes() == (third / name).read_bytes()


def test_each_group_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> Mapping[str, Array]:
        calls.append(threading.current_thread().name)
        return {"a": array(0, 512), "b": array(1, 512)}

    group = WeightGroup(("w",), compute)
    write_model(model_of(*(lazy(k, group, k, (512,), ir.DataType.FLOAT) for k in "ab")), tmp_path)
    assert len(calls) == 1
    np.testing.assert_array_equal(run(tmp_path)[1], array(1, 512))


class Meter:
    """Weights whose computation is observed: how many run at a time, how many wait to be written."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.lock = seconds, threading.Lock()
        self.started = self.running = self.written = 0
        self.parallel: list[int] = []
        self.ahead: list[int] = []

    def compute(self) -> Mapping[str, Array]:
        with self.lock:
            self.started += 1
            self.running += 1
            self.parallel.append(self.running)
            self.ahead.append(self.started - self.written)
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
        return {"value": array(0, 512)}

    def model(self, count: int) -> ir.Model:
        return model_of(*(floats(f"w{n}", self.compute, 512) for n in range(count)))


def test_two_groups_are_computed_at_a_time(tmp_path: Path) -> None:
    meter = Meter(0.01)
    write_model(meter.model(8), tmp_path)
    assert meter.started == 8
    assert max(meter.parallel) == 2


def test_few_groups_wait_for_a_slow_disk(tmp_path: Path) -> None:
    meter = Meter(0.001)

    def progress(done: int, total: int) -> None:
        assert total == 12 * 2048
        with meter.lock:
            meter.written = done // 2048
        time.sleep(0.02)

    write_model(meter.model(12), tmp_path, progress)
    assert meter.written == 12
    assert max(meter.ahead) <= 3


@pytest.mark.parametrize(("bound", "most"), [(3000, 1), (3 * 2048, 2)])
def test_the_bytes_computed_ahead_are_bounded_all_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int, most: int
) -> None:
    monkeypatch.setattr("llmc.backends.external._BYTES_AHEAD", bound)
    meter = Meter(0.01)
    write_model(meter.model(10), tmp_path)
    assert max(meter.parallel) == max(meter.parallel[6:]) == most


def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
import onnx_ir as ir
from llmc.backends.model_file import write_model
names = sorted("abcdef", key=ord)
values = [
    ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([512]),
             const_value=ir.tensor(np.full(512, ord(n), dtype=np.float32), name=n))
    for n in names
]
node = ir.Node("", "Sum", values, num_outputs=1, metadata_props={n: n for n in names})
node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "s", values[0].type, ir.Shape([512])
opsets = {"": 21, "com.microsoft": 1, "llmc": 1}
graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports=opsets, name="g")
write_model(ir.Model(graph, ir_version=10), Path(sys.argv[1]))
"""
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_types_that_numpy_lacks(tmp_path: Path) -> None:
    nibbles = (np.arange(2048) % 16).astype(ml_dtypes.uint4)
    halves = array(5, 1024).astype(ml_dtypes.bfloat16)
    weights = [
        lazy("q", WeightGroup((), lambda: {"v": nibbles}), "v", (2048,), ir.DataType.UINT4),
        lazy("h", WeightGroup((), lambda: {"v": halves}), "v", (1024,), ir.DataType.BFLOAT16),
    ]
    files = write_model(model_of(*weights), tmp_path)
    assert files["model.onnx.data"].bytes == 1024 + 2048
    loaded = ir.load(tmp_path / "model.onnx").graph.initializers
    for name, want in (("q", nibbles), ("h", halves)):
        tensor = loaded[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), want)


def test_a_model_without_large_tensors_has_no_data_file(tmp_path: Path) -> None:
    files = write_model(model_of(floats("w", lambda: {"value": array(0, 4)}, 4)), tmp_path)
    assert files.keys() == {"model.onnx"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    np.testing.assert_array_equal(run(tmp_path)[0], array(0, 4))


def test_initializers_of_subgraphs_are_written(tmp_path: Path) -> None:
    inner = floats("inner", lambda: {"value": array(0, 512)}, 512)
    branches = {}
    for name, source in (
        ("then_branch", inner),
        ("else_branch", floats("e", lambda: {"value": array(1, 512)}, 512)),
    ):
        out = ir.Value(name=f"{name}.out", type=source.type, shape=source.shape)
        node = ir.Node("", "Identity", [source], outputs=[out])
        branches[name] = ir.Graph([], [out], nodes=[node], initializers=[source], name=name)
    truth = value_of(ir.tensor(np.array(True), name="truth"))
    result = ir.Value(name="result", type=inner.type, shape=inner.shape)
    attributes = [ir.AttrGraph(name, graph) for name, graph in branches.items()]
    chosen = ir.Node("", "If", [truth], attributes, outputs=[result])
    graph = ir.Graph([], [result], nodes=[chosen], initializers=[truth], opset_imports={"": 21}, name="g")
    files = write_model(ir.Model(graph, ir_version=10), tmp_path)
    assert files["model.onnx.data"].bytes == 4096
    np.testing.assert_array_equal(run(tmp_path)[0], array(0, 512))


def missing() -> Mapping[str, Array]:
    raise CheckpointError("shard 2 is truncated", hint="fetch it again")


def broken() -> Mapping[str, Array]:
    raise ZeroDivisionError("scale")


def exhausted() -> Mapping[str, Array]:
    raise MemoryError


@pytest.mark.parametrize(
    ("compute", "error", "fact"),
    [
        (missing, CheckpointError, "weight w1: shard 2 is truncated"),
        (broken, GraphError, "weight w1 cannot be computed: ZeroDivisionError: scale"),
        (exhausted, ResourceError, r"out of memory while computing weight w1 \(2,048 bytes\)"),
        (
            lambda: {"codes": array(0, 512)},
            GraphError,
            "weight w1: its computation gives codes, but not 'value'",
        ),
        (
            lambda: {"value": array(0, 511)},
            GraphError,
            r"weight w1 is computed as float32 \(511,\); the graph declares float32 \(512,\)",
        ),
        (
            lambda: {"value": array(0, 512).astype(np.float64)},
            GraphError,
            r"weight w1 is computed as float64 \(512,\); the graph declares float32 \(512,\)",
        ),
    ],
)
def test_a_weight_that_is_not_computed_is_named(
    tmp_path: Path, compute: Compute, error: type[Exception], fact: str
) -> None:
    good = [floats(f"w{n}", lambda: {"value": array(0, 512)}, 512) for n in (0, 2, 3)]
    bad = floats("w1", compute, 512)
    model = model_of(good[0], bad, *good[1:])
    with pytest.raises(error, match=fact):
        write_model(model, tmp_path)
    assert not (tmp_path / "model.onnx").exists()
    assert all(isinstance(v.const_value, LazyWeight) for v in model.graph.initializers.values())


def test_the_hint_of_a_failed_weight_survives(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_model(model_of(floats("w", missing, 512)), tmp_path)
    assert caught.value.hint == "fetch it again"


def test_an_initializer_without_data_is_named(tmp_path: Path) -> None:
    empty = ir.Value(name="empty", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    model = model_of(floats("w", missing, 512))
    model.graph.initializers.add(empty)
    with pytest.raises(GraphError, match="initializer empty has no data"):
        write_model(model, tmp_path)


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").symlink_to("/dev/full")
    model, _ = sample()
    with pytest.raises(ResourceError, match=r"model\.onnx\.data cannot be written: No space left on device"):
        write_model(model, tmp_path)
    assert isinstance(model.graph.initializers["codes"].const_value, LazyWeight)


def test_ctrl_c_while_writing_stops_the_threads(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    model, _ = sample()
    with pytest.raises(KeyboardInterrupt):
        write_model(model, tmp_path, stop)
    assert not [t for t in threading.enumerate() if t.name.startswith("llmc-weights")]
