"""`watch` keeps Optax's contract, changes nothing, and knows the noise that it sees."""

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dissect_optax as do
from dissect_optax.diagnostics import WatchState, scalars, watch
from tests.transformations import test_contract as contract
from tests.transformations.subjects import Subject
from tests.virtual_devices import eight_devices

SUBJECTS = {
    "gradients": Subject(watch, {"decay": 0.75}),
    "a sample of gradients": Subject(watch, {"decay": 0.75}, {"sample": 1}),
    "estimates": Subject(
        watch,
        {"decay": 0.75},
        before=(functools.partial(do.moving_average_estimate, 0.75),),
        after=(do.adapt_to_variance,),
    ),
    "given variances": Subject(
        watch,
        before=(do.attach_variance,),
        after=(do.adapt_to_variance,),
        needs_variance=True,
    ),
    "an optimizer": Subject(
        lambda learning_rate: optax.chain(watch(), do.adam(learning_rate)),
        {"learning_rate": 0.125},
    ),
}
OF_STATE: list[Callable[[Subject], None]] = [
    contract.test_state_keeps_structure_shapes_and_dtypes,
    contract.test_mixed_leaves_come_back_in_their_own_dtypes,
    contract.test_jit_and_scan_agree_and_compile_once,
    contract.test_masked_leaves_pass_by,
]
CONTRACT = {
    "gradients": [
        *OF_STATE,
        contract.test_init_and_update_are_pure,
        contract.test_unknown_extra_args_and_missing_params_change_nothing,
        contract.test_counts_saturate,
        contract.test_cond_may_skip_a_step,
        contract.test_vmap_over_all_numbers,
        contract.test_donated_buffers_are_reused,
        contract.test_multi_steps_hands_over_the_mean_gradient_and_the_last_variance,
        contract.test_apply_if_finite_forgets_a_step_with_nan,
        contract.test_chain_and_named_chain,
    ],
    "a sample of gradients": [contract.test_jit_and_scan_agree_and_compile_once],
    "estimates": [*OF_STATE, contract.test_vmap_over_all_numbers],
    "given variances": OF_STATE,
    "an optimizer": [
        contract.test_jit_and_scan_agree_and_compile_once,
        contract.test_partition_gives_each_group_its_own,
    ],
}


@pytest.mark.parametrize(
    ("name", "check"),
    [(name, check) for name, checks in CONTRACT.items() for check in checks],
    ids=lambda x: x if isinstance(x, str) else x.__name__.removeprefix("test_"),
)
def test_contract(name: str, check: Callable[[Subject], None]) -> None:
    check(SUBJECTS[name])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["gradients", "estimates"])
def test_inject_hyperparams(name: str, dtype: Any) -> None:
    subject = Subject(
        SUBJECTS[name].factory,
        SUBJECTS[name].numbers,
        {"sample": 4},
        SUBJECTS[name].before,
        SUBJECTS[name].after,
    )
    contract.test_inject_hyperparams(subject, dtype)


def test_map_params_does_not_mistake_summaries_for_parameters() -> None:
    """Their shapes are not those of parameters, whose sharding they must not get."""
    tx = optax.chain(watch(), do.m_svag(0.1))
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    state = tx.init(params)
    touched = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(touched) == jax.tree.structure(state)
    for new, old in zip(
        jax.tree.leaves(touched[0]), jax.tree.leaves(state[0]), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(touched[1][0].mean["a"], np.ones((2, 3)))


# ---- Nothing changes ---------------------------------------------------------------


def noisy(step: int, mean: Any, std: Any, shape: tuple[int, ...]) -> jax.Array:
    noise = np.random.default_rng(step).normal(size=shape)
    return jnp.asarray(mean + std * noise, jnp.float32)


def run(tx: Any, gradients: list[Any], **extra: Any) -> tuple[Any, Any]:
    update = jax.jit(tx.update)
    state, updates = tx.init(gradients[0]), None
    for gradient in gradients:
        updates, state = update(gradient, state, gradient, **extra)
    return updates, state


def test_updates_pass_unchanged_as_gradients_and_as_estimates() -> None:
    gradients = [{"w": noisy(i, 1.0, 1.0, (40, 50))} for i in range(4)]
    plain, _ = run(do.m_svag(0.1), gradients)
    before, _ = run(optax.chain(watch(), do.m_svag(0.1)), gradients)
    between, _ = run(
        optax.chain(
            do.moving_average_estimate(0.9),
            do.correct_for_momentum(0.9),
            watch(),
            do.adapt_to_variance(),
            optax.scale_by_learning_rate(0.1),
        ),
        gradients,
    )
    np.testing.assert_array_equal(plain["w"], before["w"])
    np.testing.assert_allclose(plain["w"], between["w"], rtol=1e-6)


def test_the_same_object_passes() -> None:
    tx, gradient = watch(), {"w": jnp.ones(3)}
    updates, _ = tx.update(gradient, tx.init(gradient))
    assert updates is gradient
    estimate = do.Estimate(gradient, gradient)
    updates, _ = tx.update(estimate, tx.init(gradient))
    assert updates is estimate


# ---- The numbers -------------------------------------------------------------------


def expected_of(mean: np.ndarray, variance: np.ndarray) -> dict[str, float]:
    """The summaries in NumPy, from the equations."""
    eta2 = variance / mean**2
    success = [0.5 + 0.5 * math.erf(1 / math.sqrt(2 * e)) for e in eta2.ravel()]
    return {
        "relative_variance": float(np.median(eta2)),
        "factor": float(np.mean(1 / (1 + eta2))),
        "sign_success": float(np.mean(success)),
    }


def test_summaries_of_an_estimate_are_those_of_its_elements() -> None:
    rng = np.random.default_rng(0)
    mean = {"a": rng.normal(size=(3, 5)), "b": rng.normal(size=8)}
    variance = {name: rng.exponential(size=m.shape) for name, m in mean.items()}
    as_jax = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    tx = watch()
    _, state = tx.update(
        do.Estimate(as_jax(mean), as_jax(variance)), tx.init(as_jax(mean))
    )
    numbers = scalars(state)
    for name in mean:
        for quantity, value in expected_of(mean[name], variance[name]).items():
            assert numbers[f"{quantity}/{name}"] == pytest.approx(value, rel=1e-5)
    overall = expected_of(
        *(np.concatenate([x["a"].ravel(), x["b"]]) for x in (mean, variance))
    )
    for quantity in ("factor", "sign_success"):
        assert numbers[quantity] == pytest.approx(overall[quantity], rel=1e-5)
    # The weighted median of two numbers is that of the larger parameter.
    assert numbers["relative_variance"] == numbers["relative_variance/a"]


def test_a_sample_stands_for_all_elements() -> None:
    rng = np.random.default_rng(1)
    mean, variance = rng.normal(size=(300, 400)), rng.exponential(size=(300, 400))
    estimate = do.Estimate(
        jnp.asarray(mean, jnp.float32), jnp.asarray(variance, jnp.float32)
    )
    tx = watch(sample=5000)
    state = tx.init(estimate.mean)
    assert state.averages.mean.shape == (5000,)
    numbers = scalars(tx.update(estimate, state)[1])
    expected = expected_of(mean, variance)
    assert numbers["factor/params"] == pytest.approx(expected["factor"], abs=0.02)
    assert numbers["sign_success"] == pytest.approx(expected["sign_success"], abs=0.01)
    assert numbers["relative_variance"] == pytest.approx(
        expected["relative_variance"], rel=0.15
    )
    # A number that is not the right one would be noticed.
    assert numbers["factor/params"] != pytest.approx(
        expected["factor"] + 0.04, abs=0.02
    )


@pytest.mark.parametrize("eta2", [0.25, 1.0, 4.0])
def test_plain_gradients_of_planted_noise(eta2: float) -> None:
    gradients = [noisy(i, 1.0, math.sqrt(eta2), (500,)) for i in range(300)]
    _, state = run(watch(0.99), gradients)
    numbers = scalars(state)
    assert numbers["relative_variance"] == pytest.approx(eta2, rel=0.1)
    assert numbers["factor"] == pytest.approx(1 / (1 + eta2), rel=0.1)
    rho = 0.5 + 0.5 * math.erf(1 / math.sqrt(2 * eta2))
    assert numbers["sign_success"] == pytest.approx(rho, abs=0.02)


def test_nothing_is_claimed_before_a_variance_was_seen() -> None:
    tx, gradient = watch(), jnp.ones(3)
    with jax.debug_nans(True):
        state = tx.init(gradient)
        assert all(math.isnan(x) for x in scalars(state).values())
        _, state = tx.update(gradient, state)
        assert all(math.isnan(x) for x in scalars(state).values())
        _, state = tx.update(gradient, state)
    assert scalars(state)["sign_success"] == 1.0


def test_elements_without_a_direction_are_not_certain() -> None:
    zero = do.Estimate(jnp.zeros(4), jnp.zeros(4))
    numbers = scalars(watch().update(zero, watch().init(jnp.zeros(4)))[1])
    assert numbers["relative_variance"] == 0
    assert numbers["factor"] == 0
    assert numbers["sign_success"] == 0.5


def test_infinite_and_negative_variances_are_no_nan() -> None:
    estimate = do.Estimate(
        jnp.asarray([1.0, 1.0, 1.0, 2.0]), jnp.asarray([jnp.inf, -0.5, 1.0, 4.0])
    )
    numbers = scalars(watch().update(estimate, watch().init(jnp.zeros(4)))[1])
    assert numbers["factor"] == pytest.approx((0 + 1 + 0.5 + 0.5) / 4)
    assert numbers["relative_variance"] == 1.0
    assert not any(math.isnan(x) for x in numbers.values())


def test_a_missing_gradient_keeps_its_numbers() -> None:
    tx = watch()
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state = tx.init(params)
    for i in range(3):
        gradient = {"a": noisy(i, 1, 1, (3,)), "b": noisy(i, 1, 1, (2,))}
        _, state = tx.update(gradient, state, params)
    before = scalars(state)
    updates, state = tx.update({"a": noisy(5, 1, 1, (3,)), "b": None}, state, params)
    after = scalars(state)
    assert updates["b"] is None
    assert after["factor/b"] == before["factor/b"]
    assert after["factor/a"] != before["factor/a"]
    averages = state.averages.mean
    _, state = tx.update({"a": None, "b": jnp.ones(2)}, state, params)
    np.testing.assert_array_equal(state.averages.mean[:3], averages[:3])
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"a": None, "b": jnp.ones(2)}, state)


# ---- scalars -----------------------------------------------------------------------


def nested_states() -> dict[str, Any]:
    params = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
    chain = optax.chain(watch(), do.adam(1e-3))
    transformations: dict[str, Any] = {
        "chain": chain,
        "MultiSteps": optax.MultiSteps(chain, every_k_schedule=2),
        "inject_hyperparams": optax.inject_hyperparams(
            lambda learning_rate: optax.chain(watch(), do.adam(learning_rate))
        )(learning_rate=0.1),
        "masked": optax.masked(chain, {"layer": {"w": True, "b": False}}),
        "named_chain": optax.named_chain(("all", chain)),
        "apply_if_finite": optax.apply_if_finite(chain, 3),
    }
    return {name: tx.init(params) for name, tx in transformations.items()}


@pytest.mark.parametrize("name", list(nested_states()))
def test_scalars_are_found_anywhere(name: str) -> None:
    numbers = scalars(nested_states()[name])
    assert all(type(value) is float for value in numbers.values())
    assert "sign_success/layer/w" in numbers
    assert ("sign_success/layer/b" in numbers) == (name != "masked")


def test_scalars_of_a_flax_optimizer() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(watch(), do.adam(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, gradients: Any) -> None:
        optimizer.update(model, gradients)

    params = nnx.state(model, nnx.Param)
    for i in range(3):
        step(
            model,
            optimizer,
            jax.tree.map(lambda p, i=i: noisy(i, 1, 1, p.shape), params),
        )
    numbers = scalars(optimizer.opt_state)
    assert 0 < numbers["factor"] < 1
    assert {"factor/bias", "factor/kernel"} <= {
        name.removesuffix("/value") for name in numbers
    }


def test_several_watches_have_keys_of_their_own() -> None:
    tx = optax.chain(
        watch(),
        do.moving_average_estimate(0.9),
        watch(),
        do.adapt_to_variance(),
    )
    numbers = scalars(tx.init(jnp.ones(2)))
    assert {"factor", "watch_1/factor", "watch_1/factor/params"} <= set(numbers)


def test_scalars_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match="found no state of `watch`"):
        scalars(do.adam(1e-3).init(jnp.ones(2)))
    state = watch().init(jnp.ones(2))
    with pytest.raises(TypeError, match="while a function is traced"):
        jax.jit(lambda s: scalars(s))(state)
    group = jax.vmap(watch().init)(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="vmapped group of shape"):
        scalars(group)
    member = jax.tree.map(lambda x: x[1], group)
    assert "factor/params" in scalars(member)


# ---- Mistakes ----------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\)"):
        watch(1.5)
    for sample in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="`sample` must be an integer"):
            watch(sample=sample)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state of type WatchState"):
        watch().update(jnp.ones(2), optax.EmptyState())


def test_other_parameters_than_those_of_init() -> None:
    tx = watch()
    state = tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="1 leaves, expected 2"):
        tx.update({"a": jnp.ones(2)}, state)


def test_state_is_small_and_sharding_is_kept() -> None:
    """On two devices, a sharded gradient stays sharded and gives the same numbers."""
    program = Path(__file__).with_name("sharded_watch.py")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.diagnostics.{program.stem}"],
        cwd=Path(__file__).parents[2],
        env=eight_devices(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sharded", "watch"]


def test_state_is_of_named_tuples_and_arrays() -> None:
    state = watch().init({"a": jnp.ones(2)})
    assert isinstance(state, WatchState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
