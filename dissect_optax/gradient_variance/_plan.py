"""The program of one example with its terms, and its run over a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Var

from dissect_optax import _formulas
from dissect_optax.gradient_variance._loops import (
    Options,
    exposed,
    masked,
    with_share,
)
from dissect_optax.gradient_variance._program import (
    Atom,
    Source,
    depends_on,
    dtype_of,
    evaluate,
    leaves,
    select,
    trace,
)
from dissect_optax.gradient_variance._rules import TAKEN_IN_LOOP
from dissect_optax.gradient_variance._terms import (
    Batch,
    Moments,
    NeedsValues,
    TakenInLoop,
    Term,
    accumulator,
)
from dissect_optax.gradient_variance._walk import needs_values_of_a_loop


class Summary(NamedTuple):
    """Value, gradient and spread of a set of examples, and what the set weighs."""

    weight: jax.Array
    squared_weight: jax.Array
    value: jax.Array
    means: list[jax.Array]
    spreads: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The program of one example, and the terms of its gradient."""

    program: ClosedJaxpr
    """Its inputs: parameters, the leaves of the example, the share of the example."""
    value: Atom
    aux: list[Atom]
    terms: list[Term]
    parameter_count: int
    aux_tree: Any
    weight_dtype: Any

    @functools.cached_property
    def dependent(self) -> set[Var]:
        """Values that differ by example."""
        jaxpr = self.program.jaxpr
        return depends_on(jaxpr, jaxpr.invars[self.parameter_count :])

    @functools.cached_property
    def taken(self) -> set[Source]:
        """Values that already are moments over the batch."""
        return {v for term in _parts(self.terms) for v in term.sources}

    def varies(self, source: Source) -> bool:
        """Whether a source has one value for each example."""
        if source in self.taken:
            return False
        return any(v in self.dependent for v in leaves([source]))


def plan_of(
    value_and_grad: Callable[..., Any],
    params: Any,
    example: Any,
    *,
    two_pass: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Plan:
    """Trace one example and find the terms of its gradient.

    `value_and_grad(params, example)` returns `((value, aux), grad)`.
    """
    program, result = trace(value_and_grad, params, example)
    (_, aux), grads = result
    count = len(jax.tree.leaves(params))
    grad_count = len(jax.tree.leaves(grads))
    outputs = len(program.jaxpr.outvars)
    first = outputs - grad_count
    dtypes = [accumulator(dtype_of(v)) for v in program.jaxpr.outvars[first:]]
    widest = functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
    weight_dtype = jnp.finfo(widest).dtype
    options = Options(True, two_pass, precision, weight_dtype)
    program = with_share(program, options)
    varies = [i >= count for i in range(len(program.jaxpr.invars))]

    def roots(program: ClosedJaxpr) -> list[Atom]:
        return list(program.jaxpr.outvars[first:])

    def plan(options: Options) -> Plan:
        changed, walk = exposed(program, varies, roots, options)
        found = changed.jaxpr.outvars
        return Plan(
            changed,
            found[0],
            list(found[1:first]),
            [walk.term(v) for v in found[first:]],
            count,
            jax.tree.structure(aux),
            weight_dtype,
        )

    try:
        attempt = plan(options)
        if _is_complete(attempt):
            return attempt
    except NeedsValues:
        pass
    return plan(options._replace(in_loops=False))


def _is_complete(plan: Plan) -> bool:
    """Whether nothing reads the values of gradients that stayed in a loop."""
    if any(map(needs_values_of_a_loop, plan.terms)):
        return False
    sources = [v for term in plan.terms for v in term.sources]
    wanted: list[Atom] = [plan.value, *plan.aux, *leaves(sources)]
    live = select(plan.program, wanted)
    return not _holds_taken(live.args[0])  # type: ignore[attr-defined]


def _holds_taken(jaxpr: Any) -> bool:
    """Whether a jaxpr, or one inside it, reads gradients that stayed in a loop."""
    for equation in jaxpr.eqns:
        if equation.primitive is TAKEN_IN_LOOP:
            return True
        for value in equation.params.values():
            inner = value if isinstance(value, tuple | list) else (value,)
            for part in inner:
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns") and _holds_taken(part):
                    return True
    return False


def _parts(terms: list[Term]) -> list[TakenInLoop]:
    """All terms whose moments were taken in a loop."""
    found: list[TakenInLoop] = []
    for term in terms:
        if isinstance(term, TakenInLoop):
            found.append(term)
        inner = getattr(term, "term", None)
        found += _parts([inner] if isinstance(inner, Term) else [])
        found += _parts(list(getattr(term, "terms", ())))
    return found


def summarize(
    plan: Plan,
    two_pass: bool,
    precision: jax.lax.PrecisionLike,
    finished: bool,
    params: list[jax.Array],
    examples: tuple[list[jax.Array], jax.Array | None],
) -> tuple[Summary, list[jax.Array]]:
    """Summary and stacked auxiliary output of some examples.

    With `finished`, these are all examples, and the spreads are already Eq. (44).
    """
    inputs, weights = examples
    size = inputs[0].shape[0]
    if weights is None:
        weight = jnp.asarray(size, plan.weight_dtype)
        squared_weight = weight
        shares = jnp.full(size, 1 / size, plan.weight_dtype)
    else:
        weights = weights.astype(plan.weight_dtype)
        weight, squared_weight = weights.sum(), jnp.square(weights).sum()
        shares = weights / jnp.where(weight > 0, weight, 1)
    needed = list(dict.fromkeys(v for term in plan.terms for v in term.sources))
    varying = [v for v in needed if plan.varies(v)]
    fixed = [v for v in needed if not plan.varies(v)]
    wanted = leaves(needed)

    compute = select(plan.program, [plan.value, *plan.aux, *wanted])

    def of_one(*inputs: Any) -> tuple[Any, list[Any], list[Any], list[Any]]:
        value, *rest = compute(*inputs)
        environment = dict(zip(wanted, rest[len(plan.aux) :], strict=True))
        own = [evaluate(v, environment) for v in varying]
        return (
            value,
            rest[: len(plan.aux)],
            own,
            [evaluate(v, environment) for v in fixed],
        )

    run = jax.vmap(
        of_one,
        in_axes=(None,) * len(params) + (0,) * (len(inputs) + 1),
        out_axes=(0, 0, 0, None),
    )
    values, aux, stacks, constants = run(*params, *inputs, shares)
    if weights is not None:
        # Padding may hold anything, also values whose gradient is not finite.
        values, *stacks = (masked(x, shares > 0) for x in (values, *stacks))
    scale = jnp.ones((), plan.weight_dtype)
    if finished:
        # Here and not at the end, so that a table's unread rows need no second pass.
        scale = variance_factor(weight, squared_weight)
    batch = Batch(
        dict(zip(varying, stacks, strict=True)),
        dict(zip(fixed, constants, strict=True)),
        shares,
        scale,
        two_pass,
        precision,
    )
    moments: list[Moments] = list(map(batch.moments, plan.terms))
    value = (shares * values).sum()
    means, spreads = ([m[i] for m in moments] for i in range(2))
    return Summary(weight, squared_weight, value, means, spreads), aux


def variance_factor(weight: jax.Array, squared_weight: jax.Array) -> jax.Array:
    """Factor from spread to variance, given Σw and Σw²; zero where nothing counts."""
    safe = jnp.where(weight > 0, weight, 1)
    squared_share = jnp.where(weight > 0, squared_weight / safe / safe, 1)
    return _formulas.variance_of_mean_factor(squared_share)
