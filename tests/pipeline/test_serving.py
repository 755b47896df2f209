"""An artifact in the hands of onnxruntime-genai."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmc.backends.onnxruntime.generate import generate_tokens
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.models import EOS, save_tiny_model

STEPS = 6


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_ragged_batch_gives_the_text_of_each_prompt_alone(model_type: str, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    model = save_tiny_model(model_type, tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    folder = tmp_path / "out"
    plan = plan_build(str(model), target="cpu-fp32", profile="local", output=folder, verify=False)
    build(plan, SilentProgress())
    pad = json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"]
    prompts = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46], [7]]
    longest = max(map(len, prompts))

    served = og.Model(str(folder))
    params = og.GeneratorParams(served)
    params.set_search_options(batch_size=len(prompts), max_length=longest + STEPS, do_sample=False)
    generator = og.Generator(served, params)
    generator.append_tokens(np.array([p + [pad] * (longest - len(p)) for p in prompts], np.int32))
    made = []
    for _ in range(STEPS):
        generator.generate_next_token()
        made.append([int(token) for token in generator.get_next_tokens()])
    alone = [generate_tokens(folder, prompt, STEPS) for prompt in prompts]
    assert all(len(tokens) == STEPS for tokens in alone)
    assert [list(row) for row in zip(*made, strict=True)] == alone
