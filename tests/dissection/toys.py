"""A small problem for the engine: three classes, one hidden layer; and runs of it."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dissect_optax.dissection import (
    Data,
    Job,
    Problem,
    Record,
    Replica,
    Settings,
    SilentMonitor,
    Store,
    complete,
    get_method,
)

SETTINGS = Settings(steps=20, batch_size=8, evaluation_interval=10)
L2 = 0.02
LAYERS = ("hidden", "output")


def load_data(data_dir: Path | None) -> Data:
    """Three clouds of points; an evaluation takes two pieces of the training set."""
    del data_dir
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 4))
    labels = random.integers(3, size=1800)
    inputs = centres[labels] + random.normal(size=(1800, 4))
    examples = {
        "input": jnp.asarray(inputs, jnp.float32),
        "label": jnp.asarray(labels, jnp.int32),
    }
    training, test = (
        jax.tree.map(lambda array, part=part: array[part], examples)
        for part in (slice(1300), slice(1300, None))
    )
    return Data(training=training, test=test)


def init(key: jax.Array) -> dict:
    """Normal weights, no biases."""
    sizes = {"hidden": (4, 8), "output": (8, 3)}
    keys = jax.random.split(key, 2)
    return {
        layer: {
            "kernel": 0.5 * jax.random.normal(key, shape),
            "bias": jnp.zeros(shape[1:]),
        }
        for key, (layer, shape) in zip(keys, sizes.items(), strict=True)
    }


def logits(params: dict, inputs: jax.Array) -> jax.Array:
    """Of one example."""
    hidden, output = (params[layer] for layer in LAYERS)
    activation = jnp.maximum(inputs @ hidden["kernel"] + hidden["bias"], 0)
    return activation @ output["kernel"] + output["bias"]


def cross_entropy(params: dict, example: dict) -> jax.Array:
    """Of one example."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits(params, example["input"]), example["label"]
    )


def loss(params: dict, example: dict, key: jax.Array) -> jax.Array:
    """The loss in training."""
    del key
    return cross_entropy(params, example)


def evaluate_example(params: dict, example: dict) -> tuple[jax.Array, dict]:
    """Loss and accuracy."""
    guess = jnp.argmax(logits(params, example["input"]))
    return cross_entropy(params, example), {"accuracy": guess == example["label"]}


def penalty(params: dict) -> jax.Array:
    """Half of L2 times the squared weights."""
    squares = (jnp.sum(jnp.square(params[layer]["kernel"])) for layer in LAYERS)
    return 0.5 * L2 * sum(squares, start=jnp.zeros(()))


PROBLEM = Problem(
    name="toy",
    title="Toy",
    settings=SETTINGS,
    init=init,
    loss=loss,
    evaluate=evaluate_example,
    load_data=load_data,
    regularizer=penalty,
    # A tuple, which JSON does not have.
    description={"layers": (8, 3)},
)


def replicas(learning_rates: list[float], seeds: list[int]) -> Replica:
    """A group."""
    return Replica(jnp.array(learning_rates, jnp.float32), jnp.array(seeds, jnp.uint32))


def job(root: Path | None, **changes) -> Job:
    """Silent runs of the small problem, one at a time."""
    settings = {
        "problem": PROBLEM,
        "settings": SETTINGS,
        "store": Store(root),
        "monitor": SilentMonitor(),
        "replicas": 1,
    }
    return Job(**(settings | changes))


def train(
    job: Job, method: str = "m_svag", learning_rate: float = 0.3, seed: int = 0
) -> Record:
    """The record of one run."""
    configs = [job.config(get_method(method), learning_rate, seed)]
    (record,) = complete(job, get_method(method), method, configs)
    return record


def without_seconds(record: Record) -> list[tuple]:
    """The evaluations as the same run would repeat them; NaN equals NaN."""
    return [
        (line.step, *sorted((name, str(value)) for name, value in line.values.items()))
        for line in record.evaluations
    ]


def main() -> None:
    """A group of runs as a process: its directory, steps and number of step sizes."""
    root, steps, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    method = get_method("m_svag")
    runs = job(
        root,
        settings=dataclasses.replace(SETTINGS, steps=steps),
        checkpoint_seconds=0.0,
        replicas=count,
    )
    configs = group_configs(runs, count)
    # As in every test, so that both are the same program.
    with jax.numpy_rank_promotion("raise"):
        complete(runs, method, "toy", configs)


def group_configs(job: Job, count: int) -> list:
    """One run, or so many step sizes of which the largest diverges."""
    rates = [0.3, 0.1, 1e30][:count]
    return [job.config(get_method("m_svag"), rate, 0) for rate in rates]


if __name__ == "__main__":
    main()
