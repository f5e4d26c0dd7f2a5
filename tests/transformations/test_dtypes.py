"""Every dtype of gradients, and every setting of dtypes around them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from tests.transformations.subjects import OPTIMIZERS, SUBJECTS, Subject

pytestmark = pytest.mark.usefixtures("quick_compilation")

every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
every_optimizer = pytest.mark.parametrize(
    "subject", OPTIMIZERS.values(), ids=OPTIMIZERS
)
FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"]
INTEGERS = [jnp.int8, jnp.int32, jnp.uint8, jnp.uint32, jnp.bool_]


def two_steps(subject: Subject, gradient: jax.Array, params: Any = None) -> Any:
    """Updates of the second of two steps along the same gradients."""
    params = gradient if params is None else params
    if subject.per_example:
        gradient = jnp.stack([gradient] * 2)
    tx = subject.make()
    extra = (
        {"grad_variance": jnp.ones(gradient.shape)} if subject.needs_variance else {}
    )
    state = tx.init(params)
    for _ in range(2):
        updates, new_state = tx.update(gradient, state, params, **extra)
        for new, old in zip(*map(jax.tree.leaves, (new_state, state)), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
        state = new_state
    return updates


@every_subject
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_and_booleans_get_the_updates_of_float32(
    subject: Subject, dtype: Any
) -> None:
    """Votes, counts, masks: rounded to their own dtype the updates would be zero."""
    gradient = jnp.array([5, 0, 3]).astype(dtype)
    updates = two_steps(subject, gradient)
    assert updates.dtype == jnp.float32
    expected = two_steps(subject, gradient.astype(jnp.float32))
    np.testing.assert_array_equal(updates, expected)
    assert np.all((updates == 0) == (np.asarray(gradient) == 0))


def test_votes_move_as_with_optax() -> None:
    votes = jnp.array([5, -7, 3], jnp.int8)
    for ours, theirs in ((do.ssd(0.1), optax.sign_sgd(0.1)), (do.sgd(0.1), None)):
        updates, _ = ours.update(votes, ours.init(votes))
        expected = -0.1 * np.array([5.0, -7.0, 3.0])
        if theirs is not None:
            expected, _ = theirs.update(votes, theirs.init(votes))
        assert updates.dtype == jnp.float32
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


@every_optimizer
@pytest.mark.parametrize("number", [3, -2, True, 1.5, np.int16(2), np.float16(0.5)])
def test_python_and_numpy_numbers_as_gradients(subject: Subject, number: Any) -> None:
    tx, extra = subject.make(), {}
    if subject.needs_variance:
        extra = {"grad_variance": {"a": 0.0}}
    updates, _ = tx.update({"a": number}, tx.init({"a": number}), **extra)
    wide = {"a": jnp.float32(number)}
    expected, _ = tx.update(wide, tx.init(wide), **extra)
    inexact = jnp.issubdtype(jnp.result_type(number), jnp.inexact)
    assert updates["a"].dtype == (jnp.result_type(number) if inexact else jnp.float32)
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-3)


@pytest.mark.parametrize("make", [do.sgd, do.m_svag, do.adam])
def test_the_gradient_of_an_integer_parameter_moves_nothing(make: Any) -> None:
    params = {"w": jnp.ones(2), "steps": jnp.array([3, 4])}
    gradients = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    tx = make(0.1)
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_array_equal(updates["steps"], [0, 0])
    assert np.all(updates["w"] < 0)


@every_subject
@pytest.mark.parametrize("name", FLOAT8)
def test_float8(subject: Subject, name: str) -> None:
    dtype = getattr(jnp, name)
    gradient = jnp.array([1.5, -2.0, 0.25]).astype(dtype)
    updates = two_steps(subject, gradient)
    assert updates.dtype == dtype
    expected = two_steps(subject, gradient.astype(jnp.float32)).astype(dtype)
    np.testing.assert_array_equal(
        updates.astype(jnp.float32), expected.astype(jnp.float32)
    )
    assert optax.apply_updates(gradient, updates).dtype == dtype


DTYPES = ["bfloat16", "float16", "float32", "complex64", "int8", "float8_e5m2"]


@every_subject
@pytest.mark.parametrize("name", DTYPES)
def test_strict_promotion_changes_nothing(subject: Subject, name: str) -> None:
    gradient = jnp.array([1.5, -2.0, 0.25]).astype(getattr(jnp, name))
    expected = two_steps(subject, gradient)
    with jax.numpy_dtype_promotion("strict"):
        updates = two_steps(subject, gradient)
    assert updates.dtype == expected.dtype
    np.testing.assert_array_equal(
        updates.astype(jnp.complex64), expected.astype(jnp.complex64)
    )


@every_optimizer
@pytest.mark.parametrize("name", ["bfloat16", "float32", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_injected_hyperparameters_in_the_dtype_of_the_parameters(
    subject: Subject, name: str, promotion: str
) -> None:
    """Complex ones have no imaginary part, and low precision rounds decays to one."""
    params = jnp.array([1.5, -2.0, 0.25]).astype(getattr(jnp, name))
    tx = optax.inject_hyperparams(subject.factory, static_args=tuple(subject.others))(
        **subject.numbers, **subject.others
    )
    extra = subject.extra_args(params.real.astype(jnp.float32))
    with jax.numpy_dtype_promotion(promotion):
        state = tx.init(params)
        updates, _ = tx.update(params, state, params, **extra)
        jitted, _ = jax.jit(tx.update)(params, state, params, **extra)
    assert updates.dtype == jitted.dtype == params.dtype
    numbers = {k: float(np.real(v)) for k, v in state.hyperparams.items()}
    plain = subject.make(**numbers)
    expected, _ = plain.update(params, plain.init(params), **extra)
    for actual in (updates, jitted):
        np.testing.assert_allclose(
            np.asarray(actual.astype(jnp.complex64)),
            np.asarray(expected.astype(jnp.complex64)),
            rtol=2e-2 if params.dtype.itemsize < 4 else 1e-6,
        )


@pytest.mark.parametrize("value", [np.complex64(0.9), jnp.complex64(0.5)])
def test_a_complex_number_without_imaginary_part_is_a_decay(value: Any) -> None:
    tx, plain = do.adam(0.1, value), do.adam(0.1, float(np.real(value)))
    gradient = jnp.ones(2)
    ours, _ = tx.update(gradient, tx.init(gradient))
    theirs, _ = plain.update(gradient, plain.init(gradient))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("value", [np.complex64(0.9 + 0.1j), jnp.complex64(0.1j)])
def test_a_decay_with_an_imaginary_part_is_an_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^`b1` must be a number, got"):
        do.adam(0.1, value)
    with pytest.raises(TypeError, match=r"^`eps` must be a number, got"):
        do.adam(0.1, eps=value)


def test_real_leaves_stay_real_beside_complex_hyperparameters() -> None:
    params = {"c": jnp.ones(2, jnp.complex64), "r": jnp.ones(2)}
    tx = optax.inject_hyperparams(do.m_svag)(learning_rate=0.1, momentum=0.9)
    state = tx.init(params)
    assert jnp.iscomplexobj(state.hyperparams["momentum"])
    updates, _ = tx.update(params, state, params)
    assert (updates["c"].dtype, updates["r"].dtype) == (jnp.complex64, jnp.float32)
    np.testing.assert_allclose(updates["r"], [-0.1, -0.1], rtol=1e-6)
