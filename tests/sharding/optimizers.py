"""Every transformation and optimizer with sharded state; a JSON line for each."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.sharding import (
    bytes_of,
    bytes_on_device,
    collectives,
    difference,
    layer_loss,
    set_mesh,
    spread_leaves,
    zero_step,
)
from dissect_optax import family, m_svag_mb, value_grad_and_variance
from tests.transformations.subjects import SUBJECTS, Subject

P = PartitionSpec


def mesh_of(kind: AxisType) -> Mesh:
    devices = np.array(jax.devices()).reshape(4, 2)
    return Mesh(devices, ("data", "model"), axis_types=(kind, kind))


SPECS = {"matrix": P("data", "model"), "vector": P("model")}
SHAPES = {"matrix": (8, 4), "vector": (6,)}


def check_transformations() -> Iterator[dict[str, Any]]:
    """State that is born where its parameters are, and stays there."""
    for name, subject in SUBJECTS.items():
        born = born_sharded(subject)
        typed = types_of_state(subject)
        yield {"name": name, "born": born, "typed": typed}


def born_sharded(subject: Subject) -> int:
    """Initializes from shapes; returns how many buffers are like their parameter."""
    mesh = mesh_of(AxisType.Auto)
    like = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    shapes = {
        k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in SHAPES.items()
    }
    tx = subject.make()
    shardings = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, shapes),
        like,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    # Nothing but shapes is given, so that no state can be anywhere before.
    init = jax.jit(tx.init, out_shardings=shardings).lower(shapes).compile()
    outputs = jax.tree.leaves(init.output_shardings)
    buffers = 0
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, shapes))
    for leaf, sharding in zip(leaves, outputs, strict=True):
        if leaf.ndim:
            expected = like["matrix" if leaf.ndim == 2 else "vector"]
            assert sharding.is_equivalent_to(expected, leaf.ndim), (leaf, sharding)
            buffers += 1
    return buffers


def types_of_state(subject: Subject) -> int:
    """Traces `init` and two updates on a mesh whose axes have the type Explicit."""
    mesh = mesh_of(AxisType.Explicit)
    tx = subject.make()
    with set_mesh(mesh):
        params = {
            k: jax.device_put(jnp.ones(shape), NamedSharding(mesh, SPECS[k]))
            for k, shape in SHAPES.items()
        }
        batch = (None,) * subject.per_example
        gradients = {
            k: jax.device_put(g, NamedSharding(mesh, P(*batch, *SPECS[k])))
            for k, g in subject.gradients(params).items()
        }
        extra = subject.extra_args(gradients)

        def step(params: Any, gradients: Any, extra: Any) -> Any:
            states = [tx.init(params)]
            for _ in range(2):
                updates, state = tx.update(gradients, states[-1], params, **extra)
                states.append(state)
            return optax.apply_updates(params, updates), states

        moved, states = jax.eval_shape(step, params, gradients, extra)
    buffers = 0
    for leaf in jax.tree.leaves((moved, states)):
        if leaf.ndim:
            spec = SPECS["matrix" if leaf.ndim == 2 else "vector"]
            assert tuple(leaf.sharding.spec) == tuple(spec), leaf
            buffers += 1
    return buffers


def check_zero() -> Iterator[dict[str, Any]]:
    """ZeRO-1 of every optimizer, from compiled programs."""
    for name, member in family.MEMBERS.items():
        zero = zero_step(member)
        params, state = zero.initial
        rest = [leaf for leaf in jax.tree.leaves(state) if leaf.shape[:1] == ()]
        line = {
            "name": name,
            "needs variance": member.needs_variance,
            "parameters": bytes_of(params),
            "state": bytes_of(state),
            "scalars": bytes_of(rest),
            "state on a device": bytes_on_device(state),
        }
        alone = jax.tree.map(np.asarray, (params, zero.batch))
        tx = optax.with_extra_args_support(member.factory(1e-3))
        expected = on_one_device(tx, member.needs_variance, *alone)
        program = zero.step.lower(params, state, zero.batch).compile()
        new_params, new_state = program(params, state, zero.batch)
        line["error"] = difference(
            jax.tree.map(np.asarray, new_params), jax.tree.map(np.asarray, expected)
        )
        line["kept"] = all(
            leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            for leaf, sharding in zip(
                *map(jax.tree.leaves, (new_state, zero.shardings)), strict=True
            )
        )
        line["collectives"] = collectives(program.as_text())
        yield line


def on_one_device(tx: Any, needs_variance: bool, params: Any, batch: np.ndarray) -> Any:
    """The parameters after one step without a mesh."""

    @jax.jit
    def step(params: Any, batch: Any) -> Any:
        _, grad, variance = value_grad_and_variance(layer_loss)(params, batch)
        further = {"grad_variance": variance} if needs_variance else {}
        updates, _ = tx.update(grad, tx.init(params), params, **further)
        return optax.apply_updates(params, updates)

    return step(params, batch)


def check_nnx() -> Iterator[dict[str, Any]]:
    """The recipe of docs/scaling.md, and the same without its last constraint."""
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    everywhere, split = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
    batch = jax.device_put((jnp.ones((16, 16)), jnp.ones((16, 8))), split)
    for constrained in (True, False):
        model = nnx.Sequential(
            nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 8, rngs=nnx.Rngs(1))
        )
        nnx.update(model, jax.device_put(nnx.state(model), everywhere))
        optimizer = nnx.Optimizer(model, m_svag_mb(0.01), wrt=nnx.Param)
        state = nnx.state(optimizer)
        nnx.update(optimizer, jax.device_put(state, spread_leaves(mesh, state)))

        def step(model: Any, optimizer: Any, batch: Any, keep: bool = constrained):
            graph, parameters = nnx.split(model)

            def loss(parameters: Any, example: Any) -> jax.Array:
                x, target = example
                return jnp.square(nnx.merge(graph, parameters)(x) - target).mean()

            measure = value_grad_and_variance(loss, batch_sharding=split)
            _, grad, variance = measure(parameters, batch)
            optimizer.update(model, grad, grad_variance=variance)
            if keep:
                new = jax.lax.with_sharding_constraint(nnx.state(model), everywhere)
                nnx.update(model, new)

        nnx.jit(step)(model, optimizer, batch)
        leaves = jax.tree.leaves(nnx.state(model))
        buffers = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim]
        yield {
            "constrained": constrained,
            "model on every device": all(x.is_fully_replicated for x in leaves),
            "state spread": all(
                x.sharding.is_equivalent_to(split, x.ndim) for x in buffers
            ),
        }


CHECKS = {
    "transformations": check_transformations,
    "zero": check_zero,
    "nnx": check_nnx,
}

if __name__ == "__main__":
    for line in CHECKS[sys.argv[1]]():
        print(json.dumps(line), flush=True)
