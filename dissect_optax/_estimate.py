"""`Estimate`, an update direction with its element-wise variance.

What flows through a chain is a plain gradient tree, as everywhere in Optax, or an
`Estimate`. `_sources` holds what makes one, `_momentum` and `_sign` how its variance
propagates when the direction changes, `_adaptation` what ends it.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from dissect_optax._precision import cast, dtype_of, upcast, update_dtype

_MET_OTHER_CODE = (
    "An Estimate (an update direction and its variance) met code that expects plain "
    "updates. Between the transformation that made it and adapt_to_variance() only "
    "transformations of dissect_optax belong: put the others (clipping, scaling, "
    "weight decay, a learning rate) before it was made or after adapt_to_variance(). "
    "dissect_optax.masked takes the place of optax.masked there. To inspect it, or to "
    "return it from a function under jax.jit, take its `mean` and `variance`."
)


class Estimate:
    """An update direction and its element-wise variance, the pair of Lemma 1.

    An ordinary object that lives inside a chain: a transformation from gradients makes
    it, `adapt_to_variance` turns it into plain updates. Transformations of other
    libraries do not know what a variance is (`optax.scale(c)` would scale it by c and
    not by c²), so everything that they could do with it, arithmetic and JAX's tree
    functions included, raises a TypeError that says so.

    Attributes:
      mean: The update direction p̂, a tree like the parameters, in the gradient's unit.
      variance: The element-wise variance of p̂, real, with the same structure and
        shapes, in the gradient's unit squared.
      dtypes: The dtypes of the gradients that it was made of, in the order of the
        leaves; those of `mean` if not given. `adapt_to_variance` returns updates in
        these.

    Edge cases:
      * A function under `jax.jit` cannot return one: return `mean` and `variance`, and
        make another Estimate of them outside.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.attach_variance()
      >>> g, v = jnp.array([3.0, -1.0]), jnp.array([0.5, 2.0])
      >>> estimate, _ = tx.update(g, tx.init(g), grad_variance=v)
      >>> isinstance(estimate, dissect_optax.Estimate)
      True
      >>> bool((estimate.mean == g).all() & (estimate.variance == v).all())
      True
    """

    __slots__ = ("dtypes", "mean", "variance")

    mean: optax.Updates
    variance: optax.Updates
    dtypes: tuple[jnp.dtype, ...]

    def __init__(
        self,
        mean: optax.Updates,
        variance: optax.Updates,
        dtypes: tuple[jax.typing.DTypeLike, ...] | None = None,
    ):
        if dtypes is None:
            dtypes = tuple(dtype_of(leaf) for leaf in jax.tree.leaves(mean))
        self.mean = mean
        self.variance = variance
        self.dtypes = tuple(jnp.dtype(dtype) for dtype in dtypes)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(mean={self.mean!r}, variance={self.variance!r}, "
            f"dtypes={tuple(dtype.name for dtype in self.dtypes)!r})"
        )


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises what to do about an Estimate among plain updates."""
    del args, kwargs
    raise TypeError(_MET_OTHER_CODE)


_BINARY = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "divmod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
)
for _operator in (
    *_BINARY,
    *(f"r{name}" for name in _BINARY),
    *(f"i{name}" for name in _BINARY if name != "divmod"),
    *("neg", "pos", "abs", "invert", "round", "lt", "le", "gt", "ge"),
    *("bool", "int", "float", "complex", "index"),
    *("len", "iter", "getitem", "contains", "array", "jax_array"),
):
    setattr(Estimate, f"__{_operator}__", _refuse)

# Registered so that JAX's tree functions refuse it as well. An unregistered object is a
# leaf, which `jax.tree.map(f, updates, params)` hands to f beside the whole tree of
# parameters. What happens then is up to f: `optax.trace`, for instance, complains about
# "unsupported operand type(s) for *: 'float' and 'dict'".
jax.tree_util.register_pytree_node(Estimate, _refuse, _refuse)


def require_estimate(updates: Any, name: str) -> Estimate:
    """The updates in at least float32, if they are an Estimate; else an error."""
    if isinstance(updates, Estimate):
        mean, variance = upcast(updates.mean), upcast(updates.variance)
        return Estimate(mean, variance, updates.dtypes)
    raise TypeError(
        f"`{name}` needs an Estimate (mean, variance), got a plain "
        f"{type(updates).__name__} of gradients. Put moving_average_estimate(), "
        "attach_variance() or aggregate_per_example() before it in the chain."
    )


def require_gradients(updates: Any, name: str) -> None:
    """Raise if the updates are an Estimate already."""
    if isinstance(updates, Estimate):
        raise TypeError(
            f"`{name}` makes an Estimate from plain gradients, got an Estimate. Use "
            "one source of variance in a chain."
        )


def estimate_from_gradients(
    gradients: optax.Updates, mean: optax.Updates, variance: optax.Updates
) -> Estimate:
    """An Estimate made from gradients; None wherever there was no gradient."""
    mean, variance = (where_present(gradients, tree) for tree in (mean, variance))
    dtypes = tuple(dtype_of(g) for g in jax.tree.leaves(gradients))
    return Estimate(mean, variance, dtypes)


def in_gradient_dtype(
    updates: optax.Updates, dtypes: tuple[jnp.dtype, ...]
) -> optax.Updates:
    """Plain updates in the dtypes of the gradients, or float32 for integers."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(updates)
    pairs = zip(leaves, dtypes, strict=True)
    return treedef.unflatten([cast(leaf, update_dtype(dtype)) for leaf, dtype in pairs])


def update_accumulators(
    fn: Callable[..., tuple[jax.Array, jax.Array]],
    inputs: tuple[optax.Updates, ...],
    accumulators: tuple[optax.Updates, optax.Updates],
) -> tuple[optax.Updates, optax.Updates]:
    """Both accumulators after `fn`; a leaf whose input is None keeps its own."""
    treedef: Any = jax.tree.structure(inputs[0], is_leaf=is_none)
    new, rows = [], [treedef.flatten_up_to(tree) for tree in (*inputs, *accumulators)]
    for row in zip(*rows, strict=True):
        new.append(row[-2:] if row[0] is None else fn(*row))
    first, second = zip(*new, strict=True) if new else ((), ())
    return treedef.unflatten(first), treedef.unflatten(second)


def where_present(inputs: optax.Updates, tree: optax.Updates) -> optax.Updates:
    """The leaves of `tree` where there is an input, None elsewhere."""
    return jax.tree.map(
        lambda given, leaf: None if given is None else leaf,
        inputs,
        tree,
        is_leaf=is_none,
    )


def is_none(leaf: Any) -> bool:
    """Whether this is the place of an absent leaf."""
    return leaf is None
