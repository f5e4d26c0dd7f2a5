"""From a user's loss, initial parameters and data to a `Problem`; bad input ends here.

Everything is checked on shapes before anything is compiled, and once on numbers: a
loss that is not a scalar, that wants a batch, or that is not a number; data whose
arrays disagree; parameters that cannot be differentiated.
"""

import dataclasses
import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dissect_optax.dissection._correlation import neighbour_correlation
from dissect_optax.dissection._data import Data, number_of_examples
from dissect_optax.dissection._errors import UserError, first_line
from dissect_optax.dissection._problem import Problem, Settings, constant
from dissect_optax.dissection._programs import program_digest, uses_first_argument
from dissect_optax.dissection._training import penalty
from dissect_optax.dissection._tuning import FIRST_REPLICATION_SEED
from dissect_optax.dissection._warnings import (
    CorrelatedExamples,
    DissectionWarning,
    LossLooksBatched,
)

PyTree = Any

# Initial losses of this many examples are looked at.
_CHECKED_EXAMPLES = 64
# Relative differences between losses of a batch and of its examples: above the first
# they are no rounding, below the second they may be, in bfloat16.
_SAME, _OTHER = 1e-3, 0.02
# A smaller correlation of neighbours does not matter.
_CORRELATED = 0.05


def user_problem(
    loss: Callable[..., Any],
    init: Any,
    data: PyTree,
    test: PyTree,
    settings: Settings,
    *,
    metrics: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None,
    regularizer: Callable[[PyTree], jax.Array] | None = None,
    schedule: Callable[[Any], optax.ScalarOrSchedule] | None = None,
    batched: bool = False,
    title: str = "",
) -> tuple[Problem, tuple[DissectionWarning, ...]]:
    """The problem that these arguments of `dissect` describe.

    Args:
      loss: `loss(params, example)` or `loss(params, example, key)`.
      init: From a key to parameters, or the parameters.
      data: Training examples.
      test: Test examples, or None.
      settings: Length, batch size and evaluations.
      metrics: `metrics(params, example)`, scalars by name.
      regularizer: Function of the parameters that is added to the mean loss.
      schedule: From the tuned step size to a learning rate or a schedule.
      batched: Whether `loss` and `metrics` take a batch and return means.
      title: Title of the problem.

    Returns:
      The problem, and warnings about it.

    Raises:
      UserError: An argument is not what it should be.
    """
    init = _checked_init(init)
    params = _initial_shapes(init)
    in_order, tested = _checked_data("data", data), None
    training = _shuffled(in_order)
    if test is not None:
        tested = _shuffled(_checked_data("test", test))
        _check_same_kind(training, tested)
    takes_key = _takes_key(loss)
    example = jax.tree.map(lambda array: _shape_of(array[0]), training)
    key = jax.eval_shape(jax.random.key, 0)
    own = functools.partial(_loss_of_example, loss, takes_key, batched)
    _check_loss(loss, own, params, example, key, batched=batched)
    name = getattr(loss, "__name__", "loss")
    problem = Problem(
        name="dissection",
        title=title or ("loss" if name == "<lambda>" else name),
        settings=settings,
        init=init,
        loss=own,
        batch_loss=functools.partial(_loss_of_batch, loss, takes_key)
        if batched
        else None,
        evaluate=functools.partial(_evaluate, own, metrics, batched),
        load_data=lambda _: Data(training, tested),
        regularizer=regularizer,
        schedule=schedule or constant,
    )
    _check_metrics(problem, params, example)
    programs: list[_Program] = [
        (jax.value_and_grad(own), (params, example, key)),
        (problem.evaluate, (params, example)),
    ]
    if regularizer is not None:
        _check_regularizer(regularizer, params)
        programs.append((jax.value_and_grad(regularizer), (params,)))
    if schedule is not None:
        _check_schedule(schedule)
        programs.append((_rates(schedule), (1.0, jnp.int32(0))))
    if problem.batch_loss is not None:
        pair = jax.tree.map(lambda array: _shape_of(array[:2]), training)
        programs.append((jax.value_and_grad(problem.batch_loss), (params, pair, key)))
    problem = dataclasses.replace(
        problem, description=_identity(_digest_of_init(init), programs)
    )
    losses = None if takes_key else _batch_losses(loss, params, training)
    found = _check_numbers(problem, training, losses)
    return problem, (*found, *_check_correlation(problem, in_order))


# ---- The functions of the problem -------------------------------------------------


def _one(tree: PyTree) -> PyTree:
    """A batch of one example."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _loss_of_example(
    loss: Callable[..., Any],
    takes_key: bool,
    batched: bool,
    params: PyTree,
    example: PyTree,
    key: jax.Array,
) -> jax.Array:
    """The user's loss of one example in the engine's form."""
    keys = (key,) if takes_key else ()
    return loss(params, _one(example) if batched else example, *keys)


def _loss_of_batch(
    loss: Callable[..., Any],
    takes_key: bool,
    params: PyTree,
    batch: PyTree,
    key: jax.Array,
) -> jax.Array:
    """The user's loss of a batch in the engine's form."""
    return loss(params, batch, *((key,) if takes_key else ()))


def _evaluate(
    own: Callable[..., jax.Array],
    metrics: Callable[[PyTree, PyTree], Mapping[str, Any]] | None,
    batched: bool,
    params: PyTree,
    example: PyTree,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of one example; random numbers are always the same."""
    value = own(params, example, jax.random.key(0, impl="threefry2x32"))
    if metrics is None:
        return value, {}
    found = metrics(params, _one(example) if batched else example)
    return value, {name: jnp.asarray(metric) for name, metric in found.items()}


# ---- Identity ---------------------------------------------------------------------


_Program = tuple[Callable[..., Any], tuple[Any, ...]]


def _digest_of_init(init: Callable[[jax.Array], PyTree]) -> str:
    """Digest of the initialisation, which must be the same program each time."""
    key = jax.eval_shape(jax.random.key, 0)
    # A new function each time, since JAX does not trace the same one twice.
    first, second = (program_digest(lambda key: init(key), key) for _ in range(2))
    if first != second:
        raise UserError(
            "`init` is another function each time it is called: it must draw all random"
            " numbers from its key by `jax.random`, and none by `numpy.random`, for"
            " example. Otherwise, runs with equal seeds do not begin at the same"
            " parameters."
        )
    return first


def _identity(init: str, programs: list[_Program]) -> dict[str, Any]:
    """Digest of everything that makes a problem this one, beside its data."""
    parts = [init]
    for function, shapes in programs:
        try:
            parts.append(program_digest(function, *shapes))
        except Exception as error:  # They were called before, but not differentiated.
            raise UserError(
                f"`loss` or `regularizer` cannot be differentiated: {first_line(error)}"
            ) from error
    return {"program": hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]}


def _rates(schedule: Callable[[Any], Any]) -> Callable[..., Any]:
    """The learning rate as a function of step size and step."""
    return lambda size, step: jnp.asarray(schedule(size)(step))


# ---- Checks -----------------------------------------------------------------------


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of an array."""
    return jax.ShapeDtypeStruct(jnp.shape(array), jnp.result_type(array))


def _checked_init(init: Any) -> Callable[[jax.Array], PyTree]:
    """The initialisation as a function of a key."""
    # An Equinox module or a Flax state can be callable and a tree of arrays.
    if callable(init) and jax.tree_util.all_leaves([init]):
        return init
    if isinstance(init, jax.tree_util.Partial):
        return init
    leaves = jax.tree_util.tree_leaves_with_path(init)
    if not leaves:
        raise UserError(
            "`init` must be a function from a random key to parameters, or the"
            f" parameters as a tree of arrays, got {type(init).__name__}."
        )
    for path, leaf in leaves:
        try:
            jnp.asarray(leaf)
        except Exception as error:  # It may be anything.
            raise UserError(
                "`init` must be a function from a random key to parameters, or the"
                f" parameters as a tree of arrays, got {type(init).__name__} with"
                f" {type(leaf).__name__} at params{jax.tree_util.keystr(path)}. Keep"
                " what is not a parameter in the loss."
            ) from error
    arrays = jax.tree.map(jnp.asarray, init)
    return lambda key: arrays


def _initial_shapes(init: Callable[[jax.Array], PyTree]) -> PyTree:
    """Shapes of the parameters."""
    try:
        params = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))
    except Exception as error:
        raise UserError(
            "`init` cannot be called with a random key in `jax.jit`:"
            f" {first_line(error)} Expected `init(key)` to return a tree of arrays."
        ) from error
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not any(leaf.size for _, leaf in leaves):
        raise UserError(
            "`init` returned no parameters. Expected `init(key)` to return a tree of"
            " arrays."
        )
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise UserError(
                f"Parameters must be floating point, got {leaf.dtype} at"
                f" params{jax.tree_util.keystr(path)}. Keep other arrays in the loss,"
                " for example by `functools.partial`."
            )
    return params


def _checked_data(name: str, data: PyTree) -> PyTree:
    """The examples as NumPy arrays."""
    try:
        with warnings.catch_warnings():
            # Of JAX, about iterables, which are checked here.
            warnings.simplefilter("ignore", DeprecationWarning)
            arrays = jax.tree_util.tree_map_with_path(
                functools.partial(_checked_array, name), data
            )
    except UserError:
        raise
    except Exception as error:  # It may be anything.
        raise UserError(
            f"`{name}` must be a tree of arrays with a leading axis of examples, got"
            f" {type(data).__name__}: {first_line(error)}"
        ) from error
    if not jax.tree.leaves(arrays):
        raise UserError(
            f"`{name}` must be a tree of arrays with a leading axis of examples, got"
            f" {type(data).__name__} without an array."
        )
    try:
        count = number_of_examples(arrays)
    except ValueError as error:
        raise UserError(f"`{name}`: {error}") from error
    least = 2 if name == "data" else 1
    if count < least:
        raise UserError(
            f"`{name}` must hold at least {least} example{'s' * (least > 1)}, got"
            f" {count}."
        )
    if not any(array.size for array in jax.tree.leaves(arrays)):
        raise UserError(f"`{name}` must hold numbers, got examples without any.")
    return arrays


def _shuffled(arrays: PyTree) -> PyTree:
    """The examples in random order that is always the same."""
    order = np.random.default_rng(0).permutation(number_of_examples(arrays))
    return jax.tree.map(lambda array: array[order], arrays)


def _checked_array(name: str, path: tuple[Any, ...], leaf: Any) -> np.ndarray:
    """One array of the examples in NumPy, with an axis of examples."""
    place = name + jax.tree_util.keystr(path)
    try:
        array = np.asarray(leaf)
        numeric = jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool
    except Exception as error:  # It may be anything, ragged or made of random keys.
        raise UserError(
            f"`{name}` must hold arrays of numbers, got {type(leaf).__name__} at"
            f" {place}: {first_line(error)}"
        ) from error
    if not numeric:
        raise UserError(f"`{name}` must hold numbers, got {array.dtype} at {place}.")
    if array.ndim == 0:
        raise UserError(
            f"`{name}` must be a tree of arrays with a leading axis of examples, got a"
            f" single number at {place}. A Python list is a tree of its entries: pass"
            " `numpy.array(entries)` in its place."
        )
    kept = _shape_of(array[:0]).dtype
    if array.size and np.issubdtype(array.dtype, np.integer) and kept != array.dtype:
        limits = np.iinfo(kept)
        if array.min() < limits.min or array.max() > limits.max:
            raise UserError(
                f"`{name}` holds integers that JAX does not keep in {kept}, from"
                f" {array.min()} to {array.max()} at {place}. Make them smaller, or"
                " enable `jax_enable_x64`."
            )
    return array


def _check_same_kind(training: PyTree, test: PyTree) -> None:
    """Raises unless test examples look like training examples."""
    kinds = [
        jax.tree.map(lambda array: str(_shape_of(array[0])), part)
        for part in (training, test)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            "`test` must hold examples like those of `data`, got"
            f" {kinds[1]} and {kinds[0]}."
        )


def _takes_key(loss: Callable[..., Any]) -> bool:
    """Whether the loss has a third argument that must be given."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # Some built-in functions have no signature.
        return False
    positional = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    required = [p for p in positional if p.default is p.empty]
    if len(required) > 3 or len(positional) < 2:
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return False
        raise UserError(
            "`loss` must take `(params, example)` or `(params, example, key)`, got a"
            f" function of {', '.join(p.name for p in positional) or 'nothing'}."
        )
    return len(required) == 3 or (len(positional) > 2 and positional[2].name == "key")


def _check_loss(
    loss: Callable[..., Any],
    own: Callable[..., Any],
    params: PyTree,
    example: PyTree,
    key: Any,
    *,
    batched: bool,
) -> None:
    """Raises unless the loss of one example is a real scalar."""
    try:
        value = jax.eval_shape(own, params, example, key)
    except Exception as error:
        advice = ""
        if not batched and _accepts_a_batch(loss, params, example, key):
            advice = (
                " It accepts a batch of one example: if it is a mean over a batch, pass"
                " `batched=True`."
            )
        if batched and _accepts_an_example(loss, params, example, key):
            advice = (
                " It accepts one example without the batch axis: if it is the loss of"
                " one example, leave out `batched=True`."
            )
        what = "a batch of one example" if batched else "one example, without an axis"
        raise UserError(
            f"`loss` cannot be called with {what} of shape"
            f" {jax.tree.map(lambda leaf: leaf.shape, example)}:"
            f" {first_line(error)}{advice}"
        ) from error
    what = "a batch of one example" if batched else "one example"
    advice = " If it is written for a batch, return the mean over it and pass"
    advice += " `batched=True`."
    if batched:
        advice = " Return the mean over the batch; or leave out `batched=True` if it is"
        advice += " the loss of one example."
    _check_real_scalar(f"`loss` of {what}", value, advice)
    if not uses_first_argument(own, params, example, key):
        raise UserError(
            "`loss` does not use its parameters, so there is nothing to train. Is its"
            " first argument the tree that `init` returns?"
        )


def _check_real_scalar(what: str, value: PyTree, advice: str = "") -> None:
    """Raises unless the value is one floating-point number."""
    leaves = jax.tree.leaves(value)
    if isinstance(value, jax.ShapeDtypeStruct) and value.shape == ():
        if jnp.issubdtype(value.dtype, jnp.floating):
            return
        raise UserError(f"{what} must be a real number, got {value.dtype}.")
    shapes = ", ".join(str(leaf.shape) for leaf in leaves) or "nothing"
    if not isinstance(value, jax.ShapeDtypeStruct):
        shapes = f"{type(value).__name__} of {shapes}"
        advice = " Return the loss alone, without further outputs."
    raise UserError(f"{what} must be one scalar, got {shapes}.{advice}")


def _accepts_a_batch(
    loss: Callable[..., Any], params: PyTree, example: PyTree, key: Any
) -> bool:
    """Whether the loss of a batch of one example is a scalar."""
    return _is_scalar(loss, True, params, example, key)


def _accepts_an_example(
    loss: Callable[..., Any], params: PyTree, example: PyTree, key: Any
) -> bool:
    """Whether the loss of an example without a batch axis is a scalar."""
    return _is_scalar(loss, False, params, example, key)


def _is_scalar(
    loss: Callable[..., Any], batched: bool, params: PyTree, example: PyTree, key: Any
) -> bool:
    """Whether the loss can be called so, and returns a scalar."""
    own = functools.partial(_loss_of_example, loss, _takes_key(loss), batched)
    try:
        return jax.tree.leaves(jax.eval_shape(own, params, example, key))[0].shape == ()
    except Exception:
        return False


def _check_metrics(problem: Problem, params: PyTree, example: PyTree) -> None:
    """Raises unless the metrics are scalars by name."""
    try:
        _, found = jax.eval_shape(problem.evaluate, params, example)
    except Exception as error:
        raise UserError(
            "`metrics(params, example)` must return a dictionary of scalars:"
            f" {first_line(error)}"
        ) from error
    for name, value in found.items():
        if not isinstance(name, str) or name in ("loss", "data_loss"):
            raise UserError(
                "`metrics` must return a dictionary by names other than 'loss' and"
                f" 'data_loss', got {name!r}."
            )
        if value.shape != () or jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise UserError(
                f"`metrics` must return real scalars, got {name!r} as"
                f" {value.dtype}{list(value.shape)}. Return its mean over the example."
            )


def _check_regularizer(regularizer: Callable[..., Any], params: PyTree) -> None:
    """Raises unless the regularizer is a scalar function of the parameters."""
    try:
        value = jax.eval_shape(regularizer, params)
    except Exception as error:
        raise UserError(
            f"`regularizer` cannot be called with the parameters: {first_line(error)}"
        ) from error
    _check_real_scalar("`regularizer`", value, " Return the sum over all parameters.")


def _check_schedule(schedule: Callable[[Any], Any]) -> None:
    """Raises unless the schedule is a function of step size, and then of the step."""
    expected = (
        " Expected a function from the step size to a schedule, such as `lambda size:"
        " lambda step: size * shape(step)` with `shape ="
        " optax.warmup_cosine_decay_schedule(0.0, 1.0, 50, 1000)`."
    )
    try:
        # A schedule itself, called with a step size, would pass as a constant one.
        if not callable(schedule(1.0)):
            raise UserError(
                "`schedule(step_size)` must return a function of the step, got a"
                f" number.{expected}"
            )
        rate = jax.eval_shape(_rates(schedule), 1.0, jnp.int32(0))
        used = uses_first_argument(_rates(schedule), 1.0, jnp.int32(0))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            "`schedule` cannot be called with a traced step size and step:"
            f" {first_line(error)}{expected}"
        ) from error
    if rate.shape != () or not used:
        wrong = "ignores the step size" if rate.shape == () else "is not a scalar"
        raise UserError(f"The learning rate of `schedule` {wrong}.{expected}")


def _batch_losses(
    loss: Callable[..., Any], params: PyTree, training: PyTree
) -> Callable[[PyTree, PyTree], dict[str, jax.Array]] | None:
    """Losses of two examples alone, and in batches; None if it takes no batch."""

    def losses(params: PyTree, pair: PyTree) -> dict[str, jax.Array]:
        one, other = (jax.tree.map(lambda leaf, i=i: leaf[i], pair) for i in (0, 1))
        found = {
            "batch_of_one": loss(params, _one(one)),
            "batch_of_other": loss(params, _one(other)),
            "batch_of_both": loss(params, pair),
        }
        if any(jnp.shape(value) != () for value in found.values()):
            raise TypeError("Not a scalar.")
        try:
            found["one"] = loss(params, one)
        except Exception:  # It may be written for batches alone.
            return found
        return found

    pair = jax.tree.map(lambda array: _shape_of(array[:2]), training)
    try:
        jax.eval_shape(losses, params, pair)
    except Exception:
        return None
    return losses


def _checked_examples(training: PyTree) -> PyTree:
    """Some examples, first those that hold a number that is not finite."""
    count = number_of_examples(training)
    odd = np.zeros(count, bool)
    for array in jax.tree.leaves(training):
        if jnp.issubdtype(array.dtype, jnp.inexact):
            # As they are on the device, where a number may be too large.
            with np.errstate(over="ignore"):
                kept = array.astype(_shape_of(array[:0]).dtype)
            odd |= ~np.isfinite(kept).reshape(count, -1).all(axis=1)
    chosen = np.argsort(~odd, kind="stable")[:_CHECKED_EXAMPLES]
    with np.errstate(over="ignore"):
        return jax.tree.map(lambda array: jnp.asarray(array[chosen]), training)


def _check_numbers(
    problem: Problem,
    training: PyTree,
    batch_losses: Callable[[PyTree, PyTree], dict[str, jax.Array]] | None,
) -> tuple[DissectionWarning, ...]:
    """Raises if losses and gradients before the first step cannot be trained on.

    Returns:
      Warnings about the loss.
    """
    examples = _checked_examples(training)
    at_once = min(problem.settings.batch_size, number_of_examples(examples))

    @jax.jit
    def measured(examples: PyTree) -> tuple[Any, ...]:
        key = jax.random.key(FIRST_REPLICATION_SEED, impl="threefry2x32")
        params = problem.init(key)
        losses = jax.lax.map(
            lambda example: problem.evaluate(params, example)[0],
            examples,
            batch_size=at_once,
        )
        batch = jax.tree.map(lambda array: array[:at_once], examples)

        def mean_loss(params: PyTree) -> jax.Array:
            if problem.batch_loss is not None:
                return problem.batch_loss(params, batch, key)
            keys = jax.random.split(key, at_once)
            return jnp.mean(jax.vmap(problem.loss, (None, 0, 0))(params, batch, keys))

        finite = jax.tree.map(
            lambda leaf: jnp.all(jnp.isfinite(leaf)), jax.grad(mean_loss)(params)
        )
        pair = jax.tree.map(lambda array: array[:2], examples)
        in_batches = batch_losses(params, pair) if batch_losses is not None else {}
        return losses, penalty(problem, params), finite, in_batches

    losses, regularizer, finite, in_batches = jax.device_get(measured(examples))
    losses = losses.astype(np.float64)
    bad = losses[~np.isfinite(losses)]
    if bad.size:
        raise UserError(
            f"`loss` must be finite at the initial parameters, got {bad[0]} for"
            f" {bad.size} of {len(losses)} examples. Are parameters and data finite?"
        )
    for path, is_finite in jax.tree_util.tree_leaves_with_path(finite):
        if not is_finite:
            raise UserError(
                "The gradient of `loss` must be finite at the initial parameters, got"
                f" NaN or infinity at params{jax.tree_util.keystr(path)}. A root or a"
                " norm at zero has no derivative, for example."
            )
    first = float(np.mean(losses) + regularizer)
    if not first > 0:
        raise UserError(
            "Methods are compared by the logarithm of the training loss, which must be"
            f" positive before the first step, got {first:.4g} for {len(losses)}"
            " examples. To a loss that may be negative, such as a log density, add a"
            " constant that bounds it from below."
        )
    return _check_batches(problem, {k: float(v) for k, v in in_batches.items()})


def _check_correlation(
    problem: Problem, in_order: PyTree
) -> tuple[DissectionWarning, ...]:
    """Warns where neighbours in the data have similar gradients at the start."""
    key = jax.random.key(FIRST_REPLICATION_SEED, impl="threefry2x32")
    params = jax.jit(problem.init)(key)
    found = neighbour_correlation(jax.grad(problem.loss), params, in_order)
    if found is None or not found.low > _CORRELATED:
        return ()
    return (CorrelatedExamples(*found),)


def _check_batches(
    problem: Problem, losses: Mapping[str, float]
) -> tuple[DissectionWarning, ...]:
    """Compares losses of batches with those of their examples.

    Raises:
      UserError: The loss of a batch is not the mean over it, as was said.
    """
    if not losses:
        return ()
    one, other = losses["batch_of_one"], losses["batch_of_other"]
    scale = max(abs(one), abs(other))
    gap = abs(losses["batch_of_both"] - (one + other) / 2)
    if problem.batch_loss is not None and gap > _OTHER * scale:
        raise UserError(
            "With `batched=True`, `loss` must be the mean over the batch: it is"
            f" {one:.6g} and {other:.6g} for two examples, and"
            f" {losses['batch_of_both']:.6g} for both. A sum must be divided by the"
            " number of examples, and an example must not change with others, as it"
            " does in batch normalization."
        )
    alone = losses.get("one", one)
    looks_batched = gap <= _SAME * scale and abs(alone - one) > _OTHER * scale
    if problem.batch_loss is None and looks_batched:
        return (LossLooksBatched(alone, one),)
    return ()
