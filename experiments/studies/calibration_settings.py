"""The problems of the calibration: small, different, a few seconds to train."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn import datasets

from dissect_optax.dissection import Data, Problem, Settings, constant
from experiments.problems import get_problem
from experiments.problems.problem import half_squared_norm

_SETTINGS = Settings(steps=400, batch_size=8, evaluation_interval=20)
_L2 = 1e-3


@dataclasses.dataclass(frozen=True)
class Setting:
    """A problem of the calibration and its two batch sizes.

    Attributes:
      name: Its name.
      make: Makes the problem.
      batch_sizes: Batch sizes.
    """

    name: str
    make: Callable[[], Problem]
    batch_sizes: tuple[int, int] = (8, 64)


def _problem(
    name: str,
    init: Callable[[jax.Array], Any],
    evaluate: Callable[[Any, Any], jax.Array],
    training: Any,
    *,
    l2: float = 0.0,
    steps: int = _SETTINGS.steps,
    schedule: Callable[[Any], optax.ScalarOrSchedule] = constant,
) -> Problem:
    """A problem without a test set, whose loss is not random."""
    penalty = functools.partial(half_squared_norm, strength=l2)
    return Problem(
        name=name,
        title=name.replace("_", " "),
        settings=dataclasses.replace(
            _SETTINGS, steps=steps, evaluation_interval=steps // 20
        ),
        init=init,
        loss=lambda params, example, key: evaluate(params, example),
        evaluate=lambda params, example: (evaluate(params, example), {}),
        load_data=lambda _: Data(training),
        regularizer=penalty if l2 else None,
        schedule=schedule,
        description={"l2": l2},
    )


# ---- Quadratics -------------------------------------------------------------------


def _quadratic(spectrum: str, rotated: bool) -> Problem:
    """Figure 2's problems with d = 30 and x ~ N(0, 0.1² I), from θ0 ~ N(0, 25 I)."""
    random = np.random.default_rng(0)
    size = 30
    eigenvalues = random.uniform(0.1, 1.1, size)
    if spectrum == "ill":
        eigenvalues = np.concatenate(
            [random.uniform(0, 1, size - 3), random.uniform(30, 60, 3)]
        )
    basis = np.eye(size)
    if rotated:
        basis = np.linalg.qr(random.normal(size=(size, size)))[0]
    matrix = jnp.asarray(basis * eigenvalues @ basis.T, jnp.float32)
    centers = jnp.asarray(0.1 * random.normal(size=(512, size)), jnp.float32)

    def evaluate(theta: jax.Array, center: jax.Array) -> jax.Array:
        return 0.5 * (theta - center) @ matrix @ (theta - center)

    name = f"quadratic_{spectrum}_{'rotated' if rotated else 'aligned'}"
    return _problem(
        name, lambda key: 5.0 * jax.random.normal(key, (size,)), evaluate, centers
    )


BLOCK_SPECTRA = {
    "heterogeneous": ((1, 2, 3), (99, 100, 101), (4998, 4999, 5000)),
    "homogeneous": ((1, 99, 4998), (2, 100, 4999), (3, 101, 5000)),
}


def block_quadratic(kind: str, steps: int = 500) -> Problem:
    """The block quadratics of Orvieto & Gower (2025): nine examples in d = 9.

    Three blocks with random bases; examples are the rows of √9·U√H with a random
    rotation U, so that the mean loss is ½θᵀHθ. Warm-up over 5 % of the steps, then a
    cosine.

    Args:
      kind: "heterogeneous" or "homogeneous".
      steps: Length of the runs.

    Returns:
      The problem.
    """
    random = np.random.default_rng(0)
    matrix = np.zeros((9, 9))
    for index, eigenvalues in enumerate(BLOCK_SPECTRA[kind]):
        basis = np.linalg.qr(random.normal(size=(3, 3)))[0]
        block = slice(3 * index, 3 * index + 3)
        matrix[block, block] = basis * np.array(eigenvalues) @ basis.T
    values, vectors = np.linalg.eigh(matrix)
    root = vectors * np.sqrt(values) @ vectors.T
    rotation = np.linalg.qr(random.normal(size=(9, 9)))[0]
    rows = jnp.asarray(3.0 * rotation @ root, jnp.float32)

    def evaluate(theta: jax.Array, row: jax.Array) -> jax.Array:
        return 0.5 * jnp.square(row @ theta)

    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 20, 1), steps)

    def schedule(learning_rate: Any) -> optax.Schedule:
        return lambda step: learning_rate * shape(step)

    return _problem(
        f"block_quadratic_{kind}",
        lambda key: jnp.ones(9),
        evaluate,
        rows,
        steps=steps,
        schedule=schedule,
    )


# ---- Logistic regression ----------------------------------------------------------


def _logistic(table: str, standardised: bool) -> Problem:
    """Softmax regression on one of scikit-learn's tables."""
    features, labels = getattr(datasets, f"load_{table}")(return_X_y=True)
    if standardised:
        features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    classes, size = int(labels.max()) + 1, features.shape[1]
    data = (jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32))

    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Of a size that does not depend on the features' units.
        scale = 0.1 / np.sqrt(np.mean(np.square(features)) * size)
        weights = scale * jax.random.normal(key, (size, classes))
        return weights, jnp.zeros(classes)

    def evaluate(params: Any, example: Any) -> jax.Array:
        scores = example[0] @ params[0] + params[1]
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            scores, example[1]
        )

    kind = "standardised" if standardised else "raw"
    return _problem(f"{table}_{kind}", init, evaluate, data, l2=_L2)


# ---- Networks ---------------------------------------------------------------------


def _digits() -> tuple[jax.Array, jax.Array]:
    """Scikit-learn's digits with pixels from 0 to 1."""
    images, labels = datasets.load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)


def _dense_layers(sizes: tuple[int, ...], key: jax.Array) -> list[Any]:
    """Weights and biases of dense layers."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (m, n)) * np.sqrt(2 / m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _dense_network(layers: list[Any], hidden: jax.Array) -> jax.Array:
    """Dense layers with rectified units between them."""
    for weights, bias in layers[:-1]:
        hidden = jax.nn.relu(hidden @ weights + bias)
    weights, bias = layers[-1]
    return hidden @ weights + bias


def _dense_loss(layers: list[Any], example: Any) -> jax.Array:
    """Cross-entropy of a dense network."""
    scores = _dense_network(layers, example[0])
    return optax.losses.softmax_cross_entropy_with_integer_labels(scores, example[1])


def _digits_network(*hidden: int) -> Problem:
    """A dense network on digits."""
    init = functools.partial(_dense_layers, (64, *hidden, 10))
    name = "digits_" + "_".join(map(str, hidden))
    return _problem(name, init, _dense_loss, _digits(), l2=_L2)


def rotated_digits(hidden: int = 16, *, rotated: bool = True) -> Problem:
    """A dense network on digits in randomly rotated coordinates.

    SGD takes the same path as without the rotation, sign methods do not.
    """
    build = functools.partial(_dense_layers, (64, hidden, 10))
    flat, unravel = ravel_pytree(build(jax.random.key(0)))
    basis = np.eye(flat.size)
    if rotated:
        random = np.random.default_rng(0)
        basis = np.linalg.qr(random.normal(size=(flat.size, flat.size)))[0]
    matrix = jnp.asarray(basis, jnp.float32)

    def init(key: jax.Array) -> jax.Array:
        return matrix.T @ ravel_pytree(build(key))[0]

    def evaluate(theta: jax.Array, example: Any) -> jax.Array:
        return _dense_loss(unravel(matrix @ theta), example)

    name = "digits_rotated" if rotated else "digits_in_place"
    return _problem(name, init, evaluate, _digits(), l2=_L2, steps=200)


def _convolutions() -> Problem:
    """Two convolutions and a dense layer on digits."""

    def init(key: jax.Array) -> Any:
        first, second, third = jax.random.split(key, 3)
        return [
            jax.random.normal(first, (3, 3, 1, 8)) / 3,
            jax.random.normal(second, (3, 3, 8, 16)) / np.sqrt(36),
            jax.random.normal(third, (16, 10)) / 4,
        ]

    def evaluate(params: Any, example: Any) -> jax.Array:
        hidden = example[0].reshape(1, 8, 8, 1)
        for kernel in params[:2]:
            hidden = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    hidden,
                    kernel,
                    (2, 2),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            )
        scores = jnp.mean(hidden, axis=(0, 1, 2)) @ params[2]
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            scores, example[1]
        )

    return _problem("digits_convolutions", init, evaluate, _digits(), l2=_L2)


def _autoencoder() -> Problem:
    """Digits through eight numbers and back: regression with a network."""
    images, _ = _digits()
    init = functools.partial(_dense_layers, (64, 32, 8, 32, 64))

    def evaluate(layers: list[Any], image: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(_dense_network(layers, image) - image))

    return _problem("digits_autoencoder", init, evaluate, images)


def _regression(standardised: bool) -> Problem:
    """A small network on scikit-learn's diabetes table."""
    features, target = datasets.load_diabetes(return_X_y=True, scaled=standardised)
    if standardised:
        features = features * np.sqrt(len(features))
    target = (target - target.mean()) / target.std()
    data = (jnp.asarray(features, jnp.float32), jnp.asarray(target, jnp.float32))
    init = functools.partial(_dense_layers, (features.shape[1], 16, 1))

    def evaluate(layers: list[Any], example: Any) -> jax.Array:
        return jnp.square(_dense_network(layers, example[0])[0] - example[1])

    kind = "standardised" if standardised else "raw"
    return _problem(f"diabetes_{kind}", init, evaluate, data, l2=_L2)


def _existing(name: str, steps: int, examples: int | None) -> Problem:
    """A problem of the command line with fewer steps."""
    problem = get_problem(name)
    settings = dataclasses.replace(
        problem.settings,
        steps=steps,
        evaluation_interval=steps // 20,
        examples=examples,
    )
    return dataclasses.replace(problem, settings=settings)


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        *(
            Setting(
                f"quadratic_{spectrum}_{'rotated' if rotated else 'aligned'}",
                functools.partial(_quadratic, spectrum, rotated),
                (2, 16),
            )
            for spectrum in ("well", "ill")
            for rotated in (False, True)
        ),
        *(
            Setting(
                f"block_quadratic_{kind}",
                functools.partial(block_quadratic, kind, 400),
                (3, 8),
            )
            for kind in BLOCK_SPECTRA
        ),
        *(
            Setting(
                f"{table}_{'standardised' if standardised else 'raw'}",
                functools.partial(_logistic, table, standardised),
            )
            for table in ("breast_cancer", "wine", "iris")
            for standardised in (False, True)
        ),
        Setting("digits_64", functools.partial(_digits_network, 64)),
        Setting("digits_32_32_32", functools.partial(_digits_network, 32, 32, 32)),
        Setting("digits_convolutions", _convolutions),
        Setting("digits_rotated", rotated_digits),
        Setting("digits_autoencoder", _autoencoder),
        Setting("diabetes_raw", functools.partial(_regression, False)),
        Setting("diabetes_standardised", functools.partial(_regression, True)),
        Setting("imbalance", functools.partial(_existing, "imbalance", 400, None)),
        Setting("transformer", functools.partial(_existing, "transformer", 200, 256)),
        Setting("mnist", functools.partial(_existing, "mnist", 200, 2000), (16, 128)),
    )
}
