"""Streams of gradients, and what an optimizer makes of one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dissect_optax

STEPS = 60
SHAPES = {"scalar": (), "vector": (3,), "matrix": (2, 2)}


def stream(
    seed: int,
    shape: tuple[int, ...] = (4,),
    steps: int = STEPS,
    imaginary: bool = False,
) -> np.ndarray:
    """Gradients with a drifting mean, noise of every size, and exact zeros."""
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.normal(size=(steps, *shape)), axis=0) / 8
    gradients = drift + rng.normal(size=(steps, *shape)) * rng.exponential(size=shape)
    if imaginary:
        gradients = gradients + 1j * stream(seed + 1, shape, steps)
    return np.where(rng.uniform(size=(steps, *shape)) < 0.1, 0.0, gradients)


def tree_stream(dtype: Any = np.float32, steps: int = STEPS) -> dict[str, np.ndarray]:
    """A stream for every shape, rounded to the numbers that the optimizer will see."""
    return {
        name: stream(seed, shape, steps).astype(dtype)
        for seed, (name, shape) in enumerate(SHAPES.items())
    }


def as_arrays(updates: Any) -> Any:
    """Plain updates, or (mean, variance) of an Estimate, which JAX does not return."""
    if isinstance(updates, dissect_optax.Estimate):
        return updates.mean, updates.variance
    return updates


def trajectory(
    tx: optax.GradientTransformation, gradients: Any, variances: Any = None
) -> Any:
    """The updates, or (mean, variance), of all steps, stacked: one compiled loop."""
    tx = optax.with_extra_args_support(tx)

    def step(state: Any, inputs: Any) -> Any:
        gradient, variance = inputs
        extra = {} if variance is None else {"grad_variance": variance}
        updates, state = tx.update(gradient, state, **extra)
        return state, as_arrays(updates)

    gradients, variances = jax.tree.map(jnp.asarray, (gradients, variances))
    params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)
    run = jax.jit(lambda inputs: jax.lax.scan(step, tx.init(params), inputs)[1])
    return jax.device_get(run((gradients, variances)))
