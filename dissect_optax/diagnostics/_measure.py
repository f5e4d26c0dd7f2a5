"""`measure`: noise, signs, factors, improvements and dominance at one point."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax import theory
from dissect_optax.diagnostics import _report
from dissect_optax.diagnostics._dominance import (
    Dominance,
    measure_dominance,
    number_of_products,
)
from dissect_optax.diagnostics._intervals import (
    UNKNOWN,
    Interval,
    bounded_interval,
    in_range,
    jackknife_covariance,
    plain_interval,
    positive_ratio_interval,
    signal_to_noise_covariance,
    square_interval,
)
from dissect_optax.diagnostics._passes import (
    BIN_EDGES,
    DIRECTIONS,
    QUANTILES,
    Elements,
    First,
    Passes,
    Second,
    build_passes,
    compiled_passes,
    empty_totals,
)
from dissect_optax.diagnostics._problem import (
    GaussNewton,
    Point,
    check_batch_size,
    check_loss,
    examples_to_compare,
    make_point,
    number_of_examples,
)
from dissect_optax.diagnostics._progress import Callback, Progress

PyTree = Any
Level = Literal["cheap", "normal", "full"]


class SignBin(NamedTuple):
    """Elements of similar predicted sign success, and how often it was counted.

    Attributes:
      low: Lower edge of the predicted success, Eq. (8), at the mean gradient.
      high: Upper edge.
      elements: Number of elements.
      predicted: Their mean predicted success; NaN without elements.
      counted: Share of (element, mini-batch) pairs whose sign agrees with that of the
        mean gradient; NaN without elements.
    """

    low: float
    high: float
    elements: int
    predicted: float
    counted: float


class _NotMeasured(dict[str, Interval]):
    """No improvements; says so to those who look one up."""

    def __missing__(self, name: str) -> Interval:
        raise KeyError(
            f'there is no improvement {name!r} at level "cheap"; measure at level '
            '"normal" or "full"'
        )


class Warned(NamedTuple):
    """A named warning.

    Attributes:
      name: What it is about, to be tested for.
      text: A sentence for the reader.
    """

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class LayerDiagnostics:
    """The quantities of `Diagnostics` for one parameter.

    Attributes:
      name: Path of the parameter.
      shape: Its shape.
      noise_scale: tr Σ/‖∇L‖² of its part of the gradient, in examples.
      relative_variance: η² of its part of the gradient: noise scale over batch size.
      sign_success: Mean probability that an element's sign is right.
      predicted_sign_success: Mean of Eq. (8) at the mean gradient.
      counted_sign_success: Agreement with the mean gradient's sign, which the former
        predicts.
      relative_variance_quantiles: η² of the elements: quantile → value.
      factor_quantiles: γ = 1/(1+η²), Eq. (14): quantile → value.
      sign_factor_quantiles: (1+η²)^(-1/2), Eq. (6): quantile → value.
      noise_dominated: Share of elements with γ < 1/2.
      unresolved: Share of elements whose mean gradient is within two standard errors.
      improvement: Its contribution to each improvement of the whole step, in the unit
        of the loss; they add up. Empty at level "cheap".
      dominance: c of Eq. (13) for its diagonal block. None below level "full".
    """

    name: str
    shape: tuple[int, ...]
    noise_scale: Interval
    relative_variance: Interval
    sign_success: Interval
    predicted_sign_success: float
    counted_sign_success: float
    relative_variance_quantiles: dict[float, float]
    factor_quantiles: dict[float, float]
    sign_factor_quantiles: dict[float, float]
    noise_dominated: float
    unresolved: float
    improvement: dict[str, Interval]
    dominance: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only, for JSON."""
        return _report.plain(self)


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """Measurements of a loss at one point; made by `measure`.

    They describe the gradient at these parameters and the next step from here. None of
    them says which method trains better.

    Attributes:
      level: "cheap", "normal" or "full".
      batch_size: B, the number of examples of a mini-batch.
      batches: K, the number of mini-batches that were measured.
      examples: Number of examples in the data.
      parameters: Number of elements that a gradient was taken by.
      loss: Mean loss over the mini-batches, regularizer included.
      noise_scale: tr Σ/‖∇L‖², in examples: the batch size at which noise and signal
        are equal. Σ is the covariance of one example's gradient.
      relative_variance: η² of the whole gradient, E‖g-∇L‖²/‖∇L‖², which is the noise
        scale over B; without unit.
      sign_success: Mean over elements of the probability that a mini-batch's gradient
        has the sign of ∇L.
      predicted_sign_success: Mean of Eq. (8), for Gaussian noise, at the mean
        gradient.
      counted_sign_success: Mean agreement with the sign of the mean gradient, which is
        what `predicted_sign_success` predicts.
      calibration: The same two by bins of the predicted success.
      noise_dominated: Share of elements with η² > 1, γ < 1/2.
      unresolved: Share of elements whose mean gradient is within two standard errors:
        their signs are not known from these mini-batches.
      improvement: I(z) of Eq. (11), the expected decrease of the loss by the next step
        along z with the best step size, in the unit of the loss, for z = "gradient",
        "sign", "adapted_gradient" and "adapted_sign". Empty at level "cheap".
      dominance: c of Eq. (13), without unit. None below level "full".
      dominance_by_cauchy: The second opinion on it.
      layers: The same for every parameter, by its path.
      warnings: Named warnings about these numbers.
    """

    level: str
    batch_size: int
    batches: int
    examples: int
    parameters: int
    loss: float
    noise_scale: Interval
    relative_variance: Interval
    sign_success: Interval
    predicted_sign_success: float
    counted_sign_success: float
    calibration: tuple[SignBin, ...]
    noise_dominated: float
    unresolved: float
    improvement: dict[str, Interval]
    dominance: Interval | None
    dominance_by_cauchy: Interval | None
    layers: dict[str, LayerDiagnostics]
    warnings: tuple[Warned, ...]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only, for JSON.

        Infinite numbers and NaN become the strings "inf", "-inf" and "nan", which JSON
        does not have as numbers.
        """
        return _report.plain(self)

    def __str__(self) -> str:
        return _report.text(self)


def measure(
    loss: Callable[..., Any],
    params: PyTree,
    data: PyTree,
    *,
    batch_size: int,
    level: Level = "cheap",
    key: jax.Array | None = None,
    max_batches: int | None = 128,
    microbatch_size: int | None = None,
    batched: bool = False,
    has_aux: bool = False,
    trainable: Any = None,
    regularizer: Callable[[PyTree], jax.Array] | None = None,
    gauss_newton: GaussNewton | None = None,
    columns: int = 64,
    cauchy_products: int = 16,
    curvature_examples: int = 128,
    progress: Callback | bool | None = None,
) -> Diagnostics:
    r"""Measure the gradient's noise, its signs, and what the next step would gain.

    With the gradient g of a mini-batch of B examples, its element-wise variance ŝ of
    Eq. (44), and K disjoint mini-batches drawn from the data::

        noise scale        tr Σ/‖∇L‖²,  tr Σ = B·mean_k tr ŝ_k,  ‖∇L‖² = mean_k g_k·ḡ₋ₖ
        relative variance  η² = s/p², Eq. (7), of the elements and of the whole gradient
        sign success       P[sign(g) = sign(∇L)], counted, and predicted by Eq. (8)
        improvement        I(z) = (∇LᵀE[z])² / (2 E[zᵀHz]), Eq. (11)
        dominance          c = Σ|q_ii| / Σ|q_ij|, Eq. (13)

    where ḡ₋ₖ is the mean gradient without mini-batch k: products with it are unbiased,
    since the noise of the two is independent. The directions z are g ("gradient"),
    sign(g) ("sign"), γ⊙g with γ = 1/(1+η²) ("adapted_gradient") and γ⊙sign(g) with
    γ = (1+η²)^(-1/2) ("adapted_sign"). The first three quantities come at level
    "cheap", the improvements at "normal", the dominance at "full".

    The data are taken as a sample: intervals say how far a number may be from that of
    endless data of this kind. **The improvements are about the next step only**: one
    step with the best step size, from here. They do not predict which method trains
    better, and neither do the other numbers; train to compare methods.

    Args:
      loss: `loss(params, example)` or `loss(params, example, key)`, a real scalar: the
        loss of one example, without batch axis. A third argument without a default is
        taken to be a random key; each example has its own, in all passes the same.
      params: θ, a tree of floating-point or complex arrays.
      data: A tree of arrays with a common leading axis of examples. Tokens of a
        sequence are correlated: there the example is the sequence. NumPy arrays stay
        on the host, and a mini-batch at a time is moved.
      batch_size: B ≥ 2, at which variance, signs and improvements are measured.
      level: "cheap" (gradients only), "normal" (and improvements) or "full" (and
        dominance). What each costs in training steps is in docs/api.md.
      key: Random key of the order of the examples and of whatever else is random; None
        takes `jax.random.key(0)`.
      max_batches: At most so many mini-batches are measured; None takes all.
      microbatch_size: Evaluate so many examples at a time, which bounds the memory of
        gradients and curvature products; the numbers are the same to rounding. What
        remains are four copies of the parameters (level "cheap"), or some fifteen.
      batched: Whether `loss` takes a batch and returns the mean over it.
      has_aux: Whether `loss` returns a pair (value, aux); aux is ignored.
      trainable: The leaves of `params` that have a gradient, as for
        `value_grad_and_variance`; None takes all.
      regularizer: `regularizer(params)`, a scalar that is added to the loss; it has no
        variance. It counts in gradient and curvature.
      gauss_newton: A pair of functions, `outputs(params, example)` and
        `loss_of_outputs(outputs, example)`, of which the loss is the composition (with
        a key: `outputs(params, example, key)`). H is then the generalized Gauss-Newton
        matrix, which is never negative along a direction if the second function is
        convex. None takes the Hessian of the loss.
      columns: Columns of H that the dominance samples, at least two from every
        parameter. With up to 256 parameters (or `columns`) all of them are taken, and
        c is exact.
      cauchy_products: Products with Cauchy vectors for the second opinion.
      curvature_examples: Examples whose H the dominance is about, the first ones in the
        random order; the interval says how far the sample of columns may be off, for
        these examples. (The improvements take H from every mini-batch.)
      progress: A function of (steps done, steps in all); None draws a bar on a terminal
        after three seconds if Rich is installed, True anywhere, False never.

    Returns:
      A `Diagnostics`; `print` shows it in 80 columns.

    Raises:
      ValueError: If leaves of the data disagree on their length or are scalars; if
        there are fewer than `batch_size` examples; if parameters, the loss or its
        gradient are not finite; for values of other arguments outside their range.
      TypeError: If a parameter is not floating-point or complex; if the loss is not a
        real scalar, or is that of a batch without `batched=True`.

    Edge cases:
      * One or two mini-batches: values, where they exist, with unbounded intervals.
      * ‖∇L‖² estimated at or below zero: the noise scale is infinite, and its interval
        has a lower end only.
      * Elements that have no gradient in any mini-batch do not count among signs and
        quantiles.
      * Signs that the mini-batches do not determine: the interval of the sign success
        reaches from the agreement with the other mini-batches, which is too low, to
        that with all of them, which is too high, and its value is in the middle.
      * z·Hz not positive on average: the improvement is infinite, and a warning says
        so; with fewer than six mini-batches the adapted directions have no interval,
        with fewer than three no direction has one.
      * A gradient that is zero: all ratios to it are infinite.
      * A complex parameter counts as its real and its imaginary part, along a first
        axis of length two.

    Notes:
      The interval of the noise scale is Fieller's (1954), with the variance of ‖∇L‖²
      taken as it would be at the tested ratio; that of an improvement is Student's on
      the scale of its root. A plain jackknife interval of the ratio itself covers too
      little. Measured coverage: benchmarks/README.

    Examples:
      A stochastic quadratic, whose noise scale is known:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import dissect_optax as do
      >>> def loss(params, x):
      ...     return 0.5 * jnp.sum((params - x) ** 2)
      >>> data = 2.0 * jax.random.normal(jax.random.key(1), (1024, 8))
      >>> d = do.diagnostics.measure(loss, jnp.ones(8), data, batch_size=32)
      >>> d.noise_scale.low < 2.0**2 * 8 / 8 < d.noise_scale.high
      True
      >>> bool(jnp.isclose(d.relative_variance.value, d.noise_scale.value / 32))
      True

    References:
      Balles & Hennig, "Dissecting Adam", §1.4, §2.1, §C.1. McCandlish et al. (2018),
      "An empirical model of large-batch training". Fieller (1954), "Some problems in
      interval estimation". Imbens & Manski (2004), "Confidence intervals for partially
      identified parameters". Xie, Mohamadi & Li (2025), "Adam exploits ℓ∞-geometry of
      loss landscape via coordinate-wise adaptivity". Li, Hastie & Church (2007),
      "Nonlinear estimators and tail bounds for dimension reduction in ℓ1 using Cauchy
      random projections".
    """
    if level not in get_args(Level):
        raise ValueError(
            f"`level` must be one of {', '.join(get_args(Level))}, got {level!r}."
        )
    for name, number, least in (
        ("max_batches", max_batches, 1),
        ("microbatch_size", microbatch_size, 1),
        ("columns", columns, 1),
        ("cauchy_products", cauchy_products, 1),
        ("curvature_examples", curvature_examples, 1),
    ):
        _check_count(name, number, least)
    examples = number_of_examples(data)
    check_batch_size(batch_size, examples)
    point = make_point(
        loss,
        params,
        trainable=trainable,
        regularizer=regularizer,
        gauss_newton=gauss_newton,
        has_aux=has_aux,
        batched=batched,
        microbatch_size=microbatch_size,
    )
    key = jax.random.key(0) if key is None else key
    order_key, example_key, column_key = jax.random.split(key, 3)
    count = examples // batch_size
    if max_batches is not None:
        count = min(count, max_batches)
    if point.loss.takes_key:
        data = (data, jax.random.split(example_key, examples))
    order = np.asarray(jax.random.permutation(order_key, examples))
    take = functools.partial(_examples, *_by_place(data), order)

    check_loss(point, take(0, examples_to_compare(examples)))
    improvements = level != "cheap"
    try:
        passes = compiled_passes(point.loss, improvements)
    except TypeError:  # Something in it cannot be hashed.
        passes = build_passes(point.loss, improvements)

    sizes = [math.prod(shape) for shape in point.shapes]
    steps = 2 * count
    if level == "full":
        steps += number_of_products(sizes, columns, cauchy_products)
    dominance = None
    with Progress(steps, progress) as shown:
        numbers = _run(passes, point, take, batch_size, count, improvements, shown)
        if level == "full":
            dominance = measure_dominance(
                passes,
                point,
                take(0, min(curvature_examples, examples)),
                column_key,
                columns=columns,
                products=cauchy_products,
                progress=shown,
            )
    return _diagnostics(
        point, level, batch_size, examples, numbers, dominance, improvements
    )


def _check_count(name: str, value: Any, least: int) -> None:
    """Reject what is not an integer of at least `least`, or None where that is fine."""
    if value is None and name in ("max_batches", "microbatch_size"):
        return
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}, got {value!r}."
        )


def _by_place(data: PyTree) -> tuple[Any, list[Any], list[Any]]:
    """Structure of the data, and its leaves on the device and on the host."""
    leaves, tree = jax.tree.flatten(data)
    on_device = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]
    on_host = [
        None if isinstance(leaf, jax.Array) else np.asarray(leaf) for leaf in leaves
    ]
    return tree, on_device, on_host


def _examples(
    tree: Any,
    on_device: list[Any],
    on_host: list[Any],
    order: np.ndarray,
    start: int,
    size: int,
) -> PyTree:
    """Examples in the random order; what lies on the host is moved in parts."""
    chosen = order[start : start + size]
    leaves = [
        jnp.asarray(host[chosen]) if host is not None else device
        for host, device in zip(on_host, _gather(on_device, chosen), strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


_gather = jax.jit(
    lambda leaves, chosen: [x if x is None else x[chosen] for x in leaves]
)


# ---- From mini-batches to numbers --------------------------------------------------


class _Numbers(NamedTuple):
    """What the passes leave, as NumPy arrays with a leading axis of mini-batches."""

    first: First
    second: Second
    elements: Elements
    groups: np.ndarray


def _run(
    passes: Passes,
    point: Point,
    take: Callable[[int, int], PyTree],
    batch_size: int,
    count: int,
    improvements: bool,
    progress: Progress,
) -> _Numbers:
    """Both passes over all mini-batches."""
    totals = empty_totals(point.leaves, improvements)
    before = [x[0] for x in empty_totals(point.leaves, False).mean]

    def batch(number: int) -> PyTree:
        return take((number % count) * batch_size, batch_size)

    firsts: list[First] = []
    for number in range(count):
        totals, first = passes.first(
            totals, point.leaves, point.frozen, batch(number), np.int32(number)
        )
        firsts.append(first)
        # The one before, so that the next one is prepared meanwhile.
        jax.block_until_ready(firsts[max(number - 1, 0)])
        if number == 0:
            _check_finite(point, first, totals.variance)
        progress.advance()
    overall = passes.overall(totals)
    elements = passes.elements(overall)
    seconds: list[Second] = []
    current = batch(0)
    for number in range(count):
        following = batch(number + 1) if improvements else None
        before, second = passes.second(
            totals,
            overall,
            before,
            point.leaves,
            point.frozen,
            current,
            following,
            np.int32(number),
        )
        current = following if improvements else batch(number + 1)
        seconds.append(second)
        jax.block_until_ready(seconds[max(number - 1, 0)])
        progress.advance()
    first, second = (_stacked(x) for x in (firsts, seconds))
    for number, value in enumerate(first.loss):
        if not np.isfinite(value) or not np.isfinite(first.noise[number]).all():
            _raise_not_finite(point, number, value, first.noise[number])
    return _Numbers(
        first,
        second,
        jax.tree.map(lambda x: np.asarray(x, float), elements),
        np.arange(count) % (2 if improvements else 1),
    )


def _stacked(rows: list[Any]) -> Any:
    """Named tuples of small arrays as one, in float64."""
    host = jax.device_get(rows)
    return jax.tree.map(lambda *x: np.stack(x).astype(float), *host)


def _check_finite(point: Point, first: First, variance: list[jax.Array]) -> None:
    """Raise early if the first mini-batch is not finite."""
    del variance
    noise = np.asarray(first.noise)
    if not (np.isfinite(first.loss) and np.isfinite(noise).all()):
        _raise_not_finite(point, 0, float(first.loss), noise)


def _raise_not_finite(
    point: Point, number: int, value: float, noise: np.ndarray
) -> None:
    """Say where NaN or infinity came from."""
    if not np.isfinite(value):
        raise ValueError(
            f"The loss of mini-batch {number} is {value} at these parameters. Look for "
            "NaN in the data, a logarithm or division by zero in the loss, or "
            "parameters that diverged."
        )
    wrong = [n for n, s in zip(point.names, noise, strict=True) if not np.isfinite(s)]
    raise ValueError(
        f"The loss of mini-batch {number} is finite, but its gradient is not, or "
        f"overflows when squared, by {', '.join(wrong)}. Look for a square root or a "
        "norm at zero, or rescale the loss."
    )


# ---- From numbers to intervals -----------------------------------------------------


def _diagnostics(
    point: Point,
    level: str,
    batch_size: int,
    examples: int,
    numbers: _Numbers,
    dominance: Dominance | None,
    improvements: bool,
) -> Diagnostics:
    """Everything that is reported."""
    first, second, elements, groups = numbers
    count, leaves = first.noise.shape
    improvement: dict[str, Interval] = _NotMeasured()
    by_layer: dict[str, list[Interval]] = {}
    if improvements:
        improvement, by_layer = _improvements(second, groups)
    layers = {}
    for i, name in enumerate(point.names):
        factor = dict(zip(QUANTILES, elements.factor[i].tolist(), strict=True))
        active = elements.active[i]
        noise_scale = _noise_scale(numbers, [i], batch_size)
        layers[name] = LayerDiagnostics(
            name=name,
            shape=point.shapes[i],
            noise_scale=noise_scale,
            relative_variance=_divided(noise_scale, batch_size),
            sign_success=_sign_success(second, active, [i]),
            predicted_sign_success=_ratio(elements.success[i], active),
            counted_sign_success=_ratio(second.agree_with_all[:, i].mean(), active),
            # The order of η² is the reverse of that of γ.
            relative_variance_quantiles={
                q: _relative_variance(factor[round(1 - q, 9)]) for q in QUANTILES
            },
            factor_quantiles=factor,
            sign_factor_quantiles={q: math.sqrt(f) for q, f in factor.items()},
            noise_dominated=float(elements.below_half[i]) if active else math.nan,
            unresolved=float(elements.unresolved[i]) if active else math.nan,
            improvement={z: by_layer[z][i] for z in DIRECTIONS}
            if by_layer
            else _NotMeasured(),
            dominance=None if dominance is None else dominance.layers[i],
        )
    everything = list(range(leaves))
    active = elements.active.sum()
    noise_scale = _noise_scale(numbers, everything, batch_size)
    share = elements.active / max(active, 1)
    unresolved = float(np.sum(share * elements.unresolved))
    return Diagnostics(
        level=level,
        batch_size=int(batch_size),
        batches=count,
        examples=examples,
        parameters=sum(math.prod(shape) for shape in point.shapes),
        loss=float(first.loss.mean()),
        noise_scale=noise_scale,
        relative_variance=_divided(noise_scale, batch_size),
        sign_success=_sign_success(second, active, everything),
        predicted_sign_success=_ratio(elements.success.sum(), active),
        counted_sign_success=_ratio(second.agree_with_all.sum(axis=1).mean(), active),
        calibration=_calibration(second, elements),
        noise_dominated=float(np.sum(share * elements.below_half)),
        unresolved=unresolved,
        improvement=improvement,
        dominance=None if dominance is None else dominance.overall,
        dominance_by_cauchy=None if dominance is None else dominance.cauchy,
        layers=layers,
        warnings=tuple(
            _warnings(count, noise_scale, unresolved, improvement, second, dominance)
        ),
    )


def _divided(interval: Interval, divisor: float) -> Interval:
    return Interval(*(end / divisor for end in interval))


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def _relative_variance(factor: float) -> float:
    """η² from γ = 1/(1+η²)."""
    return 1 / factor - 1 if factor > 0 else math.inf if factor == 0 else math.nan


def _noise_scale(numbers: _Numbers, leaves: list[int], batch_size: int) -> Interval:
    """Noise scale tr Σ/‖∇L‖² of some leaves."""
    noise = numbers.first.noise[:, leaves].sum(axis=1)
    between = numbers.second.ahead[:, 0][:, leaves].sum(axis=1)
    count = len(noise)
    total = batch_size * float(noise.mean())
    if count == 1:
        # ‖g‖² - tr ŝ; `between` is g·g where there is nothing to leave out.
        signal = float(between[0] - noise[0])
        value = total / signal if signal > 0 else math.inf
        return Interval(value, 0.0, math.inf)
    signal, replicates = _pair_mean(between, between, np.zeros(count, int))
    if replicates is None:
        return Interval(total / signal if signal > 0 else math.inf, 0.0, math.inf)
    without = batch_size * (noise.sum() - noise) / (count - 1)
    covariance = jackknife_covariance(np.stack([without, replicates], axis=1))
    neighbours = numbers.second.neighbours[1:, leaves].sum(axis=1)
    covariance = signal_to_noise_covariance(
        covariance, total, float(noise.mean()), signal, between, neighbours
    )
    return positive_ratio_interval(total, signal, covariance, count - 1)


def _pair_mean(
    ahead: np.ndarray, behind: np.ndarray, groups: np.ndarray
) -> tuple[float, np.ndarray | None]:
    """Mean of z_k·g_l over pairs k ≠ l of one group, and its jackknife replicates.

    Args:
      ahead: z_k·ḡ₋ₖ, of shape [K].
      behind: g_k·z̄₋ₖ, of shape [K].
      groups: The group of each mini-batch, of shape [K].

    Returns:
      The mean, and what it would be without each mini-batch, of shape [K]; None where
      a group has fewer than three members.
    """
    count = len(ahead)
    sizes = np.bincount(groups)
    means = np.bincount(groups, ahead) / sizes
    value = float(means @ sizes / count)
    if np.min(sizes) < 3:
        return value, None
    n = sizes[groups]
    # From n(n-1) ordered pairs those with k on either side are taken out.
    without = (n * means[groups] - ahead - behind) / (n - 2)
    replicates = (means @ sizes - n * means[groups] + (n - 1) * without) / (count - 1)
    return value, replicates


def _sign_success(second: Second, active: float, leaves: list[int]) -> Interval:
    """Success between the agreement with the others and the agreement with all."""
    if not active > 0:
        return Interval(math.nan, 0.0, 1.0)
    upper = second.agree_with_all[:, leaves].sum(axis=1) / active
    lower = second.agree_with_others[:, leaves].sum(axis=1) / active
    count = len(upper)
    if count < 3:
        value = (float(upper.mean()) + 0.5) / 2
        return Interval(value, 0.0, 1.0)
    lower_error, upper_error = (
        float(x.std(ddof=1)) / math.sqrt(count) for x in (lower, upper)
    )
    interval = bounded_interval(
        float(lower.mean()), float(upper.mean()), lower_error, upper_error, count - 1
    )
    return in_range(interval, 0.0, 1.0)


def _calibration(second: Second, elements: Elements) -> tuple[SignBin, ...]:
    """Predicted and counted success by bins of the former."""
    # Numbers above the inner edges, with those above the outer ones around them.
    size = np.concatenate([[elements.active.sum()], elements.above, [0]])
    predicted = np.concatenate([[elements.success.sum()], elements.success_above, [0]])
    agree = second.agree_with_all.sum(axis=1).mean()
    counted = np.concatenate([[agree], second.agree_above.mean(axis=0), [0]])
    size, predicted, counted = (x[:-1] - x[1:] for x in (size, predicted, counted))
    return tuple(
        SignBin(low, high, round(n), _ratio(p, n), _ratio(c, n))
        for low, high, n, p, c in zip(
            BIN_EDGES[:-1], BIN_EDGES[1:], size, predicted, counted, strict=True
        )
    )


def _improvements(
    second: Second, groups: np.ndarray
) -> tuple[dict[str, Interval], dict[str, list[Interval]]]:
    """I(z) for every direction, and what every parameter contributes to it."""
    overall, by_layer = {}, {}
    for number, direction in enumerate(DIRECTIONS):
        adapted = direction.startswith("adapted")
        overall[direction], by_layer[direction] = _improvement(
            second.ahead[:, number],
            second.behind[:, number],
            second.curvature[:, number],
            groups if adapted else np.zeros_like(groups),
        )
    return overall, by_layer


def _improvement(
    ahead: np.ndarray, behind: np.ndarray, curvature: np.ndarray, groups: np.ndarray
) -> tuple[Interval, list[Interval]]:
    """Improvement with its interval, and the contributions of the leaves.

    With the best step size α = num/den, a leaf contributes α num_l - α²/2 den_l.

    Args:
      ahead: z·ḡ, of shape [K, leaves].
      behind: g·z̄, likewise.
      curvature: z·Hz, likewise, with H from the mini-batch that follows.
      groups: Groups of mini-batches, of shape [K].
    """
    count, leaves = ahead.shape
    unknown = [Interval(math.nan, -math.inf, math.inf)] * leaves
    if count < 2 or np.min(np.bincount(groups)) < 2:
        return UNKNOWN, unknown
    pairs = [_pair_mean(a, b, groups) for a, b in zip(ahead.T, behind.T, strict=True)]
    slopes = np.asarray([value for value, _ in pairs])
    dens = curvature.mean(axis=0)
    if not dens.sum() > 0:
        return Interval(math.inf, 0.0, math.inf), unknown
    root = _roots_of_improvements(slopes.sum(), dens.sum())
    value = max(float(root[0]), 0.0) ** 2
    step = slopes.sum() / dens.sum()
    parts = step * slopes - step**2 / 2 * dens
    if any(replicates is None for _, replicates in pairs):
        unbounded = [Interval(float(p), -math.inf, math.inf) for p in parts]
        return Interval(value, 0.0, math.inf), unbounded
    slopes_without = np.stack([r for _, r in pairs if r is not None], axis=1)
    dens_without = (count * dens - curvature) / (count - 1)
    # Without the curvature that a mini-batch lends to the one before it. In a network
    # a mini-batch with a large gradient has a large curvature as well, and the two
    # errors cancel in part.
    dens_unlent = np.roll(dens_without, 1, axis=0)
    if not (dens_without.sum(axis=1) > 0).all():
        unbounded = [Interval(float(p), -math.inf, math.inf) for p in parts]
        return Interval(value, 0.0, math.inf), unbounded
    roots, parts_without = _improvements_of(slopes_without, dens_without)
    unlent_roots, unlent_parts = _improvements_of(
        np.broadcast_to(slopes, dens_unlent.shape), dens_unlent
    )
    contributions = [
        plain_interval(float(p), replicates, -math.inf, math.inf, lent)
        for p, replicates, lent in zip(
            parts, parts_without.T, unlent_parts.T, strict=True
        )
    ]
    return square_interval(float(root[0]), roots, unlent_roots), contributions


def _improvements_of(
    slopes: np.ndarray, dens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Roots of the improvements and contributions of the leaves, of [K, leaves]."""
    slope, den = slopes.sum(axis=1), dens.sum(axis=1)
    step = (slope / den)[:, None]
    return _roots_of_improvements(slope, den), step * slopes - step**2 / 2 * dens


def _roots_of_improvements(slope: Any, curvature: Any) -> np.ndarray:
    """Roots of I(z), Eq. (11), with the signs of the slopes.

    Of ∇LᵀE[z] and E[zᵀHz], both of any length. The quadratic along a direction has one
    dimension, in which the direction is one.
    """
    slopes, curvatures = (np.atleast_1d(x)[:, None] for x in (slope, curvature))
    along = theory.Direction(jnp.ones(1), jnp.ones((1, 1)))
    values = _improvement_along(
        along, jnp.asarray(slopes), jnp.asarray(curvatures[:, :, None])
    )
    return np.sign(slopes[:, 0]) * np.sqrt(np.asarray(values, float))


_improvement_along = jax.jit(
    jax.vmap(theory.expected_improvement, in_axes=(None, 0, 0))
)


def _warnings(
    count: int,
    noise_scale: Interval,
    unresolved: float,
    improvement: dict[str, Interval],
    second: Second,
    dominance: Dominance | None,
) -> list[Warned]:
    """Named warnings about the numbers."""
    found = []
    if count < 8:
        found.append(
            Warned(
                "FewBatches",
                f"Measured on {count} mini-batch{'es' if count > 1 else ''} only: the "
                "intervals are wide or unbounded. Pass more data.",
            )
        )
    elif math.isinf(noise_scale.high):
        found.append(
            Warned(
                "GradientNotResolved",
                "The gradient cannot be told from zero with these mini-batches, so "
                "that the noise scale has no upper end. Pass more data.",
            )
        )
    if unresolved > 0.25:
        found.append(
            Warned(
                "SignsNotResolved",
                f"{100 * unresolved:.0f} % of the elements have a mean gradient within "
                "two standard errors of zero: their signs are not known, and the "
                "interval of the sign success allows for it.",
            )
        )
    if improvement:
        curvature = second.curvature.sum(axis=2).mean(axis=0)
        flat = [z for z, h in zip(DIRECTIONS, curvature, strict=True) if not h > 0]
        if flat:
            found.append(
                Warned(
                    "NegativeCurvature",
                    "The loss does not curve upwards along "
                    f"{', '.join(flat)}: the quadratic has no minimum there, and the "
                    "improvement is no number. Use `gauss_newton`.",
                )
            )
    if dominance is not None and dominance.disagree:
        found.append(
            Warned(
                "EstimatorsDisagree",
                "Columns and Cauchy products disagree on the diagonal dominance "
                f"({dominance.overall.value:.2g} and {dominance.cauchy.value:.2g}): a "
                "few columns are much larger than the others. Use more `columns` and "
                "`cauchy_products`.",
            )
        )
    return found
