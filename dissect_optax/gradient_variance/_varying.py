"""A program for one device, run where types say along which mesh axes values vary.

Inside `jax.shard_map` with `check_vma=True` the type of a value says along which manual
axes it may vary, and an operation takes only operands of one such type. The programs of
this package know nothing of it: they are traced from shapes, and their equations are
replaced by others. So a whole computation is traced as for one device, and its
equations are run again with every operand varying along all axes that any input varies
along. Nothing travels for that; only the types change.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from dissect_optax.gradient_variance._program import (
    Environment,
    abstract,
    bind,
    dtype_of,
    loop_of,
    read,
    variables,
)

Axes = frozenset[Any]

# Calls that are left when derivatives have been taken -> the parameter that they call.
CALLED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
# They change the type and nothing else.
CASTS = ("pvary", "pcast")


def varying_axes(value: Any) -> Axes:
    """The manual mesh axes along which the type of a value says that it varies."""
    aval = jax.typeof(value)
    # Before JAX 0.10 the axes themselves, now one of several things known of them.
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def varying_over(axes: Axes, value: jax.typing.ArrayLike) -> jax.Array:
    """The value with the type of one that varies along `axes`."""
    value = jnp.asarray(value)
    missing = tuple(sorted(axes - varying_axes(value), key=str))
    if not missing:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, missing, to="varying")
    return jax.lax.pvary(value, missing)  # type: ignore[attr-defined]


def run_as_on_one_device(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, for a function whose programs know no varying axes."""
    values, tree = jax.tree.flatten(arguments)
    axes = frozenset[Any]().union(*map(varying_axes, values))
    if not axes:
        return function(*arguments)

    def flat(*values: Any) -> Any:
        return function(*jax.tree.unflatten(tree, values))

    shapes = (abstract(_Typed(jax.typeof(v))) for v in values)  # type: ignore[arg-type]
    program, result = jax.make_jaxpr(flat, return_shape=True)(*shapes)
    outputs = _run(axes, program, *values)
    return jax.tree.unflatten(jax.tree.structure(result), outputs)


class _Typed:
    """Something with a type, as variables of a program have."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


def _run(axes: Axes, program: ClosedJaxpr | Jaxpr, *inputs: Any) -> list[jax.Array]:
    """Outputs of a program, all varying along `axes`."""
    jaxpr = getattr(program, "jaxpr", program)
    consts = getattr(program, "consts", ())
    lift = functools.partial(varying_over, axes)
    environment: Environment = dict(
        zip(
            [*jaxpr.constvars, *jaxpr.invars],
            map(lift, [*consts, *inputs]),
            strict=True,
        )
    )
    for equation in jaxpr.eqns:
        outputs = _outputs(axes, equation, environment)
        environment.update(zip(equation.outvars, map(lift, outputs), strict=True))
    return [lift(read(v, environment)) for v in jaxpr.outvars]


def _outputs(axes: Axes, equation: JaxprEqn, environment: Environment) -> Sequence[Any]:
    """Outputs of one equation; loops and conditions are written anew."""
    name, params = equation.primitive.name, equation.params
    lift = functools.partial(varying_over, axes)
    if name in CASTS:
        return [read(v, environment) for v in equation.invars]
    called = params.get(CALLED.get(name, ""))
    if called is None and name not in ("scan", "cond", "while"):
        return _run_lifted(axes, equation, environment)
    operands = [lift(read(v, environment)) for v in equation.invars]
    if called is not None:
        return _run(axes, called, *operands)
    if name == "cond":
        index, *rest = operands
        branches = [functools.partial(_run, axes, b) for b in params["branches"]]
        return jax.lax.switch(jnp.asarray(index, jnp.int32), branches, *rest)
    if name == "while":
        return _while(axes, params, operands)
    loop = loop_of(equation)
    if loop is None:
        return _run_lifted(axes, equation, environment)
    consts = operands[: loop.consts]
    first = operands[loop.consts : loop.consts + loop.carries]

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _run(axes, loop.body, *consts, *carry, *xs)
        return outputs[: loop.carries], outputs[loop.carries :]

    carry, stacked = jax.lax.scan(
        step,
        first,
        operands[loop.consts + loop.carries :],
        length=loop.length,
        reverse=loop.reverse,
        unroll=loop.unroll,
    )
    return [*carry, *stacked]


def _while(axes: Axes, params: Any, operands: list[Any]) -> list[Any]:
    """Outputs of a `while`."""
    ends = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    tested, consts = operands[: ends[0]], operands[ends[0] : ends[1]]

    def goes_on(carry: list[Any]) -> Any:
        return _run(axes, params["cond_jaxpr"], *tested, *carry)[0]

    def step(carry: list[Any]) -> list[Any]:
        return _run(axes, params["body_jaxpr"], *consts, *carry)

    return jax.lax.while_loop(goes_on, step, operands[ends[1] :])


def _run_lifted(axes: Axes, equation: JaxprEqn, environment: Environment) -> list[Any]:
    """Outputs of an equation whose literals vary as its other operands do."""
    inputs = [read(v, environment) for v in equation.invars]
    if variables(equation):
        inputs = [
            varying_over(axes, jnp.asarray(x, dtype_of(v)))
            for v, x in zip(equation.invars, inputs, strict=True)
        ]
    return bind(equation, inputs)
