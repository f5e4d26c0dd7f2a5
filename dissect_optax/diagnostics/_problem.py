"""The user's loss, parameters and data, checked and brought into one form.

Parameters become a list of real arrays: a complex one is the pair of its real and
imaginary parts, whose signs and variances are those of two numbers. The loss becomes
one of (leaves, example, frozen arrays).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax.gradient_variance import value_grad_and_variance
from dissect_optax.gradient_variance._parameters import Selection, select_parameters

PyTree = Any
Leaves = list[jax.Array]
# The model's outputs for an example, and the loss of outputs and example.
GaussNewton = tuple[Callable[..., Any], Callable[..., Any]]
# So many examples are enough to see whether the loss is one of a batch.
_EXAMPLES_TO_COMPARE = 3


@dataclasses.dataclass(frozen=True)
class Loss:
    """The user's functions and how they are called, as a key of compiled programs."""

    function: Callable[..., Any]
    regularizer: Callable[[PyTree], jax.Array] | None
    gauss_newton: GaussNewton | None
    has_aux: bool
    batched: bool
    takes_key: bool
    microbatch_size: int | None
    # How the parameters are put together again.
    tree: Any
    chosen: tuple[bool, ...]
    is_complex: tuple[bool, ...]
    # Frozen leaves that are not arrays, with None in the places of arrays.
    objects: tuple[Any, ...]

    # ---- The parameters -------------------------------------------------------------

    def params(self, leaves: Leaves, frozen: list[Any]) -> PyTree:
        """The user's tree of parameters."""
        trainable = iter(
            jax.lax.complex(leaf[0], leaf[1]) if is_complex else leaf
            for leaf, is_complex in zip(leaves, self.is_complex, strict=True)
        )
        arrays, objects = iter(frozen), iter(self.objects)
        full = []
        for is_trainable in self.chosen:
            if is_trainable:
                full.append(next(trainable))
                continue
            known = next(objects)
            full.append(next(arrays) if known is None else known)
        return jax.tree.unflatten(self.tree, full)

    # ---- The loss -------------------------------------------------------------------

    def of_example(self, leaves: Leaves, example: Any, frozen: list[Any]) -> jax.Array:
        """The loss of one example; of a batch of one if the loss is one of batches."""
        return self._call(self.function, self.params(leaves, frozen), example)

    def _of_batch_of_one(
        self, leaves: Leaves, example: Any, frozen: list[Any]
    ) -> jax.Array:
        """The loss of one example without batch axis, by a loss of batches."""
        batch = jax.tree.map(lambda leaf: leaf[None], example)
        return self.of_example(leaves, batch, frozen)

    def _call(self, function: Callable[..., Any], params: PyTree, example: Any) -> Any:
        """A function of parameters, example and perhaps a key; its value only."""
        if not self.takes_key:
            result = function(params, example)
        else:
            data, key = example
            result = function(params, data, key[0] if self.batched else key)
        if self.has_aux and function is self.function:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    "With `has_aux=True` the loss must return a pair (value, aux), got "
                    f"{type(result).__name__}."
                )
            return result[0]
        return result

    def penalty(self, leaves: Leaves, frozen: list[Any]) -> jax.Array:
        """The regularizer; zero without one."""
        if self.regularizer is None:
            return jnp.zeros(())
        return self.regularizer(self.params(leaves, frozen))

    def mean_over(self, leaves: Leaves, batch: Any, frozen: list[Any]) -> jax.Array:
        """The mean loss of a batch of examples, without the regularizer."""
        if self.batched:
            batch = jax.tree.map(lambda leaf: leaf[:, None], batch)
        one = functools.partial(self.of_example, leaves, frozen=frozen)
        return jnp.mean(jax.vmap(one)(batch))

    # ---- Derivatives ----------------------------------------------------------------

    def gradient(self, leaves: Leaves, batch: Any, frozen: list[Any]) -> Leaves:
        """Gradient of a mini-batch alone, at the price of a training step."""
        if self.microbatch_size is not None:
            return self.gradient_and_variance(leaves, batch, frozen)[1]
        gradient = jax.grad(
            lambda x: self.mean_over(x, batch, frozen) + self.penalty(x, frozen)
        )(leaves)
        return [g.astype(_wide(g)) for g in gradient]

    def gradient_and_variance(
        self, leaves: Leaves, batch: Any, frozen: list[Any]
    ) -> tuple[jax.Array, Leaves, Leaves]:
        """Loss, gradient and its variance (44) of a mini-batch."""
        has_penalty = self.regularizer is not None
        # The key of a batch would look like something that its examples share.
        alone = self.batched and self.takes_key
        value, grad, variance = value_grad_and_variance(
            self._of_batch_of_one if alone else self.of_example,
            batched=self.batched and not alone,
            regularizer=(lambda x: self.penalty(x, frozen)) if has_penalty else None,
            microbatch_size=self.microbatch_size,
        )(leaves, batch, frozen)
        return value, *([jnp.asarray(x, _wide(x)) for x in y] for y in (grad, variance))

    def curvature_times(
        self,
        leaves: Leaves,
        batch: Any,
        frozen: list[Any],
        directions: list[Leaves],
    ) -> list[Leaves]:
        """Products of the curvature matrix with some directions.

        The Hessian of the mini-batch's loss, or the generalized Gauss-Newton matrix
        Jᵀ H J of Schraudolph (2002), and the Hessian of the regularizer.
        """
        directions = [
            [z.astype(x.dtype) for z, x in zip(direction, leaves, strict=True)]
            for direction in directions
        ]

        def products(part: Any) -> list[Leaves]:
            if self.gauss_newton is None:
                gradient = jax.grad(self.mean_over)
                _, push = jax.linearize(lambda x: gradient(x, part, frozen), leaves)
            else:
                push = self._gauss_newton_product(leaves, part, frozen)
            return [push(direction) for direction in directions]

        size = jax.tree.leaves(batch)[0].shape[0]
        step = min(self.microbatch_size or size, size)
        full = size // step
        if full == 1:
            total = products(jax.tree.map(lambda leaf: leaf[:step], batch))
        else:
            parts = jax.tree.map(
                lambda leaf: leaf[: full * step].reshape(full, step, *leaf.shape[1:]),
                batch,
            )
            zeros = [jax.tree.map(jnp.zeros_like, leaves) for _ in directions]
            total, _ = jax.lax.scan(
                lambda sums, part: (_add(sums, products(part), 1 / full), None),
                zeros,
                parts,
            )
        if size % step:
            rest = products(jax.tree.map(lambda leaf: leaf[full * step :], batch))
            share = full * step / size
            total = _add(_scaled(total, share), rest, 1 - share)
        if self.regularizer is not None:
            gradient_of_penalty = jax.grad(self.penalty)
            _, push = jax.linearize(lambda x: gradient_of_penalty(x, frozen), leaves)
            total = _add(total, [push(direction) for direction in directions], 1.0)
        return [[x.astype(_wide(x)) for x in product] for product in total]

    def _gauss_newton_product(
        self, leaves: Leaves, batch: Any, frozen: list[Any]
    ) -> Callable[[Leaves], Leaves]:
        """The product of a direction with the generalized Gauss-Newton matrix."""
        assert self.gauss_newton is not None
        model, loss_of_outputs = self.gauss_newton
        if self.batched:
            batch = jax.tree.map(lambda leaf: leaf[:, None], batch)

        def outputs(x: Leaves) -> Any:
            params = self.params(x, frozen)
            return jax.vmap(lambda e: self._call(model, params, e))(batch)

        def mean_loss(out: Any) -> jax.Array:
            examples = batch[0] if self.takes_key else batch
            return jnp.mean(jax.vmap(loss_of_outputs)(out, examples))

        out, push = jax.linearize(outputs, leaves)
        _, curve = jax.linearize(jax.grad(mean_loss), out)
        pull = jax.linear_transpose(push, leaves)
        return lambda direction: pull(curve(push(direction)))[0]


def _wide(leaf: Any) -> Any:
    """At least float32, in which everything is summed up."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _scaled(tree: Any, factor: float) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, tree)


def _add(tree: Any, other: Any, factor: float) -> Any:
    """The first tree and a multiple of the second."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(factor, x.dtype) * y, tree, other)


# ---- Checks ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """Where the loss is measured."""

    loss: Loss
    leaves: Leaves
    frozen: list[Any]
    names: list[str]
    shapes: list[tuple[int, ...]]


def make_point(
    loss: Callable[..., Any],
    params: PyTree,
    *,
    trainable: Any,
    regularizer: Callable[[PyTree], jax.Array] | None,
    gauss_newton: GaussNewton | None,
    has_aux: bool,
    batched: bool,
    microbatch_size: int | None,
) -> Point:
    """The loss and its parameters in the form of this module."""
    if not callable(loss):
        raise TypeError(f"`loss` must be a function, got {type(loss).__name__}.")
    selection = select_parameters(params, trainable)
    if not selection.trainable:
        raise ValueError("`params` holds no parameters, so there is no gradient.")
    leaves = [jnp.asarray(leaf) for leaf in selection.trainable]
    frozen = selection.frozen
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in frozen]
    function = Loss(
        loss,
        regularizer,
        gauss_newton,
        has_aux,
        batched,
        _takes_key(loss),
        microbatch_size,
        selection.tree,
        tuple(selection.chosen),
        tuple(jnp.iscomplexobj(leaf) for leaf in leaves),
        tuple(None if a else x for x, a in zip(frozen, is_array, strict=True)),
    )
    real = [
        jnp.stack([leaf.real, leaf.imag]) if jnp.iscomplexobj(leaf) else leaf
        for leaf in leaves
    ]
    for name, leaf in zip(selection.trainable_paths, real, strict=True):
        if not bool(jnp.isfinite(leaf.astype(_wide(leaf))).all()):
            raise ValueError(
                f"The parameter {name or 'params'} holds NaN or infinite numbers, so "
                "nothing can be measured there. Pass parameters from before training "
                "diverged."
            )
    arrays = [x for x, a in zip(frozen, is_array, strict=True) if a]
    return Point(
        function,
        real,
        arrays,
        _names(selection),
        [leaf.shape for leaf in real],
    )


def _names(selection: Selection) -> list[str]:
    """Readable, unique names of the trainable parameters."""
    indices = jax.tree.unflatten(selection.tree, range(len(selection.leaves)))
    by_index = {
        index: jax.tree_util.keystr(path, simple=True, separator="/")
        for path, index in jax.tree_util.tree_leaves_with_path(indices)
    }
    return [
        by_index[i] or "params" for i, chosen in enumerate(selection.chosen) if chosen
    ]


def _takes_key(loss: Callable[..., Any]) -> bool:
    """Whether the loss has a third argument without a default, the random key."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # A function of C without a signature.
        return False
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.default is p.empty
    ]
    return len(positional) >= 3


def number_of_examples(data: PyTree) -> int:
    """The common length of the leaves of the data."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError("`data` holds no arrays, so there are no examples.")
    shapes = {
        jax.tree_util.keystr(path) or "data": jnp.shape(leaf) for path, leaf in leaves
    }
    scalars = [path for path, shape in shapes.items() if not shape]
    if scalars:
        raise ValueError(
            f"Every leaf of `data` needs a leading axis of examples, but {scalars} are "
            "scalars. What all examples share belongs into the loss."
        )
    sizes = {path: shape[0] for path, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The leaves of `data` disagree on the number of examples: {sizes}. The "
            "leading axis of every leaf must count the same examples."
        )
    return next(iter(sizes.values()))


def check_batch_size(batch_size: Any, examples: int) -> None:
    """Reject a batch size that the data cannot fill, or that shows no variance."""
    integer = isinstance(batch_size, int | np.integer)
    if not integer or isinstance(batch_size, bool):
        raise TypeError(f"`batch_size` must be an integer, got {batch_size!r}.")
    if batch_size < 2:
        raise ValueError(
            f"`batch_size` must be at least 2, got {batch_size}: one example shows no "
            "variance within its mini-batch. The noise scale does not depend on it; "
            "the variance of one example's gradient is `batch_size` times as large."
        )
    if batch_size > examples:
        raise ValueError(
            f"`batch_size` is {batch_size}, but `data` holds {examples} examples only. "
            "Pass more data or a smaller batch size."
        )


def check_loss(point: Point, examples: Any) -> None:
    """Raise if the loss fails on one example, or seems to be one of a batch.

    Args:
      point: Loss and parameters.
      examples: A few examples, stacked along a leading axis.
    """
    loss = point.loss
    first = jax.tree.map(lambda leaf: leaf[:1] if loss.batched else leaf[0], examples)
    try:
        value = jax.eval_shape(loss.of_example, point.leaves, first, point.frozen)
    except Exception as error:
        form = "a batch of one example" if loss.batched else "one example"
        error.add_note(f"`measure` calls the loss with {form}: {_shapes_of(first)}.")
        if not loss.batched and _is_loss_of_batch(point, examples):
            raise TypeError(
                "The loss must be that of one example, without the batch axis, but it "
                f"fails on one ({type(error).__name__}: {error}) and returns a scalar "
                "for a batch. Pass `batched=True` if it is the mean over a batch."
            ) from error
        raise
    if not jax.tree_util.all_leaves([value]) or value.shape != ():
        came = (
            f"an array of shape {value.shape}"
            if jax.tree_util.all_leaves([value])
            else f"a {type(value).__name__}"
        )
        raise TypeError(
            f"The loss of {'a batch' if loss.batched else 'one example'} must be a "
            f"real scalar, got {came}. Return the "
            f"{'mean over the batch' if loss.batched else 'sum or mean over outputs'}"
            "; for a pair (loss, aux), use `has_aux=True`."
        )
    if not loss.batched and not loss.takes_key:
        _check_against_batch(point, examples)


def _shapes_of(example: Any) -> Any:
    return jax.tree.map(jnp.shape, example)


def _is_loss_of_batch(point: Point, examples: Any) -> bool:
    """Whether the loss of several examples together is a scalar."""
    try:
        value = jax.eval_shape(
            point.loss.of_example, point.leaves, examples, point.frozen
        )
    except Exception:
        return False
    return bool(jax.tree_util.all_leaves([value])) and value.shape == ()


def _check_against_batch(point: Point, examples: Any) -> None:
    """Raise if the loss is the mean over a batch and differs on bare examples.

    Many a loss of a batch runs on a bare example and takes another axis for the batch.
    It gives itself away by two equations: on the examples together it is the mean of
    what it is on batches of one, and on bare examples it is something else.
    """
    if not _is_loss_of_batch(point, examples):
        return
    loss = point.loss
    call = functools.partial(loss.of_example, point.leaves, frozen=point.frozen)
    count = jax.tree.leaves(examples)[0].shape[0]
    if count < 2:
        return
    try:
        together = float(call(examples))
        alone = [
            float(call(jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], examples)))
            for k in range(count)
        ]
        bare = [
            float(call(jax.tree.map(lambda leaf, k=k: leaf[k], examples)))
            for k in range(count)
        ]
    except Exception:  # Whatever it is, it is not a loss of batches of any size.
        return

    def same(first: float, second: float) -> bool:
        return abs(first - second) <= 1e-4 * (abs(first) + abs(second))

    # A loss that sees no batch axis, like a sum of squares, adds up instead.
    mean_of_bare = float(np.mean(bare))
    if same(together, float(np.mean(alone))) and not same(together, mean_of_bare):
        raise TypeError(
            "The loss seems to be the mean over a batch: of "
            f"{count} examples together it is {together:.6g}, the mean of what it is "
            f"on batches of one, but over bare examples that is {mean_of_bare:.6g}. "
            "Pass `batched=True`, or a loss of one example without the batch axis."
        )


def examples_to_compare(examples: int) -> int:
    """How many examples `check_loss` wants."""
    return min(examples, _EXAMPLES_TO_COMPARE)
