"""The public functions: a gradient with its variance, and how it is computed.

The loss of one example is traced with its gradient (`_program`); every gradient is
followed back (`_walk`) to the terms that it is made of (`_terms`), by one rule for each
primitive (`_rules`), out of loops too (`_loops`); the program that computes the factors
of these terms is mapped over the batch, and their mean and variance are taken
(`_plan`); micro-batches and mapped axes are merged (`_merging`).
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dissect_optax.gradient_variance._coupling import (
    warn_of_centering,
    warn_of_mixing,
)
from dissect_optax.gradient_variance._merging import (
    check_microbatch_size,
    checked_weights,
    in_microbatches,
    merged_over_axis,
    relative_weights,
)
from dissect_optax.gradient_variance._parameters import (
    Selection,
    Trainable,
    select_parameters,
)
from dissect_optax.gradient_variance._plan import (
    Plan,
    Summary,
    plan_of,
    summarize,
    variance_factor,
)
from dissect_optax.gradient_variance._program import dtype_of
from dissect_optax.gradient_variance._report import (
    VarianceReport,
    VarianceRoute,
    warn_of_stored,
)
from dissect_optax.gradient_variance._sharding import (
    BatchSharding,
    check_divisible,
    check_exclusive,
    run_spread,
    spread_of,
)
from dissect_optax.gradient_variance._terms import stored_parts
from dissect_optax.gradient_variance._varying import run_as_on_one_device

PyTree = Any


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The user's loss and how it is called."""

    function: Callable[..., Any]
    has_aux: bool
    batched: bool

    def of_one(
        self, params: PyTree, example: PyTree, shared: Sequence[Any]
    ) -> tuple[jax.Array, Any]:
        """The loss of one example and its auxiliary output, checked."""
        if self.batched:
            example = jax.tree.map(lambda leaf: leaf[None], example)
        try:
            result = self.function(params, example, *shared)
        except Exception as error:
            shapes = jax.tree.map(jnp.shape, example)
            form = (
                "a batch of one example"
                if self.batched
                else "one example, without the batch axis (see `batched`)"
            )
            error.add_note(
                f"`value_grad_and_variance` calls the loss with {form}; its shapes are "
                f"{shapes}."
            )
            raise
        return self._checked(result)

    def _checked(self, result: Any) -> tuple[jax.Array, Any]:
        """Value and auxiliary output."""
        if self.has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                "With `has_aux=True` the loss must return a pair (value, aux), got "
                f"{type(result).__name__}."
            )
        value, aux = result if self.has_aux else (result, ())
        subject = "mean loss of a batch" if self.batched else "loss of one example"
        if not jax.tree_util.all_leaves([value]):
            raise TypeError(
                f"The {subject} must be a real scalar, got a {type(value).__name__}. "
                "For a pair (loss, aux), use `has_aux=True`."
            )
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            remedy = (
                "Return the mean over the batch."
                if self.batched
                else "Sum or average over the outputs of the example; the batch axis "
                "is not visible to the loss."
            )
            raise TypeError(
                f"The {subject} must be a real scalar, got an array of shape {shape} "
                f"and dtype {dtype}. {remedy}"
            )
        return jnp.asarray(value), aux


@dataclasses.dataclass(frozen=True)
class _Settings:
    """How the variance is taken: arguments of `value_grad_and_variance`."""

    trainable: Trainable = None
    regularizer: Callable[[PyTree], jax.Array] | None = None
    microbatch_size: int | None = None
    two_pass: bool = False
    precision: jax.lax.PrecisionLike = None
    axis_name: Any = None
    batch_sharding: BatchSharding = None


def value_grad_and_variance(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    batched: bool = False,
    trainable: Trainable = None,
    regularizer: Callable[[PyTree], jax.Array] | None = None,
    microbatch_size: int | None = None,
    two_pass: bool = False,
    precision: jax.lax.PrecisionLike = None,
    axis_name: Any = None,
    batch_sharding: jax.sharding.NamedSharding
    | jax.sharding.PartitionSpec
    | None = None,
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    r"""Like `jax.value_and_grad` over a batch, with the variance of the mean gradient.

    With per-example gradients ∇ℓ_k of a batch B and their mean g, the variance is
    Eq. (44) of the paper, exact and unbiased::

        ŝ = 1/|B| · [ 1/(|B|-1) Σ_k ∇ℓ_k² - |B|/(|B|-1) g² ]

    that is, the sample variance of the per-example gradients (divisor |B|-1) divided
    by |B|. Per-example gradients of large parameters are not stored: the gradient
    program of one example is cut where small factors are multiplied, and the batch's
    sums of products and of squared products are computed from the factors.
    `explain_variance` reports for every parameter what was found. Call it in `jax.jit`.

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
        batched: Whether `loss` takes a batch and returns the mean over its examples.
            It is called with batches of one, `x[None]` for every leaf of an example,
            so it must be a mean of what it is on each example alone.
        trainable: The leaves of `params` that have a gradient: a tree of bools
            with the structure of `params` or of its upper part, or a function
            `(path, leaf) -> bool` of a key path as in `jax.tree.map_with_path`. The
            others are frozen: they cost nothing, may be of any type (integers, keys,
            functions), and have None in place of gradient and variance. None takes
            all.
        regularizer: `regularizer(params)`, a scalar that is added to the value; its
            gradient is added to the gradient and has no variance. It sees the frozen
            parameters too.
        microbatch_size: Evaluate that many examples at a time in a loop and merge the
            parts exactly (Chan et al., 1979), which bounds memory for any model.
            None takes all at once. On a CPU, convolutions are slow inside the loop.
        two_pass: Compute deviations from the mean gradient in a second pass, and not
            squares and their mean in one. Slower (about `vmap(grad)` without its
            memory), and exact also where all examples have nearly the same gradient;
            see Notes.
        precision: Precision of the products that sums and squares are taken with, as
            in `jax.lax.dot_general`. None takes that of the product in the gradient.
        axis_name: Name of a mapped axis, or several, (`jax.shard_map` with or without
            `check_vma`, `jax.vmap`) over which the examples are spread; the result is
            that of all of them.
        batch_sharding: Sharding of `batch` over a mesh with axes of type Auto, as it
            was given to `jax.device_put(batch, batch_sharding)`, or a `PartitionSpec`
            of the mesh in context; what it says of the leading axis counts. Every
            device then measures its own examples, and only a mean and a spread per
            parameter travel; without it the result is the same, but the compiler may
            collect all examples on every device. With axes of type Explicit it is
            read off the arrays. `microbatch_size` counts the examples on one device.

    Returns:
        A function of `(params, batch, *shared, weights=None)`. `batch` is a tree of
        arrays with a common leading axis; per-example random keys are one more leaf of
        it. It returns `(value, grad, variance)`, or `((value, aux), grad, variance)`:
        the mean loss; the mean gradient in the dtype of `params`; its variance, in the
        squared unit of the gradient, real, in at least float32, in which all sums are
        taken. Both trees have the structure of `params` with None for frozen leaves,
        which is that of the trainable part
        `jax.tree.map(lambda p, t: p if t else None, params, trainable)`.

    Raises:
        TypeError: If the loss of one example is not a real scalar; if a trainable leaf
            is not a floating-point or complex array (the message gives its path); if
            `trainable` holds or returns anything but bools.
        ValueError: If batch leaves disagree on their length, have none or are fewer
            than two; if `weights` are negative or leave fewer than two examples.
            Traced weights cannot be checked: where fewer than two of them are
            positive, the gradient is that of the one example, or zero without any,
            and the variance is zero. If `trainable` freezes everything or does not fit
            `params`. If the batch does not divide by the devices that it is spread
            over; if its leaves are spread over different axes; if `batch_sharding` is
            given together with `axis_name`, or differs from the arrays' own.
        NameError: If `axis_name` is not a mapped axis.

    Warns:
        UserWarning: If the program subtracts from a value its mean over axes of length
            one, or if a batched loss lets examples meet: signs of batch normalization
            in training mode, whose gradient by one example is silently zero. Both are
            read off the program while it is traced; neither finds every such loss.

    Edge cases:
        - None in `params` is not a leaf: it is None in gradient and variance.
        - A batched loss that is a sum, or that divides by a total over the batch (of
          mask entries, say), differs from the mean of its values on single examples,
          and only the latter is computed; `weights` expresses the division.
        - On several devices, a parameter whose gradient is the same for all examples
          may have the square of a rounding error for its variance, and not zero.
        - With `batched`, `aux` has the batch axis of length one after the stacked one.
        - A parameter that the loss does not use has gradient and variance zero.
        - Python floats are parameters; Python integers and bools are not.

    Notes:
        Squares minus the squared mean lose digits in the outer products of dense
        layers and in products per example where the examples' gradients differ by less
        than about 1e-3 of their size in float32; the difference is clamped at zero.
        The relative variance ŝ/g² is then wrong by no more than some 1e-6/|B|, which
        no variance adaptation notices. Stored gradients of up to 65 536 elements, and
        rows of a table that is an embedding only, always use deviations.

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

        On several devices, each with its own examples:

        >>> mesh = jax.sharding.Mesh(jax.devices()[:3], ("data",))
        >>> split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        >>> measure = jax.jit(value_grad_and_variance(loss, batch_sharding=split))
        >>> _, _, other = measure(params, jax.device_put(batch, split))
        >>> bool(jnp.allclose(other["w"], variance["w"]))
        True

    References:
        Balles & Hennig, "Dissecting Adam", §C.1; Chan, Golub & LeVeque (1979),
        "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    check_microbatch_size(microbatch_size)
    check_exclusive(batch_sharding, axis_name)
    settings = _Settings(
        trainable,
        regularizer,
        microbatch_size,
        two_pass,
        precision,
        axis_name,
        batch_sharding,
    )
    return functools.partial(
        _value_grad_and_variance, _Loss(loss, has_aux, batched), settings
    )


def explain_variance(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    batched: bool = False,
    trainable: Trainable = None,
) -> Callable[..., VarianceReport]:
    """How `value_grad_and_variance` computes each parameter's variance, and its cost.

    Args:
        loss: As for `value_grad_and_variance`.
        has_aux: As for `value_grad_and_variance`.
        batched: As for `value_grad_and_variance`.
        trainable: As for `value_grad_and_variance`; frozen leaves are not reported.

    Returns:
        A function of `(params, batch, *shared)` that computes nothing, so that shapes
        (`jax.ShapeDtypeStruct`) will do. It returns a list with a `VarianceRoute` for
        each trainable parameter; `routes` names what was found:

        - ``outer product``: one more matrix product;
        - ``2 outer products``: a few, with one product for each pair of them;
        - ``product per example``: gradients of a few examples at a time;
        - ``table rows``: rows that were looked up, added by example;
        - ``stored gradients``: one gradient per example, side by side;
        - ``gradients by example``: the same for a few examples at a time, after an
          operation that mixes elements;
        - ``the same for all examples``: no variance;
        - ``sum of …``: what overlaps, by products of their factors where these are
          small, else for a few examples at a time.

        In brackets stands the JAX primitive that it was found at. `operations` and
        `numbers` are estimates from the shapes of one parameter's terms. The list's
        `memory()` is exact, for all parameters together: it compiles the program and
        the plain gradient, and returns the temporary memory of both.

    Warns:
        UserWarning: If the gradients of a parameter of 65 536 elements or more are
            stored for every example.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> def loss(params, x):
        ...     return jnp.tanh(x @ params["w"]).sum()
        >>> shape = jax.ShapeDtypeStruct
        >>> params = {"w": shape((784, 100), jnp.float32)}
        >>> report = explain_variance(loss)(params, shape((128, 784), jnp.float32))
        >>> report[0].routes
        ('outer product (dot_general)',)
        >>> memory = report.memory()
        >>> memory.with_variance < memory.plain + 2 * 4 * 784 * 100
        True
    """
    return functools.partial(
        _explain_variance, _Loss(loss, has_aux, batched), trainable
    )


def _explain_variance(
    loss: _Loss, trainable: Trainable, params: PyTree, batch: PyTree, *shared: Any
) -> VarianceReport:
    """The report of `explain_variance`; arguments may be shapes."""
    size = _batch_size(batch)
    selection = select_parameters(params, trainable)
    # What the loss closes over must be arrays for it, so shapes become tracers.
    arrays, rest = _arrays_apart((selection.frozen, shared))

    plans = []

    def make_plan(arrays: list[jax.Array]) -> None:
        frozen, shared = rest.joined(arrays)
        plans.append(_plan(loss, selection, selection.trainable, frozen, batch, shared))

    jax.eval_shape(make_plan, arrays)

    def mean_loss(
        leaves: list[Any], arrays: list[jax.Array], batch: PyTree
    ) -> jax.Array:
        frozen, shared = rest.joined(arrays)
        one = functools.partial(loss.of_one, selection.full(leaves, frozen))
        values, _ = jax.vmap(lambda example: one(example, shared))(batch)
        return values.mean()

    def measured(leaves: list[Any], arrays: list[jax.Array], batch: PyTree) -> Any:
        frozen, shared = rest.joined(arrays)
        full = selection.full(leaves, frozen)
        # Examples that mix were warned of before.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _value_grad_and_variance(
                loss,
                _Settings(selection.results([True] * len(leaves), False)),
                full,
                batch,
                *shared,
            )

    def lowered() -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        arguments = (selection.trainable, arrays, batch)
        return (
            jax.jit(jax.value_and_grad(mean_loss)).lower(*arguments),
            jax.jit(measured).lower(*arguments),
        )

    routes = []
    for path, term in zip(selection.trainable_paths, plans[0].terms, strict=True):
        reasons = stored_parts(term)
        if reasons:
            warn_of_stored(path, term.size, size, reasons)
        routes.append(
            VarianceRoute(
                path,
                term.shape,
                term.routes,
                term.extra_operations(size),
                term.extra_memory(size),
            )
        )
    return VarianceReport(routes, lowered)


def _value_grad_and_variance(
    loss: _Loss,
    settings: _Settings,
    params: PyTree,
    batch: PyTree,
    *shared: Any,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[Any, PyTree, PyTree]:
    """The function that `value_grad_and_variance` returns."""
    batch = jax.tree.map(jnp.asarray, batch)
    size = _batch_size(batch)
    total = size * _mapped_parts(settings.axis_name)
    if total < 2:
        raise ValueError(
            "The variance of a gradient needs a batch of at least two examples, got "
            f"{total}. Use `jax.value_and_grad` for a single example."
        )
    if weights is not None:
        weights = checked_weights(weights, size)
    selection = select_parameters(params, settings.trainable)
    leaves = selection.trainable
    arrays, rest = _arrays_apart((selection.frozen, shared))
    examples = (batch, weights)
    spread = spread_of(examples, (leaves, arrays), settings.batch_sharding)
    measure = functools.partial(_measure, loss, selection, settings, rest)
    if spread is None:
        axis_name = settings.axis_name
        result = measure(size, axis_name, (leaves, arrays), examples)
    else:
        check_divisible(size, spread)
        axis_name = spread.axes or settings.axis_name
        on_each = functools.partial(measure, size // spread.parts, axis_name)
        given = (list(map(jnp.asarray, leaves)), arrays)
        result = run_spread(on_each, spread, given, examples)
    (value, own_value), (grads, variances), aux = result
    if settings.regularizer is not None:
        penalty = functools.partial(_penalty, settings.regularizer, selection)
        extra, extra_grads = jax.value_and_grad(penalty)(leaves)
        own_value = (value + extra).astype(own_value.dtype)
        grads = [g + e for g, e in zip(grads, extra_grads, strict=True)]
    grads = [g.astype(jnp.result_type(p)) for g, p in zip(grads, leaves, strict=True)]
    return (
        (own_value, aux) if loss.has_aux else own_value,
        selection.results(grads),
        selection.results(variances),
    )


def _measure(
    loss: _Loss,
    selection: Selection,
    settings: _Settings,
    rest: "_Rest",
    size: int,
    axis_name: Any,
    given: tuple[list[Any], list[jax.Array]],
    examples: tuple[PyTree, jax.Array | None],
) -> tuple[
    tuple[jax.Array, jax.Array], tuple[list[jax.Array], list[jax.Array]], PyTree
]:
    """Value, means and variances, and auxiliary output; of all along `axis_name`.

    The value comes twice: as it was added up, and in the dtype of the loss.
    """
    batch, weights = examples
    if weights is not None:
        weights = relative_weights(weights, axis_name)
    part = size if settings.microbatch_size is None else settings.microbatch_size
    part = min(part, size)
    merged = part < size or axis_name is not None

    def summarized(
        given: tuple[list[Any], list[jax.Array]],
        examples: tuple[PyTree, jax.Array | None],
    ) -> tuple[Summary, jax.Array, PyTree]:
        leaves, arrays = given
        batch, weights = examples
        frozen, shared = rest.joined(arrays)
        two_pass, precision = settings.two_pass, settings.precision
        plan = _plan(
            loss, selection, leaves, frozen, batch, shared, two_pass, precision
        )
        run = functools.partial(
            summarize, plan, two_pass, precision, not merged, leaves
        )
        stacks = (jax.tree.leaves(batch), weights)
        if part < size:
            summary, aux = in_microbatches(run, stacks, size, part)
        else:
            summary, aux = run(stacks)
        kind = jnp.zeros((), dtype_of(plan.value))
        return summary, kind, jax.tree.unflatten(plan.aux_tree, aux)

    summary, kind, aux = run_as_on_one_device(summarized, given, (batch, weights))
    if axis_name is not None:
        summary = merged_over_axis(summary, axis_name, size, weights is None)
    variances = summary.spreads
    if merged:
        factor = variance_factor(summary.weight, summary.squared_weight)
        variances = [s * factor.astype(s.dtype) for s in variances]
    value = summary.value
    return (value, value.astype(kind.dtype)), (summary.means, variances), aux


def _mapped_parts(axis_name: Any) -> int:
    """Number of parts that the examples have along mapped axes."""
    if axis_name is None:
        return 1
    try:
        # The sum of ones over an axis is its size, a Python number.
        parts: int = jax.lax.psum(1, axis_name)
    except NameError as error:
        raise NameError(
            f"`axis_name={axis_name!r}` must be an axis that `jax.shard_map` or "
            "`jax.vmap` maps over around this call. For a sharded batch under "
            "`jax.jit`, use `batch_sharding`."
        ) from error
    return parts


@dataclasses.dataclass(frozen=True)
class _Rest:
    """A tree without its arrays."""

    tree: Any
    leaves: list[Any]
    is_array: list[bool]

    def joined(self, arrays: list[jax.Array]) -> Any:
        """The tree with arrays in place of its own."""
        given = iter(arrays)
        pairs = zip(self.leaves, self.is_array, strict=True)
        leaves = [next(given) if known else leaf for leaf, known in pairs]
        return jax.tree.unflatten(self.tree, leaves)


def _arrays_apart(tree: PyTree) -> tuple[list[jax.Array], _Rest]:
    """The arrays of a tree, or shapes of such, and the rest, which may be anything."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    arrays = [leaf for leaf, known in zip(leaves, is_array, strict=True) if known]
    rest = [None if known else x for x, known in zip(leaves, is_array, strict=True)]
    return arrays, _Rest(structure, rest, is_array)


def _penalty(
    regularizer: Callable[[PyTree], jax.Array],
    selection: Selection,
    trainable: list[Any],
) -> jax.Array:
    """The regularizer as a function of what is trainable."""
    return regularizer(selection.full(trainable, selection.frozen))


# ---- Plan and summary --------------------------------------------------------------


def _plan(
    loss: _Loss,
    selection: Selection,
    leaves: list[Any],
    frozen: list[Any],
    batch: PyTree,
    shared: Sequence[Any],
    two_pass: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Plan:
    """The plan of one example of the batch; warns if examples meet in the loss."""
    example = jax.tree.map(_without_batch_axis, batch)

    def one(trainable: list[Any], example: PyTree) -> tuple[jax.Array, Any]:
        return loss.of_one(selection.full(trainable, frozen), example, shared)

    def whole(trainable: list[Any], batch: PyTree) -> Any:
        return loss.function(selection.full(trainable, frozen), batch, *shared)

    plan = plan_of(
        jax.value_and_grad(one, has_aux=True),
        leaves,
        example,
        two_pass=two_pass,
        precision=precision,
    )
    jaxpr = plan.program.jaxpr
    if not (loss.batched and warn_of_mixing(whole, leaves, example, jaxpr)):
        warn_of_centering(jaxpr, jaxpr.invars[plan.parameter_count :])
    return plan


def _without_batch_axis(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one example of a batch leaf."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], leaf.dtype)


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
