"""From a user's loss, initial parameters and data to a `Problem`; bad input ends here.

Everything is checked on shapes before anything is compiled, and once on numbers: a
loss that is not a scalar, that wants a batch, or that is not a number; data whose
arrays disagree; parameters that cannot be differentiated.
"""

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dissect_optax.dissection._data import Data, number_of_examples
from dissect_optax.dissection._errors import UserError, first_line
from dissect_optax.dissection._problem import Problem, Settings, constant
from dissect_optax.dissection._programs import program_digest

PyTree = Any

# Initial losses of this many examples are looked at.
_CHECKED_EXAMPLES = 64


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
) -> Problem:
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
      The problem.

    Raises:
      UserError: An argument is not what it should be.
    """
    init = _checked_init(init)
    params = _initial_shapes(init)
    training, tested = _checked_data("data", data), None
    if test is not None:
        tested = _checked_data("test", test)
        _check_same_kind(training, tested)
    takes_key = _takes_key(loss)
    example = jax.tree.map(lambda array: _shape_of(array[0]), training)
    key = jax.eval_shape(jax.random.key, 0)
    own = functools.partial(_loss_of_example, loss, takes_key, batched)
    _check_loss(loss, own, params, example, key, batched=batched)
    problem = Problem(
        name="dissection",
        title=title or getattr(loss, "__name__", "loss"),
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
        description=_identity(
            [(init, (key,)), (own, (params, example, key))]
            + ([(metrics, (params, example))] if metrics and not batched else [])
            + ([(regularizer, (params,))] if regularizer else []),
            schedule,
        ),
    )
    _check_metrics(problem, params, example)
    if regularizer is not None:
        _check_scalar("`regularizer`", regularizer, params)
    _check_numbers(problem, training)
    return problem


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


def _identity(
    programs: list[tuple[Callable[..., Any], tuple[Any, ...]]], schedule: Any
) -> dict[str, Any]:
    """Digests of the programs that make a problem this one."""
    parts = [program_digest(function, *shapes) for function, shapes in programs]
    if schedule is not None:
        try:
            parts.append(program_digest(_rates(schedule), 1.0, jnp.arange(10.0)))
        except Exception as error:
            raise UserError(
                "`schedule` cannot be called with a traced step size:"
                f" {first_line(error)} Expected a function from the step size to a"
                " learning rate or a schedule, such as `lambda size: lambda step: size"
                " * shape(step)` with `shape = optax.warmup_cosine_decay_schedule(0.0,"
                " 1.0, 50, 1000)`."
            ) from error
    return {"program": hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]}


def _rates(schedule: Callable[[Any], Any]) -> Callable[..., Any]:
    """Learning rates at some steps, as a function of step size and steps."""

    def rates(size: Any, steps: jax.Array) -> Any:
        rate = schedule(size)
        return rate(steps) if callable(rate) else jnp.asarray(rate)

    return rates


# ---- Checks -----------------------------------------------------------------------


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of an array."""
    return jax.ShapeDtypeStruct(jnp.shape(array), jnp.result_type(array))


def _checked_init(init: Any) -> Callable[[jax.Array], PyTree]:
    """The initialisation as a function of a key."""
    # An Equinox module or a Flax state can be callable and a tree of arrays.
    if callable(init) and jax.tree_util.all_leaves([init]):
        return init
    leaves = jax.tree.leaves(init)
    if not leaves or any(callable(leaf) for leaf in leaves):
        raise UserError(
            "`init` must be a function from a random key to parameters, or the"
            f" parameters as a tree of arrays, got {type(init).__name__}."
        )
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
    if not leaves:
        raise UserError("`init` returned no parameters.")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise UserError(
                f"Parameters must be floating point, got {leaf.dtype} at"
                f" params{jax.tree_util.keystr(path)}. Keep other arrays in the loss,"
                " for example by `functools.partial`."
            )
    return params


def _checked_data(name: str, data: PyTree) -> PyTree:
    """The examples as NumPy arrays, in random order that is always the same."""
    try:
        arrays = jax.tree.map(np.asarray, data)
        count = number_of_examples(arrays)
    except ValueError as error:
        raise UserError(f"`{name}`: {error}") from error
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        if leaf.dtype == object or leaf.dtype.kind in "USMm":
            raise UserError(
                f"`{name}` must hold numbers, got {leaf.dtype} at"
                f" {name}{jax.tree_util.keystr(path)}."
            )
    if count < 2:
        raise UserError(f"`{name}` must hold at least two examples, got {count}.")
    order = np.random.default_rng(0).permutation(count)
    return jax.tree.map(lambda array: array[order], arrays)


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
        what = "a batch of one example" if batched else "one example, without an axis"
        raise UserError(
            f"`loss` cannot be called with {what} of shape"
            f" {jax.tree.map(lambda leaf: leaf.shape, example)}:"
            f" {first_line(error)}{advice}"
        ) from error
    leaves = jax.tree.leaves(value)
    if len(leaves) == 1 and leaves[0].shape == ():
        if jnp.issubdtype(leaves[0].dtype, jnp.floating):
            return
        raise UserError(f"`loss` must return a real number, got {leaves[0].dtype}.")
    shapes = ", ".join(str(leaf.shape) for leaf in leaves) or "nothing"
    advice = ""
    if not batched:
        advice = (
            " If it is written for a batch, return the mean over it and pass"
            " `batched=True`."
        )
    raise UserError(
        f"`loss` must return one scalar for one example, got {shapes}.{advice}"
    )


def _accepts_a_batch(
    loss: Callable[..., Any], params: PyTree, example: PyTree, key: Any
) -> bool:
    """Whether the loss of a batch of one example is a scalar."""
    own = functools.partial(_loss_of_example, loss, _takes_key(loss), True)
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
        if value.shape != () or name == "loss":
            raise UserError(
                "`metrics` must return scalars by names other than 'loss', got"
                f" {name!r} of shape {value.shape}."
            )


def _check_scalar(name: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Raises unless the function returns a scalar."""
    try:
        shape = jax.eval_shape(function, *arguments).shape
    except Exception as error:
        raise UserError(f"{name} cannot be called: {first_line(error)}") from error
    if shape != ():
        raise UserError(f"{name} must return a scalar, got shape {shape}.")


def _check_numbers(problem: Problem, training: PyTree) -> None:
    """Raises if losses before the first step are not finite numbers."""
    params = jax.jit(problem.init)(jax.random.key(0, impl="threefry2x32"))
    few = jax.tree.map(lambda array: jnp.asarray(array[:_CHECKED_EXAMPLES]), training)
    losses, _ = jax.jit(jax.vmap(problem.evaluate, (None, 0)))(params, few)
    bad = [float(value) for value in losses if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"`loss` must be finite at the initial parameters, got {bad[0]} for"
            f" {len(bad)} of {len(losses)} examples. Are parameters and data finite?"
        )
