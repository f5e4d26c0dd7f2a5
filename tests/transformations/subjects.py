"""Every public transformation and optimizer, made ready for the contract's tests.

A transformation from or to an `Estimate` stands in a chain that leads from gradients
to plain updates, so that one matrix of tests fits all of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dissect_optax as do
from dissect_optax import family

Transformation = optax.GradientTransformationExtraArgs
LEARNING_RATE = 0.125
BATCH_SIZE = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """One public factory, and the chain that it is tested in."""

    factory: Callable[..., Transformation]
    # Arguments by name: the numbers that may be traced, vmapped and injected.
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    # The rest of its arguments.
    others: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: tuple[Callable[[], Transformation], ...] = ()
    after: tuple[Callable[[], Transformation], ...] = ()
    needs_variance: bool = False
    per_example: bool = False

    def make(
        self,
        wrap: Callable[..., Any] = lambda factory: factory,
        **overrides: Any,
    ) -> Transformation:
        """The chain; `wrap` may put a wrapper of Optax around the factory."""
        arguments = {**self.numbers, **self.others, **overrides}
        tx = wrap(self.factory)(**arguments)
        if not (self.before or self.after):
            return tx
        return optax.chain(*(f() for f in self.before), tx, *(f() for f in self.after))

    @functools.cached_property
    def jitted_update(self) -> Callable[..., Any]:
        """The update of `make()`, compiled once for all tests."""
        return jax.jit(self.make().update)

    def extra_args(self, gradients: optax.Updates) -> dict[str, Any]:
        """What `update` needs beside gradients, state and parameters."""
        if not self.needs_variance:
            return {}
        return {"grad_variance": jax.tree.map(_variance, gradients)}

    def gradients(self, params: optax.Params, step: int = 0) -> optax.Updates:
        """Random gradients for these parameters."""
        rng = np.random.default_rng(step)
        batch = (BATCH_SIZE,) if self.per_example else ()
        return jax.tree.map(lambda p: _noise(rng, batch + p.shape, p.dtype), params)

    def run(
        self, update: Callable[..., Any], params: optax.Params, state: Any, steps: int
    ) -> tuple[optax.Updates, Any]:
        """The last updates and the state after some steps along random gradients."""
        updates = None
        for step in range(steps):
            gradients = self.gradients(params, step)
            updates, state = update(
                gradients, state, params, **self.extra_args(gradients)
            )
        return updates, state


def _variance(gradient: jax.Array) -> jax.Array:
    return 0.5 * jnp.square(jnp.abs(gradient)) + 0.25


def _noise(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    draw = rng.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        draw = draw + 1j * rng.normal(size=shape)
    return jnp.asarray(draw, dtype)


def factories(*names: str) -> tuple[Callable[[], Transformation], ...]:
    """Public factories, to be called with their defaults."""
    return tuple(getattr(do, name) for name in names)


_LEARNING = {"learning_rate": LEARNING_RATE}
_MOMENTUM = {"learning_rate": LEARNING_RATE, "momentum": 0.75}

OPTIMIZERS = {
    "sgd": Subject(do.sgd, _LEARNING),
    "ssd": Subject(do.ssd, _LEARNING),
    "svag": Subject(do.svag, {**_LEARNING, "decay": 0.75}),
    "m_sgd": Subject(do.m_sgd, _MOMENTUM),
    "m_ssd": Subject(do.m_ssd, _MOMENTUM),
    "m_svag": Subject(do.m_svag, _MOMENTUM),
    "m_svag debiased": Subject(do.m_svag, _MOMENTUM, {"debias_variance": True}),
    "adam": Subject(do.adam, {**_LEARNING, "b1": 0.75, "b2": 0.875, "eps": 1e-3}),
    "adam_star": Subject(do.adam_star, _MOMENTUM),
    "m_svag_mb": Subject(do.m_svag_mb, _MOMENTUM, needs_variance=True),
    "adam_star_mb": Subject(do.adam_star_mb, _MOMENTUM, needs_variance=True),
}

TRANSFORMATIONS = {
    "moving_average_estimate": Subject(
        do.moving_average_estimate,
        {"b1": 0.75},
        after=factories("adapt_to_variance"),
    ),
    "moving_average_estimate of two decays": Subject(
        do.moving_average_estimate,
        {"b1": 0.75, "b2": 0.875, "eps": 1e-3},
        after=factories("adapt_to_variance"),
    ),
    "attach_variance": Subject(
        do.attach_variance, after=factories("adapt_to_variance"), needs_variance=True
    ),
    "aggregate_per_example": Subject(
        do.aggregate_per_example, after=factories("adapt_to_variance"), per_example=True
    ),
    "with_relative_variance_of": Subject(
        lambda b1: do.with_relative_variance_of(do.moving_average_estimate(b1)),
        {"b1": 0.75},
        after=factories("adapt_to_variance"),
    ),
    "accumulate_momentum": Subject(
        do.accumulate_momentum,
        {"momentum": 0.75},
        before=factories("attach_variance"),
        after=factories("adapt_to_variance"),
        needs_variance=True,
    ),
    "correct_for_momentum": Subject(
        do.correct_for_momentum,
        {"momentum": 0.75},
        before=factories("moving_average_estimate"),
        after=factories("adapt_to_variance"),
    ),
    "scale_by_sign": Subject(do.scale_by_sign),
    "masked": Subject(
        do.masked,
        others={"inner": do.scale_by_sign(), "mask": True},
        before=factories("attach_variance"),
        after=factories("adapt_to_variance"),
        needs_variance=True,
    ),
    "scale_by_sign of an Estimate": Subject(
        do.scale_by_sign,
        before=factories("attach_variance"),
        after=factories("adapt_to_variance"),
        needs_variance=True,
    ),
    **{
        f"adapt_to_variance({factor.__name__})": Subject(
            do.adapt_to_variance,
            others={"factor": factor},
            before=factories("attach_variance"),
            needs_variance=True,
        )
        for factor in (do.inverse, do.inverse_sqrt, do.gaussian_sign)
    },
}

# Of the family two chains that have many parts between them: a mean beside the
# direction, a deviation from it, sources that are read a step late, η⁻¹, a factor
# before the momentum. tests/family has all members.
FAMILY = {
    "family.acprop": Subject(
        family.acprop, {**_LEARNING, "b1": 0.75, "b2": 0.875, "eps_root": 1e-3}
    ),
    "family.adopt": Subject(
        family.adopt,
        {**_LEARNING, "b1": 0.75, "b2": 0.875, "eps": 1e-3},
        # `inject_hyperparams` takes a function for a schedule unless told otherwise.
        {"clip_value_fn": jnp.sqrt},
    ),
}

SUBJECTS = {**TRANSFORMATIONS, **OPTIMIZERS, **FAMILY}
