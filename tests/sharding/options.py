"""Options of `value_grad_and_variance` on meshes; a JSON line for each check."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.sharding import (
    bytes_of,
    collectives,
    difference,
    set_mesh,
)
from dissect_optax import value_grad_and_variance

P = PartitionSpec
KINDS = ("auto", "explicit", "shard_map, check_vma")
EXAMPLES = 24


def normal(*shape: int, seed: int = 0) -> jax.Array:
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray(random.normal(size=shape), jnp.result_type(float))


PARAMS = {"w": normal(6, 4), "b": normal(4), "out": normal(4, 8)}
BATCH = {"x": normal(EXAMPLES, 3, 6), "y": normal(EXAMPLES, 3, 8)}


def loss(params: Any, example: Any, power: float = 2.0) -> jax.Array:
    hidden = jnp.tanh(example["x"] @ params["w"] + params["b"][None])
    return (jnp.abs(hidden @ params["out"] - example["y"]) ** power).sum()


def loss_with_aux(params: Any, example: Any) -> tuple[jax.Array, Any]:
    return loss(params, example), {"row": example["x"][0], "none": None}


def mean_loss(params: Any, batch: Any) -> jax.Array:
    return jax.vmap(loss, (None, 0))(params, batch).mean()


def named_loss(params: Any, example: Any, activation: str) -> jax.Array:
    assert activation == "tanh"
    return loss(params, example)


def penalty(params: Any) -> jax.Array:
    return 0.1 * jnp.square(params["w"]).sum()


def nearly_equal(params: Any, example: Any) -> jax.Array:
    return 1e4 * (params["w"] * jnp.ones((6, 4))).sum() + 1e-4 * loss(params, example)


WEIGHTS = jnp.abs(normal(EXAMPLES)) + 0.1
# The first device has no example that counts, and what it has is not finite.
MASK = jnp.asarray([0.0] * 3 + [1.0, 2.0, 0.0] * 7)
BROKEN = jax.tree.map(
    lambda x: jnp.where(jnp.expand_dims(MASK == 0, (1, 2)), jnp.nan, x), BATCH
)

# Loss, keywords, batch, arguments after it, weights.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], Any, tuple[Any, ...], Any]]
CASES = {
    "weights": (loss, {}, BATCH, (), WEIGHTS),
    "masked examples": (loss, {}, BROKEN, (), MASK),
    "micro-batches that leave a rest": (loss, {"microbatch_size": 2}, BATCH, (), None),
    "two passes": (nearly_equal, {"two_pass": True}, BATCH, (), None),
    "batched": (mean_loss, {"batched": True}, BATCH, (), None),
    "frozen and static": (
        named_loss,
        {"trainable": {"w": True, "b": False, "out": True}},
        BATCH,
        ("tanh",),
        None,
    ),
    "all at once": (
        loss_with_aux,
        {
            "has_aux": True,
            "two_pass": True,
            "microbatch_size": 2,
            "regularizer": penalty,
        },
        BATCH,
        (),
        WEIGHTS,
    ),
}


def check_options() -> Iterator[dict[str, Any]]:
    for name, (function, options, batch, shared, weights) in CASES.items():
        expected = _result(None, function, options, batch, shared, weights)[0]
        for kind in KINDS:
            result, program = _result(kind, function, options, batch, shared, weights)
            yield {
                "case": f"{name}, {kind}",
                "error": difference(result, expected),
                "finite": all(bool(np.isfinite(x).all()) for x in _arrays(result)),
                "collectives": collectives(program),
                "gradient and variance": bytes_of(result[1:]),
            }


def _result(
    kind: str | None,
    function: Callable[..., Any],
    options: dict[str, Any],
    batch: Any,
    shared: tuple[Any, ...],
    weights: Any,
) -> tuple[Any, str]:
    """Value, gradient and variance on a kind of mesh, and the compiled program."""
    is_explicit = kind == "explicit"
    mesh = one_axis(AxisType.Explicit if is_explicit else AxisType.Auto)
    split, everywhere = (NamedSharding(mesh, s) for s in (P("data"), P()))
    options = dict(options)
    if kind is None:
        pass
    elif kind.startswith("shard_map"):
        options["axis_name"] = "data"
    elif kind == "auto":
        options["batch_sharding"] = split
    measure = value_grad_and_variance(function, **options)

    def run(params: Any, batch: Any, weights: Any) -> Any:
        return measure(params, batch, *shared, weights=weights)

    params = PARAMS
    if kind is not None:
        params = jax.device_put(params, everywhere)
        batch, weights = jax.device_put((batch, weights), split)
    if kind is not None and kind.startswith("shard_map"):
        by_example = (P(), P("data")) if "has_aux" in options else P()
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=(by_example, P(), P()),
            check_vma=kind.endswith("check_vma"),
        )
    if is_explicit:
        with set_mesh(mesh):
            return _compiled(run, params, batch, weights)
    return _compiled(run, params, batch, weights)


def _compiled(run: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    program = jax.jit(run).lower(*arguments).compile()
    return program(*arguments), program.as_text()


def _arrays(tree: Any) -> list[np.ndarray]:
    return list(map(np.asarray, jax.tree.leaves(tree)))


def one_axis(kind: AxisType) -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",), axis_types=(kind,))


def two_axes(kind: AxisType, *names: str) -> Mesh:
    devices = np.array(jax.devices()).reshape(4, 2)
    return Mesh(devices, names or ("data", "model"), axis_types=(kind,) * 2)


# ---- Other meshes --------------------------------------------------------------------


def check_meshes() -> Iterator[dict[str, Any]]:
    plain = jax.jit(value_grad_and_variance(loss))(PARAMS, BATCH)
    for name, check in {
        "parameters over another axis, auto": sharded_parameters_auto,
        "parameters over another axis, explicit": sharded_parameters_explicit,
        "parameters over the same axis, auto": parameters_over_data_auto,
        "parameters over the same axis, explicit": parameters_over_data_explicit,
        "parameters alone, explicit": parameters_alone,
        "two axes, auto": over_both_auto,
        "two axes, explicit": over_both_explicit,
        "two axes, shard_map": over_both_shard_map,
        "labels on all devices, explicit": labels_everywhere,
        "a spec in context": spec_in_context,
        "types without context": types_without_context,
        "mapped replicas": mapped_replicas,
    }.items():
        result = check()
        yield {"case": name, "error": difference(result, plain)}


def over_model(mesh: Mesh, leaf: jax.Array) -> NamedSharding:
    """Matrices are spread over the axis `model`, by their outputs."""
    return NamedSharding(mesh, P(None, "model") if leaf.ndim == 2 else P())


def put_parameters(mesh: Mesh, axis: str) -> Any:
    def put(leaf: jax.Array) -> jax.Array:
        spec = P(None, axis) if leaf.ndim == 2 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, PARAMS)


def check_results_are_like(params: Any, result: Any) -> None:
    for tree in result[1:]:
        for leaf, like in zip(*map(jax.tree.leaves, (tree, params)), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), (
                leaf.sharding,
                like.sharding,
            )


def auto(mesh: Mesh, params: Any, spec: PartitionSpec) -> Any:
    split = NamedSharding(mesh, spec)
    measure = jax.jit(value_grad_and_variance(loss, batch_sharding=split))
    return measure(params, jax.device_put(BATCH, split))


def explicit(mesh: Mesh, params: Any, spec: PartitionSpec) -> Any:
    with set_mesh(mesh):
        batch = jax.device_put(BATCH, NamedSharding(mesh, spec))
        result = jax.jit(value_grad_and_variance(loss))(params, batch)
    check_results_are_like(params, result)
    return result


def sharded_parameters_auto() -> Any:
    mesh = two_axes(AxisType.Auto)
    return auto(mesh, put_parameters(mesh, "model"), P("data"))


def sharded_parameters_explicit() -> Any:
    mesh = two_axes(AxisType.Explicit)
    return explicit(mesh, put_parameters(mesh, "model"), P("data"))


def parameters_over_data_auto() -> Any:
    mesh = two_axes(AxisType.Auto)
    return auto(mesh, put_parameters(mesh, "data"), P("data"))


def parameters_over_data_explicit() -> Any:
    mesh = two_axes(AxisType.Explicit)
    return explicit(mesh, put_parameters(mesh, "data"), P("data"))


def parameters_alone() -> Any:
    mesh = two_axes(AxisType.Explicit)
    return explicit(mesh, put_parameters(mesh, "model"), P())


def over_both_auto() -> Any:
    return auto(two_axes(AxisType.Auto), PARAMS, P(("data", "model")))


def over_both_explicit() -> Any:
    mesh = two_axes(AxisType.Explicit)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    return explicit(mesh, params, P(("data", "model")))


def over_both_shard_map() -> Any:
    mesh, axes = two_axes(AxisType.Auto), ("data", "model")
    mapped = jax.shard_map(
        value_grad_and_variance(loss, axis_name=axes),
        mesh=mesh,
        in_specs=(P(), P(axes)),
        out_specs=P(),
    )
    return jax.jit(mapped)(PARAMS, BATCH)


def labels_everywhere() -> Any:
    mesh = one_axis(AxisType.Explicit)
    batch = {
        "x": jax.device_put(BATCH["x"], NamedSharding(mesh, P("data"))),
        "y": jax.device_put(BATCH["y"], NamedSharding(mesh, P())),
    }
    with set_mesh(mesh):
        return jax.jit(value_grad_and_variance(loss))(PARAMS, batch)


def spec_in_context() -> Any:
    mesh = one_axis(AxisType.Auto)
    with set_mesh(mesh):
        measure = value_grad_and_variance(loss, batch_sharding=P("data"))
        return jax.jit(measure)(PARAMS, BATCH)


def types_without_context() -> Any:
    mesh = one_axis(AxisType.Explicit)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    measure = jax.jit(value_grad_and_variance(loss))
    if hasattr(jax.sharding, "use_abstract_mesh"):
        return measure(params, batch)
    with pytest.raises(ValueError, match=r"use_mesh\(mesh\)"):
        measure(params, batch)
    with set_mesh(mesh):
        return measure(params, batch)


def mapped_replicas() -> Any:
    """Two models at once, over an axis of their own."""
    mesh = two_axes(AxisType.Auto, "data", "replica")
    split = NamedSharding(mesh, P("data"))
    measure = value_grad_and_variance(loss, batch_sharding=split)
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    params = jax.device_put(params, NamedSharding(mesh, P("replica")))
    batch = jax.device_put(BATCH, split)
    both, program = _compiled(jax.vmap(measure, (0, None)), params, batch)
    assert set(collectives(program)) == {"all-reduce"}, collectives(program)
    return jax.tree.map(lambda x: x[0], both)


# ---- Errors --------------------------------------------------------------------------


def check_errors() -> Iterator[dict[str, Any]]:
    mesh = one_axis(AxisType.Auto)
    typed = two_axes(AxisType.Explicit)
    split = NamedSharding(mesh, P("data"))
    short = jax.tree.map(lambda x: x[:12], BATCH)

    def put(axis: str, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(typed, P(axis)))

    def in_shard_map() -> Any:
        measure = value_grad_and_variance(loss, batch_sharding=P("data"))
        return jax.shard_map(
            measure, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
        )(PARAMS, BATCH)

    def in_context(spec: PartitionSpec, batch: Any, mesh: Mesh) -> Any:
        with set_mesh(mesh):
            return value_grad_and_variance(loss, batch_sharding=spec)(PARAMS, batch)

    cases: dict[str, Callable[[], Any]] = {
        "uneven": lambda: value_grad_and_variance(loss, batch_sharding=split)(
            PARAMS, short
        ),
        "both": lambda: value_grad_and_variance(
            loss, batch_sharding=split, axis_name="data"
        )(PARAMS, BATCH),
        "not mapped": lambda: value_grad_and_variance(loss, axis_name="data")(
            PARAMS, BATCH
        ),
        "no context": lambda: value_grad_and_variance(loss, batch_sharding=P("data"))(
            PARAMS, BATCH
        ),
        "a name": lambda: value_grad_and_variance(
            loss,
            batch_sharding="data",  # type: ignore[arg-type]
        )(PARAMS, BATCH),
        "unknown axis": lambda: in_context(P("batch"), BATCH, mesh),
        "manual axis": in_shard_map,
        "different axes": lambda: value_grad_and_variance(loss)(
            PARAMS, {"x": put("data", BATCH["x"]), "y": put("model", BATCH["y"])}
        ),
        "another axis": lambda: in_context(
            P("model"), jax.tree.map(lambda x: put("data", x), BATCH), typed
        ),
    }
    for name, call in cases.items():
        try:
            call()
        except Exception as error:
            yield {"case": name, "error": f"{type(error).__name__}: {error}"}
        else:
            yield {"case": name, "error": None}


CHECKS = {"options": check_options, "meshes": check_meshes, "errors": check_errors}

if __name__ == "__main__":
    for line in CHECKS[sys.argv[1]]():
        print(json.dumps(line), flush=True)
