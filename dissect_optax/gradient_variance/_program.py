"""The loss and gradient of one example as a flat jaxpr, and the values in it.

`trace` records a function and replaces every call (jit, remat) by the equations that it
calls. Values that remat protects from being stored remain protected: its inputs pass
through the optimization barrier that JAX itself would put there. `select` gives the
part of a program that certain values need, dead code removed. Custom differentiation
rules have done their work before.

A `Source` is a small value that exists once per example: a variable of the program, or
a `Derived` one, a function of others that the program did not compute itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters import partial_eval

Atom = Var | Literal
Environment = dict[Any, Any]
Producers = dict[Var, JaxprEqn]

# Primitives that call a jaxpr -> the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
REMATS = ("remat2", "checkpoint")


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """A function of other values of one example."""

    function: Callable[..., jax.Array]
    operands: tuple["Source", ...]
    aval: jax.ShapeDtypeStruct


Source = Var | Literal | Derived


def derive(function: Callable[..., jax.Array], *operands: Source) -> Derived:
    """A value computed from others, with its shape."""
    aval = jax.eval_shape(function, *map(abstract, operands))
    return Derived(function, operands, aval)


def leaves(sources: Iterable[Source]) -> list[Var]:
    """The variables of the program that values are computed from."""
    found: dict[Var, None] = {}
    seen: set[Derived] = set()
    pending = list(sources)[::-1]
    while pending:
        source = pending.pop()
        if isinstance(source, Derived):
            if source not in seen:
                seen.add(source)
                pending.extend(source.operands[::-1])
        elif isinstance(source, Var):
            found.setdefault(source)
    return list(found)


def evaluate(source: Source, environment: Environment) -> Any:
    """The value of a source, given those of the program's variables."""
    if isinstance(source, Literal):
        return source.val
    if source not in environment:
        assert isinstance(source, Derived)
        operands = [evaluate(operand, environment) for operand in source.operands]
        environment[source] = source.function(*operands)
    return environment[source]


def shape_of(source: Source) -> tuple[int, ...]:
    """Shape of a value."""
    return tuple(getattr(source.aval, "shape", ()))


def dtype_of(source: Source) -> Any:
    """Dtype of a value."""
    return getattr(source.aval, "dtype", None)


def size_of(source: Source) -> int:
    """Number of elements of a value."""
    return math.prod(shape_of(source))


def abstract(source: Source) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a value, as an argument for tracing."""
    aval: Any = source.aval
    weak_type = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak_type)


# ---- Reading a jaxpr -----------------------------------------------------------------


SCAN_PARAMETERS = {
    "jaxpr",
    "length",
    "reverse",
    "unroll",
    "num_consts",
    "num_carry",
    "linear",
    "ft_in",
    "ft_out",
    "_split_transpose",
}


class Loop(NamedTuple):
    """The parts of a `lax.scan` in a jaxpr."""

    body: ClosedJaxpr
    consts: int
    carries: int
    length: int
    reverse: bool
    unroll: int


def loop_of(equation: JaxprEqn) -> Loop | None:
    """The parts of a scan; nothing for a form that is not known."""
    params = equation.params
    if equation.primitive.name != "scan" or not set(params) <= SCAN_PARAMETERS:
        return None
    try:
        if "num_carry" in params:
            counts = params["num_consts"], params["num_carry"]
        else:
            # Since JAX 0.12: trees of the inputs, consts, carry and xs.
            consts, carry, xs = params["ft_in"].unpack()
            counts = len(consts), len(carry)
            if sum(counts) + len(xs) != len(equation.invars):
                return None
        body = params["jaxpr"]
        if not isinstance(body, ClosedJaxpr):
            return None
        return Loop(
            body, *counts, params["length"], params["reverse"], params["unroll"]
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def variables(equation: JaxprEqn) -> list[Var]:
    """Inputs of an equation that are not literals."""
    return [v for v in equation.invars if isinstance(v, Var)]


def defining_equations(jaxpr: Jaxpr) -> Producers:
    """For each variable the equation that computes it."""
    return {v: equation for equation in jaxpr.eqns for v in equation.outvars}


def depends_on(jaxpr: Jaxpr, inputs: Collection[Var]) -> set[Var]:
    """All variables whose value may depend on one of `inputs`."""
    dependent = set(inputs)
    for equation in jaxpr.eqns:
        flags = [isinstance(v, Var) and v in dependent for v in equation.invars]
        if any(flags):
            outputs = _dependent_outputs(equation, flags)
            dependent.update(
                v for v, d in zip(equation.outvars, outputs, strict=True) if d
            )
    return dependent


def _dependent_outputs(equation: JaxprEqn, flags: Sequence[bool]) -> Sequence[bool]:
    """Which outputs depend on the flagged inputs; loops are looked into."""
    loop = loop_of(equation)
    if loop is None:
        return [True] * len(equation.outvars)
    return loop_dependence(loop, loop.body.jaxpr, flags)[1]


def loop_dependence(
    loop: Loop, body: Jaxpr, flags: Sequence[bool]
) -> tuple[list[bool], list[bool]]:
    """Which inputs and outputs of a loop's body depend on the flagged inputs.

    A carry does where a step makes it so. The body may have more inputs.
    """
    inputs = list(flags)
    while True:
        flagged = [v for v, flag in zip(body.invars, inputs, strict=False) if flag]
        dependent = depends_on(body, flagged)
        outputs = [isinstance(v, Var) and v in dependent for v in body.outvars]
        more = [k for k in range(loop.carries) if outputs[k] > inputs[loop.consts + k]]
        if not more:
            carries = inputs[loop.consts : loop.consts + loop.carries]
            return inputs, [*carries, *outputs[loop.carries :]]
        for k in more:
            inputs[loop.consts + k] = True


def is_zero(atom: Atom, produced_by: Producers) -> bool:
    """Whether a value is known to be zero everywhere."""
    if isinstance(atom, Literal):
        return np.ndim(atom.val) == 0 and bool(atom.val == 0)
    equation = produced_by.get(atom)
    return (
        equation is not None
        and equation.primitive.name in ("broadcast_in_dim", "convert_element_type")
        and is_zero(equation.invars[0], produced_by)
    )


def with_outputs(program: ClosedJaxpr, outputs: Sequence[Atom]) -> ClosedJaxpr:
    """The same equations with other outputs, dead code removed."""
    jaxpr = program.jaxpr.replace(outvars=list(outputs))
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(outputs), instantiate=True)
    return ClosedJaxpr(live, program.consts)


def select(program: ClosedJaxpr, wanted: Sequence[Atom]) -> Callable[..., list[Any]]:
    """The part of `program` that computes `wanted`, as a function of its inputs."""
    live = with_outputs(program, wanted)
    return functools.partial(jax.core.eval_jaxpr, live.jaxpr, live.consts)


def known_value(program: ClosedJaxpr, atom: Atom) -> np.ndarray | None:
    """The value of an atom that depends on no input of the program, if it is one.

    Loop counters and what is computed from them are of this kind.
    """
    if isinstance(atom, Literal):
        return np.asarray(atom.val)
    live = with_outputs(program, [atom])
    used = {v for equation in live.jaxpr.eqns for v in variables(equation)} | {
        v for v in live.jaxpr.outvars if isinstance(v, Var)
    }
    constants = dict(zip(live.jaxpr.constvars, live.consts, strict=True))
    traced = any(isinstance(constants.get(v), jax.core.Tracer) for v in used)
    if traced or any(v in used for v in live.jaxpr.invars):
        return None
    unread = [None] * len(live.jaxpr.invars)

    def value() -> np.ndarray:
        with jax.ensure_compile_time_eval():
            (found,) = jax.core.eval_jaxpr(live.jaxpr, live.consts, *unread)
            return np.asarray(found)

    if jax.sharding.get_abstract_mesh().empty:
        return value()
    # Inside `shard_map` JAX cannot compute now what lies on no mesh; meshes belong to a
    # thread, so that another one can.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(value).result()


# ---- Evaluating a jaxpr --------------------------------------------------------------


def run_equation(equation: JaxprEqn, *operands: Any) -> list[Any]:
    """Outputs of one equation; `operands` replace its variables, literals stay."""
    values = iter(operands)
    return bind(
        equation,
        [v.val if isinstance(v, Literal) else next(values) for v in equation.invars],
    )


def bind(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Outputs of one equation; `inputs` replace its variables and literals."""
    bound = equation.primitive.get_bind_params(equation.params)
    # Older versions of JAX give the functions that a primitive calls beside them.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def read(atom: Atom, environment: Mapping[Any, Any]) -> Any:
    """Value of a variable or literal."""
    return atom.val if isinstance(atom, Literal) else environment[atom]


# Outputs of an equation, given the values computed before it; None to run it as it is.
Replacement = Callable[[JaxprEqn, Environment], list[Any] | None]


def run_with(
    replaced: Replacement,
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    *inputs: Any,
) -> list[Any]:
    """Evaluate a jaxpr; where `replaced` gives the outputs of an equation, take those.

    `replaced` gets an equation with the values that were computed before it.
    """
    environment: Environment = dict(zip(jaxpr.constvars, consts, strict=True))
    environment.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        outputs = replaced(equation, environment)
        if outputs is None:
            values = [environment[v] for v in variables(equation)]
            outputs = run_equation(equation, *values)
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [read(v, environment) for v in jaxpr.outvars]


def retrace(program: ClosedJaxpr, replaced: Replacement) -> ClosedJaxpr:
    """The same program with some equations replaced."""
    run = functools.partial(run_with, replaced, program.jaxpr, program.consts)
    return jax.make_jaxpr(run)(*map(abstract, program.jaxpr.invars))


# ---- Inlining calls ------------------------------------------------------------------


def trace(function: Callable, *arguments: Any) -> tuple[ClosedJaxpr, Any]:
    """Jaxpr of `function` without calls, and the tree that it returns."""
    program, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return inline_calls(program), result


def inline_calls(program: ClosedJaxpr) -> ClosedJaxpr:
    """The same program with every call replaced by what it calls."""
    return retrace(program, _run_call)


def _run_call(equation: JaxprEqn, environment: Environment) -> list[Any] | None:
    """Outputs of a call, computed by the equations that it calls."""
    called = equation.params.get(CALLS.get(equation.primitive.name, ""))
    if isinstance(called, Jaxpr):
        called = ClosedJaxpr(called, ())
    if not isinstance(called, ClosedJaxpr):
        return None
    operands = [read(v, environment) for v in equation.invars]
    if equation.primitive.name in REMATS:
        operands = _behind_barrier(equation, operands)
    return run_with(_run_call, called.jaxpr, called.consts, *operands)


def _behind_barrier(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    """Operands of remat's second forward pass, kept apart from the first."""
    if not equation.params.get("differentiated", True):
        return operands
    protect = equation.params.get("prevent_cse", True)
    flags = protect if isinstance(protect, tuple) else (protect,) * len(operands)
    chosen = [x for x, flag in zip(operands, flags, strict=True) if flag]
    if not chosen:
        return operands
    guarded = iter(jax.lax.optimization_barrier(chosen))
    return [
        next(guarded) if flag else x for x, flag in zip(operands, flags, strict=True)
    ]
