"""What travels between devices, and what each of them holds, on eight virtual devices.

    python -m benchmarks.sharding variance     # gradient and variance, models × meshes
    python -m benchmarks.sharding optimizers   # state of every optimizer, ZeRO-1
    python -m benchmarks.sharding overhead     # time at fixed total work

Everything but the last is read off compiled programs: the collectives in their text
with the bytes of their results, and the temporary memory per device. A collective
inside a loop counts once. `variance` computes in float64 and leaves most optimizations
of the compiler out, as the tests do. Eight devices on a few cores show no speed-up, so
`overhead` compares eight devices with one at the same total work: it is what the
division costs, and no more than that. Each command adds its part to
`results/sharding.json`.
"""

import argparse
import contextlib
import functools
import importlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.environment import environment
from benchmarks.networks import NETWORKS
from dissect_optax import family, value_grad_and_variance

OUTPUT = Path("benchmarks/results/sharding.json")
DEVICES = 8
EXAMPLES = 16

# ---- Compiled programs ---------------------------------------------------------------

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COLLECTIVE = re.compile(rf"= (\([^()]*\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")


class Collectives(NamedTuple):
    """How often a collective is in the text of a program, and what it returns."""

    number: int
    bytes: int


def collectives(program: str) -> dict[str, Collectives]:
    """The collectives in the text of a compiled program."""
    found: dict[str, Collectives] = {}
    for result, name in _COLLECTIVE.findall(program):
        count, size = found.get(name, (0, 0))
        arrays = _ARRAY.findall(result)
        found[name] = Collectives(
            count + 1, size + sum(_bytes(*array) for array in arrays)
        )
    return found


def in_words(found: dict[str, Collectives]) -> dict[str, dict[str, int]]:
    """The same as it is written to a file."""
    return {k: {"count": number, "bytes": size} for k, (number, size) in found.items()}


def _bytes(kind: str, bits: str, shape: str) -> int:
    """Size of an array, from its type as a program writes it."""
    size = math.prod(int(n) for n in shape.split(",") if n)
    return size * (int(bits) // 8 if bits else 1)


def bytes_of(tree: Any) -> int:
    """Size of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def set_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """`jax.set_mesh`, also for JAX before 0.8."""
    if hasattr(jax, "set_mesh"):
        return jax.set_mesh(mesh)
    return jax.sharding.use_mesh(mesh)  # type: ignore[attr-defined]


# ---- Gradient and variance -----------------------------------------------------------

MESHES = ("auto", "explicit", "shard_map", "shard_map, check_vma")


class Model(NamedTuple):
    """A loss of one example with its arguments."""

    loss: Callable[..., jax.Array]
    params: Any
    batch: Any
    shared: tuple[Any, ...] = ()


class Run(NamedTuple):
    """A compiled program and what it returned."""

    program: Any
    result: Any

    @property
    def collectives(self) -> dict[str, Collectives]:
        """What travels."""
        return collectives(self.program.as_text())

    @property
    def memory(self) -> int:
        """Temporary memory of one device, in bytes."""
        return int(self.program.memory_analysis().temp_size_in_bytes)


def with_examples(model: Model, count: int = EXAMPLES) -> Model:
    """The model with a batch of so many examples, made of those that it has."""
    random = np.random.default_rng(0)

    def more(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        rows = leaf[jnp.arange(count) % leaf.shape[0]]
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            rows = rows + 0.3 * jnp.asarray(random.normal(size=rows.shape), rows.dtype)
        return rows

    return model._replace(batch=jax.tree.map(more, model.batch))


def on_one_device(model: Model, **options: Any) -> Run:
    """Gradient and variance, without a mesh."""
    measure = value_grad_and_variance(model.loss, **options)
    return _run(measure, model.params, model.batch, *model.shared)


def plain_gradient(model: Model) -> Run:
    """Value and gradient of the mean loss, the batch spread over a mesh."""
    return _run(_mean_gradient(model), *_placed(model, _mesh(AxisType.Auto)))


def _mean_gradient(model: Model) -> Callable[..., Any]:
    """Value and gradient of the mean loss of a batch."""

    def mean_loss(params: Any, batch: Any, *shared: Any) -> jax.Array:
        one = functools.partial(model.loss, params)
        return jax.vmap(lambda example: one(example, *shared))(batch).mean()

    return jax.value_and_grad(mean_loss)


def on_a_mesh(model: Model, kind: str, **options: Any) -> Run:
    """Gradient and variance, the batch spread over a mesh of one of the `MESHES`."""
    mesh = _mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    arguments = _placed(model, mesh)
    if kind == "explicit":
        with set_mesh(mesh):
            return _run(value_grad_and_variance(model.loss, **options), *arguments)
    batch = PartitionSpec("data")
    if kind == "auto":
        options["batch_sharding"] = NamedSharding(mesh, batch)
        return _run(value_grad_and_variance(model.loss, **options), *arguments)
    everywhere = (PartitionSpec(),) * len(model.shared)
    mapped = jax.shard_map(
        value_grad_and_variance(model.loss, axis_name="data", **options),
        mesh=mesh,
        in_specs=(PartitionSpec(), batch, *everywhere),
        out_specs=PartitionSpec(),
        check_vma=kind.endswith("check_vma"),
    )
    return _run(mapped, *arguments)


def _mesh(kind: AxisType) -> Mesh:
    """All devices along one axis."""
    return Mesh(np.array(jax.devices()), ("data",), axis_types=(kind,))


def _placed(model: Model, mesh: Mesh) -> tuple[Any, ...]:
    """Arguments of the loss's mean: the batch is spread, the others are everywhere."""
    batch = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return (
        jax.device_put(model.params, everywhere),
        jax.device_put(model.batch, batch),
        *jax.device_put(model.shared, everywhere),
    )


def _run(function: Callable[..., Any], *arguments: Any) -> Run:
    """Compile and run."""
    program = jax.jit(function).lower(*arguments).compile()
    return Run(program, jax.tree.map(_on_host, program(*arguments)))


def _on_host(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf)


# What is less, in a variance in float64, is a rounding error squared: all examples have
# the same gradient, which is added up in another order.
SMALLEST = 1e-20


def difference(result: Any, expected: Any) -> float:
    """Largest difference of two trees, in units of the largest element of an array."""
    return max(
        float(np.abs(x - y).max(initial=0) / np.abs(y).max(initial=SMALLEST))
        for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    )


def row_of(kind: str, run: Run, expected: Any = None) -> dict[str, Any]:
    """A row of the table."""
    return {
        "mesh": kind,
        "error": None if expected is None else difference(run.result, expected),
        "collectives": in_words(run.collectives),
        "temporary bytes per device": run.memory,
        "gradient bytes": bytes_of(run.result[1]),
        "variance bytes": bytes_of(run.result[2]) if len(run.result) == 3 else 0,
    }


def variance_rows(
    name: str, model: Model, meshes: tuple[str, ...] = MESHES
) -> Iterator[dict[str, Any]]:
    """Rows of one model: one device, the plain gradient, and every kind of mesh."""
    model = with_examples(model)
    alone = on_one_device(model)
    yield {"model": name, **row_of("one device", alone)}
    yield {"model": name, **row_of("plain gradient", plain_gradient(model))}
    for kind in meshes:
        run = on_a_mesh(model, kind)
        yield {"model": name, **row_of(kind, run, alone.result)}


# ---- Optimizers ----------------------------------------------------------------------

WIDTHS = 64, 128


def layer_loss(params: Any, example: jax.Array) -> jax.Array:
    """Loss of one example of one dense layer."""
    return jnp.square(jnp.tanh(example @ params["w"] + params["b"])).sum()


def _layer() -> Any:
    """Parameters of one dense layer."""
    random = np.random.default_rng(0)
    w = jnp.asarray(random.normal(size=WIDTHS) / 8, jnp.float32)
    return {"w": w, "b": jnp.zeros(WIDTHS[1])}


def spread_leaves(mesh: Mesh, tree: Any) -> Any:
    """Shardings that spread the leading axis of all leaves that divide by the mesh."""

    def sharding(leaf: Any) -> NamedSharding:
        divides = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec(*["data"] * divides))

    return jax.tree.map(sharding, tree)


class ZeroStep(NamedTuple):
    """A training step whose optimizer state is spread over the batch's devices."""

    initial: tuple[Any, Any]
    step: Callable[..., tuple[Any, Any]]
    batch: jax.Array
    shardings: Any
    """Of the state."""


def zero_step(member: family.Member) -> ZeroStep:
    """ZeRO-1: parameters on every device, an eighth of the moments on each."""
    mesh = _mesh(AxisType.Auto)
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(_layer(), everywhere)
    rows = np.random.default_rng(1).normal(size=(2 * DEVICES, WIDTHS[0]))
    batch = jax.device_put(jnp.asarray(rows, jnp.float32), by_example)
    tx = optax.with_extra_args_support(member.factory(1e-3))
    shardings = spread_leaves(mesh, jax.eval_shape(tx.init, params))
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    slices = spread_leaves(mesh, params)
    measure = value_grad_and_variance(layer_loss, batch_sharding=by_example)

    def mean_loss(params: Any, batch: jax.Array) -> jax.Array:
        return jax.vmap(layer_loss, (None, 0))(params, batch).mean()

    @functools.partial(
        jax.jit, donate_argnums=(0, 1), out_shardings=(everywhere, shardings)
    )
    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        further = {}
        if member.needs_variance:
            _, grad, variance = measure(params, batch)
            variance = jax.lax.with_sharding_constraint(variance, slices)
            further = {"grad_variance": variance}
        else:
            grad = jax.grad(mean_loss)(params, batch)
        grad = jax.lax.with_sharding_constraint(grad, slices)
        updates, state = tx.update(grad, state, params, **further)
        updates = jax.lax.with_sharding_constraint(updates, everywhere)
        return optax.apply_updates(params, updates), state

    return ZeroStep((params, state), step, batch, shardings)


def optimizer_rows() -> Iterator[dict[str, Any]]:
    """What the state of every optimizer takes, and what its ZeRO-1 step sends."""
    for name, member in family.MEMBERS.items():
        zero = zero_step(member)
        params, state = zero.initial
        program = zero.step.lower(params, state, zero.batch).compile()  # type: ignore[attr-defined]
        size = bytes_of(params)
        yield {
            "optimizer": name,
            "needs variance": member.needs_variance,
            "state bytes per parameter byte": bytes_of(state) / size,
            "state bytes per device and parameter byte": bytes_on_device(state) / size,
            "parameter bytes": size,
            "collectives": in_words(collectives(program.as_text())),
        }


def bytes_on_device(tree: Any) -> int:
    """What the first device holds of a tree of arrays."""
    return sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(tree))


# ---- Time ----------------------------------------------------------------------------


def overhead_rows(
    names: list[str], batch: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Seconds per call on eight devices over those on one, for the same batch."""
    for name in names:
        network = NETWORKS[name](batch)
        model = Model(network.loss, network.params, network.batch)
        split = _mesh(AxisType.Auto)
        by_example = NamedSharding(split, PartitionSpec("data"))
        programs = {
            "plain, one": (_mean_gradient(model), (model.params, model.batch)),
            "plain, eight": (_mean_gradient(model), _placed(model, split)),
            "variance, one": (
                value_grad_and_variance(model.loss),
                (model.params, model.batch),
            ),
            "variance, eight": (
                value_grad_and_variance(model.loss, batch_sharding=by_example),
                _placed(model, split),
            ),
        }
        compiled = {
            label: (jax.jit(function).lower(*arguments).compile(), arguments)
            for label, (function, arguments) in programs.items()
        }
        seconds: dict[str, list[float]] = {label: [] for label in compiled}
        for _ in range(rounds + 1):
            for label, (program, arguments) in compiled.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*arguments))
                seconds[label].append(time.perf_counter() - start)
        row: dict[str, Any] = {"network": name, "batch": batch, "rounds": rounds}
        for label, times in seconds.items():
            row[f"milliseconds, {label}"] = 1e3 * statistics.median(times[1:])
        for kind in ("plain", "variance"):
            pairs = zip(
                seconds[f"{kind}, eight"][1:], seconds[f"{kind}, one"][1:], strict=True
            )
            row[f"ratio, {kind}"] = statistics.median(a / b for a, b in pairs)
        yield row


# ---- Command -------------------------------------------------------------------------


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("variance", "optimizers", "overhead"))
    parser.add_argument("--models", nargs="+", help="of the tests; all by default")
    parser.add_argument("--networks", nargs="+", default=["mnist_mlp", "lstm"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    measured = {
        "variance": lambda: _all_variance_rows(args.models),
        "optimizers": optimizer_rows,
        "overhead": lambda: overhead_rows(args.networks, args.batch, args.rounds),
    }[args.what]()
    if args.what == "variance":
        # Exact to the last digits, and compiled quickly: nothing is timed here.
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_disable_most_optimizations", True)
    rows = _kept_rows(args.output, args.what, args.models)
    for row in measured:
        print(json.dumps(row), flush=True)
        rows.append(row)
        report = json.loads(args.output.read_text()) if args.output.exists() else {}
        report[args.what] = {"environment": environment(), "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nWritten to {args.output}")


def _kept_rows(path: Path, what: str, names: list[str] | None) -> list[dict[str, Any]]:
    """Rows of models that are not measured again."""
    if what != "variance" or names is None or not path.exists():
        return []
    rows = json.loads(path.read_text()).get(what, {}).get("rows", [])
    return [row for row in rows if row["model"] not in names]


def _all_variance_rows(names: list[str] | None) -> Iterator[dict[str, Any]]:
    """Rows of the models of the tests."""
    models = importlib.import_module("tests.gradient_variance.models").MODELS
    for name in names or models:
        loss, params, batch, _, shared = models[name]()
        yield from variance_rows(name, Model(loss, params, batch, shared))


if __name__ == "__main__":
    main()
