"""Every member beside its namesake in Optax, or beside an oracle of ours."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from benchmarks.family_step import CASES, Case, namesake, relative_difference
from dissect_optax import family
from tests.family import oracle
from tests.transformations.streams import stream, trajectory

MEMBERS = family.MEMBERS
every_member = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
NAMESAKES = {m.name: m for m in MEMBERS.values() if m.optax and m.name != "sgd"}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """Nothing here depends on how hard the compiler works."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---- Optax's ----------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_member_equals_its_namesake(case: Case) -> None:
    if case.theirs is None:
        pytest.skip(f"this Optax has no {case.label}")
    assert relative_difference(case) < 1e-9


def test_every_namesake_is_compared_with_its_defaults() -> None:
    plain = {case.name for case in CASES if not case.settings}
    # Of Table 1 tests/transformations/test_optimizers.py has the comparison.
    names = {member.optax.removeprefix("contrib.") for member in NAMESAKES.values()}
    assert names - {"sgd"} == plain


@pytest.mark.parametrize("name", sorted(set(NAMESAKES) & set(family.__all__)))
def test_arguments_have_optax_names_and_defaults(name: str) -> None:
    theirs = namesake(MEMBERS[name].optax)
    if theirs is None:
        pytest.skip(f"this Optax has no {name}")
    ours = inspect.signature(getattr(family, name)).parameters
    # A partial of Adam shows what it fixes; a clipping function has no equality.
    hidden = {"nesterov"} if name == "nadam" else {"clip_value_fn"}
    for argument, parameter in inspect.signature(theirs).parameters.items():
        if argument not in hidden:
            assert ours[argument].default == parameter.default, argument
            assert ours[argument].kind == parameter.kind, argument


def buffers_of(tx: optax.GradientTransformation, size: int = 512) -> int:
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, jnp.zeros((size, size))))
    return sum(leaf.size == size * size for leaf in leaves)


@every_member
def test_state_holds_the_buffers_of_the_table(member: family.Member) -> None:
    ours = buffers_of(member.factory(0.1))
    assert ours == member.buffers
    theirs = namesake(member.optax) if member.optax else None
    # For `optax.sgd` with momentum, and centred RMSProp, see the cases below.
    if theirs is not None and member.name not in ("m_sgd", "rmsprop_centered"):
        assert ours <= buffers_of(theirs(0.1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_no_case_holds_more_buffers_than_its_namesake(case: Case) -> None:
    if case.theirs is None:
        pytest.skip(f"this Optax has no {case.label}")
    ours, theirs = (
        buffers_of(make(0.1, **case.settings)) for make in (case.ours, case.theirs)
    )
    assert ours <= theirs


# ---- Ours -------------------------------------------------------------------------

GRADIENTS = stream(3, (3, 4))
VARIANCES = 0.1 + stream(4, (3, 4)) ** 2


def ours(tx: optax.GradientTransformation, variances: Any = None) -> np.ndarray:
    return trajectory(tx, GRADIENTS, variances)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        "adam_mini",
        "cautious_adam",
        "m_svag_decorrelated",
        "m_svag_maximum",
        "adam_unbiased",
        "adam_erf",
        "adam",
        "adam_equal_decays",
    ],
)
def test_members_equal_the_oracle(name: str) -> None:
    expected = -0.1 * getattr(oracle, name)(GRADIENTS)
    actual = ours(MEMBERS[name].factory(0.1))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_adam_mini_has_any_blocks() -> None:
    def by_rows(g: jax.Array) -> jax.Array:
        return jnp.mean(g * g, axis=1, keepdims=True)

    tx = family.adam_mini(0.1, block=by_rows)
    expected = -0.1 * oracle.adam_mini(GRADIENTS, axes=(2,))
    np.testing.assert_allclose(ours(tx), expected, rtol=1e-9, atol=1e-15)
    moment = optax.tree.get(tx.init(jnp.zeros((3, 4))), "second_moment")
    assert moment.shape == (3, 1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        "vrgd",
        "m_svag_mb_reciprocal",
        "m_svag_mb_before_momentum",
        "adam_star_mb_before_momentum",
    ],
)
def test_members_with_a_mini_batch_variance_equal_the_oracle(name: str) -> None:
    gradients = np.where(GRADIENTS == 0, 0.5, GRADIENTS)
    expected = -0.1 * getattr(oracle, name)(gradients, VARIANCES)
    actual = trajectory(MEMBERS[name].factory(0.1), gradients, VARIANCES)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_the_factored_moment_equals_the_oracle() -> None:
    tx = family.factored_rms(0.1, min_dim_size_to_factor=2)
    # The schedule of the decay is a float32 number, in Optax too.
    expected = -0.1 * oracle.factored_rms(GRADIENTS)
    np.testing.assert_allclose(ours(tx), expected, rtol=1e-6, atol=1e-15)
    state = tx.init(jnp.zeros((3, 4)))
    assert optax.tree.get(state, "row").shape == (3, 1)
    assert optax.tree.get(state, "column").shape == (1, 4)


# ---- Equal decays -----------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("decay", [0.5, 0.95, 0.99])
def test_adam_with_equal_decays_is_the_exact_recursion(decay: float) -> None:
    exact = optax.chain(
        do.moving_average_estimate(decay),
        do.scale_by_sign(),
        do.adapt_to_variance(do.inverse_sqrt),
        optax.scale_by_learning_rate(0.1),
    )
    two_averages = family.adam(0.1, b1=decay, b2=decay, eps=0.0)
    expected = -0.1 * oracle.adam(
        np.where(GRADIENTS == 0, 1e-9, GRADIENTS), decay, decay, 0.0
    )
    gradients = np.where(GRADIENTS == 0, 1e-9, GRADIENTS)
    for tx in (exact, two_averages):
        actual = trajectory(tx, gradients)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_adabelief_with_equal_decays_is_adam_with_another_factor() -> None:
    decay = 0.8
    adam_but_for_a_line = optax.chain(
        do.moving_average_estimate(decay),
        do.scale_by_sign(),
        do.adapt_to_variance(family.reciprocal),
        optax.scale_by_learning_rate(0.1),
    )
    adabelief = family.adabelief(0.1, decay, decay, eps=0.0, eps_root=0.0)
    gradients = 1 + stream(5, (6,), steps=200)
    one, other = (trajectory(tx, gradients) for tx in (adam_but_for_a_line, adabelief))
    # s is β (v-m²), but for the averages' start from zero, which decays with β^t.
    ratio = other / one * np.sqrt(decay)
    assert np.max(np.abs(ratio[-1] - 1)) < 1e-9
    assert np.max(np.abs(ratio[5] - 1)) > 1e-2


# ---- What a moment estimates --------------------------------------------------------


def mean_variance(tx: optax.GradientTransformation, steps: int) -> float:
    """The mean variance over many elements after steps of independent noise."""
    rng = np.random.default_rng(0)
    gradients = (2 + 3 * rng.normal(size=(steps, 20_000))).astype(np.float32)
    _, variances = trajectory(tx, gradients)
    return float(np.mean(variances[-1], dtype=np.float64)) / 9


@pytest.mark.parametrize(
    ("direction", "source", "minus_square", "expected"),
    [
        # The two averages of Adam: 1 - κ = 2β/(1+β).
        (family.moving_average(0.8), family.second_moment(0.9), True, 1.6 / 1.8),
        # AdaBelief: 2β²/(1+β). ACProp: 2/(1+β).
        (
            family.moving_average(0.8),
            family.second_moment(0.9, family.deviation_from_mean()),
            False,
            1.28 / 1.8,
        ),
        (
            family.moving_average(0.8),
            family.second_moment(0.9, family.deviation_from_previous_mean()),
            False,
            2 / 1.8,
        ),
        (optax.identity(), family.centred_second_moment(0.8), False, 1.6 / 1.8),
    ],
    ids=["about zero", "from the mean", "from the mean before", "centred"],
)
def test_the_bias_of_a_variance_is_the_one_that_is_documented(
    direction: Any, source: Any, minus_square: bool, expected: float
) -> None:
    tx = family.estimate(direction, source, minus_square=minus_square)
    measured = mean_variance(tx, steps=120)
    assert abs(measured / expected - 1) < 0.01
    # It would reject the unbiased value.
    assert abs(measured - 1) > 0.05


# ---- The registry -----------------------------------------------------------------


def test_the_registry_has_every_optimizer_and_the_empty_cells() -> None:
    optimizers = {
        name
        for name in family.__all__
        if "learning_rate" in getattr(getattr(family, name), "__annotations__", {})
    }
    assert optimizers <= set(MEMBERS)
    assert [m.name for m in MEMBERS.values() if not m.is_published] == [
        "m_svag_mb_reciprocal",
        "m_svag_decorrelated",
        "m_svag_maximum",
        "m_svag_mb_before_momentum",
        "adam_star_mb_before_momentum",
        "adam_unbiased",
        "adam_erf",
    ]
    for name, member in MEMBERS.items():
        assert member.name == name
        assert member.reference
        assert member.order in ("after momentum", "before momentum", "no momentum")


def test_neighbours_are_not_members() -> None:
    assert not set(family.NEIGHBOURS) & set(MEMBERS)
    assert {"sophia", "muon"} <= set(family.NEIGHBOURS)


# ---- What every member keeps of the library's promises ------------------------------


def params_of_every_kind() -> Any:
    return {
        "absent": None,
        "brain": jnp.ones(3, jnp.bfloat16),
        "complex": jnp.ones(2, jnp.complex64),
        "empty": jnp.ones(0),
        "matrix": jnp.ones((2, 3)),
        "scalar": jnp.ones(()),
    }


def extra_of(member: family.Member, gradients: Any) -> Any:
    if not member.needs_variance:
        return {}
    real = jax.tree.map(lambda g: jnp.abs(g).astype(jnp.float32), gradients)
    return {"grad_variance": jax.tree.map(lambda g: 0.25 + g * g, real)}


def avals(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@every_member
def test_updates_and_state_keep_their_dtypes(member: family.Member) -> None:
    params = params_of_every_kind()
    tx = optax.with_extra_args_support(member.factory(0.1))
    state = tx.init(params)
    extra = extra_of(member, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params, **extra)
    assert avals(updates) == avals(params)
    assert avals(new_state) == avals(state)
    # A gradient that is missing leaves its buffers as they are.
    missing = {**params, "matrix": None}
    extra = extra_of(member, missing)
    updates, new_state = jax.eval_shape(tx.update, missing, state, params, **extra)
    assert avals(updates) == avals(missing)
    assert avals(new_state) == avals(state)


SIZES = np.array([0.0, 1e-30, 1e-19, 1e-16, 1e-8, 1.0, 1e6, 1e12], np.float32)


# One of each kind of direction, source, factor and order.
EACH_PART = (
    "adam",
    "amsgrad",
    "yogi",
    "ademamix",
    "adan",
    "rmsprop_centered",
    "novograd",
    "adopt",
    "adabelief",
    "acprop",
    "factored_rms",
    "vrgd",
    "cautious_adam",
    "m_svag_mb_reciprocal",
    "m_svag_decorrelated",
    "m_svag_maximum",
    "adam_star_mb_before_momentum",
)


@pytest.mark.parametrize("name", EACH_PART)
def test_updates_and_derivatives_are_finite(name: str) -> None:
    member = MEMBERS[name]
    tx = optax.with_extra_args_support(member.factory(1.0))
    # Constant, changing and vanishing gradients of all sizes: [step, kind, size].
    signs = jnp.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, 0.0]])
    gradients = signs[:, :, None] * SIZES[None, None]

    def last(gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = jnp.zeros_like(gradients[0])

        def step(state: Any, gradient: jax.Array) -> Any:
            updates, state = tx.update(
                gradient, state, params, **extra_of(member, gradient)
            )
            return state, updates

        _, updates = jax.lax.scan(step, tx.init(params), gradients)
        return jnp.sum(updates * jnp.arange(1.0, 4.0)[:, None, None]), updates

    slope, updates = jax.jit(jax.grad(last, has_aux=True))(gradients)
    assert np.all(np.isfinite(updates))
    assert not np.any(np.isnan(slope))
    assert np.all(np.isfinite(slope[..., SIZES == 0]))
    usual = (SIZES >= 1e-16) & (SIZES <= 1e12)
    assert np.all(np.isfinite(slope[..., usual]))
    # No gradient at all, no update; the averages of Yogi start at 1e-6.
    assert name == "yogi" or np.all(updates[..., SIZES == 0] == 0)


def test_the_page_has_the_table_of_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "family.md").read_text("utf-8")
    for member in MEMBERS.values():
        cells = (member.direction, member.source or "–", member.factor, member.order)
        row = " | ".join([f"`{member.name}`", *cells, str(member.buffers)])
        assert f"| {row} |" in page
