"""A transformation of an `Estimate` on some leaves only."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from dissect_optax._estimate import Estimate, in_gradient_dtype


def masked(
    inner: optax.GradientTransformation,
    mask: Any | Callable[[optax.Params], Any],
) -> optax.GradientTransformationExtraArgs:
    """Applies a transformation to some leaves of an `Estimate` and leaves the others.

    For plain updates it is `optax.masked`, which cannot look into an `Estimate`. Of
    an `Estimate`, `inner` sees the leaves with a mask of True; mean and variance of the
    others are unchanged.

    Args:
      inner: The transformation for these leaves: `scale_by_sign`,
        `accumulate_momentum`, `correct_for_momentum`, `adapt_to_variance` or a chain
        of them.
      mask: A tree of booleans like the parameters, or a prefix of it, True where
        `inner` acts; or a function that makes one from parameters or updates.

    Returns:
      A transformation from `Estimate` to whatever `inner` returns for one. Its state is
      an `optax.MaskedState`, without buffers for the other leaves.

    Raises:
      TypeError: From `update`, if `inner` makes an `Estimate` of plain updates: the
        other leaves would have no variance.

    Edge cases:
      * If `inner` ends the `Estimate`, as `adapt_to_variance` does, it ends for all
        leaves: the others return their mean, as with a factor of one.
      * A mask without any True, or without any False, is allowed.
      * With `accumulate_momentum` inside, the other leaves are single gradients beside
        sums of gradients.

    Examples:
      Signs for the matrices; biases keep their magnitude, and all are adapted:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import dissect_optax as do
      >>> tx = optax.chain(
      ...     do.moving_average_estimate(0.9),
      ...     do.masked(do.scale_by_sign(), {"matrix": True, "bias": False}),
      ...     do.adapt_to_variance(do.inverse),
      ... )
      >>> gradient = {"matrix": jnp.array([[4.0]]), "bias": jnp.array([-3.0])}
      >>> updates, _ = tx.update(gradient, tx.init(gradient))
      >>> float(updates["matrix"][0, 0]), float(updates["bias"][0])
      (1.0, -3.0)

    References:
      Balles & Hennig, "Dissecting Adam", §1.1.
    """
    inner = optax.with_extra_args_support(inner)

    def update_inner(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        new_updates, state = inner.update(updates, state, params, **extra_args)
        if isinstance(new_updates, Estimate):
            raise TypeError(
                "`masked` cannot make an Estimate of some leaves only: the others "
                "would have no variance. Put the source of variance before `masked`, "
                "or use optax.partition or optax.masked around the whole chain up to "
                "adapt_to_variance()."
            )
        return new_updates, state

    plain = optax.masked(
        optax.GradientTransformationExtraArgs(inner.init, update_inner), mask
    )

    def update_fn(
        updates: optax.Updates | Estimate,
        state: optax.MaskedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates | Estimate, optax.MaskedState]:
        if not isinstance(updates, Estimate):
            return plain.update(updates, state, params, **extra_args)
        estimate = updates
        mask_tree = mask(estimate.mean) if callable(mask) else mask

        def chosen(tree: Any) -> Any:
            """The tree with holes where the mask is False."""
            return jax.tree.map(
                lambda m, part: part if m else optax.MaskedNode(), mask_tree, tree
            )

        def filled(tree: Any, rest: Any) -> Any:
            """The tree with its holes filled from `rest`."""
            return jax.tree.map(
                lambda m, part, other: part if m else other, mask_tree, tree, rest
            )

        treedef: Any = jax.tree.structure(estimate.mean)
        dtypes = tuple(jax.tree.leaves(chosen(treedef.unflatten(estimate.dtypes))))
        part = Estimate(chosen(estimate.mean), chosen(estimate.variance), dtypes)
        new, inner_state = inner.update(
            part,
            state.inner_state,
            None if params is None else chosen(params),
            **extra_args,
        )
        new_state = optax.MaskedState(inner_state=inner_state)
        if isinstance(new, Estimate):
            mean = filled(new.mean, estimate.mean)
            variance = filled(new.variance, estimate.variance)
            return Estimate(mean, variance, estimate.dtypes), new_state
        rest = in_gradient_dtype(estimate.mean, estimate.dtypes)
        return filled(new, rest), new_state

    return optax.GradientTransformationExtraArgs(plain.init, update_fn)
