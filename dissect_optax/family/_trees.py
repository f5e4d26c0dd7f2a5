"""Functions mapped over trees in which a gradient may be missing."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from dissect_optax._estimate import is_none


def map_present(
    fn: Callable[..., jax.Array], gradients: optax.Updates, *trees: Any
) -> optax.Updates:
    """`fn` of the leaves where there is a gradient, None elsewhere.

    A tree of None stands for None in every leaf.
    """
    treedef, rows = _rows(gradients, trees)
    return treedef.unflatten([None if row[0] is None else fn(*row) for row in rows])


def update_buffer(
    fn: Callable[..., jax.Array], inputs: tuple[Any, ...], buffer: optax.Updates
) -> optax.Updates:
    """`fn` of inputs and buffer; a leaf without a gradient keeps its buffer.

    The first input is the tree of gradients; another of None stands for None in every
    leaf.
    """
    treedef, rows = _rows(inputs[0], (*inputs[1:], buffer))
    return treedef.unflatten([row[-1] if row[0] is None else fn(*row) for row in rows])


def is_zero(value: Any) -> bool:
    """Whether a Python number, and not a traced value, is zero."""
    return isinstance(value, int | float) and value == 0


def _rows(gradients: optax.Updates, trees: tuple[Any, ...]) -> tuple[Any, Any]:
    """The structure of the gradients, and what belongs to each of its leaves."""
    treedef: Any = jax.tree.structure(gradients, is_leaf=is_none)
    columns = [
        [None] * treedef.num_leaves if tree is None else treedef.flatten_up_to(tree)
        for tree in (gradients, *trees)
    ]
    return treedef, zip(*columns, strict=True)
