"""Losses of a batch, and losses in which examples meet."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dissect_optax import explain_variance, value_grad_and_variance
from tests.gradient_variance.models import normal
from tests.gradient_variance.oracle import relative_error, variance_of_mean


def loss(params, batch):
    x, target = batch
    h = jnp.tanh(x @ params["w"] + params["b"][None])
    return jnp.square(h - target).sum(-1).mean()


def make():
    return {"w": normal(4, 3), "b": normal(3)}, (normal(5, 4), normal(5, 3))


@pytest.mark.parametrize(
    "options", [{}, {"microbatch_size": 2}, {"trainable": {"w": True, "b": False}}]
)
@pytest.mark.usefixtures("x64")
def test_a_batched_loss_is_called_with_one_example_at_a_time(options):
    params, batch = make()
    measure = value_grad_and_variance(loss, batched=True, **options)
    value, grad, variance = jax.jit(measure)(params, batch)

    def one(params, example):
        return loss(params, jax.tree.map(lambda leaf: leaf[None], example))

    gradients = jax.vmap(jax.grad(one), (None, 0))(params, batch)
    assert relative_error(value, loss(params, batch)) < 1e-12
    for name, k in gradients.items():
        if name in grad and grad[name] is not None:
            assert relative_error(grad[name], k.mean(0)) < 1e-12
            assert relative_error(variance[name], variance_of_mean(k)) < 1e-12
    assert variance["w"] is not None


def test_auxiliary_output_has_an_axis_of_one_example():
    def with_aux(params, batch):
        return loss(params, batch), {"logits": batch[0] @ params["w"], "one": 1.0}

    params, batch = make()
    measure = value_grad_and_variance(with_aux, has_aux=True, batched=True)
    (_, aux), _, _ = measure(params, batch)
    assert aux["logits"].shape == (5, 1, 3)
    assert aux["one"].shape == (5,)
    np.testing.assert_allclose(aux["logits"][:, 0], batch[0] @ params["w"], rtol=1e-5)


def test_weights_take_examples_out_of_a_batched_loss():
    params, batch = make()
    measure = value_grad_and_variance(loss, batched=True)
    kept = np.asarray([1.0, 1.0, 0.0, 1.0, 0.0])
    masked = measure(params, batch, weights=kept)
    smaller = measure(params, jax.tree.map(lambda x: x[kept > 0], batch))
    for a, b in zip(*map(jax.tree.leaves, (masked, smaller)), strict=True):
        assert relative_error(a, b) < 1e-5


def test_the_explanation_of_a_batched_loss():
    report = explain_variance(loss, batched=True)(*jax.eval_shape(make))
    assert [row.parameter for row in report] == ["['b']", "['w']"]
    assert report[1].routes[0].startswith("outer product")


def test_a_batched_loss_that_returns_every_loss_is_told_to_take_the_mean():
    def every(params, batch):
        return jnp.square(batch[0] @ params["w"]).sum(-1)

    with pytest.raises(TypeError, match=r"mean loss of a batch.*\(1,\).*the mean"):
        value_grad_and_variance(every, batched=True)(*make())


def test_a_failing_batched_loss_is_told_how_it_was_called():
    def fails(params, batch):
        return (batch[0] @ params["b"]).sum()

    with pytest.raises(TypeError) as raised:
        value_grad_and_variance(fails, batched=True)(*make())
    assert re.search(r"a batch of one example.*\(1, 4\)", raised.value.__notes__[0])


# ---- Losses in which examples meet -------------------------------------------------


def normalized(x, axes):
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def batch_norm(params, x):
    return jnp.square(normalized(x @ params, 0) - 1).mean()


def spatial_norm(params, x):
    return jnp.square(normalized(x[:, :, None] * params[None], (0, 1)) - 1).mean()


def norm_in_a_scan(params, x):
    def layer(h, w):
        return normalized(jnp.tanh(h @ w), 0), None

    h, _ = jax.lax.scan(layer, x, jnp.stack([params[:, :4]] * 2))
    return jnp.square(h - 1).mean()


def norm_in_a_cond(params, x):
    h = jax.lax.cond(params[0, 0] > 0, lambda h: normalized(h, 0), jnp.sin, x @ params)
    return jnp.square(h - 1).mean()


def all_pairs(params, x):
    h = x @ params
    similarity = h @ h.T
    return -jnp.diag(jax.nn.log_softmax(similarity)).mean()


def first_is_the_anchor(params, x):
    h = x @ params
    return jnp.square(h - h[:1]).mean()


@pytest.mark.parametrize(
    "mixing",
    [
        batch_norm,
        spatial_norm,
        norm_in_a_scan,
        norm_in_a_cond,
        all_pairs,
        first_is_the_anchor,
        jax.checkpoint(batch_norm),
        jax.jit(batch_norm),
    ],
    ids=lambda f: getattr(f, "__name__", "wrapped"),
)
def test_a_batched_loss_in_which_examples_meet_is_a_warning(mixing):
    params, x = normal(4, 4), normal(5, 4)
    with pytest.warns(UserWarning, match=r"examples meet.*Batch norm.*running") as w:
        value_grad_and_variance(mixing, batched=True)(params, x)
    assert len(w) == 1
    with pytest.warns(UserWarning, match="lets examples meet"):
        explain_variance(mixing, batched=True)(params, x)


def layer_norm(params, x):
    return jnp.square(normalized(x @ params, -1) - 1).mean()


def weighted_features(params, x):
    return (jax.nn.softmax(x @ params) * x).sum(-1).mean()


def accumulated(params, x):
    def layer(carry, w):
        h, penalty = carry
        h = jnp.tanh(h @ w)
        return (h, penalty + jnp.square(h).mean()), None

    layers = jnp.stack([params] * 2)
    (h, penalty), _ = jax.lax.scan(layer, (x, jnp.zeros(())), layers)
    # The penalty of the first scan is a mean over the batch; the second carries it on.
    (h, penalty), _ = jax.lax.scan(layer, (h, penalty), layers)
    return jnp.square(h).mean() + penalty


def one_after_the_other(params, x):
    return jax.lax.map(lambda row: jnp.square(row @ params).sum(), x).mean()


def table_lookup(params, x):
    tokens = jnp.where(x > 0, 1, 0)
    return jnp.sin(params[tokens]).mean()


def only_batches_of_one(params, x):
    return jnp.square(x.reshape(4) @ params).sum()


def own_shape(params, x):
    assert x.shape[0] == 1
    return jnp.square(x @ params).mean()


@pytest.mark.parametrize(
    "separate",
    [
        layer_norm,
        weighted_features,
        accumulated,
        one_after_the_other,
        table_lookup,
        only_batches_of_one,
        own_shape,
    ],
)
def test_a_batched_loss_of_separate_examples_is_none(separate):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value_grad_and_variance(separate, batched=True)(normal(4, 4), normal(5, 4))


def norm_of_one_row(params, x):
    return jnp.square(normalized((x @ params)[None], 0) - 1).mean()


def norm_without_axes(params, x):
    return jnp.square(normalized(x @ params, ()) - 1).mean()


def norm_in_low_precision(params, x):
    h = (x @ params).astype(jnp.bfloat16)[None]
    wide = h.astype(jnp.float32)
    return jnp.square(wide - wide.mean(0)[None]).mean() + h.mean().astype(jnp.float32)


def norm_of_a_pixel(params, x):
    return jnp.square(normalized((x @ params)[None, None], (0, 1)) - 1).mean()


def row_norm_in_a_scan(params, x):
    def layer(h, w):
        return normalized(jnp.tanh(h @ w)[None], 0)[0], None

    return jax.lax.scan(layer, x, jnp.stack([params] * 2))[0].sum()


@pytest.mark.parametrize(
    "centered",
    [
        norm_of_one_row,
        norm_without_axes,
        norm_in_low_precision,
        norm_of_a_pixel,
        row_norm_in_a_scan,
    ],
)
def test_a_value_minus_itself_is_a_warning(centered):
    params, x = normal(4, 4), normal(5, 4)
    with pytest.warns(UserWarning, match="mean over axes of length one.*LayerNorm"):
        value_grad_and_variance(centered)(params, x)


def attention_to_one_token(params, x):
    scores = jax.nn.softmax((x @ params @ x)[None, None])
    return jnp.square(scores @ x[None]).sum()


def surrogate(params, x):
    logits = x @ params
    return jnp.exp(logits - jax.lax.stop_gradient(logits)).sum()


def difference_from_the_mean(params, x):
    h = x @ params
    return jnp.square(h - h.mean()).sum() + jnp.square(h[:1] - h[:1].sum() / 2).sum()


def centered_data(params, x):
    return jnp.square(layer_norm(params, x[None]))


@pytest.mark.parametrize(
    "usual",
    [attention_to_one_token, surrogate, difference_from_the_mean, centered_data],
)
def test_other_differences_are_none(usual):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value_grad_and_variance(usual)(normal(4, 4), normal(5, 4))
