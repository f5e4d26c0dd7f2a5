"""The choice of the parameters that a gradient is taken by."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Trainable = PyTree | Callable[[tuple[Any, ...], Any], bool] | None


@dataclasses.dataclass(frozen=True)
class Selection:
    """Parameters in the order of their leaves, and which of them are trainable."""

    tree: Any
    leaves: list[Any]
    paths: list[str]
    chosen: list[bool]

    @property
    def trainable(self) -> list[Any]:
        """The leaves that the gradient is taken by."""
        return [leaf for leaf, t in zip(self.leaves, self.chosen, strict=True) if t]

    @property
    def frozen(self) -> list[Any]:
        """The other leaves."""
        return [leaf for leaf, t in zip(self.leaves, self.chosen, strict=True) if not t]

    @property
    def trainable_paths(self) -> list[str]:
        """Paths of the trainable leaves."""
        return [path for path, t in zip(self.paths, self.chosen, strict=True) if t]

    def full(self, trainable: list[Any], frozen: list[Any]) -> PyTree:
        """The whole tree, with the given leaves in place of its own."""
        parts = {True: iter(trainable), False: iter(frozen)}
        return jax.tree.unflatten(self.tree, [next(parts[t]) for t in self.chosen])

    def results(self, values: list[Any], frozen: Any = None) -> PyTree:
        """A tree of one value per trainable leaf, and `frozen` for the others."""
        return self.full(values, [frozen] * self.chosen.count(False))


def select_parameters(params: PyTree, trainable: Trainable) -> Selection:
    """Leaves of `params` by `trainable`, with those that have a gradient checked."""
    with_paths, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in with_paths]
    paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    if trainable is None:
        chosen = [True] * len(leaves)
    elif callable(trainable) and jax.tree_util.all_leaves([trainable]):
        # A module of Equinox is callable too; as a tree of bools it is not a leaf.
        chosen = [
            _as_bool(trainable(path, leaf), name)
            for (path, leaf), name in zip(with_paths, paths, strict=True)
        ]
    else:
        chosen = _by_prefix(params, trainable)
    if trainable is not None and leaves and not any(chosen):
        raise ValueError(
            "`trainable` freezes every parameter, so there is no gradient. The "
            f"parameters are {', '.join(paths)}."
        )
    for leaf, path, is_trainable in zip(leaves, paths, chosen, strict=True):
        if is_trainable:
            _check_leaf(leaf, path or "params")
    return Selection(tree, leaves, paths, chosen)


def _by_prefix(params: PyTree, trainable: PyTree) -> list[bool]:
    """A bool for each leaf, from a tree that may end above the leaves."""
    try:
        flags = jax.tree.map(
            lambda flag, subtree: [flag] * len(jax.tree.leaves(subtree)),
            trainable,
            params,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`trainable` must be a tree of bools with the structure of `params` or of "
            "its upper part, or a function of a path and a leaf, got the structure "
            f"{jax.tree.structure(trainable)} for {jax.tree.structure(params)}."
        ) from error
    flat = jax.tree.leaves(flags)
    return [_as_bool(flag, "the tree") for flag in flat]


def _as_bool(flag: Any, name: str) -> bool:
    """A flag that is known when the program is built."""
    if isinstance(flag, bool | np.bool_):
        return bool(flag)
    raise TypeError(
        "`trainable` must say True or False for every parameter, as a Python or NumPy "
        f"bool, got {type(flag).__name__} for {name}. It is read when the program is "
        "built, so it cannot be an array."
    )


def _check_leaf(leaf: Any, path: str) -> None:
    """Reject a trainable leaf that has no gradient, by its path."""
    if not isinstance(leaf, int | float | complex) and not hasattr(leaf, "dtype"):
        what = getattr(leaf, "__qualname__", None) or type(leaf).__name__
        kind = "the function " if callable(leaf) else "an object of type "
        raise TypeError(
            f"Every parameter must be an array, but {path} is {kind}`{what}`. Freeze "
            "what is not an array, `trainable=lambda path, leaf: isinstance(leaf, "
            "jax.Array)`, or take it out of the parameters and put it back in the "
            "loss: `arrays, rest = equinox.partition(model, "
            "equinox.is_inexact_array)` and `equinox.combine(arrays, rest)`."
        )
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            "A gradient is taken by floating-point and complex parameters, but "
            f"{path} has dtype {dtype}. Freeze it, e.g. with `trainable=lambda path, "
            "leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)`, or pass it to the loss "
            "as a further argument."
        )
