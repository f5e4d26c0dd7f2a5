"""A line through noisy points: the arguments of `dissect` where it takes no time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def points(count: int = 64, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `[count, 2]` and noisy values of a linear function."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(count, 2))
    targets = inputs @ np.array([1.0, -1.0]) + 0.5 * random.normal(size=count) + shift
    return inputs.astype(np.float32), targets.astype(np.float32)


def loss(w: jax.Array, example: Any) -> jax.Array:
    """Squared error of one example, above a bound."""
    x, y = example
    return 0.5 * jnp.square(x @ w - y)


def mean_loss(w: jax.Array, batch: Any) -> jax.Array:
    """The same for a batch `[batch, ...]`."""
    x, y = batch
    return 0.5 * jnp.mean(jnp.square(x @ w - y))


def init(key: jax.Array) -> jax.Array:
    """Two normal weights, far from the best ones."""
    return 3.0 + 0.3 * jax.random.normal(key, (2,))


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of `dissect`: one method, 20 steps, two seeds."""
    fixed = {
        "loss": loss,
        "init": init,
        "data": points(),
        "batch_size": 8,
        "steps": 20,
        "seeds": 2,
        "methods": ("m_ssd",),
        "level": None,
        "progress": False,
    }
    return fixed | changes
