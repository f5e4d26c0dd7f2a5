"""Optax's contract, for every public transformation and optimizer."""

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import dissect_optax as do
from tests.transformations.subjects import (
    FAMILY,
    LEARNING_RATE,
    OPTIMIZERS,
    SUBJECTS,
    Subject,
    Transformation,
)
from tests.virtual_devices import eight_devices

pytestmark = pytest.mark.usefixtures("quick_compilation")

every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
every_optimizer = pytest.mark.parametrize(
    "subject", OPTIMIZERS.values(), ids=OPTIMIZERS
)
# Per-example gradients have not the shape of their updates.
every_subject_but_per_example = pytest.mark.parametrize(
    "subject",
    [subject for subject in SUBJECTS.values() if not subject.per_example],
    ids=[name for name, subject in SUBJECTS.items() if not subject.per_example],
)
with_numbers = pytest.mark.parametrize(
    "subject",
    [subject for subject in SUBJECTS.values() if subject.numbers],
    ids=[name for name, subject in SUBJECTS.items() if subject.numbers],
)


def plain_params(dtype: Any = jnp.float32) -> optax.Params:
    return {"matrix": jnp.ones((2, 3), dtype), "vector": jnp.ones(3, dtype)}


def mixed_params() -> optax.Params:
    """Everything that a tree of parameters may hold."""
    return {
        "absent": None,
        "complex": jnp.ones(2, jnp.complex64),
        "empty": jnp.ones(0),
        "brain": jnp.ones(3, jnp.bfloat16),
        "half": jnp.ones(2, jnp.float16),
        "matrix": jnp.ones((2, 3)),
        "scalar": jnp.ones(()),
    }


def avals(tree: Any) -> Any:
    """Shape, dtype and weakness of every leaf, in the structure of the tree."""
    return jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)), tree
    )


def assert_close(actual: Any, desired: Any, rtol: float = 1e-5) -> None:
    chex.assert_trees_all_close(actual, desired, rtol=rtol, atol=1e-6)


def test_every_public_factory_is_a_subject() -> None:
    public = {
        name
        for name in do.__all__
        if inspect.isfunction(getattr(do, name))
        and inspect.signature(getattr(do, name)).return_annotation is Transformation
    }
    named = {name.partition("(")[0].split(" ")[0] for name in SUBJECTS}
    assert named - set(FAMILY) == public


# ---- init and update --------------------------------------------------------------


@every_subject
def test_init_and_update_are_pure(subject: Subject) -> None:
    params, tx, update = plain_params(), subject.make(), subject.jitted_update
    state = tx.init(params)
    first = subject.run(update, params, state, steps=2)
    # Had a step left a trace anywhere, these would differ.
    subject.run(update, params, first[1], steps=3)
    chex.assert_trees_all_equal(state, tx.init(params))
    chex.assert_trees_all_equal(subject.run(update, params, state, steps=2), first)


@every_subject
def test_unknown_extra_args_and_missing_params_change_nothing(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state, gradients = tx.init(params), subject.gradients(params)
    extra = subject.extra_args(gradients)
    expected = tx.update(gradients, state, params, **extra)
    chex.assert_trees_all_equal(tx.update(gradients, state, **extra), expected)
    actual = tx.update(gradients, state, params, value=1.0, anything="else", **extra)
    chex.assert_trees_all_equal(actual, expected)


@functools.cache
def mixed_step(subject: Subject) -> tuple[Any, optax.Updates, Any]:
    """State, updates and new state of a compiled step with a mixed tree."""
    params, tx = mixed_params(), subject.make()
    gradients, state = subject.gradients(params), tx.init(params)
    extra = subject.extra_args(gradients)
    return state, *jax.jit(tx.update)(gradients, state, params, **extra)


@every_subject
def test_state_keeps_structure_shapes_and_dtypes(subject: Subject) -> None:
    params, tx = mixed_params(), subject.make()
    gradients = subject.gradients(params)
    extra = subject.extra_args(gradients)
    state, _, jitted = mixed_step(subject)
    expected = avals(state)
    assert avals(jax.jit(tx.init)(params)) == expected
    assert avals(jax.eval_shape(tx.init, params)) == expected
    assert avals(jitted) == expected
    eager = tx.update(gradients, state, params, **extra)
    assert avals(eager[1]) == expected
    abstract = jax.eval_shape(tx.update, gradients, state, params, **extra)
    assert avals(abstract) == avals(eager)


@every_subject
def test_state_is_named_tuples_of_plain_arrays(subject: Subject) -> None:
    state = subject.make().init(mixed_params())
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)
        assert jnp.issubdtype(leaf.dtype, jnp.inexact) or leaf.dtype == jnp.int32

    def own_states(node: Any) -> list[Any]:
        if hasattr(node, "_fields"):
            return [node]
        return [found for child in node for found in own_states(child)]

    for own in own_states(state):
        assert isinstance(own, tuple)
        assert type(own).__module__.startswith(("dissect_optax", "optax"))


@every_subject
def test_mixed_leaves_come_back_in_their_own_dtypes(subject: Subject) -> None:
    params, tx = mixed_params(), subject.make()
    state, updates, _ = mixed_step(subject)
    expected = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == expected
    chex.assert_tree_all_finite(updates)
    gradients = subject.gradients(params)
    extra = subject.extra_args(gradients)
    without_params, _ = jax.eval_shape(tx.update, gradients, state, None, **extra)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), without_params) == expected


@every_subject
def test_every_mixed_leaf_is_treated_as_if_it_were_alone(subject: Subject) -> None:
    params, tx = mixed_params(), subject.make()
    together, _ = subject.run(tx.update, params, tx.init(params), steps=2)
    for name in ("complex", "half"):
        state = tx.init(params[name])
        for step in range(2):
            gradient = subject.gradients(params, step)[name]
            alone, state = tx.update(gradient, state, **subject.extra_args(gradient))
        chex.assert_trees_all_equal(together[name], alone)


@every_subject
def test_a_missing_gradient_keeps_its_state(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()
    _, state = subject.run(tx.update, params, tx.init(params), steps=1)
    full = subject.gradients(params, step=1)
    partial = {**full, "vector": None}
    expected, full_state = tx.update(full, state, params, **subject.extra_args(full))
    for extra in (subject.extra_args(partial), subject.extra_args(full)):
        updates, new_state = tx.update(partial, state, params, **extra)
        assert updates["vector"] is None
        chex.assert_trees_all_equal(updates["matrix"], expected["matrix"])
        assert avals(new_state) == avals(state)
        for new, old, moved in zip(
            *map(jax.tree.leaves, (new_state, state, full_state)), strict=True
        ):
            kept = new.shape == (3,)
            chex.assert_trees_all_equal(new, old if kept else moved)


@every_subject
def test_counts_saturate(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()
    most = jnp.iinfo(jnp.int32).max
    state = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, most) if leaf.dtype == jnp.int32 else leaf,
        subject.run(tx.update, params, tx.init(params), steps=1)[1],
    )
    updates, state = subject.run(tx.update, params, state, steps=1)
    chex.assert_tree_all_finite(updates)
    for leaf in jax.tree.leaves(state):
        if leaf.dtype == jnp.int32:
            assert leaf == most


# ---- JAX's transformations --------------------------------------------------------


@every_subject
def test_jit_and_scan_agree_and_compile_once(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()
    traces = []

    def update(*args: Any, **kwargs: Any) -> Any:
        traces.append(1)
        return tx.update(*args, **kwargs)

    jitted = jax.jit(update)
    compiled = subject.run(jitted, params, tx.init(params), steps=3)
    assert len(traces) == 1
    assert jitted._cache_size() == 1
    plain = subject.run(tx.update, params, tx.init(params), steps=3)
    assert_close(compiled, plain)

    stream = [subject.gradients(params, step) for step in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stream)

    def step(state: Any, gradients: Any) -> Any:
        updates, state = tx.update(
            gradients, state, params, **subject.extra_args(gradients)
        )
        return state, updates

    last_state, updates = jax.lax.scan(step, tx.init(params), stacked)
    last_updates = jax.tree.map(lambda leaf: leaf[-1], updates)
    assert_close((last_updates, last_state), plain)


@every_subject
def test_cond_may_skip_a_step(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()
    gradients = subject.gradients(params)
    extra = subject.extra_args(gradients)
    zeros = jax.tree.map(jnp.zeros_like, params)
    taken_step = subject.jitted_update(gradients, tx.init(params), params, **extra)

    @jax.jit
    def step(taken: Any, state: Any) -> Any:
        return jax.lax.cond(
            taken,
            lambda state: tx.update(gradients, state, params, **extra),
            lambda state: (zeros, state),
            state,
        )

    state = tx.init(params)
    chex.assert_trees_all_equal(step(False, state), (zeros, state))
    assert_close(step(True, state), taken_step)


@with_numbers
def test_vmap_over_all_numbers(subject: Subject) -> None:
    params = plain_params()

    def two_steps(numbers: dict[str, Any]) -> Any:
        tx = subject.make(**numbers)
        return subject.run(tx.update, params, tx.init(params), steps=2)

    halves = {name: number / 2 for name, number in subject.numbers.items()}
    both = jax.tree.map(lambda *pair: jnp.array(pair), subject.numbers, halves)
    together = jax.jit(jax.vmap(two_steps))(both)
    for i, numbers in enumerate((subject.numbers, halves)):
        one_of_them = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert_close(one_of_them, two_steps(numbers))


@every_subject
def test_donated_buffers_are_reused(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()

    def step(params: Any, state: Any, gradients: Any, extra: Any) -> Any:
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    expected = subject.run(subject.jitted_update, params, tx.init(params), steps=2)
    given = jax.tree.map(jnp.copy, params), tx.init(params)
    for number in range(2):
        gradients = subject.gradients(params, number)
        before = jax.tree.leaves(given)
        given = donating(*given, gradients, subject.extra_args(gradients))
        assert all(leaf.is_deleted() for leaf in before)
    assert_close(given[1], expected[1])


def test_states_are_sharded_like_their_parameters() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.transformations.sharded_steps"],
        cwd=Path(__file__).parents[2],
        env=eight_devices(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(SUBJECTS)


# ---- Optax's wrappers -------------------------------------------------------------


def injectable(subject: Subject, dtype: Any = None) -> Transformation:
    def inject(factory: Callable[..., Any]) -> Callable[..., Any]:
        # Behind an Estimate, which is in wide numbers, Optax before 0.2.7 would take
        # the dtype of the hyperparameters from there.
        hyperparam_dtype = dtype if subject.before else None
        return optax.inject_hyperparams(
            factory,
            static_args=tuple(subject.others),
            hyperparam_dtype=hyperparam_dtype,
        )

    return subject.make(inject)


@with_numbers
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_inject_hyperparams(subject: Subject, dtype: Any) -> None:
    params = plain_params(dtype)
    tx = injectable(subject, dtype)
    state = tx.init(params)
    updates, new_state = subject.run(jax.jit(tx.update), params, state, steps=2)

    # The same numbers, rounded as the wrapper rounds them.
    rounded = {name: jnp.asarray(v, dtype) for name, v in subject.numbers.items()}
    plain = subject.make(**rounded)
    expected, _ = subject.run(plain.update, params, plain.init(params), steps=2)
    assert avals(new_state) == avals(state)
    assert jax.tree.map(jnp.result_type, updates) == (
        jax.tree.map(jnp.result_type, params)
    )
    rtol = 1e-5 if dtype == jnp.float32 else 1e-2
    assert_close(
        jax.tree.map(lambda u: u.astype(jnp.float32), updates),
        jax.tree.map(lambda u: u.astype(jnp.float32), expected),
        rtol,
    )


@pytest.mark.usefixtures("x64")
@every_optimizer
def test_inject_hyperparams_keeps_the_dtypes_of_a_mixed_state(
    subject: Subject,
) -> None:
    params = {"wide": jnp.ones(2, jnp.float64), "narrow": jnp.ones(2, jnp.float32)}
    tx = injectable(subject)
    state, extra = tx.init(params), subject.extra_args(params)
    _, new_state = jax.eval_shape(tx.update, params, state, params, **extra)
    assert avals(new_state) == avals(state)


@every_subject
def test_masked_leaves_pass_by(subject: Subject) -> None:
    params = plain_params()
    mask = {"matrix": True, "vector": False}
    tx, alone = optax.masked(subject.make(), mask), subject.make()
    state = tx.init(params)
    updates, new_state = subject.run(jax.jit(tx.update), params, state, steps=2)
    assert avals(new_state) == avals(state)
    # The variances of all gradients were handed over, those of one are used.
    part = {"matrix": params["matrix"]}
    chex.assert_trees_all_equal(
        updates["vector"], subject.gradients(params, 1)["vector"]
    )
    state = alone.init(part)
    for step in range(2):
        gradients = {"matrix": subject.gradients(params, step)["matrix"]}
        expected, state = alone.update(
            gradients, state, part, **subject.extra_args(gradients)
        )
    assert_close(updates["matrix"], expected["matrix"])


@every_subject
def test_partition_gives_each_group_its_own(subject: Subject) -> None:
    params = plain_params()
    tx = optax.partition(
        {"ours": subject.make(), "frozen": optax.set_to_zero()},
        {"matrix": "ours", "vector": "frozen"},
    )
    state = tx.init(params)
    updates, new_state = subject.run(jax.jit(tx.update), params, state, steps=1)
    assert avals(new_state) == avals(state)
    alone = subject.make()
    expected, _ = subject.run(alone.update, params, alone.init(params), steps=1)
    assert_close(updates["matrix"], expected["matrix"])
    assert not np.any(updates["vector"])


@every_subject_but_per_example
def test_multi_steps_hands_over_the_mean_gradient_and_the_last_variance(
    subject: Subject,
) -> None:
    params, tx = plain_params(), subject.make()
    wrapped = optax.MultiSteps(tx, every_k_schedule=2)
    update, state = jax.jit(wrapped.update), wrapped.init(params)
    first, second = subject.gradients(params, 0), subject.gradients(params, 1)
    updates, state = update(first, state, params, **subject.extra_args(first))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    last = subject.extra_args(second)
    updates, _ = update(second, state, params, **last)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = subject.jitted_update(mean, tx.init(params), params, **last)
    assert_close(updates, expected)


@every_subject_but_per_example
def test_apply_if_finite_forgets_a_step_with_nan(subject: Subject) -> None:
    params = plain_params()
    tx = optax.apply_if_finite(subject.make(), max_consecutive_errors=3)
    update = jax.jit(tx.update)
    _, state = subject.run(update, params, tx.init(params), steps=1)
    gradients = subject.gradients(params, 1)
    gradients["vector"] = gradients["vector"].at[0].set(jnp.nan)
    updates, new_state = update(
        gradients, state, params, **subject.extra_args(gradients)
    )
    assert new_state.notfinite_count == 1
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
    chex.assert_trees_all_equal(new_state.inner_state, state.inner_state)


@every_subject
def test_chain_and_named_chain(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()
    expected, _ = subject.run(tx.update, params, tx.init(params), steps=1)
    for chain in (
        optax.chain(optax.identity(), tx, optax.scale(-2.0)),
        optax.named_chain(("ours", tx), ("half", optax.scale(-2.0))),
    ):
        updates, state = subject.run(chain.update, params, chain.init(params), steps=1)
        assert_close(updates, jax.tree.map(lambda u: -2 * u, expected))
    assert set(state) == {"ours", "half"}


@every_subject
def test_map_params_reaches_every_buffer_and_no_count(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()
    _, state = subject.run(tx.update, params, tx.init(params), steps=1)
    touched = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    for new, old in zip(jax.tree.leaves(touched), jax.tree.leaves(state), strict=True):
        chex.assert_trees_all_equal(new, old if old.dtype == jnp.int32 else old + 1)


STATE_NAMES = {
    "svag": ("mean", "variance"),
    "m_sgd": ("trace",),
    "m_ssd": ("trace",),
    "m_svag": ("mean", "variance"),
    "adam": ("mean", "second_moment"),
    "adam_star": ("mean", "variance"),
    "m_svag_mb": ("trace", "variance"),
    "adam_star_mb": ("trace", "variance"),
}


@pytest.mark.parametrize("name", STATE_NAMES)
def test_tree_get_finds_the_state_by_name(name: str) -> None:
    params, subject = plain_params(), OPTIMIZERS[name]
    state = subject.make().init(params)
    for field in STATE_NAMES[name]:
        assert jax.tree.structure(optax.tree.get(state, field)) == (
            jax.tree.structure(params)
        )
    changed = optax.tree.set(state, **{STATE_NAMES[name][0]: params})
    chex.assert_trees_all_equal(optax.tree.get(changed, STATE_NAMES[name][0]), params)


@pytest.mark.parametrize("name", ["sgd", "ssd"])
def test_sgd_and_ssd_have_no_state(name: str) -> None:
    assert not jax.tree.leaves(OPTIMIZERS[name].make().init(plain_params()))


@pytest.mark.parametrize(
    ("name", "counts"),
    [("m_svag", 2), ("adam", 1), ("svag", 1), ("m_sgd", 0), ("m_svag_mb", 0)],
)
def test_counts_are_found_by_name(name: str, counts: int) -> None:
    state = OPTIMIZERS[name].make().init(plain_params())
    assert len(list(optax.tree.get_all_with_path(state, "count"))) == counts


@every_optimizer
def test_state_holds_no_more_buffers_than_the_method_needs(subject: Subject) -> None:
    expected = {
        do.sgd: 0,
        do.ssd: 0,
        do.m_sgd: 1,
        do.m_ssd: 1,
    }.get(subject.factory, 2)
    leaves = jax.tree.leaves(subject.make().init(jnp.ones(5)))
    assert sum(leaf.shape == (5,) for leaf in leaves) == expected


@every_optimizer
def test_a_schedule_sets_the_step_size_of_each_step(subject: Subject) -> None:
    params, fixed = plain_params(), subject.make()
    falling = subject.make(
        learning_rate=optax.linear_schedule(LEARNING_RATE, LEARNING_RATE / 2, 1)
    )
    for steps, share in ((1, 1.0), (2, 0.5)):
        updates, _ = subject.run(fixed.update, params, fixed.init(params), steps)
        scheduled, _ = subject.run(falling.update, params, falling.init(params), steps)
        assert_close(scheduled, jax.tree.map(lambda u, s=share: s * u, updates))


# ---- The libraries around Optax ---------------------------------------------------


@every_optimizer
def test_flax_nnx_optimizer(subject: Subject) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, subject.make(), wrt=nnx.Param)
    params = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    tx = subject.make()
    state = tx.init(params)

    @nnx.jit
    def step(model: Any, optimizer: Any, gradients: Any) -> None:
        optimizer.update(model, gradients, **subject.extra_args(gradients))

    for number in range(2):
        gradients = subject.gradients(params, number)
        step(model, optimizer, gradients)
        updates, state = tx.update(
            gradients, state, params, **subject.extra_args(gradients)
        )
        params = optax.apply_updates(params, updates)
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)),
        jax.tree.leaves(params),
        strict=True,
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    "subject",
    [subject for subject in OPTIMIZERS.values() if not subject.needs_variance],
    ids=[name for name, subject in OPTIMIZERS.items() if not subject.needs_variance],
)
def test_linen_train_state(subject: Subject) -> None:
    params, tx = plain_params(), subject.make()
    train_state = flax.training.train_state.TrainState.create(
        apply_fn=flax.linen.Dense(1).apply, params=params, tx=tx
    )
    gradients = subject.gradients(params)
    apply = jax.jit(lambda train_state, grads: train_state.apply_gradients(grads=grads))
    new = apply(train_state, gradients)
    updates, state = tx.update(gradients, tx.init(params), params)
    assert_close(new.params, optax.apply_updates(params, updates))
    assert_close(new.opt_state, state)
    assert new.step == 1


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax before 0.12.
def test_orbax_saves_and_restores_every_state(tmp_path: Path) -> None:
    states, blanks = {}, {}
    for name, subject in OPTIMIZERS.items():
        params, tx = plain_params(), subject.make()
        blanks[name] = jax.eval_shape(tx.init, params)
        _, states[name] = subject.run(jax.jit(tx.update), params, tx.init(params), 1)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", blanks)
    chex.assert_trees_all_equal(restored, states)
    assert jax.tree.structure(restored) == jax.tree.structure(states)
