"""Formulas as source text: scalars whose operators write lines in place of computing.

Called with such scalars, an elementwise function of arrays (`metaopt.leaf.one_pass`, a rule's
`direction`) leaves a `Program`: one assignment after another, for a loop over the entries of
arrays. Printed in a language it is the body of a kernel. What depends on values that are the same
for all entries is kept apart, to be computed once before the loop; Python numbers are combined in
double by Python itself, and rounded once, to the dtype of the scalar they meet.
"""

import math
import numbers
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = ["PYTHON", "C", "Constant", "Language", "Program", "Scalar", "UntraceableError"]

#: From the narrowest to the widest. Of float16 nothing is computed: it is read and cast.
FLOATS = ("float16", "float32", "float64")
WIDE = FLOATS[1:]

#: The dtypes of operands with which an operation is the same in every language; it takes no others.
#: Integers are counts of steps, which do not overflow.
OPERANDS: Mapping[str, tuple[str, ...]] = (
    dict.fromkeys(("-", "*", "/", "pow", "neg", "abs"), WIDE)
    | dict.fromkeys(("sqrt", "exp", "expm1", "log", "log1p", "tanh"), WIDE)
    | dict.fromkeys(("<", "<=", ">", ">="), (*WIDE, "int32"))
    | dict.fromkeys(("==", "!="), (*WIDE, "int32", "bool"))
    | dict.fromkeys(("&", "|", "not"), ("bool",))
    | {"+": (*WIDE, "int32"), "where": (*WIDE, "int32", "bool")}
)


class UntraceableError(Exception):
    """A function that is no formula of scalars; the message says what it does otherwise."""


class Dtype(str):
    """The name of a dtype, which compares with the namespace's own alone."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):  # NumPy's, say, which no name equals
            msg = f"it compares a dtype with {other!r}"
            raise UntraceableError(msg)
        return str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """An entry of an array, or a value that all entries share, inside a `Program`.

    It has the operators and, through its namespace, the functions of an array; all else that an
    array can be asked for, its shape and device among it, a program cannot depend on. That it is
    none of NumPy's arrays, say, only `isinstance` can tell.

    Parameters
    ----------
    program : Program
    dtype : {"float16", "float32", "float64", "int32", "bool"}
    name : str
        Of the variable.
    varies : bool
        Whether it differs from entry to entry.
    """

    program: "Program"
    dtype: str
    name: str
    varies: bool

    __array_ufunc__: ClassVar[None] = None  # else NumPy's numbers make arrays of objects

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", Dtype(self.dtype))

    def __array_namespace__(self, *, api_version: Any = None) -> Any:
        return FUNCTIONS

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions
            raise AttributeError(name)
        msg = f"it asks an array for its {name}"
        raise UntraceableError(msg)

    def __len__(self) -> int:
        msg = "it asks an array for its length"
        raise UntraceableError(msg)

    def __bool__(self) -> bool:
        msg = "it branches on a value"
        raise UntraceableError(msg)

    def __add__(self, other: Any) -> "Scalar":
        return self.program.line("+", self, other)

    def __radd__(self, other: Any) -> "Scalar":
        return self.program.line("+", other, self)

    def __sub__(self, other: Any) -> "Scalar":
        return self.program.line("-", self, other)

    def __rsub__(self, other: Any) -> "Scalar":
        return self.program.line("-", other, self)

    def __mul__(self, other: Any) -> "Scalar":
        return self.program.line("*", self, other)

    def __rmul__(self, other: Any) -> "Scalar":
        return self.program.line("*", other, self)

    def __truediv__(self, other: Any) -> "Scalar":
        return self.program.line("/", self, other)

    def __rtruediv__(self, other: Any) -> "Scalar":
        return self.program.line("/", other, self)

    def __pow__(self, other: Any) -> "Scalar":
        return self.program.line("pow", self, other)

    def __rpow__(self, other: Any) -> "Scalar":
        return self.program.line("pow", other, self)

    def __neg__(self) -> "Scalar":
        return self.program.line("neg", self)

    def __pos__(self) -> "Scalar":
        return self

    def __abs__(self) -> "Scalar":
        return self.program.line("abs", self)

    def __eq__(self, other: object) -> Any:
        return self.program.line("==", self, other, dtype="bool")

    def __ne__(self, other: object) -> Any:
        return self.program.line("!=", self, other, dtype="bool")

    def __lt__(self, other: Any) -> "Scalar":
        return self.program.line("<", self, other, dtype="bool")

    def __le__(self, other: Any) -> "Scalar":
        return self.program.line("<=", self, other, dtype="bool")

    def __gt__(self, other: Any) -> "Scalar":
        return self.program.line(">", self, other, dtype="bool")

    def __ge__(self, other: Any) -> "Scalar":
        return self.program.line(">=", self, other, dtype="bool")

    def __and__(self, other: Any) -> "Scalar":
        return self.program.line("&", self, other)

    def __or__(self, other: Any) -> "Scalar":
        return self.program.line("|", self, other)

    def __invert__(self) -> "Scalar":
        return self.program.line("not", self)

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True, eq=False)
class Constant(Scalar):
    """A number inside a `Program`; its name is what Python shows of it, which tells 0.0 from -0.0.

    Parameters
    ----------
    value : float, int or bool
        As the dtype is.
    """

    value: Any


@dataclass(frozen=True, slots=True)
class Line:
    """An assignment: a new variable, the operation, and variables or constants."""

    name: str
    dtype: str
    operation: str
    arguments: tuple[Scalar, ...]


@dataclass(slots=True)
class Program:
    """What a traced function computes, line by line.

    Parameters
    ----------
    once : list of Line
        What the values that all entries share come to.
    each : list of Line
        What is left to compute for every entry.
    """

    once: list[Line] = field(default_factory=list)
    each: list[Line] = field(default_factory=list)
    _known: dict[Any, Scalar] = field(default_factory=dict)

    def variable(self, name: str, dtype: str, *, varies: bool) -> Scalar:
        """Return an input of the program."""
        return Scalar(self, dtype, name, varies)

    def constant(self, value: Any, dtype: str) -> Scalar:
        """Return a number as a scalar, a scalar as it is.

        Raises
        ------
        UntraceableError
            If a number with an array of this dtype would make one of another dtype, or is none.
        """
        if isinstance(value, Scalar):
            return value
        kind, real = type(value), isinstance(value, numbers.Real)
        own = str(getattr(value, "dtype", "")) if real else ""  # NumPy's numbers have a dtype
        if dtype in FLOATS and (kind in (int, float) or own in FLOATS[: FLOATS.index(dtype) + 1]):
            value = float(value)
        elif not (dtype == "bool" and kind is bool) and not (
            dtype == "int32" and kind is int and abs(value) < 2**31
        ):
            shown = repr(value) if real else f"{kind.__module__}.{kind.__name__}"
            msg = f"it combines {dtype} with {shown}"
            raise UntraceableError(msg)
        return Constant(self, dtype, repr(value), varies=False, value=value)

    def line(self, operation: str, *operands: Any, dtype: str | None = None) -> Scalar:
        """Return the variable that holds an operation on scalars and numbers of one dtype.

        `dtype` is that of the result, by default the operands'; what was computed before is not
        computed again.
        """
        arguments = self._arguments(operation, operands)
        return self._assigned(operation, arguments, arguments[0].dtype if dtype is None else dtype)

    def where(self, condition: Any, x: Any, y: Any) -> Scalar:
        """Return the variable that holds x where the condition holds, else y."""
        if not isinstance(condition, Scalar) or condition.dtype != "bool":
            msg = "it chooses by what is no boolean array"
            raise UntraceableError(msg)
        branches = self._arguments("where", (x, y))
        return self._assigned("where", (condition, *branches), branches[0].dtype)

    def cast(self, x: Scalar, dtype: Any) -> Scalar:
        """Return the variable that holds a scalar in another dtype."""
        if (
            not isinstance(dtype, str)
            or dtype not in FLOATS
            or (dtype == "float16" and x.dtype not in WIDE)
        ):
            msg = f"it casts {x.dtype} to {dtype}"
            raise UntraceableError(msg)
        return self._assigned("cast", (x,), dtype)

    def _arguments(self, operation: str, operands: tuple[Any, ...]) -> tuple[Scalar, ...]:
        """Return operands as scalars of the one dtype that they have to have."""
        kinds = {operand.dtype for operand in operands if isinstance(operand, Scalar)}
        if len(kinds) != 1:
            msg = f"it combines dtypes: {', '.join(sorted(kinds)) or 'numbers alone'}"
            raise UntraceableError(msg)
        (kind,) = kinds
        if kind not in OPERANDS[operation]:
            msg = f"it takes {operation} of {kind}"
            raise UntraceableError(msg)
        return tuple(self.constant(operand, kind) for operand in operands)

    def _assigned(self, operation: str, arguments: tuple[Scalar, ...], dtype: str) -> Scalar:
        """Return the variable of a line, a new one where there is none yet."""
        key = (operation, dtype, *((argument.name, argument.dtype) for argument in arguments))
        if key not in self._known:
            varies = any(argument.varies for argument in arguments)
            name = f"t{len(self._known)}"
            lines = self.each if varies else self.once
            lines.append(Line(name, dtype, operation, arguments))
            self._known[key] = Scalar(self, dtype, name, varies)
        return self._known[key]

    def prune(self, results: Iterable[Scalar]) -> set[str]:
        """Drop the lines that no result depends on; return the variables that are left in use."""
        used = {result.name for result in results}
        for line in reversed(self.once + self.each):
            if line.name in used:
                used |= {argument.name for argument in line.arguments}
        self.once = [line for line in self.once if line.name in used]
        self.each = [line for line in self.each if line.name in used]
        return used


class _Functions:
    """The functions of the array API standard that are elementwise, on scalars."""

    __name__ = "metaopt.tracer"
    float16, float32, float64 = "float16", "float32", "float64"
    int32, bool = "int32", "bool"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions
            raise AttributeError(name)
        msg = f"it calls {name}, which is no elementwise function that the tracer knows"
        raise UntraceableError(msg)

    def asarray(self, x: Scalar, *, dtype: str | None = None, **_: Any) -> Scalar:
        return x if dtype is None or dtype == x.dtype else x.program.cast(x, dtype)

    def astype(self, x: Scalar, dtype: str, **_: Any) -> Scalar:
        return self.asarray(x, dtype=dtype)

    def zeros_like(self, x: Scalar, *, dtype: str | None = None, **_: Any) -> Scalar:
        return x.program.constant(0, dtype or x.dtype)

    def ones_like(self, x: Scalar, *, dtype: str | None = None, **_: Any) -> Scalar:
        return x.program.constant(1, dtype or x.dtype)

    def where(self, condition: Scalar, x: Any, y: Any) -> Scalar:
        return condition.program.where(condition, x, y)

    def sqrt(self, x: Scalar) -> Scalar:
        return x.program.line("sqrt", x)

    def exp(self, x: Scalar) -> Scalar:
        return x.program.line("exp", x)

    def expm1(self, x: Scalar) -> Scalar:
        return x.program.line("expm1", x)

    def log(self, x: Scalar) -> Scalar:
        return x.program.line("log", x)

    def log1p(self, x: Scalar) -> Scalar:
        return x.program.line("log1p", x)

    def tanh(self, x: Scalar) -> Scalar:
        return x.program.line("tanh", x)

    def abs(self, x: Scalar) -> Scalar:
        return abs(x)

    def sign(self, x: Scalar) -> Scalar:
        return self.where(x > 0.0, 1.0, self.where(x < 0.0, -1.0, x))

    def square(self, x: Scalar) -> Scalar:
        return x * x

    def pow(self, x: Scalar, y: Any) -> Scalar:
        return x**y

    def maximum(self, x: Scalar, y: Any) -> Scalar:
        return self.where((x > y) | (x != x), x, y)  # NaN is the larger

    def minimum(self, x: Scalar, y: Any) -> Scalar:
        return self.where((x < y) | (x != x), x, y)

    def clip(self, x: Scalar, min: Any = None, max: Any = None) -> Scalar:
        x = x if min is None else self.where(x < min, min, x)
        return x if max is None else self.where(x > max, max, x)

    def isfinite(self, x: Scalar) -> Scalar:
        return abs(x) < math.inf

    def isnan(self, x: Scalar) -> Scalar:
        return x != x

    def logical_and(self, x: Scalar, y: Scalar) -> Scalar:
        return x & y

    def logical_or(self, x: Scalar, y: Scalar) -> Scalar:
        return x | y

    def logical_not(self, x: Scalar) -> Scalar:
        return ~x


FUNCTIONS = _Functions()


@dataclass(frozen=True)
class Language:
    """How a program is written.

    Parameters
    ----------
    line : str
        Template of an assignment, of {dtype}, {name} and {value}.
    operations : mapping of operation to template
        Of arguments {0}, {1}, ... and of the {dtype} of the result and the {suffix} of functions
        in it; an operator between two arguments where there is none.
    dtypes : mapping of dtype to name
    literal : callable
        From a number and a dtype to its literal.
    """

    line: str
    operations: dict[str, str]
    dtypes: dict[str, str]
    literal: Callable[[Any, str], str]

    def written(self, scalar: Scalar) -> str:
        """Return the variable or literal of a scalar."""
        if isinstance(scalar, Constant):
            return self.literal(scalar.value, scalar.dtype)
        return scalar.name

    def lines(self, lines: list[Line]) -> list[str]:
        """Return lines of a program as lines of source."""
        return [
            self.line.format(
                dtype=self.dtypes[line.dtype],
                name=line.name,
                value=self.operations.get(line.operation, "{0} " + line.operation + " {1}").format(
                    *map(self.written, line.arguments),
                    dtype=self.dtypes[line.dtype],
                    suffix="f" if line.dtype == "float32" else "",
                ),
            )
            for line in lines
        ]


FUNCTION_NAMES = ("sqrt", "exp", "expm1", "log", "log1p", "tanh")


def _c_literal(value: Any, dtype: str) -> str:
    if dtype in ("bool", "int32"):
        return str(int(value))
    end = "f" if dtype == "float32" else ""
    if end:  # the float itself, so that no compiler rounds from a double
        value = _float32(value)
    if not math.isfinite(value):
        return {math.inf: f"(1.0{end} / 0.0{end})", -math.inf: f"(-1.0{end} / 0.0{end})"}.get(
            value, f"(0.0{end} / 0.0{end})"
        )
    return f"{value!r}{end}" if math.copysign(1.0, value) > 0.0 else f"({value!r}{end})"


def _float32(value: float) -> float:
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _python_literal(value: Any, dtype: str) -> str:
    if dtype == "bool":
        return repr(value)
    shown = repr(value).replace("inf", "np.inf").replace("nan", "np.nan")
    return f"np.{dtype}({shown})"


#: C, C++ and CUDA; "half" is CUDA's.
C = Language(
    line="const {dtype} {name} = {value};",
    operations={name: f"{name}{{suffix}}({{0}})" for name in FUNCTION_NAMES}
    | {
        "abs": "fabs{suffix}({0})",
        "cast": "({dtype})({0})",
        "neg": "-{0}",
        "not": "!{0}",
        "pow": "pow{suffix}({0}, {1})",
        "where": "{0} ? {1} : {2}",
    },
    dtypes={
        "float16": "half",
        "float32": "float",
        "float64": "double",
        "int32": "int",
        "bool": "bool",
    },
    literal=_c_literal,
)

#: Python with the names `math` and `np`, as numba compiles it.
PYTHON = Language(
    line="{name} = {value}",
    operations={name: f"math.{name}({{0}})" for name in FUNCTION_NAMES}
    | {
        "abs": "abs({0})",
        "cast": "np.{dtype}({0})",
        "neg": "-{0}",
        "not": "not {0}",
        "pow": "{0} ** {1}",
        "where": "{1} if {0} else {2}",
    },
    dtypes={name: name for name in ("float16", "float32", "float64", "int32")} | {"bool": "bool_"},
    literal=_python_literal,
)
