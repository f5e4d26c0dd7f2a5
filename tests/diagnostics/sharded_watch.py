"""Steps of `watch` with sharded parameters; prints what passed.

A script that needs the environment of `tests.virtual_devices`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax.diagnostics import scalars, watch

SHAPE = (64, 512)


def main() -> None:
    """Numbers, shardings, and what is sent between devices."""
    assert jax.device_count() == 8
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    tx = watch(sample=1000)
    update = jax.jit(tx.update)
    state = expected = tx.init(jnp.zeros(SHAPE))
    for seed in range(3):
        gradient = 1 + jax.random.normal(jax.random.key(seed), SHAPE)
        _, expected = update(gradient, expected)
        sharded = jax.device_put(gradient, split)
        updates, state = update(sharded, state)
        assert updates.sharding.is_equivalent_to(split, 2)
    for name, value in scalars(state).items():
        np.testing.assert_allclose(value, scalars(expected)[name], rtol=1e-5)
    print("sharded")
    # The whole gradient is never collected: no device sees an array of its size.
    program = update.lower(sharded, state).compile().as_text()
    collected = re.findall(r"f32\[([\d,]+)\]\S* all-gather", program)
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in collected]
    assert all(size < np.prod(SHAPE) / 4 for size in sizes), collected
    print("watch")


if __name__ == "__main__":
    main()
