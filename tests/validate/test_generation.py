"""Greedy text through onnxruntime-genai against PyTorch's generate, and every metric on one folder."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import data
from llmc.artifact.store.codec import TextCodec
from llmc.artifact.text import TextRecord
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ParityError
from llmc.runtime.ort_model import OrtModel, shares_buffer
from llmc.validate.generation import ServedText, measure_generation, served_texts
from llmc.validate.quality import measure_quality, plan_windows
from llmc.validate.questions import Question
from llmc.validate.reference import TorchModel
from llmc.validate.served import Served

from .decoder import Variant
from .levels import parity_of
from .serving import END, tiny_tokenizer, write_artifact

SERVED = Variant(grouped=True, padding="right", logits="last")
PROMPTS = ("The sea", "def mean(values):", "Once", "A list of", "Water boils")


def generate(
    folder: Path, reference: TorchModel, prompts: tuple[str, ...] = PROMPTS, stop: tuple[int, ...] = (END,)
) -> dict[Metric, Measurement]:
    served = Served(folder)
    codec = TextCodec(folder, TextRecord())
    made = served_texts(served, codec, tiny_tokenizer(), prompts)
    return {m.metric: m for m in measure_generation(made, reference, reference, stop, served.where)}


@pytest.mark.parametrize("share", [False, True], ids=["growing", "shared"])
def test_equal_text(llama: Any, tmp_path: Path, share: bool) -> None:
    write_artifact(llama, tmp_path, SERVED, share_buffer=share)
    found = generate(tmp_path, TorchModel(llama))
    equal = found[Metric.GENERATE_EQUAL]
    assert equal.value == 1.0
    assert equal.detail == "5 prompts, 32 new tokens each"
    assert "onnxruntime-genai" in equal.where
    assert found[Metric.GENERATE_GAP].value < 1e-4
    assert found[Metric.GENERATE_SEEDED].value == 1.0


def test_a_prompt_begins_once_with_the_tokenizers_own_token(llama: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    write_artifact(llama, tmp_path, SERVED, share_buffer=False)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path)
    codec = TextCodec(tmp_path, TextRecord(before=(1,)))
    (made,) = served_texts(Served(tmp_path), codec, tokenizer, ("Once",), 1)
    bare = tokenizer("Once", add_special_tokens=False)["input_ids"]
    assert made.ids == made.encoded == [1, *bare]


def test_other_weights_give_other_text(llama: Any, tmp_path: Path) -> None:
    variant = Variant(**{**vars(SERVED), "scale_weight": ("model.layers.0.self_attn.o_proj.weight", -1.0)})
    write_artifact(llama, tmp_path, variant, share_buffer=False)
    found = generate(tmp_path, TorchModel(llama))
    assert found[Metric.GENERATE_EQUAL].value < 1.0
    assert "differs from new token" in found[Metric.GENERATE_EQUAL].detail
    assert found[Metric.GENERATE_GAP].value > 1.0
    assert found[Metric.GENERATE_SEEDED].value < 1.0
    assert "draws at new token" in found[Metric.GENERATE_SEEDED].detail


def test_other_tokens_are_unequal(llama: Any, tmp_path: Path) -> None:
    write_artifact(llama, tmp_path, SERVED, share_buffer=False)
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    swapped = text.replace('"T": 54', '"T": 55').replace('"U": 55', '"U": 54')
    assert swapped != text
    path.write_text(swapped, encoding="utf-8")
    found = generate(tmp_path, TorchModel(llama))[Metric.GENERATE_EQUAL]
    assert found.value == 0.8
    assert "'The sea' is encoded as" in found.detail


def test_text_is_held_to_that_of_pytorch(llama: Any, tmp_path: Path) -> None:
    """Other text than PyTorch's own, token by token, is told apart by the token at which it parts."""
    reference, ids = TorchModel(llama), tiny_tokenizer()("Once")["input_ids"]
    own = reference.greedy(np.array(ids), 32).tolist()
    for at in (None, 0, 5, 31):
        made = [(t + 1) % 256 if i == at else t for i, t in enumerate(own)]
        served = ServedText("Once", ids, ids, made, (made, made))
        equal, gap, _ = measure_generation([served], reference, reference, (), "here")
        assert equal.value == (at is None)
        assert at is None or f"differs from new token {at + 1} on" in equal.detail
        assert (gap.value > 1e-3) == (at is not None)


@pytest.mark.parametrize(("behind", "share"), [(0.1, 1.0), (0.6, 0.0)])
def test_a_drawn_token_is_unlikely_by_logits_where_they_are_flat(behind: float, share: float) -> None:
    """Of 256 tokens 40 are preferred to the one that was drawn, by `behind` logits each."""

    class Flat:
        def ask(self, question: Question) -> bytes:
            logits = np.zeros((question.keep, 256), np.float32)
            logits[:, 100:140] = behind
            return question.reduce(logits)

    served = ServedText("Once", [5], [5], [100], ([7], [7]))
    made = measure_generation([served], Flat(), Flat(), (), "here", 1)  # type: ignore[arg-type]
    assert {m.metric: m.value for m in made}[Metric.GENERATE_SEEDED] == share


def test_end_token_stops_both(llama: Any, tmp_path: Path) -> None:
    """Equal with the same end token; an artifact that does not know the model's runs on and differs."""
    write_artifact(llama, tmp_path, SERVED, share_buffer=False)
    reference = TorchModel(llama)
    later = int(reference.greedy(np.array(tiny_tokenizer()("Once")["input_ids"]), 4)[2])
    ran_on = generate(tmp_path, reference, ("Once",), (later,))[Metric.GENERATE_EQUAL]
    assert ran_on.value == 0.0
    config = tmp_path / "genai_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"eos_token_id": 2', f'"eos_token_id": {later}'), encoding="utf-8")
    stopped = generate(tmp_path, reference, ("Once",), (later,))
    assert stopped[Metric.GENERATE_EQUAL].value == 1.0
    assert stopped[Metric.GENERATE_GAP].value < 1e-4
    # Ending where the original goes on is a gap as well.
    early = generate(tmp_path, reference, ("Once",), (END,))
    assert early[Metric.GENERATE_GAP].value > 1.0


def test_folder_that_is_not_served(llama: Any, tmp_path: Path) -> None:
    write_artifact(llama, tmp_path, SERVED, share_buffer=False)
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ParityError, match="cannot load"):
        Served(tmp_path)


def test_every_metric_of_a_served_folder(mistral: Any, tmp_path: Path) -> None:
    """On the shipped text and in the cache mode that the folder is served in."""
    interface = write_artifact(mistral, tmp_path, SERVED, share_buffer=True)
    assert shares_buffer(tmp_path)
    model = OrtModel(tmp_path, interface, threads=1, share_buffer=True)
    reference, tokenizer = TorchModel(mistral), tiny_tokenizer()
    tokens = np.array(tokenizer(data.eval_text()[:3000])["input_ids"])
    made = (
        *parity_of(model, reference, tokens).measure(),
        *measure_quality(model, reference, plan_windows(model.interface, tokens, (1,))),
        *generate(tmp_path, reference).values(),
    )
    areas = ("prefill", "chunks", "decode", "ragged", "window", "positions", "text", "generate")
    assert {m.metric for m in made} == {m for m in Metric if m.partition(".")[0] in areas}
    made = tuple(m for m in made if m.metric is not Metric.TEXT_KL_RATIO)  # nothing here is quantized
    assert all(m.status is MeasurementStatus.MEASURED and math.isfinite(m.value) for m in made)


def test_shipped_text_and_prompts() -> None:
    assert len(data.eval_text().split()) > 4000
    assert len(data.prompts()) == 8
    assert len(set(data.prompts())) == 8
