"""One run of the gate: what its steps share, each made when a step first asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmc.artifact.store.codec import TextCodec
from llmc.errors import ConfigError, ParityError
from llmc.graph.switches import rope_switches, trained_lengths
from llmc.pipeline.gate.contents import compare_contents
from llmc.pipeline.gate.subject import Subject, open_original, open_own
from llmc.pipeline.steps.original import tokenize
from llmc.progress import Progress
from llmc.validate.costs import model_costs
from llmc.validate.drawing import BUDGET, Ground, plan_positions
from llmc.validate.reference import sliding_window
from llmc.validate.settings import Original, describe_original

if TYPE_CHECKING:
    from llmc.artifact.verdict import Measurement
    from llmc.validate.positions import Plan
    from llmc.validate.quality import Windows
    from llmc.validate.remembered import RememberedModel
    from llmc.validate.weights import WeightParity


@dataclass
class Run:
    """The state of one run.

    Args:
        text: The evaluation text.
        found: Measurements, appended as they are taken.
    """

    subject: Subject
    text: str
    progress: Progress
    found: list[Measurement] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> Any:
        """The original's tokenizer, by transformers."""
        return self.subject.checkpoint.tokenizer()

    @cached_property
    def _tokenized(self) -> tuple[Any, tuple[int, ...]]:
        return tokenize(self.tokenizer, self.text)

    @property
    def tokens(self) -> Any:
        """Token ids of the evaluation text, (n,) int64.

        Raises:
            ConfigError: It has none.
        """
        return self._tokenized[0]

    @cached_property
    def codec(self) -> TextCodec:
        """The artifact's tokenizer, as `llmc run` uses it.

        Raises:
            ParityError: It cannot be read.
        """
        try:
            return TextCodec(self.subject.folder, self.subject.text)
        except ConfigError as error:
            raise ParityError(error.fact) from error

    @cached_property
    def stated(self) -> Original:
        """What the original says of serving it."""
        checkpoint = self.subject.checkpoint
        return describe_original(checkpoint.config, checkpoint.generation_config(), self.tokenizer)

    @cached_property
    def weights(self) -> WeightParity:
        """What became of the weights; broken measurements where they cannot be read."""
        return compare_contents(self.subject, self.progress)

    @cached_property
    def windows(self) -> Windows:
        """Pieces of the evaluation text that quality is measured on first.

        Raises:
            ConfigError: The text is too short.
        """
        return self.all_windows.sample(self._most_windows)

    @cached_property
    def all_windows(self) -> Windows:
        """Those, and as many more, which are looked at where the first do not decide a gate."""
        from llmc.validate.quality import plan_windows

        return plan_windows(self.subject.interface, *self._tokenized, 2 * self._most_windows)

    @property
    def _most_windows(self) -> int:
        from llmc.validate.quality import most_windows

        return most_windows(self.subject.checkpoint.reference_bytes())

    def require_windows(self) -> None:
        """Find out whether the evaluation text is long enough, before work that it would be the end of.

        Raises:
            ConfigError: It is not.
        """
        _ = self.windows

    @cached_property
    def original(self) -> RememberedModel:
        """The original."""
        return open_original(self.subject)

    @cached_property
    def own(self) -> RememberedModel:
        """The original with the artifact's own weights."""
        return open_own(self.subject, self.original, self.weights)

    @cached_property
    def plan(self) -> Plan:
        """The positions that the parity levels look at."""
        subject, config = self.subject, self.subject.checkpoint.config
        ground = Ground(
            interface=subject.interface,
            text=self.tokens,
            costs=model_costs(subject.interface, config, subject.compiled.reference_bytes() // 4),
            window=sliding_window(config),
            switches=rope_switches(config),
            lengths=trained_lengths(config),
            compiled=subject.backend.rounds_attention,
        )
        return plan_positions(ground, subject.seed, BUDGET if subject.budget is None else subject.budget)
