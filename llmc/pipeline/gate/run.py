"""Hold the state of a run of the gate: what its steps share, created on first use."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmc.artifact.store.codec import TextCodec
from llmc.errors import ConfigError, ParityError
from llmc.graph.match import count_plain_attention
from llmc.graph.switches import rope_switches, trained_lengths
from llmc.pipeline.gate.contents import compare_contents
from llmc.pipeline.gate.subject import Subject, open_original, open_own
from llmc.pipeline.steps.original import tokenize
from llmc.progress import Progress
from llmc.validate.costs import model_costs
from llmc.validate.drawing import BUDGET, Ground, plan_positions
from llmc.validate.reference import sliding_window
from llmc.validate.settings import Original, describe_original
from llmc.validate.torch_session import interface_in_transformers

if TYPE_CHECKING:
    from llmc.artifact.served import ServerRecord
    from llmc.artifact.verdict import Measurement
    from llmc.validate.positions import Plan
    from llmc.validate.quality import Windows
    from llmc.validate.remembered import RememberedModel
    from llmc.validate.weights import WeightParity


@dataclass
class Run:
    """The state of a run of the gate.

    Args:
        text: The evaluation text.
        found: Measurements so far; steps append to them.
        servers: What each server did; the step that asks them appends to it.
    """

    subject: Subject
    text: str
    progress: Progress
    found: list[Measurement] = field(default_factory=list)
    servers: list[ServerRecord] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> Any:
        """Return the original's tokenizer, loaded by transformers."""
        return self.subject.checkpoint.tokenizer()

    @cached_property
    def _tokenized(self) -> tuple[Any, tuple[int, ...]]:
        return tokenize(self.tokenizer, self.text)

    @property
    def tokens(self) -> Any:
        """Return the token ids of the evaluation text, (n,) int64.

        Raises:
            ConfigError: The text has no tokens.
        """
        return self._tokenized[0]

    @cached_property
    def codec(self) -> TextCodec:
        """Return the artifact's tokenizer, as `llmc run` uses it.

        Raises:
            ParityError: The tokenizer cannot be read.
        """
        try:
            return TextCodec(self.subject.folder, self.subject.text)
        except ConfigError as error:
            raise ParityError(error.fact) from error

    @cached_property
    def stated(self) -> Original:
        """Return what the original states about serving."""
        checkpoint = self.subject.checkpoint
        return describe_original(checkpoint.config, checkpoint.generation_config(), self.tokenizer)

    @cached_property
    def weights(self) -> WeightParity:
        """Return the comparison of the weights; broken measurements if they cannot be read."""
        return compare_contents(self.subject, self.progress)

    @cached_property
    def windows(self) -> Windows:
        """Return the windows of the evaluation text on which quality is measured first.

        Raises:
            ConfigError: The text is too short.
        """
        return self.all_windows.sample(self._most_windows)

    @cached_property
    def all_windows(self) -> Windows:
        """Return those windows and as many more, used if the first do not decide a gate."""
        from llmc.validate.quality import plan_windows

        return plan_windows(self.subject.interface, *self._tokenized, 2 * self._most_windows)

    @property
    def _most_windows(self) -> int:
        from llmc.validate.quality import most_windows

        return most_windows(self.subject.checkpoint.reference_bytes())

    def require_windows(self) -> None:
        """Require that the evaluation text is long enough, before the expensive work.

        Raises:
            ConfigError: The text is too short.
        """
        _ = self.windows

    @cached_property
    def original(self) -> RememberedModel:
        """Return the original."""
        return open_original(self.subject)

    @cached_property
    def own(self) -> RememberedModel:
        """Return the original with the artifact's own weights."""
        return open_own(self.subject, self.original, self.weights)

    @cached_property
    def plan(self) -> Plan:
        """Return the positions that the parity levels compare."""
        subject, config = self.subject, self.subject.checkpoint.config
        window = sliding_window(config)
        interface = subject.interface
        if not subject.backend.writes_graph:
            interface = interface_in_transformers(interface, window)
        plain = count_plain_attention(subject.rebuilt.graph.graph)
        ground = Ground(
            interface=interface,
            text=self.tokens,
            costs=model_costs(interface, config, subject.compiled.reference_bytes() // 4, plain_layers=plain),
            window=window,
            switches=rope_switches(config),
            lengths=trained_lengths(config),
            compiled=subject.backend.rounds_attention or subject.target.cache_text is not None,
            padding=subject.checkpoint.padding,
        )
        return plan_positions(ground, subject.seed, BUDGET if subject.budget is None else subject.budget)
