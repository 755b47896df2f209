"""Trace complex numbers as pairs of real tensors, since ONNX has none.

Models turn queries and keys by products with complex numbers of modulus 1 (RoFormer, Su et al. 2021). While
a model is traced, what makes complex numbers makes a `Pair` of real and imaginary parts instead, and
functions of pairs are computed on their parts. A pair is a pytree node, so that markers of layers pass its
two tensors on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from llmc.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

#: Functions that move or sum elements, by their names in torch; they apply to each part.
_MOVING = frozenset(
    {
        "__getitem__",
        "broadcast_to",
        "cat",
        "chunk",
        "clone",
        "concat",
        "contiguous",
        "cpu",
        "detach",
        "expand",
    }
    | {"expand_as", "flatten", "flip", "gather", "index_select", "movedim", "narrow", "permute", "repeat"}
    | {"repeat_interleave", "reshape", "roll", "select", "split", "squeeze", "stack", "sum", "swapaxes", "t"}
    | {"tile", "transpose", "unbind", "unflatten", "unsqueeze", "view", "where"}
)
_HINT = "only rotations by complex numbers can be compiled"


@cache
def pair_class() -> type:
    """Define the class on first use, so that importing this module does not import torch."""
    from torch.utils import _pytree as pytree

    class Pair:
        """A complex tensor as two real ones, for code that cannot tell the difference."""

        def __init__(self, real: torch.Tensor, imag: torch.Tensor) -> None:
            self.real, self.imag = real, imag

        @classmethod
        def __torch_function__(
            cls, function: Any, _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            return _apply(cls, function.__name__, function, args, kwargs or {})

        def __getattr__(self, name: str) -> Any:
            import torch

            if name.startswith("__") or not hasattr(torch.Tensor, name):
                raise AttributeError(name)
            if name in ("device", "ndim", "shape"):
                return getattr(self.real, name)
            if name == "dtype":
                return self.real.dtype.to_complex()
            function = getattr(torch.Tensor, name)
            return lambda *args, **kwargs: _apply(type(self), name, function, (self, *args), kwargs)

        def __len__(self) -> int:
            return len(self.real)

    def operator(name: str) -> Callable[..., Any]:
        import torch

        function = getattr(torch.Tensor, name)
        return lambda self, *args: _apply(Pair, name, function, (self, *args), {})

    names = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "abs", "getitem")
    for name in names:
        setattr(Pair, f"__{name}__", operator(f"__{name}__"))
    pytree.register_pytree_node(
        Pair,
        lambda pair: ([pair.real, pair.imag], None),
        lambda parts, _: Pair(*parts),
        serialized_type_name="llmc.trace.Pair",
    )
    return Pair


def pairs_for_complex() -> Any:
    """Return a context in which functions that make complex numbers from real ones make pairs."""
    from torch.overrides import TorchFunctionMode

    pair = pair_class()

    class Mode(TorchFunctionMode):
        """Replaces what would return a complex tensor."""

        def __torch_function__(
            self, function: Any, _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            name, given = getattr(function, "__name__", ""), kwargs or {}
            make = _MAKING.get(name)
            if make is not None:
                return make(pair, *args, **given)
            if any(isinstance(value, complex) for value in args):
                return _apply(pair, name, function, args, given)
            return function(*args, **given)

    return Mode()


def check_real(program: torch.export.ExportedProgram) -> None:
    """Refuse complex numbers that remain in a traced program.

    Raises:
        UnsupportedError: A node of the program computes complex numbers.
    """
    import torch

    for node in program.graph.nodes:
        value = node.meta.get("val")
        unused = node.op == "placeholder" and not node.users  # such as a table of a tower that is not called
        if isinstance(value, torch.Tensor) and value.is_complex() and not unused:
            modules = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values() if name]
            where = f" in {modules[-1]}" if modules else ""
            raise UnsupportedError(f"{node.name}{where} computes with complex numbers", hint=_HINT)


def _polar(pair: type, modulus: Any, angle: Any) -> Any:
    return pair(modulus * angle.cos(), modulus * angle.sin())


def _of_last_axis(pair: type, parts: Any) -> Any:
    return pair(parts[..., 0], parts[..., 1])


#: Functions of real tensors whose result is complex.
_MAKING: Mapping[str, Callable[..., Any]] = {
    "polar": _polar,
    "complex": lambda pair, real, imag: pair(real, imag),
    "view_as_complex": _of_last_axis,
}


def _apply(
    pair: type, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Compute a function of torch with pairs or complex numbers among its arguments."""
    computed = _COMPUTING.get(name.strip("_") if name != "__getitem__" else name)
    if computed is not None:
        return computed(pair, *args, **kwargs)
    if name not in _MOVING:
        raise UnsupportedError(f"the model applies {name} to complex numbers", hint=_HINT)
    real, imag = (_part(pair, (args, dict(kwargs)), part) for part in ("real", "imag"))
    first, second = function(*real[0], **real[1]), function(*imag[0], **imag[1])
    if isinstance(first, (tuple, list)):
        return type(first)(pair(x, y) for x, y in zip(first, second, strict=True))
    return pair(first, second)


def _part(pair: type, value: Any, part: str) -> Any:
    """Replace every pair in nested arguments by its real or imaginary part."""
    if isinstance(value, pair):
        return getattr(value, part)
    if isinstance(value, (tuple, list)):
        return type(value)(_part(pair, item, part) for item in value)
    if isinstance(value, dict):
        return {key: _part(pair, item, part) for key, item in value.items()}
    return value


def _parts(value: Any) -> tuple[Any, Any]:
    """Return the real and the imaginary part; the latter is None for real numbers."""
    both = isinstance(value, (complex, pair_class()))
    return (value.real, value.imag) if both else (value, None)


def _mul(pair: type, one: Any, other: Any) -> Any:
    (a, b), (c, d) = _parts(one), _parts(other)
    if b is None or d is None:
        return pair(a * c, (a * d) if b is None else (b * c))
    return pair(a * c - b * d, a * d + b * c)


def _div(pair: type, one: Any, other: Any) -> Any:
    c, d = _parts(other)
    if d is None:
        return pair(one.real / c, one.imag / c)
    square = c * c + d * d
    return _mul(pair, one, pair(c / square, -d / square))


def _add(pair: type, one: Any, other: Any, *, alpha: float = 1) -> Any:
    (a, b), (c, d) = _parts(one), _parts(other)
    real = a + alpha * c
    imag = alpha * d if b is None else b if d is None else b + alpha * d
    return pair(real, imag + real * 0 if b is None or d is None else imag)


def _to(pair: type, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Convert the device, or the type to another complex one, of both parts."""
    import torch

    def real(x: Any) -> Any:
        return x.to_real() if isinstance(x, torch.dtype) and x.is_complex else x

    types = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
    if any(not kind.is_complex for kind in types):
        raise UnsupportedError(f"the model converts complex numbers to {types[0]}", hint=_HINT)
    args, kwargs = tuple(real(x) for x in args), {key: real(x) for key, x in kwargs.items()}
    return pair(value.real.to(*args, **kwargs), value.imag.to(*args, **kwargs))


def _stacked(_: type, value: Any) -> Any:
    import torch

    return torch.stack([value.real, value.imag], dim=-1)


def _exp(pair: type, value: Any) -> Any:
    return _polar(pair, value.real.exp(), value.imag)


#: Functions that compute with complex numbers, by their names in torch without underscores.
_COMPUTING: Mapping[str, Callable[..., Any]] = {
    "mul": _mul,
    "multiply": _mul,
    "rmul": _mul,
    "div": _div,
    "truediv": _div,
    "rtruediv": lambda pair, one, other: _div(pair, _promoted(pair, other, one), one),
    "add": _add,
    "radd": _add,
    "sub": lambda pair, one, other: _add(pair, one, other, alpha=-1),
    "rsub": lambda pair, one, other: _add(pair, _neg(pair, one), other),
    "neg": lambda pair, one: _neg(pair, one),
    "conj": lambda pair, one: pair(one.real, -one.imag),
    "conj_physical": lambda pair, one: pair(one.real, -one.imag),
    "resolve_conj": lambda pair, one: one,
    "real": lambda pair, one: one.real,
    "imag": lambda pair, one: one.imag,
    "abs": lambda pair, one: (one.real * one.real + one.imag * one.imag).sqrt(),
    "angle": lambda pair, one: one.imag.atan2(one.real),
    "exp": _exp,
    "view_as_real": _stacked,
    "is_complex": lambda pair, one: True,
    "dim": lambda pair, one: one.real.dim(),
    "size": lambda pair, one, *axis: one.real.size(*axis),
    "numel": lambda pair, one: one.real.numel(),
    "to": _to,
}


def _neg(pair: type, one: Any) -> Any:
    return pair(-one.real, -one.imag)


def _promoted(pair: type, number: Any, like: Any) -> Any:
    """Return a real number as a pair."""
    zero = like.real * 0
    return pair(zero + number, zero)
