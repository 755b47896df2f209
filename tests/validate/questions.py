"""A multiple-choice task in the format of lm-evaluation-harness, over items in a file beside it."""

import json
from pathlib import Path
from typing import Any

import yaml


def write_task(folder: Path, items: list[dict[str, Any]], **changes: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "rivers",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "items.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    path = folder / "rivers.yaml"
    path.write_text(yaml.safe_dump(task))
    return str(path)
