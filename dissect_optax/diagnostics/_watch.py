"""`watch` and `scalars`: a few numbers about gradient noise that are always on.

The summaries are those of a fixed random sample of the elements, so that they cost next
to nothing beside a step, and so that the averages that plain gradients need are small.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dissect_optax import _formulas, theory
from dissect_optax._checks import check_state, checked_decay
from dissect_optax._estimate import Estimate, is_none
from dissect_optax._precision import accumulation_dtype, dtype_of, real_dtype
from dissect_optax._sources import MovingAverageEstimateState, moving_average_estimate

# A small parameter is watched by so many elements, whatever its share in the sample.
_LEAST_PER_LEAF = 16
# Not NaN, which `jax_debug_nans` would take for an error.
_UNKNOWN = -1.0
_QUANTITIES = ("relative_variance", "factor", "sign_success")


class WatchState(NamedTuple):
    """State of `watch`.

    The arrays over leaves have the shape [leaves], in the order of the parameters, and
    hold -1 where nothing has been seen yet.

    Attributes:
      count: int32, the number of updates seen. Hides tuple.count, as Optax's states do.
      relative_variance: Median of η² over the sampled elements of every parameter.
      factor: Mean of γ = 1/(1+η²) over them, Eq. (14).
      sign_success: Mean of the success probability ρ over them, Eq. (8).
      sizes: Number of elements of every parameter, the weights of the overall numbers.
      averages: Moving averages of the sampled gradients, unused if an `Estimate`
        passes.
      names: Paths of the parameters, in UTF-8, each with a newline at its end: numbers,
        as whatever maps a function over states expects.
    """

    count: jax.Array  # type: ignore[assignment]
    relative_variance: jax.Array
    factor: jax.Array
    sign_success: jax.Array
    sizes: jax.Array
    averages: MovingAverageEstimateState
    names: jax.Array


def watch(
    decay: jax.typing.ArrayLike = 0.99, *, sample: int = 8192
) -> optax.GradientTransformationExtraArgs:
    """Passes updates on unchanged, and keeps summaries of their noise in its state.

    Of an `Estimate` (p̂, s) that passes, it reads what the rest of the chain sees, for
    every parameter and for a sample of its elements::

        relative variance  η² = s/p̂², Eq. (7), the median
        factor             γ = 1/(1+η²), Eq. (14), the mean
        sign success       ρ = 1/2 + 1/2 erf(1/(√2 η)), Eq. (8), the mean

    Of plain gradients it keeps moving averages of its own, of the sampled elements
    only, with the variance made unbiased as by `moving_average_estimate(decay,
    debias_variance=True)`. The sample is random and the same in every step; where
    there are no more than `sample` elements in all, it is all of them.

    Args:
      decay: Decay of the averages of plain gradients, in [0, 1). Their η² cannot
        exceed about (1+β)/(1-β), 199 at 0.99, since the mean itself is noisy: what
        lies near that is "at least". Not used if an `Estimate` passes.
      sample: About how many elements are watched in all, in proportion to the sizes of
        the parameters, at least 16 (or all) of each. 8192 give the overall means to
        ± 0.005.

    Returns:
      A transformation that may stand anywhere in a chain: before an optimizer it sees
      gradients, after `moving_average_estimate` or another source the `Estimate`. Its
      state is a `WatchState`, of the same structure, shapes and dtypes from `init` on;
      `scalars` reads it.

    Raises:
      ValueError: If the decay is outside [0, 1), or `sample` is below one.
      TypeError: From `update`, if the state is that of another transformation.

    Edge cases:
      * Before the first update, and on plain gradients before the second, `scalars`
        returns NaN: no variance has been seen.
      * Elements without a direction (zero, or below 1.1e-19 in float32) count as
        η² = 0 with ρ = 1/2 and γ = 0: nothing is certain about them, and they move
        nothing.
      * A negative variance, as two decays give, counts as zero.
      * A parameter whose gradient is None keeps its numbers; one that
        `optax.masked` hides does not appear.
      * After other transformations it sees what they return: updates, not gradients.
      * Complex gradients: η² of the complex number, and ρ of a real one with that η².

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import dissect_optax as do
      >>> tx = optax.chain(do.diagnostics.watch(), do.adam(1e-3))
      >>> params = {"w": jnp.zeros(100)}
      >>> def step(state, key):
      ...     gradient = {"w": 1.0 + jax.random.normal(key, (100,))}
      ...     return tx.update(gradient, state, params)[1], None
      >>> keys = jax.random.split(jax.random.key(0), 300)
      >>> state, _ = jax.lax.scan(step, tx.init(params), keys)
      >>> numbers = do.diagnostics.scalars(state)
      >>> 0.8 < numbers["relative_variance/w"] < 1.2
      True
      >>> abs(numbers["sign_success"] - 0.841) < 0.02
      True

    References:
      Balles & Hennig, "Dissecting Adam", §1.4, §3.
    """
    decay = checked_decay("decay", decay)
    integer = isinstance(sample, int | np.integer) and not isinstance(sample, bool)
    if not integer or sample < 1:
        raise ValueError(
            f"`sample` must be an integer of at least 1, got {sample!r}. It is the "
            "number of elements that are watched."
        )
    own = moving_average_estimate(decay, debias_variance=True)

    def init_fn(params: optax.Params) -> WatchState:
        with_paths = jax.tree_util.tree_leaves_with_path(params)
        leaves = [leaf for _, leaf in with_paths]
        names = [
            jax.tree_util.keystr(path, simple=True, separator="/") or "params"
            for path, _ in with_paths
        ]
        dtype = _common_dtype(leaves)
        real = real_dtype(dtype)
        watched = sum(map(len, _sampled_elements(_shapes(leaves), sample)))

        def unknown() -> jax.Array:
            """An array of its own each time, since states are donated."""
            return jnp.full(len(leaves), _UNKNOWN, real)

        text = "".join(name.replace("\n", " ") + "\n" for name in names)
        return WatchState(
            jnp.zeros([], jnp.int32),
            unknown(),
            unknown(),
            unknown(),
            jnp.asarray([math.prod(shape) for shape in _shapes(leaves)], real),
            own.init(jnp.zeros(watched, dtype)),
            jnp.asarray(np.frombuffer(text.encode(), np.uint8)),
        )

    def update_fn(
        updates: optax.Updates | Estimate,
        state: WatchState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates | Estimate, WatchState]:
        del extra_args
        check_state("watch", state, WatchState)
        tree = updates.mean if isinstance(updates, Estimate) else updates
        leaves = _leaves_like(params, tree, len(state.factor))
        present = [leaf is not None for leaf in leaves]
        shapes = _shapes(leaves)
        if None in shapes:
            shapes = _shapes_of_missing(shapes, params)
        elements = _sampled_elements(tuple(shapes), sample)
        dtype = state.averages.mean.dtype
        seen = np.repeat(present, [len(e) for e in elements])
        mean = _gathered(leaves, elements, dtype)
        count = optax.safe_increment(state.count)
        averages = state.averages
        if isinstance(updates, Estimate):
            variances = _leaves_like(params, updates.variance, len(leaves))
            variance = _gathered(variances, elements, real_dtype(dtype))
            known = jnp.asarray(True)
        else:
            estimate, new = own.update(mean, averages)
            averages = MovingAverageEstimateState(
                new.count,
                jnp.where(seen, new.mean, averages.mean),
                jnp.where(seen, new.variance, averages.variance),
            )
            mean, variance = estimate.mean, estimate.variance
            known = count > 1
        summaries = _summaries(mean, variance, tuple(len(e) for e in elements))
        changes = jnp.asarray(present) & known
        before = (state.relative_variance, state.factor, state.sign_success)
        relative_variance, factor, success = (
            jnp.where(changes, new.astype(old.dtype), old)
            for new, old in zip(summaries, before, strict=True)
        )
        new_state = WatchState(
            count,
            relative_variance,
            factor,
            success,
            state.sizes,
            averages,
            state.names,
        )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _common_dtype(leaves: list[Any]) -> jnp.dtype:
    """One dtype for all sampled elements: complex or double if a leaf is."""
    dtypes = [accumulation_dtype(dtype_of(leaf), None) for leaf in leaves]
    with jax.numpy_dtype_promotion("standard"):
        common = jnp.dtype(jnp.float32)
        for dtype in dtypes:
            common = jnp.promote_types(common, dtype)
    return common


def _shapes(leaves: list[Any]) -> Any:
    return tuple(None if leaf is None else jnp.shape(leaf) for leaf in leaves)


def _leaves_like(params: optax.Params | None, tree: Any, count: int) -> list[Any]:
    """The `count` leaves of a tree, None for parameters that have none there."""
    for leaves in (jax.tree.leaves(tree), jax.tree.leaves(tree, is_leaf=is_none)):
        # None may stand for a parameter that has none, or for a missing gradient.
        if len(leaves) == count:
            return leaves
    if params is not None:
        treedef: Any = jax.tree.structure(params)
        try:
            leaves = treedef.flatten_up_to(tree)
        except ValueError:
            leaves = []
        if len(leaves) == count:
            return [
                leaf if jax.tree_util.all_leaves([leaf]) else None for leaf in leaves
            ]
    raise ValueError(
        "`watch` got updates of another structure than the parameters that its state "
        f"was made for: {len(jax.tree.leaves(tree))} leaves, expected {count}. Make "
        "the state with `init` of the same parameters."
    )


def _shapes_of_missing(shapes: Any, params: optax.Params | None) -> Any:
    """Shapes with those of missing gradients taken from the parameters."""
    known = jax.tree.leaves(params, is_leaf=is_none)
    if len(known) != len(shapes):
        raise ValueError(
            "`watch` needs the parameters where a gradient is None: call "
            "update(gradients, state, params)."
        )
    return tuple(
        jnp.shape(p) if shape is None else shape
        for p, shape in zip(known, shapes, strict=True)
    )


@functools.lru_cache(maxsize=256)
def _sampled_elements(
    shapes: tuple[tuple[int, ...], ...], sample: int
) -> tuple[np.ndarray, ...]:
    """Flat indices of the watched elements of every leaf; constants of the program.

    They are random, since evenly spaced ones may all lie in one column of a matrix.
    """
    sizes = [math.prod(shape) for shape in shapes]
    share = min(sample / max(sum(sizes), 1), 1.0)
    random = np.random.default_rng(0)
    chosen = []
    for size in sizes:
        count = min(size, max(_LEAST_PER_LEAF, round(share * size)))
        if count == size:
            chosen.append(np.arange(size))
            continue
        # With replacement and without duplicates: a permutation of 2e7 takes seconds.
        indices = np.unique(random.integers(0, size, 2 * count))
        while len(indices) < count:
            more = random.integers(0, size, 2 * count)
            indices = np.unique(np.concatenate([indices, more]))
        chosen.append(np.sort(random.choice(indices, count, replace=False)))
    return tuple(chosen)


def _gathered(
    leaves: list[Any], elements: tuple[np.ndarray, ...], dtype: jnp.dtype
) -> jax.Array:
    """The watched elements of all leaves as one vector; zeros for missing leaves."""
    parts = [jnp.zeros(0, dtype)]
    for leaf, chosen in zip(leaves, elements, strict=True):
        if leaf is None:
            parts.append(jnp.zeros(len(chosen), dtype))
            continue
        leaf = jnp.asarray(leaf)
        if leaf.dtype == jax.dtypes.float0:
            parts.append(jnp.zeros(len(chosen), dtype))
        elif len(chosen) == leaf.size:
            parts.append(leaf.reshape(-1).astype(dtype))
        else:
            # By all axes: flattened first, a sharded array would be collected.
            index = np.unravel_index(chosen, leaf.shape)
            parts.append(leaf[tuple(i.astype(np.int32) for i in index)].astype(dtype))
    return jnp.concatenate(parts)


# Compiled as one also where the optimizer is not.
@functools.partial(jax.jit, static_argnums=2)
def _summaries(
    mean: jax.Array, variance: jax.Array, counts: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Median η², mean γ and mean ρ of consecutive parts of two vectors."""
    variance = jnp.maximum(variance, 0)
    eta2 = _formulas.relative_variance(mean, variance)
    absent = _formulas.is_no_direction(mean)
    magnitude = jnp.where(absent, jnp.zeros((), eta2.dtype), jnp.abs(mean))
    deviation = jnp.sqrt(variance)
    factor = jnp.where(absent, 0.0, theory.optimal_factor(magnitude, deviation))
    success = jnp.where(absent, 0.5, theory.success_probability(magnitude, deviation))
    part = np.repeat(np.arange(len(counts)), counts)
    number = jnp.asarray(np.maximum(counts, 1), eta2.dtype)

    def means(values: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(values, part, len(counts), indices_are_sorted=True)
        return sums / number

    # Sorted within each part, the medians lie in places that are known.
    _, ordered = jax.lax.sort((jnp.asarray(part), eta2), num_keys=2)
    starts = np.cumsum(counts) - counts
    last = max(sum(counts) - 1, 0)
    low, high = (
        jnp.asarray(np.clip(starts + (np.asarray(counts) - back) // 2, 0, last))
        for back in (1, 0)
    )
    if not counts or not sum(counts):
        nothing = jnp.full(len(counts), _UNKNOWN, eta2.dtype)
        return nothing, nothing, nothing
    # Not the mean of an infinite and a finite one: the lower one then.
    lower, upper = ordered[low], ordered[high]
    median = jnp.where(jnp.isinf(upper), lower, 0.5 * (lower + upper))
    empty = jnp.asarray(np.asarray(counts) == 0)
    columns = (median, means(factor), means(success))
    first, second, third = (jnp.where(empty, _UNKNOWN, column) for column in columns)
    return first, second, third


def scalars(opt_state: optax.OptState) -> dict[str, float]:
    """The numbers of every `watch` in an optimizer state, for any logger.

    Args:
      opt_state: A state that holds a `WatchState`, however deep: of a chain, of
        `optax.MultiSteps`, `optax.inject_hyperparams`, `optax.masked`, of Flax.

    Returns:
      A flat dictionary of Python floats: "relative_variance", "factor", "sign_success"
      over all parameters, and "relative_variance/PATH" and so on for each of them. The
      overall factor and success are means over elements, the overall relative variance
      is the median of those of the parameters, weighted by their sizes. With several
      watches the keys of the second one begin with "watch_1/", and so on.

    Raises:
      ValueError: If there is no `WatchState`, or the state is one of a vmapped group.
      TypeError: Under `jax.jit`, where there are no numbers yet.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax as do
      >>> tx = do.diagnostics.watch()
      >>> list(do.diagnostics.scalars(tx.init(jnp.zeros(3))))[:3]
      ['relative_variance', 'factor', 'sign_success']
    """

    def is_watch(node: Any) -> bool:
        return isinstance(node, WatchState)

    watches = [
        leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_watch) if is_watch(leaf)
    ]
    if not watches:
        raise ValueError(
            "`scalars` found no state of `watch` in a "
            f"{type(opt_state).__name__}. Put dissect_optax.diagnostics.watch() into "
            "the chain, and pass the optimizer's state (not the updates or parameters)."
        )
    result = {}
    for number, state in enumerate(watches):
        prefix = f"watch_{number}/" if number else ""
        numbers = _scalars_of(state)
        result.update({prefix + name: value for name, value in numbers.items()})
    return result


def _scalars_of(state: WatchState) -> dict[str, float]:
    """The numbers of one watch."""
    arrays = [*state[1:5], state.names]
    # Flax wraps the arrays of a state in variables.
    arrays = [x[...] if hasattr(x, "get_value") else x for x in arrays]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        raise TypeError(
            "`scalars` returns Python numbers, which do not exist yet while a function "
            "is traced. Return the optimizer's state from it, and call `scalars` "
            "outside."
        )
    *columns, sizes, text = (np.asarray(x) for x in jax.device_get(arrays))
    columns = [np.where(x == _UNKNOWN, np.nan, x.astype(float)) for x in columns]
    if sizes.ndim != 1:
        raise ValueError(
            "`scalars` needs the state of one optimizer, got one of a vmapped group of "
            f"shape {sizes.shape[:-1]}. Pick a member: jax.tree.map(lambda x: x[0], "
            "state)."
        )
    names = text.astype(np.uint8).tobytes().decode().split("\n")[:-1]
    result = {
        name: _overall(name, column, sizes.astype(float))
        for name, column in zip(_QUANTITIES, columns, strict=True)
    }
    for quantity, column in zip(_QUANTITIES, columns, strict=True):
        for name, value in zip(names, column, strict=True):
            result[f"{quantity}/{name}"] = float(value)
    return result


def _overall(quantity: str, column: np.ndarray, sizes: np.ndarray) -> float:
    """A mean weighted by sizes, or a median."""
    seen = ~np.isnan(column) & (sizes > 0)
    column, sizes = column[seen], sizes[seen]
    if not len(column):
        return math.nan
    if quantity != "relative_variance":
        return float(column @ sizes / sizes.sum())
    order = np.argsort(column)
    share = np.cumsum(sizes[order]) / sizes.sum()
    return float(column[order][np.searchsorted(share, 0.5)])
