"""Split the tensors of a folder over ranks by the tensor-parallel plan of the model's own transformers code.

`PreTrainedModel.tp_plan` names the modules that are split and how
(transformers/distributed/tensor_parallel.py): `colwise` by outputs, `rowwise` by inputs, embeddings by tokens
or by width. All other tensors are whole on every rank. The tensors of a quantized module are split with their
matrix, so that every rank has whole groups and whole packed words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from llmc.artifact.ranks import SMALL, Piece, RankLayout, RankTensor, SourceTensor, small_values
from llmc.errors import ConfigError, UnsupportedError, number_ranges
from llmc.graph.weights import TensorInfo, WeightStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Most ranks that a refusal names.
_MOST_RANKS = 64
#: Tensors of gptq and awq have the inputs of their matrix first; all others have its outputs first.
_INPUTS_FIRST = {"qweight", "qzeros", "scales"}
#: Tensors with one element for every input.
_BY_INPUT = {"g_idx", "weight_g_idx"}
#: Tensors that describe a whole matrix.
_WHOLE = {"weight_shape"}
_WHOLE_HINT = "build it without --shards; servers then split the whole weights when they load them"
_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class Split(Enum):
    """The axis of a weight (outputs, inputs), or (tokens, width), that is cut, with a range for each rank."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"


def find_splits(model: PreTrainedModel) -> dict[str, Split]:
    """Return how the modules of a model are split, by name; modules that are whole are not named.

    Raises:
        UnsupportedError: Its transformers code has no plan, or one that does not cut a weight into ranges.
    """
    from transformers.distributed import tensor_parallel as styles
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    plan = model.tp_plan
    if not plan:
        raise UnsupportedError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}",
            hint=_WHOLE_HINT,
        )
    known = {
        styles.ColwiseParallel: Split.OUTPUTS,
        styles.RowwiseParallel: Split.INPUTS,
    }
    whole = (styles.ReplicatedWithGradAllReduce, styles.AllReduceParallel)
    found = {}
    for name, _ in model.named_modules():
        style_name = plan.get(_LAYER_NUMBER.sub(".*", name))
        if style_name is None:
            continue
        style: Any = ALL_PARALLEL_STYLES[style_name]
        if isinstance(style, styles.EmbeddingParallel):
            found[name] = Split.INPUTS if style.shard_dim else Split.OUTPUTS
        elif type(style) in known:
            found[name] = known[type(style)]
        elif type(style) is not styles.TensorParallelLayer and not isinstance(style, whole):
            raise UnsupportedError(
                f"{name} of {type(model).__name__} is split as {style_name}, which --shards does not write",
                hint=_WHOLE_HINT,
            )
    for name, _ in model.named_parameters():
        stated = plan.get(_LAYER_NUMBER.sub(".*", name))
        if stated is not None:
            raise UnsupportedError(
                f"{name} of {type(model).__name__} is split as {stated}, which --shards does not write",
                hint=_WHOLE_HINT,
            )
    return found


def require_ranks(
    model: PreTrainedModel, tensors: Mapping[str, TensorInfo], ranks: int, group: int = 1
) -> None:
    """Check that heads and every tensor can be cut into equal ranges.

    Args:
        tensors: The tensors of a folder, quantized or not.
        ranks: Number of ranks, at least 2.
        group: Number of inputs that share a scale, if `tensors` are not quantized yet.

    Raises:
        ConfigError: They cannot, or `ranks` is less than 2; the hint names the numbers of ranks that can.
        UnsupportedError: As `find_splits`.
    """
    splits = find_splits(model)
    if ranks < 2:
        raise ConfigError(f"--shards {ranks} does not split anything", hint="state 2 or more ranks")
    reason = next(_obstacles(model, splits, tensors, ranks, group), None)
    if reason is None:
        return
    fitting = [
        count
        for count in range(2, _MOST_RANKS + 1)
        if next(_obstacles(model, splits, tensors, count, group), None) is None
    ]
    hint = f"numbers of ranks that fit: {number_ranges(fitting)}" if fitting else "no number of ranks fits"
    raise ConfigError(f"{reason} cannot be split over {ranks} ranks", hint=hint)


def _obstacles(
    model: PreTrainedModel,
    splits: Mapping[str, Split],
    tensors: Mapping[str, TensorInfo],
    ranks: int,
    group: int,
) -> Iterator[str]:
    """Yield what cannot be cut into equal ranges, with its size."""
    config = model.config.get_text_config(decoder=True)
    for field, noun in (("num_attention_heads", "heads"), ("num_key_value_heads", "key-value heads")):
        count = getattr(config, field, None)
        if isinstance(count, int) and count % ranks:
            yield f"{count} {noun}"
    for name, info in tensors.items():
        axis = _axis(name, info, splits)
        if axis is None:
            continue
        size = info.shape[axis]
        if size % ranks:
            yield f"{name} with {size} {'rows' if axis == 0 else 'columns'}"
        elif _split_of(name, splits) is Split.INPUTS and size % group == 0 and size // ranks % group:
            yield f"{name} with {size // group} groups of {group} inputs"


def split_tensors(model: PreTrainedModel, whole: WeightStore, ranks: int) -> RankLayout:
    """Lay out the tensors of a folder over ranks, under the names that they have in it.

    Args:
        model: The model of the folder, on the device `meta`.
        whole: The tensors under the names in the files.

    Raises:
        ConfigError: As `require_ranks`.
        UnsupportedError: As `find_splits`, or the files have other names than the model.
    """
    import transformers

    infos = whole.infos()
    require_ranks(model, infos, ranks)
    splits = find_splits(model)
    modules = {name.rpartition(".")[0] for name in infos}
    tied = set(model._tied_weights_keys or ())
    for name in splits:
        if name not in modules and f"{name}.weight" not in tied:
            raise UnsupportedError(
                f"the files lack {name}, which {type(model).__name__} has, so that it cannot be split",
                hint=_WHOLE_HINT,
            )
    return RankLayout(
        names=f"transformers {transformers.__version__}",
        tensors={name: _source(whole, info) for name, info in infos.items()},
        ranks=tuple(
            {name: _tensor(name, info, splits, rank, ranks) for name, info in infos.items()}
            for rank in range(ranks)
        ),
    )


def _source(whole: WeightStore, info: TensorInfo) -> SourceTensor:
    small = math.prod(info.shape) <= SMALL
    values = small_values(whole.read(info.name)) if small else None
    return SourceTensor(dtype=info.dtype.numpy().name, shape=info.shape, values=values)


def _tensor(name: str, info: TensorInfo, splits: Mapping[str, Split], rank: int, ranks: int) -> RankTensor:
    axis = _axis(name, info, splits)
    size = tuple(n // ranks if at == axis else n for at, n in enumerate(info.shape))
    start = tuple(rank * n if at == axis else 0 for at, n in enumerate(size))
    piece = Piece(source=name, start=start, size=size, at=(0,) * len(size), extent=size)
    return RankTensor(dtype=info.dtype.numpy().name, shape=size, pieces=(piece,))


def _split_of(name: str, splits: Mapping[str, Split]) -> Split | None:
    return splits.get(name.rpartition(".")[0])


def _axis(name: str, info: TensorInfo, splits: Mapping[str, Split]) -> int | None:
    """Return the axis along which a tensor is cut; None if every rank has it whole."""
    split, part = _split_of(name, splits), name.rpartition(".")[2]
    if split is None or part in _WHOLE or not info.shape:
        return None
    if part in _BY_INPUT:
        return 0 if split is Split.INPUTS else None
    if len(info.shape) == 1:
        return 0 if split is Split.OUTPUTS and info.shape[0] > 1 else None
    first = Split.INPUTS if part in _INPUTS_FIRST else Split.OUTPUTS
    axis = 0 if split is first else 1
    return axis if info.shape[axis] > 1 else None
