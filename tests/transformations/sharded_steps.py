"""Two steps of every subject with sharded parameters; prints the names that passed.

A script that needs the environment of `tests.virtual_devices`.
"""

import jax
import jax.numpy as jnp

from tests.transformations.subjects import SUBJECTS, Subject


def check(subject: Subject) -> None:
    """Each buffer lies where its parameter lies, before and after a step."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {
        "matrix": jax.device_put(jnp.ones((8, 2)), split),
        "vector": jax.device_put(jnp.ones(16), split),
    }
    tx = subject.make()
    state = tx.init(params)
    assert_sharded(state, split)
    gradients = subject.gradients(params)
    if not subject.per_example:
        gradients = jax.device_put(gradients, split)
    extra = subject.extra_args(gradients)
    update = jax.jit(tx.update)
    for _ in range(2):
        _, new_state = update(gradients, state, params, **extra)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert_sharded(new_state, split)
        state = new_state


def assert_sharded(state: object, split: jax.sharding.NamedSharding) -> None:
    """Buffers are split over the devices; counts need not be."""
    for leaf in jax.tree.leaves(state):
        if leaf.ndim:
            assert leaf.sharding.is_equivalent_to(split, leaf.ndim), leaf.sharding


if __name__ == "__main__":
    assert jax.device_count() == 8
    for name, subject in SUBJECTS.items():
        check(subject)
        print(name)
