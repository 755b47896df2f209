"""From text to tokens and back: a tokenizer is served as transformers has it, or refused at once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc import limits
from llmc.artifact.manifest import State
from llmc.artifact.store.folder import open_artifact
from llmc.artifact.text import TextKind, TextRecord
from llmc.backends.onnxruntime.runtime_tokenizer import open_runtime_tokenizer
from llmc.checkpoint import open_checkpoint
from llmc.config import Metric
from llmc.errors import CheckpointError, ConfigError, UnsupportedError
from llmc.pipeline import build, inspect, run
from llmc.pipeline.steps.text import write_text
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.validate.served import ServedTokenizer
from tests.notes import Notes
from tests.texts import CHAT, around, edit, replace_tokenizer, save_model

REPLACE = "{% for m in messages %}{{ m.content.replace('a', 'b') }}{% endfor %}"
LISTED = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "T"}]
ADDED = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "special": True}


def examine(
    folder: Path, *, target: str = "cpu-fp32", profile: str = "local", **options: Any
) -> tuple[TextRecord, list[str]]:
    """What the first step of a build finds out about a checkpoint's text, and what it tells the user."""
    plan = plan_build(str(folder), target=target, profile=profile, **options)
    checkpoint = open_checkpoint(str(folder))
    if plan.chat_template is not None:
        object.__setattr__(checkpoint, "chat_template", plan.chat_template)
    progress = Notes()
    (folder / "out").mkdir(exist_ok=True)
    return write_text(checkpoint, plan, folder / "out", progress), progress.notes


@pytest.mark.parametrize(
    ("settings", "chat"),
    [
        ({"chat_template": LISTED}, True),
        ({"chat_template": [{"name": "rag", "template": CHAT}]}, False),
        ({"chat_template": None}, False),
        ({"chat_template": ""}, False),
        ({"tokenizer_class": None, "bos_token": None}, False),
        ({"tokenizer_class": "SomeNewTokenizer"}, False),
        ({"tokenizer_class": ..., "model_max_length": None, "clean_up_tokenization_spaces": None}, False),
        ({"model_max_length": 1e30, "extra_special_tokens": ["<s>"]}, False),
        ({"additional_special_tokens": ["<s>"], "eos_token": ADDED, "chat_template": CHAT}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True}, False),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False),
    ],
)
def test_settings_that_people_publish_are_served(settings: Any, chat: bool, tmp_path: Path) -> None:
    found, _ = examine(save_model(tmp_path, **settings))
    assert found == TextRecord(chat=chat, adds_special_tokens=found.adds_special_tokens)


def test_templates_that_are_left_out_are_told(tmp_path: Path) -> None:
    _, notes = examine(save_model(tmp_path, chat_template=LISTED))
    assert "of the checkpoint's chat templates, only default is used, not tool_use" in notes


def test_templates_without_a_default_are_told(tmp_path: Path) -> None:
    _, notes = examine(save_model(tmp_path, chat_template=[{"name": "rag", "template": CHAT}]))
    assert notes[0].startswith("none of the checkpoint's chat templates (rag) is the default")


def test_without_settings_the_vocabulary_decides(tmp_path: Path) -> None:
    (save_model(tmp_path) / "tokenizer_config.json").unlink()
    assert examine(tmp_path)[0].served
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }


def test_the_newer_of_two_templates_is_taken(tmp_path: Path) -> None:
    save_model(tmp_path, chat_template="OLD")
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    assert examine(tmp_path)[0].chat
    assert json.loads((tmp_path / "out" / "tokenizer_module.json").read_text())["chat_template"] == CHAT


@pytest.mark.parametrize(
    ("single", "before", "after", "adds"),
    [
        ("<s> $A", (1,), (), True),
        ("<s> $A </s>", (1,), (2,), True),
        ("$A </s>", (), (2,), True),
        ("<pad> <s> $A", (0, 1), (), False),
    ],
)
def test_tokens_around_a_text(
    single: str, before: tuple[int, ...], after: tuple[int, ...], adds: bool, tmp_path: Path
) -> None:
    found, notes = examine(around(save_model(tmp_path), single))
    assert (found.before, found.after, found.adds_special_tokens) == (before, after, adds)
    assert adds or "[0, 1] before and [] after" in notes[0]
    served = ServedTokenizer(open_runtime_tokenizer(tmp_path / "out"), found)
    ids = AutoTokenizer.from_pretrained(tmp_path)("the fox")["input_ids"]
    assert served.encode("the fox") == ids
    assert served.encode_rendered("the fox") == ids[len(before) : len(ids) - len(after)]


@pytest.mark.parametrize(
    ("kind", "exceptions"),
    [
        ("gemma", ()),
        ("llama2", (TextKind.LEADING_SPACE, TextKind.SPECIAL_TOKENS)),
        ("nfc", (TextKind.NOT_COMPOSED,)),
    ],
)
def test_rare_texts_that_the_runtime_gets_wrong_are_told(
    kind: str, exceptions: tuple[TextKind, ...], tmp_path: Path
) -> None:
    found, notes = examine(replace_tokenizer(save_model(tmp_path), kind))
    assert found.served
    assert found.exceptions == exceptions
    assert all(any(kind in note for note in notes) for kind in exceptions)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("unigram", r"cannot read this tokenizer \(Unigram, Metaspace\): \[json"),
        ("wordlevel", r"cannot read this tokenizer \(WordLevel, Whitespace\): Cannot know how"),
        ("wordpiece", r"cannot read this tokenizer \(WordPiece, BertNormalizer, BertPreTokenizer\)"),
    ],
)
def test_what_the_runtime_cannot_read_is_refused_with_a_way_out(kind: str, said: str, tmp_path: Path) -> None:
    replace_tokenizer(save_model(tmp_path), kind)
    with pytest.raises(UnsupportedError, match=said) as caught:
        examine(tmp_path)
    assert str(caught.value.hint).startswith("--token-ids builds")
    found, notes = examine(tmp_path, token_ids=True)
    assert not found.served
    assert notes[-1] == f"onnxruntime-genai does not serve its text: {caught.value.fact}"
    assert examine(tmp_path, target="tensorrt-fp16", profile="rtx-4090")[0].served  # not its runtime


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "does not give this tokenizer's tokens .*Lowercase"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": r"(?<=\d)(?=(\d{3})+$)"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "onnxruntime-genai",
        ),
    ],
)
def test_steps_that_the_runtime_does_not_take_are_named(changes: Any, said: str, tmp_path: Path) -> None:
    edit(save_model(tmp_path) / "tokenizer.json", **changes)
    with pytest.raises(UnsupportedError, match=said):
        examine(tmp_path)


def test_a_template_beyond_the_runtime_can_be_replaced(tmp_path: Path) -> None:
    save_model(tmp_path, chat_template=REPLACE)
    with pytest.raises(UnsupportedError, match=r"chat template .* Unknown method: replace") as caught:
        examine(tmp_path)
    assert "--chat-template FILE" in str(caught.value.hint)
    (tmp_path / "own.jinja").write_text(CHAT)
    found, _ = examine(tmp_path, chat_template=tmp_path / "own.jinja")
    assert found == TextRecord(chat=True, chat_template=CHAT)
    with pytest.raises(ConfigError, match=r"chat template .*none\.jinja cannot be read"):
        examine(tmp_path, chat_template=tmp_path / "none.jinja")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        ("{{ raise_exception('tools alone') }}", "tools alone"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_renders_no_message_is_refused(template: str, said: str, tmp_path: Path) -> None:
    save_model(tmp_path, chat_template=template)
    with pytest.raises(CheckpointError, match=f"does not render a user's message .*{said}") as caught:
        examine(tmp_path)
    assert "--chat-template FILE" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "does not end within",
        ),
        ("{{ 'a' * 10**10 }}", "needs more than 1 GiB of memory"),
        (
            "{% if messages[0].role == 'system' %}{{ 'a'.center(10**8) }}{% endif %}",
            "returns more than .* characters",
        ),
    ],
)
def test_a_template_without_end_is_refused(
    template: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1)
    with pytest.raises(CheckpointError, match=f"the chat template {said}"):
        examine(save_model(tmp_path, chat_template=template))


def test_merges_left_out_at_random_are_refused(tmp_path: Path) -> None:
    model = json.loads((save_model(tmp_path) / "tokenizer.json").read_text())["model"]
    edit(tmp_path / "tokenizer.json", model=model | {"dropout": 0.1})
    with pytest.raises(CheckpointError, match=r"leaves out merges at random \(dropout 0.1\)"):
        examine(tmp_path)


def test_a_tokenizer_of_remote_code_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, tokenizer_class="Remote", auto_map={"AutoTokenizer": ["x.Remote", None]})
    with pytest.raises(UnsupportedError, match=r"names the tokenizer class Remote of code") as caught:
        examine(tmp_path)
    assert "remove auto_map" in str(caught.value.hint)


def _add_token(folder: Path, content: str, *, special: bool) -> int:
    """Save a model whose tokenizer has one token more than its embedding has rows, and return its id."""
    save_model(folder)
    beyond = len(AutoTokenizer.from_pretrained(folder))
    save_model(folder, rows=beyond)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit(folder / "tokenizer.json", added_tokens=[*tokens, {"id": beyond, "content": content, **flags}])
    return beyond


def test_an_added_token_behind_a_gap_has_the_id_that_transformers_gives_it(tmp_path: Path) -> None:
    n = _add_token(tmp_path, "river", special=False)
    save_model(tmp_path / "more", rows=n + 9)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    edit(tmp_path / "more" / "tokenizer.json", added_tokens=[*tokens[:-1], {**tokens[-1], "id": n + 5}])
    assert examine(tmp_path / "more")[0].served
    assert AutoTokenizer.from_pretrained(tmp_path / "more" / "out")("river")["input_ids"] == [n]


def test_tokens_beyond_the_embedding_are_named(tmp_path: Path) -> None:
    n = _add_token(tmp_path, "<image>", special=True)
    told = f"the model's embedding of {n} rows has no row for the special tokens <image> ({n})"
    assert examine(tmp_path)[1][0] == told
    edit(tmp_path / "generation_config.json", eos_token_id=n)
    said = f"eos_token_id is {n} in generation_config.json ('<image>' in the tokenizer); "
    said += f"the model's embedding has {n} rows"
    assert said in examine(tmp_path)[1]  # the tokenizer's own end is inside
    edit(tmp_path / "tokenizer_config.json", eos_token="<image>")
    with pytest.raises(CheckpointError, match=re.escape(said)):
        examine(tmp_path)


def test_an_ordinary_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    n = _add_token(tmp_path, "river", special=False)
    with pytest.raises(CheckpointError, match=rf"beyond .* of {n} rows, such as 'river' with id {n}"):
        examine(tmp_path)


def test_a_token_around_the_text_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    file = around(save_model(tmp_path), "<s> $A") / "tokenizer.json"
    post = json.loads(file.read_text())["post_processor"]
    post["special_tokens"]["<s>"]["ids"] = [9999]
    edit(file, post_processor=post)
    with pytest.raises(CheckpointError, match="puts the token with id 9999 around a text"):
        examine(tmp_path)


def test_a_panic_of_the_library_is_an_error(tmp_path: Path) -> None:
    model = json.loads((save_model(tmp_path) / "tokenizer.json").read_text())["model"]
    edit(tmp_path / "tokenizer.json", model=model | {"continuing_subword_prefix": "##"})
    with pytest.raises(CheckpointError, match="cannot be read: PanicException"):
        examine(tmp_path)


def test_a_class_that_cannot_take_every_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"GemmaTokenizer, fails on short texts: .*<unk>"):
        examine(save_model(tmp_path, tokenizer_class="GemmaTokenizer"))


def test_settings_that_an_artifact_does_not_take_are_told(tmp_path: Path) -> None:
    edit(save_model(tmp_path) / "generation_config.json", num_beams=4, suppress_tokens=[7], temperature=0.5)
    told = "settings of generation_config.json that an artifact does not support: num_beams = 4, "
    assert examine(tmp_path)[1] == [f"{told}suppress_tokens = [7]"]


def _original(folder: Path, prompt: str, template: str | None, tokens: int) -> str:
    """Greedy text by transformers, step by step."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if template is not None or tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    made: list[int] = []
    with torch.no_grad():
        while len(made) < tokens:
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
            if made[-1] == model.generation_config.eos_token_id:
                return str(tokenizer.decode(made[:-1], skip_special_tokens=True))
    return str(tokenizer.decode(made, skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["bos", "bos and template", "llama2", "gemma", "wordlevel", "own template"])
def test_run_gives_the_text_of_transformers(kind: str, tmp_path: Path) -> None:
    folder, template = save_model(tmp_path / "model"), None
    if kind in ("llama2", "gemma", "wordlevel"):
        replace_tokenizer(folder, kind)
    else:
        around(folder, "<s> $A")
    if kind == "bos and template":
        edit(folder / "tokenizer_config.json", chat_template=CHAT)
    if kind == "own template":
        template = tmp_path / "own.jinja"
        template.write_text(CHAT)
    plan = plan_build(
        str(folder),
        target="cpu-fp32",
        profile="local",
        output=tmp_path / "out",
        verify=False,
        token_ids=kind == "wordlevel",
        chat_template=template,
    )
    build(plan, SilentProgress())
    for prompt in ("the fox", " naïve\n", *([] if kind == "wordlevel" else [""])):
        pieces: list[str] = []
        made = run(tmp_path / "out", prompt, 16, pieces.append, SilentProgress())
        assert made.text == "".join(pieces) == _original(folder, prompt, plan.chat_template, 16)


def test_an_artifact_that_is_verified_by_token_ids_says_so(tmp_path: Path) -> None:
    replace_tokenizer(save_model(tmp_path / "model"), "wordpiece")
    plan = plan_build(
        str(tmp_path / "model"), target="cpu-fp32", profile="local", output=tmp_path / "out", token_ids=True
    )
    result = build(plan, SilentProgress())
    assert result.verdict is not None
    told = "onnxruntime-genai does not serve its text: onnxruntime-genai cannot read this tokenizer"
    assert open_artifact(tmp_path / "out").manifest.state is State.VERIFIED
    assert told in result.render()
    assert told in inspect(str(tmp_path / "out")).render()
    assert told in next(c.detail for c in result.verdict.checks if c.metric is Metric.TOKENIZER_EQUAL)


def test_a_template_that_was_given_is_part_of_the_original_ever_after(tmp_path: Path) -> None:
    from llmc.pipeline.steps.original import open_pair

    (tmp_path / "own.jinja").write_text(CHAT)
    save_model(tmp_path / "model", chat_template=REPLACE)
    plan = plan_build(
        str(tmp_path / "model"),
        target="cpu-fp32",
        profile="local",
        output=tmp_path / "out",
        verify=False,
        chat_template=tmp_path / "own.jinja",
    )
    build(plan, SilentProgress())
    _, original, _ = open_pair(tmp_path / "out", None, force=False)
    assert original.tokenizer().chat_template == CHAT
