"""Leave the large weights of an artifact behind, and draw others from a seed where it is measured.

Speed and memory do not depend on the values of weights, and neither does whether two kernels agree on them.
An artifact without its large weights is small enough to be carried where a network is not. Its graph, its
small weights, and its tables, such as for rotary embeddings, stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from llmc.artifact.manifest import MODEL
from llmc.errors import ConfigError

#: Files in the artifact: which weights are drawn, and the bytes of the others.
SEEDED, KEPT = "seeded.json", "kept.bin"
#: Size of the smallest weight that is drawn, in bytes.
LEAST_BYTES = 4 << 10
_SEED = 7
#: Range of drawn weights, which are uniform; their deviation is 0.02, as in models before training.
_RANGE = 0.02 * 12**0.5
#: Kinds of weights that are drawn, by the endings of their names, with their types.
_DRAWN = {
    "weight": np.float16,
    "scales": np.float16,
    "minimums": np.float16,
    "codes": np.uint8,
    "zero_points": np.uint8,
}


def drop_weights(folder: Path, least: int = LEAST_BYTES) -> None:
    """Replace the file of weights by a plan for drawing them; does nothing if that is done already.

    Args:
        least: Bytes of the smallest weight that is drawn; smaller ones are kept.

    Raises:
        ConfigError: The weights are in several files.
    """
    import onnx

    if (folder / SEEDED).is_file():
        return
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    bits = _bits(model)
    plan: list[dict[str, Any]] = []
    kept = bytearray()
    files: set[str] = set()
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        files.add(entries["location"])
        start, size = int(entries.get("offset", 0)), int(entries["length"])
        kind = _kind(tensor.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), len(tensor.dims))
        drawn = kind is not None and size >= least
        place = {"offset": start, "bytes": size, "values": kind if drawn else "kept"}
        if drawn and tensor.name in bits:
            place["bits"] = bits[tensor.name]
        if not drawn:
            with (folder / entries["location"]).open("rb") as file:
                file.seek(start)
                kept += file.read(size)
        plan.append(place)
    if len(files) != 1:
        raise ConfigError(f"the weights of {folder} are in {len(files)} files, not in one")
    data = folder / files.pop()
    document = {"file": data.name, "bytes": data.stat().st_size, "seed": _SEED, "weights": plan}
    (folder / KEPT).write_bytes(kept)
    (folder / SEEDED).write_text(json.dumps(document), encoding="utf-8")
    data.unlink()


def lacks_weights(folder: Path) -> bool:
    """Return whether the weights of an artifact are still to be drawn."""
    if not (folder / SEEDED).is_file():
        return False
    document = json.loads((folder / SEEDED).read_text(encoding="utf-8"))
    return not (folder / document["file"]).is_file()


def draw_weights(folder: Path) -> None:
    """Write the file of weights that `drop_weights` removed, with drawn values."""
    document = json.loads((folder / SEEDED).read_text(encoding="utf-8"))
    random = np.random.Generator(np.random.PCG64(document["seed"]))
    kept, taken = (folder / KEPT).read_bytes(), 0
    partial = folder / f".partial-{document['file']}"
    with partial.open("wb") as file:
        file.truncate(document["bytes"])
        for place in document["weights"]:
            size: int = place["bytes"]
            file.seek(place["offset"])
            if place["values"] == "kept":
                file.write(kept[taken : taken + size])
                taken += size
            else:
                file.write(_draw(place["values"], size, place.get("bits", 4), random))
    partial.replace(folder / document["file"])


def _kind(name: str, dtype: np.dtype[Any], rank: int) -> str | None:
    """Return how a weight is drawn, by the names that quantization gives; None for one that is not."""
    kind = name.rsplit(".", 1)[-1]
    return kind if rank >= 2 and kind in _DRAWN and dtype == _DRAWN[kind] else None


def _bits(model: Any) -> dict[str, int]:
    """Return the bits of a code, by the names of the weights that a node with that attribute reads."""
    return {
        name: int(attribute.i)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "bits"
        for name in node.input
    }


def _draw(kind: str, size: int, bits: int, random: np.random.Generator) -> bytes:
    if kind == "weight":
        levels = (np.arange(256) - 127.5) / 256 * _RANGE
        return levels.astype(np.float16)[random.integers(0, 256, size // 2, np.uint8)].tobytes()
    if kind == "scales":
        return np.full(size // 2, _RANGE / 2**bits, np.float16).tobytes()
    if kind == "minimums":  # the code in the middle stands for 0
        return np.full(size // 2, -_RANGE / 2, np.float16).tobytes()
    if kind == "zero_points":
        return (b"\x88" if bits == 4 else b"\x80") * size
    return random.integers(0, 256, size, np.uint8).tobytes()
