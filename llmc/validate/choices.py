"""Compare the tokens that an engine chooses step by step with the choices of the unmodified original."""

from collections.abc import Iterator

import numpy as np

from llmc.arrays import Array
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.config import Metric
from llmc.errors import ParityError
from llmc.graph.interface import Interface
from llmc.runtime.session import Session
from llmc.validate.measure import broken, measured, unmeasured
from llmc.validate.reference import Reference

#: Lengths of the prompts, and the number of steps after each.
PROMPTS, STEPS = (1, 16, 100), 64


def ask_choices(
    reference: Reference, interface: Interface, tokens: Array
) -> Iterator[tuple[int, Array, Array]]:
    """Yield prompts with the original's greedy text after them.

    Args:
        tokens: (n,) int64, the text that prompts are cut from.

    Yields:
        For each prompt its length, the whole sequence (prompt + steps,) int64, and the original's most likely
        token after each token of its greedy text, (steps,) int64.
    """
    limit = interface.max_length or 1 << 62
    for length in PROMPTS:
        steps = min(STEPS, limit - length)
        if steps > 0:
            prompt = np.take(tokens, np.arange(length, 2 * length), mode="wrap")
            sequence = np.concatenate([prompt, reference.greedy(prompt, steps)])
            yield length, sequence, reference.logits(sequence, keep=steps).argmax(axis=1)


def measure_choices(model: Session, reference: Reference, tokens: Array) -> Measurement:
    """Measure the share of steps with the original's most likely token; each is fed the token before it.

    Args:
        tokens: As for `ask_choices`.
    """
    equal, lengths = list[bool](), []
    try:
        for length, sequence, chosen in ask_choices(reference, model.interface, tokens):
            model.prefill(sequence[None, :length], steps=len(chosen))
            for token, best in zip(sequence[length:], chosen, strict=True):
                equal.append(int(model.decode(token.reshape(1, 1))[0, -1].argmax()) == int(best))
            lengths.append(length)
    except ParityError as error:
        return broken((Metric.DECODE_TOP1,), error, model.where)[0]
    if not equal:
        why = "no step fits into the model's positions"
        return unmeasured(Metric.DECODE_TOP1, MeasurementStatus.NOT_MEASURED, why, model.where)
    prompts = ", ".join(map(str, lengths))
    detail = f"{len(equal)} steps of the original's greedy text after prompts of {prompts} tokens"
    return measured(Metric.DECODE_TOP1, float(np.mean(equal)), detail, model.where)
