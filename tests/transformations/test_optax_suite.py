"""Optax's own optimizer tests, shipped in its wheel, run on our optimizers.

`optax.contrib._common_test` and `optax._src.alias_test` look their optimizers up by
name and are parameterized over lists of names. Here the look-up finds ours, and each
test's underlying function runs with our names in place of theirs.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import dissect_optax as do
from dissect_optax import family

common_test = pytest.importorskip(
    "optax.contrib._common_test", reason="this Optax ships no tests"
)
alias_test = pytest.importorskip(
    "optax._src.alias_test", reason="this Optax ships no tests"
)


def with_exact_gradients(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, for tests that pass no variance: their gradients have none."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        tx = factory(*args, **kwargs)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            zeros = jax.tree.map(lambda g: jnp.zeros_like(g.real), updates)
            return tx.update(updates, state, params, grad_variance=zeros, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


FACTORIES = {
    name: getattr(do, name)
    for name in (
        "sgd",
        "ssd",
        "svag",
        "m_sgd",
        "m_ssd",
        "m_svag",
        "adam",
        "adam_star",
    )
} | {
    "m_svag_mb": with_exact_gradients(do.m_svag_mb),
    "adam_star_mb": with_exact_gradients(do.adam_star_mb),
    # Of the family one with η⁻¹ and a source that needs the direction's mean.
    "adabelief": family.adabelief,
}
# What each needs to solve the test problems in the given number of steps.
LEARNING_RATES = {
    "sgd": 1e-3,
    "ssd": 1e-2,
    "svag": 1e-3,
    "m_sgd": 1e-4,
    "m_ssd": 1e-2,
    "m_svag": 1e-3,
    "adam": 1e-1,
    "adam_star": 1e-2,
    "m_svag_mb": 1e-4,
    "adam_star_mb": 1e-2,
    "adabelief": 1e-2,
}
# A step of fixed length in every coordinate circles in Rosenbrock's valley; Optax's
# own tests leave sign_sgd and signum out for the same reason.
FIXED_LENGTH = {"ssd", "m_ssd", "adam_star_mb"}


@pytest.fixture(autouse=True)
def look_up_ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(common_test, "_get_opt_factory", FACTORIES.__getitem__)
    monkeypatch.setattr(alias_test, "alias", types.SimpleNamespace(**FACTORIES))
    # Their tests broadcast scalars over vectors.
    with jax.numpy_rank_promotion("allow"):
        yield


def run(case: Any, test_name: str, **arguments: Any) -> None:
    """One test of Optax, with our arguments in place of its parameterization."""
    functions = {
        name: inspect.unwrap(function)
        for name, function in vars(case).items()
        if inspect.isfunction(function)
    }
    generated = [n for n, f in functions.items() if f.__name__ == test_name]
    if not generated:
        pytest.skip(f"this Optax has no {test_name}")
    test = functions[generated[0]]
    # Before 0.2.7 some tests run in variants; the one with jit is the one of later.
    compiled = type(case.__name__, (case,), {"variant": staticmethod(jax.jit)})
    wanted = inspect.signature(test).parameters
    # Outside a unittest runner, a failure in one of their subtests raises.
    test(
        compiled(generated[0]),
        **{name: value for name, value in arguments.items() if name in wanted},
    )


def parameters(name: str) -> dict[str, Any]:
    return {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": LEARNING_RATES[name]},
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }


every_optimizer = pytest.mark.parametrize("name", FACTORIES)


# ---- optax.contrib._common_test -----------------------------------------------------


@every_optimizer
def test_accepts_extra_args(name: str) -> None:
    run(
        common_test.ContribTest,
        "test_optimizers_accept_extra_args",
        **parameters(name),
        wrap=False,
    )


@every_optimizer
@pytest.mark.parametrize("target", ["parabola", "rosenbrock", "mixed_tensor_target"])
def test_converges(name: str, target: str) -> None:
    if name in FIXED_LENGTH and target == "rosenbrock":
        pytest.skip("steps of a fixed length need a schedule in Rosenbrock's valley")
    setup = getattr(common_test, f"_setup_{target}")
    run(
        common_test.ContribTest,
        "test_optimizers",
        **parameters(name),
        target=setup,
        dtype="float32",
    )


@every_optimizer
def test_can_be_wrapped_in_inject_hyperparams(name: str) -> None:
    run(
        common_test.ContribTest,
        "test_optimizers_can_be_wrapped_in_inject_hyperparams",
        **parameters(name),
    )


@every_optimizer
def test_preserves_dtype(name: str) -> None:
    run(
        common_test.ContribTest,
        "test_preserve_dtype",
        **parameters(name),
        dtype="bfloat16",
    )


@every_optimizer
def test_accumulates_gradients(name: str) -> None:
    run(
        common_test.ContribTest,
        "test_gradient_accumulation",
        **parameters(name),
        dtype="bfloat16",
    )


@every_optimizer
def test_state_is_stable(name: str) -> None:
    run(
        common_test.ContribTest,
        "test_state_shape_dtype_shard_stability",
        **parameters(name),
        dtype=jnp.float16,
    )


@every_optimizer
def test_accepts_a_learning_rate_schedule(name: str) -> None:
    run(
        common_test.ContribTest,
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
        **parameters(name),
    )


# ---- optax._src.alias_test, where it asks for more ----------------------------------


@every_optimizer
def test_converges_with_complex_parameters(name: str) -> None:
    run(
        alias_test.AliasTest,
        "test_optimization",
        **parameters(name),
        target=alias_test._setup_parabola,
        dtype=jnp.complex64,
    )


@every_optimizer
def test_state_is_stable_for_complex_parameters(name: str) -> None:
    run(
        alias_test.AliasTest,
        "test_state_shape_dtype_shard_stability",
        **parameters(name),
        dtype=jnp.complex128,
    )
