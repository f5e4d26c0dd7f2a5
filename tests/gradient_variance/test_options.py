"""Options, numbers and contexts of `value_grad_and_variance`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dissect_optax
from dissect_optax import value_grad_and_variance
from tests.gradient_variance.models import MODELS, normal
from tests.gradient_variance.oracle import (
    relative_error,
    variance_by_equation_44,
    variance_of_mean,
    weighted_mean_and_variance,
)


def loss(params, example):
    """A dense layer, a recurrent one, a table: every kind of term, in one model."""
    x, tokens = example
    h = jnp.tanh(x @ params["dense"] + params["bias"])
    sequence = params["table"][tokens] @ params["product"]
    return jnp.square(h).sum() + jnp.sin(sequence).sum() * h[0]


def make_params(dtype=None):
    params = {
        "dense": normal(4, 5),
        "bias": normal(5),
        "table": normal(9, 4),
        "product": normal(4, 7),
    }
    return jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)


def make_batch(size, dtype=None):
    tokens = np.random.default_rng(0).integers(0, 9, (size, 3))
    x = normal(size, 4)
    return x.astype(dtype or x.dtype), jnp.asarray(tokens)


def per_example(params, batch):
    """Per-example losses and gradients, in the order of the leaves."""
    values, gradients = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batch)
    return np.asarray(values), [np.asarray(g) for g in jax.tree.leaves(gradients)]


def assert_matches(result, values, gradients, tolerance=1e-12):
    value, grad, variance = result
    assert relative_error(value, values.mean()) < tolerance
    for g, s, k in zip(
        jax.tree.leaves(grad), jax.tree.leaves(variance), gradients, strict=True
    ):
        assert relative_error(g, k.mean(0)) < tolerance
        assert relative_error(s, variance_of_mean(k)) < tolerance


def assert_close(actual, wanted, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert relative_error(a, b) < tolerance


# ---- Microbatches, two passes, auxiliary output, regularizer ----------------------


@pytest.mark.parametrize("size", [1, 3, 11])
@pytest.mark.usefixtures("x64")
def test_microbatches_of_any_size_merge_exactly(size):
    params, batch = make_params(), make_batch(11)
    measure = jax.jit(value_grad_and_variance(loss, microbatch_size=size))
    assert_matches(measure(params, batch), *per_example(params, batch))


@pytest.mark.parametrize(
    "name", ["transposed_convolution", "tied_weights", "embedding"]
)
@pytest.mark.usefixtures("x64")
def test_two_passes_are_exact_too(name):
    loss, params, batch, *_ = MODELS[name]()
    result = jax.jit(value_grad_and_variance(loss, two_pass=True))(params, batch)
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    for s, k in zip(*map(jax.tree.leaves, (result[2], gradients)), strict=True):
        assert relative_error(s, variance_of_mean(k)) < 1e-12


def affine_loss(params, x):
    return (params["w"] * jnp.outer(x, jnp.ones(3))).sum() + x @ params["v"] @ jnp.ones(
        3
    )


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_two_passes_see_what_the_difference_of_squares_loses(spread):
    x = 1000 * (1 + spread * normal(33, 4))
    params = {"w": normal(4, 3), "v": normal(4, 3)}
    _, _, one = jax.jit(value_grad_and_variance(affine_loss))(params, x)
    _, _, two = jax.jit(value_grad_and_variance(affine_loss, two_pass=True))(params, x)
    wanted = variance_of_mean(np.broadcast_to(np.float64(x)[:, :, None], (33, 4, 3)))
    assert relative_error(two["v"], wanted) < 1e-5
    # An error of some 1e-7 of the square, relative to a variance of `spread` times it.
    assert relative_error(one["v"], wanted) < 1e-6 / spread**2
    assert np.all(np.asarray(one["v"]) >= 0)
    if spread < 1e-3:
        assert relative_error(one["v"], wanted) > 1e-1
    # Gradients that are stored need no second pass.
    assert relative_error(one["w"], wanted) < 1e-5


def test_identical_examples_have_no_variance_in_two_passes():
    params, (x, tokens) = make_params(), make_batch(1)
    batch = jnp.tile(x, (7, 1)), jnp.tile(tokens, (7, 1))
    _, grad, variance = jax.jit(value_grad_and_variance(loss, two_pass=True))(
        params, batch
    )
    for g, s in zip(jax.tree.leaves(grad), jax.tree.leaves(variance), strict=True):
        assert np.abs(s).max() < 1e-12 * np.square(g).max()


def loss_with_aux(params, example, factor):
    value = factor * loss(params, example)
    return value, {"x": example[0] * 2, "value": value}


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.usefixtures("x64")
def test_auxiliary_output_is_stacked(microbatch_size):
    params, batch = make_params(), make_batch(5)
    measure = value_grad_and_variance(
        loss_with_aux, has_aux=True, microbatch_size=microbatch_size
    )
    (value, aux), grad, variance = jax.jit(measure)(params, batch, 3.0)
    values, gradients = per_example(params, batch)
    scaled = [3 * g for g in gradients]
    assert_matches((value, grad, variance), 3 * values, scaled)
    assert_close(aux, {"x": 2 * batch[0], "value": 3 * values})


def half_squares(params):
    return 0.25 * sum(jnp.square(p).sum() for p in jax.tree.leaves(params))


@pytest.mark.usefixtures("x64")
def test_a_regularizer_moves_the_gradient_and_not_the_variance():
    params, batch = make_params(), make_batch(5)
    plain = value_grad_and_variance(loss)(params, batch)
    value, grad, variance = jax.jit(
        value_grad_and_variance(loss, regularizer=half_squares)
    )(params, batch)
    assert relative_error(value, plain[0] + half_squares(params)) < 1e-12
    assert_close(grad, jax.tree.map(lambda g, p: g + 0.5 * p, plain[1], params))
    assert_close(variance, plain[2])


# ---- Weights -----------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.usefixtures("x64")
def test_weights_give_the_variance_of_the_weighted_mean(microbatch_size):
    params, batch = make_params(), make_batch(5)
    weights = np.asarray([0.5, 0.0, 2.0, 1.0, 0.25])
    measure = value_grad_and_variance(loss, microbatch_size=microbatch_size)
    value, grad, variance = jax.jit(measure)(params, batch, weights=weights)
    values, gradients = per_example(params, batch)
    assert relative_error(value, weights @ values / weights.sum()) < 1e-12
    wanted = [weighted_mean_and_variance(g, weights) for g in gradients]
    assert_close(grad, [mean for mean, _ in wanted])
    assert_close(variance, [spread for _, spread in wanted])


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}, {"two_pass": True}])
@pytest.mark.usefixtures("x64")
def test_a_mask_gives_the_result_of_the_smaller_batch(options):
    params, (x, tokens) = make_params(), make_batch(6)
    mask = np.asarray([True, False, True, True, False, False])
    # Padding may hold anything.
    padded = x.at[1].set(jnp.nan).at[4].set(jnp.inf), tokens.at[5].set(100)
    measure = jax.jit(value_grad_and_variance(loss, **options))
    masked = measure(params, padded, weights=mask)
    assert_matches(masked, *per_example(params, (x[mask], tokens[mask])))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_traced_weights_that_leave_no_variance_give_zero(microbatch_size):
    params, batch = make_params(), make_batch(4)
    measure = jax.jit(value_grad_and_variance(loss, microbatch_size=microbatch_size))
    one = np.asarray([0.0, 0.0, 0.5, 0.0])
    value, grad, variance = measure(params, batch, weights=one)
    values, gradients = per_example(params, batch)
    assert relative_error(value, values[2]) < 1e-6
    assert_close(grad, [g[2] for g in gradients], 1e-5)
    assert_close(variance, [np.zeros(g.shape[1:]) for g in gradients])
    nothing = measure(params, batch, weights=np.zeros(4))
    assert_close(nothing, jax.tree.map(np.zeros_like, nothing))


# ---- Low precision and complex numbers --------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_are_accumulated_in_float32(dtype):
    params, batch = make_params(dtype), make_batch(300, dtype)
    value, grad, variance = jax.jit(value_grad_and_variance(loss))(params, batch)
    assert value.dtype == dtype
    _, gradients = per_example(params, batch)
    rounding = float(jnp.finfo(dtype).eps)
    for g, s, k, p in zip(
        *map(jax.tree.leaves, (grad, variance, gradients, params)), strict=True
    ):
        assert g.dtype == p.dtype
        assert s.dtype == jnp.float32
        k = np.float64(k)
        assert relative_error(np.float64(g), k.mean(0)) < 2 * rounding
        # Products are not rounded, per-example gradients are: half a unit each.
        assert relative_error(s, variance_of_mean(k)) < 2 * rounding


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_that_are_exact_are_not_rounded_on_the_way(dtype):
    x = (1 + normal(1000, 6) / 4).astype(dtype)
    params = {"w": jnp.zeros((6, 2), dtype), "b": jnp.zeros(6, dtype)}
    _, _, variance = value_grad_and_variance(
        lambda p, x: (x @ p["w"]).sum() + x @ p["b"]
    )(params, x)
    wanted = variance_of_mean(np.float64(x))
    assert relative_error(variance["b"], wanted) < 1e-5
    assert relative_error(variance["w"][:, 0], wanted) < 1e-4


# ---- Contexts ----------------------------------------------------------------------


def test_traces_the_loss_once_for_all_calls():
    calls = []

    def counted(params, example):
        calls.append(1)
        return loss(params, example)

    measure = jax.jit(value_grad_and_variance(counted))
    measure(make_params(), make_batch(4))
    traced = len(calls)
    measure(make_params(), make_batch(4))
    assert len(calls) == traced == 1
    assert measure._cache_size() == 1


@pytest.mark.usefixtures("x64")
def test_replications_by_vmap_over_parameters():
    batch = make_batch(5)
    params = [make_params(), jax.tree.map(jnp.cos, make_params())]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    replicated = jax.vmap(value_grad_and_variance(loss), (0, None))
    results = jax.jit(replicated)(stacked, batch)
    for i, p in enumerate(params):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], results)
        assert_matches(one, *per_example(p, batch))


@pytest.mark.usefixtures("x64")
def test_steps_inside_a_scan_with_a_loss_that_closes_over_traced_values():
    params, batch = make_params(), make_batch(5)

    def step(params, factor):
        measure = value_grad_and_variance(lambda p, x: factor * loss(p, x))
        value, grad, variance = measure(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad), (value, variance)

    last, (values, variances) = jax.jit(lambda p: jax.lax.scan(step, p, jnp.ones(2)))(
        params
    )
    first, second = (jax.tree.map(lambda v, i=i: v[i], variances) for i in range(2))
    middle, _ = step(params, 1.0)
    wanted = per_example(params, batch), per_example(middle, batch)
    for value, variance, (losses, gradients) in zip(
        values, (first, second), wanted, strict=True
    ):
        assert relative_error(value, losses.mean()) < 1e-12
        assert_close(variance, [variance_of_mean(g) for g in gradients])
    assert_close(last, step(middle, 1.0)[0])


def test_shapes_are_known_without_computing():
    params, batch = make_params(), make_batch(5)
    value, grad, variance = jax.eval_shape(value_grad_and_variance(loss), params, batch)
    assert value.shape == ()
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(lambda leaf: leaf.shape, grad) == shapes
    assert jax.tree.map(lambda leaf: leaf.shape, variance) == shapes


def scaled_or_not(params, x, mode):
    return jnp.square(x @ params).sum() * (2 if mode == "double" else 1)


@pytest.mark.usefixtures("x64")
def test_shared_arguments_may_be_anything():
    params, x = normal(4, 3), normal(5, 4)
    measure = value_grad_and_variance(scaled_or_not)
    single, double = measure(params, x, "single"), measure(params, x, "double")
    assert_close(double[1], 2 * single[1])
    assert_close(double[2], 4 * single[2])


def total_at(precision):
    measure = value_grad_and_variance(scaled_or_not, precision=precision)
    return str(
        jax.make_jaxpr(measure, static_argnums=2)(normal(4, 3), normal(5, 4), "")
    )


def test_precision_reaches_the_products():
    assert total_at(None).count("HIGHEST") == 0
    assert total_at("highest").count("HIGHEST") > 0
    with jax.default_matmul_precision("float32"):
        assert total_at(None).count("HIGHEST") > 0


def joined_loss(params, xs):
    return jnp.sin(xs @ jnp.concatenate(params, axis=1)).sum()


def split(parts):
    return [normal(32, 96 // parts)] * parts


def test_parameters_that_share_a_product_share_its_cost():
    xs = normal(4, 12, 32)  # More steps than cross terms are worth.
    measure = value_grad_and_variance(joined_loss)
    products = [
        str(jax.make_jaxpr(measure)(split(parts), xs)).count(" scan[")
        for parts in (1, 3)
    ]
    assert products == [1, 1]


@pytest.mark.usefixtures("full_optimization")
def test_memory_of_a_large_table_does_not_grow_with_the_batch():
    def loss(table, tokens):
        return jnp.sin(table[tokens]).sum()

    table = jax.ShapeDtypeStruct((4000, 64), jnp.float32)
    tokens = jax.ShapeDtypeStruct((32, 5), jnp.int32)
    measure = jax.jit(value_grad_and_variance(loss))
    analysis = measure.lower(table, tokens).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 2 * 4000 * 64 * 4


def deep_loss(params, x):
    def block(w, x):
        return jnp.sin(jnp.sin(x @ w) @ w)

    for w in params:
        x = jax.checkpoint(block)(w, x)
    return jnp.square(x).sum()


@pytest.mark.usefixtures("full_optimization")
def test_remat_keeps_its_barriers_and_its_memory():
    params = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4
    x = jax.ShapeDtypeStruct((16, 32, 64), jnp.float32)
    measure = value_grad_and_variance(deep_loss)
    # XLA drops these on a CPU, for the plain gradient too; elsewhere they are what
    # keeps the second forward pass from being merged with the first.
    assert str(jax.make_jaxpr(measure)(params, x)).count("optimization_barrier") == 4
    plain = jax.value_and_grad(lambda p, x: jax.vmap(deep_loss, (None, 0))(p, x).mean())
    ours, its = (
        jax.jit(f).lower(params, x).compile().memory_analysis().temp_size_in_bytes
        for f in (measure, plain)
    )
    assert ours < 1.2 * its + 4 * 64 * 64 * 4


@pytest.mark.usefixtures("x64")
def test_remat_with_a_random_key_inside():
    def loss(params, example):
        x, key = example

        def noisy(w, x, key):
            return jnp.tanh(x @ w) * jax.random.normal(key, (3,))

        return jnp.square(jax.checkpoint(noisy)(params, x, key)).sum()

    params = normal(4, 3)
    batch = normal(5, 4), jax.random.split(jax.random.key(0), 5)
    _, _, variance = jax.jit(value_grad_and_variance(loss))(params, batch)
    gradients = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    assert relative_error(variance, variance_of_mean(gradients)) < 1e-12


# ---- Unbiasedness ------------------------------------------------------------------


def test_the_variance_is_unbiased_and_other_divisors_are_not():
    size, repetitions = 4, 4000
    random = np.random.default_rng(7)
    x = jnp.asarray(random.normal(size=(repetitions, size, 3)), jnp.float32)
    scale = jnp.asarray([0.5, 1.0, 2.0])
    # The gradient of one example is scale·x, so the mean of four has variance scale²/4.
    measure = value_grad_and_variance(lambda p, x: (p * scale * x).sum())
    _, grads, variances = jax.jit(jax.vmap(measure, (None, 0)))(jnp.ones(3), x)
    truth = np.square(np.asarray(scale)) / size
    variances = np.asarray(variances, np.float64)
    standard_error = variances.std(0) / np.sqrt(repetitions)
    assert np.all(np.abs(variances.mean(0) - truth) < 4 * standard_error)
    assert np.all(np.abs(np.var(grads, axis=0) / truth - 1) < 0.1)
    # |B|² alone, |B|-1 alone, |B| alone: all of them rejected.
    for factor in ((size - 1) / size, size, size - 1):
        wrong = factor * variances.mean(0)
        assert np.all(np.abs(wrong - truth) > 8 * factor * standard_error)


# ---- Bad input ---------------------------------------------------------------------


def vector_loss(params, x):
    return x @ params


def pair_loss(params, x):
    return jnp.sum(x @ params), x


def batched_loss(params, x):
    return jnp.mean(jnp.square(x @ params).sum(-1), axis=0)


@pytest.mark.parametrize(
    ("bad_loss", "batch", "error", "message"),
    [
        (pair_loss, np.ones((3, 4)), TypeError, r"got a tuple.*`has_aux=True`"),
        (vector_loss, np.ones((3, 4)), TypeError, r"real scalar, got .* \(2,\)"),
        (
            lambda p, x: (x @ p).sum() + 0j,
            np.ones((3, 4)),
            TypeError,
            "real scalar, got .* complex",
        ),
        (
            lambda p, x: (x["a"] @ p).sum(),
            {"a": np.ones((3, 4)), "b": np.ones(2)},
            ValueError,
            r"disagree .*\['a'\]\": 3, .*\['b'\]\": 2",
        ),
        (vector_loss, np.ones((0, 4)), ValueError, "empty"),
        (vector_loss, {"nothing": None}, ValueError, "no arrays"),
        (vector_loss, np.ones((1, 4)), ValueError, "at least two examples, got 1"),
        (
            vector_loss,
            {"x": np.ones((3, 4)), "rate": 0.5},
            ValueError,
            r"\['rate'\].* scalars.* shared?",
        ),
    ],
)
def test_bad_batches_and_losses_are_named(bad_loss, batch, error, message):
    with pytest.raises(error, match=message):
        value_grad_and_variance(bad_loss)(np.ones((4, 2)), batch)


def test_a_loss_that_reduces_the_batch_axis_is_told_that_there_is_none():
    # Which of them it is depends on JAX.
    with pytest.raises((ValueError, IndexError)) as raised:
        value_grad_and_variance(batched_loss)(np.ones((4, 2)), np.ones((3, 4)))
    notes = "".join(raised.value.__notes__)
    assert re.search(r"without the batch axis.*\(4,\)", notes)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0], r"shape \(3,\), got shape \(2,\)"),
        ([1.0, -1.0, 1.0], "not negative"),
        ([1.0, np.nan, 1.0], "finite"),
        ([0.0, 3.0, 0.0], "positive weight, got 1"),
    ],
)
def test_bad_weights_are_named(weights, message):
    measure = value_grad_and_variance(batched_loss_of_one)
    with pytest.raises(ValueError, match=message):
        measure(np.ones((4, 2)), np.ones((3, 4)), weights=np.asarray(weights))


def batched_loss_of_one(params, x):
    return jnp.square(x @ params).sum()


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_bad_microbatch_sizes_are_named(size):
    with pytest.raises(ValueError, match=r"microbatch_size.*positive integer"):
        value_grad_and_variance(loss, microbatch_size=size)


def test_aux_must_be_a_pair():
    measure = value_grad_and_variance(batched_loss_of_one, has_aux=True)
    with pytest.raises(TypeError, match=r"pair \(value, aux\)"):
        measure(np.ones((4, 2)), np.ones((3, 4)))


# ---- The explanation ---------------------------------------------------------------


def test_the_explanation_needs_shapes_only_and_can_be_read():
    shapes = jax.eval_shape(lambda: (make_params(), make_batch(5)))
    report = dissect_optax.explain_variance(loss)(*shapes)
    lines = {row.parameter: str(row) for row in report}
    assert lines["['dense']"].startswith(
        "['dense'] [4, 5]: outer product (dot_general)"
    )
    # One more matrix product: a multiplication and an addition per example and element.
    assert report[1].operations == 2 * 5 * 4 * 5
    assert [row.shape for row in report] == [(5,), (4, 5), (4, 7), (9, 4)]


@pytest.mark.usefixtures("x64")
def test_equation_44_with_the_numbers_written_out():
    gradients = np.asarray([[1.0], [2.0], [6.0]])
    _, grad, variance = value_grad_and_variance(lambda p, x: (p * x).sum())(
        jnp.zeros(1), gradients
    )
    # Mean 3; deviations -2, -1, 3; (4 + 1 + 9)/2 = 7; divided by 3.
    assert float(grad[0]) == pytest.approx(3, rel=1e-12)
    assert float(variance[0]) == pytest.approx(7 / 3, rel=1e-12)
    assert variance_by_equation_44(gradients)[0] == pytest.approx(7 / 3, rel=1e-12)


@pytest.mark.parametrize("unit", [1e30, 1e-30])
def test_the_unit_of_the_weights_does_not_matter(unit):
    def loss(params, x):
        return jnp.square(jnp.vdot(params, x))

    params, batch = jnp.array([1.0, 2.0]), jnp.arange(8.0).reshape(4, 2)
    weights = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    measure = jax.jit(dissect_optax.value_grad_and_variance(loss))
    _, _, wanted = measure(params, batch, weights=weights)
    _, _, variance = measure(params, batch, weights=weights * np.float32(unit))
    np.testing.assert_allclose(variance, wanted, rtol=1e-5)
    assert (wanted > 0).all()


def test_one_example_on_one_device_is_a_batch_of_one():
    def loss(params, x):
        return jnp.square(params * x)

    measure = dissect_optax.value_grad_and_variance(loss, axis_name="data")
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        jax.vmap(measure, (None, 0), axis_name="data")(1.0, jnp.ones((1, 1)))
    _, _, variance = jax.vmap(measure, (None, 0), axis_name="data")(
        1.0, jnp.array([[1.0], [2.0]])
    )
    # Gradients 2 and 8 have variance 18, their mean half of it.
    np.testing.assert_allclose(variance, [9.0, 9.0], rtol=1e-6)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"])
def test_a_microbatch_is_counted_in_whole_examples(size):
    with pytest.raises(ValueError, match="positive integer"):
        dissect_optax.value_grad_and_variance(jnp.sum, microbatch_size=size)
