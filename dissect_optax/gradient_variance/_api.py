"""The gradient of a mini-batch together with its variance, Eq. (44) of the paper.

The loss of one example is traced with its gradient (`_program`); every
gradient is followed back to the small factors that it is a product of
(`_rules`); the program that computes the factors is mapped over the batch, and
mean and variance are taken from the factors (`_terms`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Var

from dissect_optax.gradient_variance._merging import (
    Summary,
    check_microbatch_size,
    checked_weights,
    in_microbatches,
    masked,
    merged_over_axis,
    relative_weights,
    variance_factor,
)
from dissect_optax.gradient_variance._program import (
    Atom,
    depends_on,
    select,
    shaped,
    trace,
    without_accumulation,
)
from dissect_optax.gradient_variance._rules import Walk
from dissect_optax.gradient_variance._terms import Batch, Moments, Term, accumulator

PyTree = Any


class VarianceRoute(NamedTuple):
    """How the variance of one parameter's gradient is computed, and what it costs."""

    parameter: str
    """Path of the parameter in its tree."""
    shape: tuple[int, ...]
    routes: tuple[str, ...]
    """What the gradient is made of; several entries for a sum or a concatenation."""
    operations: int
    """Floating-point operations beyond those of the plain gradient."""
    numbers: int
    """Array elements held beyond the plain gradient's own and the two results."""

    def __str__(self) -> str:
        """One line of a report."""
        return (
            f"{self.parameter} {list(self.shape)}: {', '.join(self.routes)}; "
            f"{self.operations:.1e} operations, {self.numbers:.1e} numbers"
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The program of one example, and the terms of its gradient."""

    program: ClosedJaxpr
    value: Atom
    aux: list[Atom]
    terms: list[Term]
    dependent: set[Var]
    parameter_count: int
    aux_tree: Any
    weight_dtype: jnp.dtype


def value_grad_and_variance(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    regularizer: Callable[[PyTree], jax.Array] | None = None,
    microbatch_size: int | None = None,
    two_pass: bool = False,
    precision: jax.lax.PrecisionLike = None,
    axis_name: Any = None,
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    r"""Like `jax.value_and_grad` over a batch, with the variance of the mean gradient.

    With per-example gradients ∇ℓ_k of a batch B and their mean g, the variance is
    Eq. (44) of the paper, exact and unbiased::

        ŝ = 1/|B| · [ 1/(|B|-1) Σ_k ∇ℓ_k² - |B|/(|B|-1) g² ]

    that is, the sample variance of the per-example gradients (divisor |B|-1) divided
    by |B|. Per-example gradients of large parameters are not stored: the gradient
    program of one example is cut where small factors are multiplied, and the batch's
    sums of products and of squared products are computed from the factors.
    `explain_variance` tells for every parameter what was found. Call it in `jax.jit`.

    Weights w_k ≥ 0 give the weighted mean Σ w_k ∇ℓ_k / W, W = Σ w_k, and the unbiased
    estimate of its variance, for independent examples of one variance::

        ŝ = Σ_k w_k (∇ℓ_k - g)² / (W - Σw²/W) · Σw²/W²

    Weights of zero and one give what the batch without the zeros would give, whatever
    the masked examples hold, also NaN.

    Args:
        loss: `loss(params, example, *shared)`, a real scalar: the loss of one example,
            without batch axis, as for `jax.vmap`. It must not see other examples.
        has_aux: Whether `loss` returns `(value, aux)`; `aux` comes back stacked over
            the batch.
        regularizer: `regularizer(params)`, a scalar that is added to the value; its
            gradient is added to the gradient and has no variance.
        microbatch_size: Evaluate that many examples at a time in a loop and merge the
            parts exactly (Chan et al., 1979), which bounds memory for any model.
            None takes all at once. On a CPU, convolutions are slow inside the loop.
        two_pass: Compute deviations from the mean gradient in a second pass, and not
            squares and their mean in one. Slower (about `vmap(grad)` without its
            memory), and exact also where all examples have nearly the same gradient;
            see Notes.
        precision: Precision of the products that sums and squares are taken with, as
            in `jax.lax.dot_general`. None takes that of the product in the gradient.
        axis_name: Name of a mapped axis (`jax.shard_map` with `check_vma=False`,
            `jax.vmap`) over which the examples are spread; the result is that of all
            of them.

    Returns:
        A function of `(params, batch, *shared, weights=None)`. `batch` is a tree of
        arrays with a common leading axis; per-example random keys are one more leaf of
        it. It returns `(value, grad, variance)`, or `((value, aux), grad, variance)`:
        the mean loss; the mean gradient in the dtype of `params`; its variance, in the
        squared unit of the gradient, real, in at least float32, in which all sums are
        taken.

    Raises:
        TypeError: If the loss of one example is not a real scalar.
        ValueError: If batch leaves disagree on their length, have none or are fewer
            than two; if `weights` are negative or leave fewer than two examples.
            Traced weights cannot be checked: where fewer than two of them are
            positive, the gradient is that of the one example, or zero without any,
            and the variance is zero.

    Notes:
        Squares minus the squared mean lose digits in the outer products of dense
        layers and in products per example where the examples' gradients differ by less
        than about 1e-3 of their size in float32; the difference is clamped at zero.
        The relative variance ŝ/g² is then wrong by no more than some 1e-6/|B|, which
        no variance adaptation notices. Stored gradients and table rows always use
        deviations.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> def loss(params, example):
        ...     x, y = example
        ...     return (jnp.tanh(x @ params["w"]) - y) ** 2
        >>> params = {"w": jnp.asarray([0.5, -1.0])}
        >>> batch = jnp.asarray([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]]), jnp.ones(3)
        >>> measure = jax.jit(value_grad_and_variance(loss))
        >>> value, grad, variance = measure(params, batch)
        >>> each = jax.vmap(jax.grad(loss), (None, 0))(params, batch)["w"]
        >>> bool(jnp.allclose(grad["w"], each.mean(0)))
        True
        >>> bool(jnp.allclose(variance["w"], each.var(0, ddof=1) / 3))
        True

    References:
        Balles & Hennig, "Dissecting Adam", §C.1; Chan, Golub & LeVeque (1979),
        "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    check_microbatch_size(microbatch_size)
    return functools.partial(
        _value_grad_and_variance,
        loss,
        has_aux,
        regularizer,
        microbatch_size,
        two_pass,
        precision,
        axis_name,
    )


def explain_variance(
    loss: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., list[VarianceRoute]]:
    """The way that `value_grad_and_variance` takes for each parameter, and its cost.

    Args:
        loss: As for `value_grad_and_variance`.
        has_aux: As for `value_grad_and_variance`.

    Returns:
        A function of `(params, batch, *shared)` that computes nothing, so that shapes
        (`jax.ShapeDtypeStruct`) will do. It returns a `VarianceRoute` for each
        parameter; `routes` names what was found:

        - ``outer product``: one more matrix product;
        - ``product per example``: gradients of a few examples at a time;
        - ``table rows``: rows that were looked up, added by example;
        - ``stored gradients``: one gradient per example, side by side;
        - ``the same for all examples``: no variance;
        - ``sum of …``: what overlaps, added for a few examples at a time.

        In brackets stands the JAX primitive that it was found at.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> def loss(params, x):
        ...     return jnp.tanh(x @ params["w"]).sum()
        >>> shape = jax.ShapeDtypeStruct
        >>> params = {"w": shape((784, 100), jnp.float32)}
        >>> report = explain_variance(loss)(params, shape((128, 784), jnp.float32))
        >>> report[0].routes
        ('outer product (dot_general)',)
    """
    return functools.partial(_explain_variance, loss, has_aux)


def _explain_variance(
    loss: Callable[..., Any],
    has_aux: bool,
    params: PyTree,
    batch: PyTree,
    *shared: Any,
) -> list[VarianceRoute]:
    """The report of `explain_variance`; arguments may be shapes."""
    size = _batch_size(batch)
    plan = _plan(loss, has_aux, params, batch, shared)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [
        VarianceRoute(
            jax.tree_util.keystr(path),
            term.shape,
            term.routes,
            term.extra_operations(size),
            term.extra_memory(size),
        )
        for path, term in zip(paths, plan.terms, strict=True)
    ]


def _value_grad_and_variance(
    loss: Callable[..., Any],
    has_aux: bool,
    regularizer: Callable[[PyTree], jax.Array] | None,
    microbatch_size: int | None,
    two_pass: bool,
    precision: jax.lax.PrecisionLike,
    axis_name: Any,
    params: PyTree,
    batch: PyTree,
    *shared: Any,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[Any, PyTree, PyTree]:
    """The function that `value_grad_and_variance` returns."""
    batch = jax.tree.map(jnp.asarray, batch)
    size = _batch_size(batch)
    # The sum of ones over an axis is its size, a Python number.
    total = size if axis_name is None else size * jax.lax.psum(1, axis_name)
    if total < 2:
        raise ValueError(
            "The variance of a gradient needs a batch of at least two examples, got "
            f"{total}. Use `jax.value_and_grad` for a single example."
        )
    if weights is not None:
        weights = relative_weights(checked_weights(weights, size), axis_name)
    plan = _plan(loss, has_aux, params, batch, shared)
    part = size if microbatch_size is None else min(microbatch_size, size)
    merged = part < size or axis_name is not None
    run = functools.partial(
        _summary, plan, two_pass, precision, not merged, jax.tree.leaves(params)
    )
    examples = (jax.tree.leaves(batch), weights)
    if part < size:
        summary, aux = in_microbatches(run, examples, size, part)
    else:
        summary, aux = run(examples)
    if axis_name is not None:
        summary = merged_over_axis(summary, axis_name)

    variances = summary.spreads
    if merged:
        factor = variance_factor(summary.weight, summary.squared_weight)
        variances = [s * factor.astype(s.dtype) for s in variances]
    value, grads = summary.value, summary.means
    if regularizer is not None:
        extra, extra_grad = jax.value_and_grad(regularizer)(params)
        value = value + extra
        grads = [g + e for g, e in zip(grads, jax.tree.leaves(extra_grad), strict=True)]
    leaves = jax.tree.leaves(params)
    grads = [g.astype(jnp.result_type(p)) for g, p in zip(grads, leaves, strict=True)]
    value = value.astype(shaped(plan.value).dtype)
    tree = jax.tree.structure(params)
    return (
        (value, jax.tree.unflatten(plan.aux_tree, aux)) if has_aux else value,
        jax.tree.unflatten(tree, grads),
        jax.tree.unflatten(tree, variances),
    )


# ---- Plan and summary --------------------------------------------------------------


def _plan(
    loss: Callable[..., Any],
    has_aux: bool,
    params: PyTree,
    batch: PyTree,
    shared: Sequence[Any],
) -> _Plan:
    """Trace one example and find the terms of its gradient."""
    example = jax.tree.map(_without_batch_axis, batch)
    one = functools.partial(_loss_of_one, loss, has_aux, shared)
    program, result = trace(jax.value_and_grad(one, has_aux=True), params, example)
    count = len(jax.tree.leaves(params))
    (_, aux), _ = result
    outputs = len(program.jaxpr.outvars)
    program = without_accumulation(program, range(outputs - count, outputs))
    jaxpr = program.jaxpr
    dependent = depends_on(jaxpr, jaxpr.invars[count:])
    walk = Walk(jaxpr, dependent)
    terms = [walk.term(v) for v in jaxpr.outvars[outputs - count :]]
    dtypes = [accumulator(shaped(v).dtype) for v in jaxpr.outvars[outputs - count :]]
    weight_dtype = jnp.finfo(jnp.result_type(jnp.float32, *dtypes)).dtype
    return _Plan(
        program,
        jaxpr.outvars[0],
        jaxpr.outvars[1 : outputs - count],
        terms,
        dependent,
        count,
        jax.tree.structure(aux),
        weight_dtype,
    )


def _loss_of_one(
    loss: Callable[..., Any],
    has_aux: bool,
    shared: Sequence[Any],
    params: PyTree,
    example: PyTree,
) -> tuple[jax.Array, Any]:
    """The loss of one example and its auxiliary output, checked."""
    try:
        result = loss(params, example, *shared)
    except Exception as error:
        shapes = jax.tree.map(jnp.shape, example)
        error.add_note(
            "`value_grad_and_variance` calls the loss with one example, without the "
            f"batch axis; its shapes are {shapes}."
        )
        raise
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "With `has_aux=True` the loss must return a pair (value, aux), got "
            f"{type(result).__name__}."
        )
    value, aux = result if has_aux else (result, ())
    if not jax.tree_util.all_leaves([value]):
        raise TypeError(
            "The loss of one example must be a real scalar, got a "
            f"{type(value).__name__}. For a pair (loss, aux), use `has_aux=True`."
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "The loss of one example must be a real scalar, got an array of shape "
            f"{shape} and dtype {dtype}. Sum or average over the outputs of the "
            "example; the batch axis is not visible to the loss."
        )
    return jnp.asarray(value), aux


def _without_batch_axis(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example of a batch leaf."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], leaf.dtype)


def _summary(
    plan: _Plan,
    two_pass: bool,
    precision: jax.lax.PrecisionLike,
    finished: bool,
    params: list[jax.Array],
    examples: tuple[list[jax.Array], jax.Array | None],
) -> tuple[Summary, list[jax.Array]]:
    """Summary and stacked auxiliary output of some examples.

    With `finished`, these are all examples, and the spreads are already Eq. (44).
    """
    leaves, weights = examples
    size = leaves[0].shape[0]
    needed = dict.fromkeys(v for term in plan.terms for v in term.variables)
    varying = [v for v in needed if v in plan.dependent]
    fixed = [v for v in needed if v not in plan.dependent]
    run = jax.vmap(
        select(plan.program, [plan.value, *plan.aux, *varying, *fixed]),
        in_axes=(None,) * len(params) + (0,) * len(leaves),
        out_axes=[0] * (1 + len(plan.aux) + len(varying)) + [None] * len(fixed),
    )
    values, *outputs = run(*params, *leaves)
    aux, outputs = outputs[: len(plan.aux)], outputs[len(plan.aux) :]
    stacks, constants = outputs[: len(varying)], outputs[len(varying) :]
    if weights is None:
        weight = jnp.asarray(size, plan.weight_dtype)
        squared_weight = weight
        shares = jnp.full(size, 1 / size, plan.weight_dtype)
    else:
        weights = weights.astype(plan.weight_dtype)
        weight, squared_weight = weights.sum(), jnp.square(weights).sum()
        shares = weights / jnp.where(weight > 0, weight, 1)
        counts = shares > 0
        # Padding may hold anything, also values whose gradient is not finite.
        values, *stacks = (masked(x, counts) for x in (values, *stacks))
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


# ---- Checks ------------------------------------------------------------------------


def _batch_size(batch: PyTree) -> int:
    """Number of examples, the same in every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("`batch` holds no arrays, so it has no batch axis.")
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    scalars = [path for path, shape in shapes.items() if not shape]
    if scalars:
        raise ValueError(
            f"Every leaf of `batch` needs a leading batch axis, but {scalars} are "
            "scalars. Pass what all examples share as a further argument."
        )
    sizes = {path: shape[0] for path, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The leaves of `batch` disagree on the number of examples: {sizes}. Pass "
            "what all examples share as a further argument."
        )
    size = next(iter(sizes.values()))
    if size == 0:
        raise ValueError("`batch` is empty: its leaves have length 0.")
    return size
