"""OrtModel: KV cache modes agree, and an artifact that is not its interface is named."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.config import Provider
from llmc.errors import ConfigError, ExitCode, ParityError, ResourceError
from llmc.runtime.ort_model import OrtModel, records_graph, shares_buffer
from llmc.validate.served import Served
from tests.cuda import stub_environment
from tests.validate.decoder import Variant, write_decoder


def test_growing_and_shared_cache_give_the_same_logits(
    llama: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    interface = write_decoder(llama, tmp_path, Variant(grouped=True, padding="right"))
    made = []
    for share in (False, True):
        model = OrtModel(tmp_path, interface, threads=1, share_buffer=share)
        steps = [model.prefill(tokens[None, :9], steps=4)[:, -1:]]
        steps += [model.decode(tokens[None, at : at + 1]) for at in range(9, 13)]
        made.append(np.concatenate(steps, axis=1))
    np.testing.assert_array_equal(made[0], made[1])
    assert made[0].shape == (1, 5, 256)
    assert made[0].dtype == np.float32


@pytest.mark.parametrize("share", [False, True], ids=["growing", "shared"])
def test_restore_goes_back(llama: Any, tokens: np.ndarray, tmp_path: Path, share: bool) -> None:
    interface = write_decoder(llama, tmp_path, Variant(grouped=True, padding="right"))
    model = OrtModel(tmp_path, interface, threads=1, share_buffer=share)
    model.prefill(tokens[None, :9], steps=4)
    point = model.state()
    first = [model.decode(tokens[None, at : at + 1]).copy() for at in (20, 21)]
    model.restore(point)
    again = [model.decode(tokens[None, at : at + 1]).copy() for at in (20, 21)]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_shared_cache_without_a_slot_left(llama: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path, Variant(grouped=True, padding="right"))
    model = OrtModel(tmp_path, interface, threads=1, share_buffer=True)
    model.prefill(tokens[None, :9], steps=0)
    with pytest.raises(ConfigError, match="has 9 slots, but the step needs 10"):
        model.decode(tokens[None, :1])


def test_missing_output_is_named(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path, Variant(drop_output="present.1.value"))
    with pytest.raises(ParityError, match=r"the graph lacks the output present\.1\.value") as caught:
        OrtModel(tmp_path, interface, threads=1, share_buffer=False)
    assert caught.value.exit_code is ExitCode.PARITY


def test_output_the_interface_does_not_name(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path)
    fewer = interface.model_copy(update={"outputs": interface.outputs[:-1]})
    with pytest.raises(ParityError, match=r"has the output present\.1\.value, which the interface"):
        OrtModel(tmp_path, fewer, threads=1, share_buffer=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "output logits is float32, but the interface says float16"),
        ({"shape": ("batch", "sequence", 255)}, "the interface says .*255"),
        ({"shape": ("batch", 256)}, "output logits has shape"),
    ],
    ids=["type", "size", "rank"],
)
def test_output_of_another_kind(llama: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    interface = write_decoder(llama, tmp_path)
    logits = interface.outputs[0].model_copy(update=change)
    stated = interface.model_copy(update={"outputs": (logits, *interface.outputs[1:])})
    with pytest.raises(ParityError, match=message):
        OrtModel(tmp_path, stated, threads=1, share_buffer=False)


def test_logits_of_every_position_where_the_last_is_promised(
    llama: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    interface = write_decoder(llama, tmp_path).model_copy(update={"logits": "last"})
    model = OrtModel(tmp_path, interface, threads=1, share_buffer=False)
    with pytest.raises(ParityError, match=r"logits has shape \[1, 5, 256\], but it must be \[1, 1, 256\]"):
        model.prefill(tokens[None, :5], steps=0)


def test_input_that_nothing_feeds(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path, Variant(position_ids=True))
    silent = interface.model_copy(update={"position_ids": False})
    with pytest.raises(ParityError, match=r"inputs \['position_ids'\] that nothing feeds"):
        OrtModel(tmp_path, silent, threads=1, share_buffer=False)


def test_cache_outputs_missing_from_the_interface(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path, Variant(drop_output="present.0.key"))
    outputs = tuple(o for o in interface.outputs if o.name != "present.0.key")
    with pytest.raises(ParityError, match=r"lacks the outputs \['present\.0\.key'\]"):
        OrtModel(tmp_path, interface.model_copy(update={"outputs": outputs}), threads=1, share_buffer=False)


def test_run_that_fails(llama: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    model = OrtModel(tmp_path, write_decoder(llama, tmp_path), threads=1, share_buffer=False)
    with pytest.raises(ParityError, match="onnxruntime failed at batch 1, sequence 1, total 1"):
        model.prefill(np.array([[10_000]]), steps=0)


def test_no_model(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path / "there")
    with pytest.raises(ConfigError, match=r"has no model\.onnx") as caught:
        OrtModel(tmp_path, interface, threads=1, share_buffer=False)
    assert caught.value.hint == "give the directory of a built artifact"


def test_model_that_does_not_load(llama: Any, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path)
    path = tmp_path / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ParityError, match="cannot load"):
        OrtModel(tmp_path, interface, threads=1, share_buffer=False)


@pytest.mark.parametrize(
    ("providers", "records"),
    [
        ("", False),
        ('{"cuda": {"enable_cuda_graph": "0"}}', False),
        ('{"cuda": {"enable_cuda_graph": "1"}}', True),
    ],
)
def test_records_graph(tmp_path: Path, providers: str, records: bool) -> None:
    options = f'{{"session_options": {{"provider_options": [{providers}]}}}}'
    (tmp_path / "genai_config.json").write_text(f'{{"model": {{"decoder": {options}}}}}', encoding="utf-8")
    assert records_graph(tmp_path) is records


def test_shares_buffer(tmp_path: Path) -> None:
    path = tmp_path / "genai_config.json"
    with pytest.raises(ConfigError, match="cannot read"):
        shares_buffer(tmp_path)
    path.write_text('{"search": {"past_present_share_buffer": true}}')
    assert shares_buffer(tmp_path)
    path.write_text('{"search": {}}')
    assert not shares_buffer(tmp_path)


def test_a_runtime_that_is_not_installed(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interface = write_decoder(llama, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ResourceError, match="onnxruntime, which executes graphs, cannot be imported"
    ) as caught:
        OrtModel(tmp_path, interface, threads=1, share_buffer=False)
    assert "pip install onnxruntime" in str(caught.value.hint)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(
        ResourceError, match="onnxruntime-genai, which runs artifacts, cannot be imported"
    ) as caught:
        Served(tmp_path)
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert "pip install onnxruntime-genai" in str(caught.value.hint)


@pytest.mark.parametrize("share", [False, True], ids=["growing", "shared"])
def test_the_graph_chooses_the_tokens_that_its_logits_prefer(
    llama: Any, tokens: np.ndarray, tmp_path: Path, share: bool
) -> None:
    interface = write_decoder(llama, tmp_path, Variant(grouped=True, padding="right"))
    rows = np.stack([tokens[:9], tokens[9:18]])
    chosen = []
    for chooses in (False, True):
        model = OrtModel(tmp_path, interface, threads=1, share_buffer=share, chooses=chooses)
        steps = [model.prefill(rows, steps=3)[:, -1].argmax(axis=-1)]
        steps.append(model.next_tokens(steps[-1]))
        steps.append(model.next_tokens(steps[-1]))
        chosen.append(steps)
        assert model.decode(steps[-1][:, None]).shape == (2, 1, 256)
    np.testing.assert_array_equal(chosen[0], chosen[1])


def test_a_shared_cache_that_served_another_prompt(llama: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    interface = write_decoder(llama, tmp_path, Variant(grouped=True, padding="right"))
    model = OrtModel(tmp_path, interface, threads=1, share_buffer=True)
    first = [model.prefill(tokens[None, :9], steps=2), model.decode(tokens[None, 9:10])]
    model.prefill(tokens[None, 20:31], steps=0)
    again = [model.prefill(tokens[None, :9], steps=2), model.decode(tokens[None, 9:10])]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("share", "provider"), [(True, Provider.CPU), (False, Provider.CUDA)])
def test_a_step_that_cannot_be_a_cuda_graph(
    llama: Any, tmp_path: Path, share: bool, provider: Provider
) -> None:
    interface = write_decoder(llama, tmp_path, Variant(grouped=True, padding="right"))
    with pytest.raises(ConfigError, match="cannot be a CUDA graph: it needs CUDA and a shared KV buffer"):
        OrtModel(tmp_path, interface, threads=1, share_buffer=share, provider=provider, cuda_graph=True)


ALONE = """
import sys
from pathlib import Path
from llmc.config import Provider
from llmc.errors import LlmcError
from llmc.gpu import Gpu
from llmc.runtime import ort_session
ort_session.require_cuda = lambda: Gpu("a GPU", "9.0", 1, "GPU-1")  # it would say beforehand what is missing
try:
    ort_session.open_session(Path(sys.argv[1]), 1, provider=Provider.CUDA)
except LlmcError as error:
    print(f"{type(error).__name__}: {error.fact} | {error.hint}")
"""


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        (
            {"without": ("libcublas.so.13",)},
            "did not load CUDAExecutionProvider: the session would run on CPUExecutionProvider",
        ),
        ({"devices": 0}, "CUDA failure 100: no CUDA-capable device"),
    ],
    ids=["library", "device"],
)
def test_a_provider_that_does_not_load_is_no_session_on_the_cpu(
    lacks: dict[str, Any], says: str, llama: Any, tmp_path: Path, cuda_stub: Path
) -> None:
    write_decoder(llama, tmp_path)
    machine = stub_environment(cuda_stub, **lacks)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], env=machine, capture_output=True, text=True, check=True
    )
    assert "ResourceError: onnxruntime 1" in done.stdout
    assert says in done.stdout
    assert "| llmc doctor t" in done.stdout
