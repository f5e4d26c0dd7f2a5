"""Small models that between them meet every way in which a gradient can be made.

`MODELS` maps a name to a function that makes a `Model`: the loss of one example, its
parameters, a batch, further arguments that all examples share, and for each parameter
the route that its variance must take.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks

OUTER = "outer product (dot_general)"
TWO, THREE, FOUR, FIVE, SIX = (
    f"{count} outer products (dot_general)" for count in (2, 3, 4, 5, 6)
)
PRODUCT = "product per example (dot_general)"
CONVOLUTION = "product per example (conv_general_dilated)"
ROWS = "table rows (scatter-add)"
FIXED = "the same for all examples"
STORED = "stored gradients"


class Model(NamedTuple):
    loss: Callable[..., jax.Array]
    params: Any
    batch: Any
    routes: dict[str, str]
    shared: tuple[Any, ...] = ()


def normal(*shape, seed=0):
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray(random.normal(size=shape), jnp.result_type(float))


def doubled(tree):
    dtype = jnp.result_type(float)
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def from_network(network, routes):
    return Model(network.loss, doubled(network.params), doubled(network.batch), routes)


def mnist_mlp():
    routes = {f"[{i}]['{k}']": r for i in range(4) for k, r in LAYER.items()}
    return from_network(networks.mnist_mlp(3), routes)


LAYER = {"w": OUTER, "b": STORED}


def cifar10_3c3d():
    routes = {f"['dense'][{i}]['{k}']": r for i in range(3) for k, r in LAYER.items()}
    for i in range(3):
        routes[f"['conv'][{i}]['w']"] = CONVOLUTION
        routes[f"['conv'][{i}]['b']"] = STORED
    return from_network(networks.cifar10_3c3d(3), routes)


def cifar100_allcnnc():
    routes = {f"[{i}]['w']": CONVOLUTION for i in range(9)}
    routes |= {f"[{i}]['b']": STORED for i in range(9)}
    return from_network(networks.cifar100_allcnnc(2), routes)


BLOCK = {
    "['scale'][0]": STORED,
    "['scale'][1]": STORED,
    **{f"['attention'][{i}]": FIVE for i in range(4)},
    "['dense'][0]['w']": FIVE,
    "['dense'][0]['b']": STORED,
    "['dense'][1]['w']": FIVE,
    "['dense'][1]['b']": STORED,
    "['out'][0]['w']": OUTER,
    "['out'][0]['b']": STORED,
}


def transformer_block():
    network = networks.transformer_block(3, tokens=5, width=16)
    return from_network(network, BLOCK)


def lstm():
    routes = {
        "['in']": FIVE,
        "['state']": FIVE,
        "['b']": STORED,
        "['out'][0]['w']": OUTER,
        "['out'][0]['b']": STORED,
    }
    return from_network(networks.lstm(3, steps=5, width=8), routes)


def embedding():
    routes = {"['table']": ROWS} | {f"['block']{k}": r for k, r in BLOCK.items()}
    # Few words, so that examples repeat words within themselves and between them.
    network = networks.embedding(3, vocabulary=7, tokens=5, width=16)
    return from_network(network, routes)


def tied_weights_loss(params, tokens):
    hidden = jnp.tanh(params["table"][tokens[:-1]] @ params["w"])
    scores = jax.nn.log_softmax(hidden @ params["table"].T)
    return -jnp.take_along_axis(scores, tokens[1:, None], 1).mean()


def tied_weights():
    params = {"table": normal(11, 6), "w": normal(6, 6)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 5)))
    routes = {"['table']": f"sum of {FOUR} + {ROWS}", "['w']": FOUR}
    return Model(tied_weights_loss, params, tokens, routes)


def dropout_loss(params, example):
    x, key = example
    keep = jax.random.bernoulli(key, 0.5, (6,))
    h = jnp.where(keep, jnp.tanh(x @ params["w"]), 0) / 0.5
    return jnp.square(h @ params["v"]).sum()


def dropout():
    params = {"w": normal(4, 6), "v": normal(6, 3)}
    batch = (normal(5, 4), jax.random.split(jax.random.key(3), 5))
    return Model(dropout_loss, params, batch, {"['w']": OUTER, "['v']": OUTER})


def l2_in_the_loss_loss(params, x, strength):
    penalty = sum(jnp.square(w).sum() for w in jax.tree.leaves(params))
    return jnp.square(jnp.tanh(x @ params["w"])).sum() + strength / 2 * penalty


def l2_in_the_loss():
    params = {"w": normal(4, 6), "unused": normal(3)}
    routes = {"['w']": f"{OUTER}, {FIXED}", "['unused']": FIXED}
    return Model(l2_in_the_loss_loss, params, normal(5, 4), routes, (0.1,))


def stacked_rnn_step(w, h, x):
    h = jnp.tanh(h @ w[0] + x @ w[1])
    return h, h


def rnn_loss(w, xs):
    start = jnp.zeros(xs.shape[-1])
    _, hs = jax.lax.scan(lambda h, x: stacked_rnn_step(w, h, x), start, xs)
    return jnp.square(hs).sum()


def rnn():
    return Model(rnn_loss, normal(2, 6, 6), normal(3, 4, 6), {"": FOUR})


def unrolled_rnn_loss(w, xs):
    h = jnp.zeros(xs.shape[-1])
    for x in xs:
        h = jnp.tanh(h @ w + x)
    return jnp.square(h).sum()


def unrolled_rnn():
    return Model(unrolled_rnn_loss, normal(6, 6), normal(3, 4, 6), {"": FOUR})


def character_rnn_loss(params, tokens):
    def step(h, token):
        h = jnp.tanh(h @ params["w"] + params["table"][token])
        return h, None

    h, _ = jax.lax.scan(step, jnp.zeros(8), tokens, reverse=True, unroll=2)
    return jnp.square(h).sum()


def character_rnn():
    params = {"table": normal(31, 8), "w": normal(8, 8)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 6)))
    routes = {"['table']": ROWS, "['w']": SIX}
    return Model(character_rnn_loss, params, tokens, routes)


def remat_loss(params, x):
    for w in params:
        x = jax.checkpoint(lambda w, x: jnp.sin(jnp.tanh(x @ w)))(w, x)
    return jnp.square(x).sum()


def remat():
    params = [normal(6, 6, seed=i) for i in range(3)]
    return Model(remat_loss, params, normal(4, 6), {f"[{i}]": OUTER for i in range(3)})


def scan_over_layers_loss(params, xs):
    def layer(x, w):
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x), None

    x, _ = jax.lax.scan(layer, xs, params)
    return jnp.square(x).sum()


def scan_over_layers():
    return Model(scan_over_layers_loss, normal(3, 6, 6), normal(4, 2, 6), {"": TWO})


def nested_scans_loss(params, xs):
    def layer(xs, w):
        def step(h, x):
            h = jnp.tanh(h @ w + x)
            return h, h

        return jax.lax.scan(step, jnp.zeros(8), xs)[1], None

    xs, _ = jax.lax.scan(layer, xs, params)
    return jnp.square(xs).sum()


def nested_scans():
    return Model(nested_scans_loss, normal(2, 8, 8), normal(4, 3, 8), {"": THREE})


def loop_over_layers_loss(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params[i])
    return jnp.square(x).sum()


def loop_over_layers():
    return Model(loop_over_layers_loss, normal(3, 6, 6), normal(4, 6), {"": OUTER})


def joined_weights_loss(params, x):
    w = jnp.concatenate([params["left"], 2 * params["right"]], axis=1)
    first, second = jnp.split(x @ w, [5])
    return jnp.square(first).sum() + jnp.sin(second).sum()


def joined_weights():
    params = {"left": normal(4, 3), "right": normal(4, 6)}
    return Model(
        joined_weights_loss,
        params,
        normal(5, 4),
        {"['left']": OUTER, "['right']": OUTER},
    )


def cond_loss(params, example):
    x, flag = example
    h = jax.lax.cond(flag, lambda: jnp.tanh(x @ params), lambda: x[:3] * 2.0)
    return jnp.square(h).sum()


def cond():
    batch = (normal(5, 4), jnp.asarray([True, False, True, True, False]))
    return Model(cond_loss, normal(4, 3), batch, {"": OUTER})


def convolution(
    channels, kernel, strides, padding, image=1, dilation=1, groups=1, lhs=1
):
    def loss(params, x):
        y = jax.lax.conv_general_dilated(
            x[None],
            params,
            strides,
            padding,
            lhs_dilation=(lhs, lhs),
            rhs_dilation=(dilation, dilation),
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sin(y).sum()

    return Model(loss, normal(*kernel), normal(3, 7, 8, channels), {"": CONVOLUTION})


def strided_convolution():
    return convolution(2, (3, 3, 2, 4), (2, 3), "SAME")


def dilated_convolution():
    return convolution(2, (3, 2, 2, 4), (1, 2), "VALID", dilation=2)


def grouped_convolution():
    return convolution(4, (3, 3, 2, 6), (1, 1), ((0, 2), (1, 1)), groups=2)


def depthwise_convolution():
    return convolution(4, (3, 3, 1, 8), (2, 1), "SAME", groups=4)


def pointwise_convolution():
    return convolution(4, (1, 1, 4, 6), (1, 1), "VALID")


def transposed_convolution():
    return convolution(2, (3, 3, 2, 4), (1, 1), ((1, 2), (2, 1)), lhs=2)


def whole_image_convolution():
    model = convolution(2, (7, 8, 2, 4), (1, 1), "VALID")
    return model._replace(routes={"": "outer product (conv_general_dilated)"})


def channels_first_loss(params, x):
    y = jax.lax.conv_general_dilated(x[None], params, (1,), "SAME")
    return jnp.sin(y).sum()


def channels_first():
    routes = {"": "8 outer products (conv_general_dilated)"}
    return Model(channels_first_loss, normal(5, 2, 3), normal(3, 2, 8), routes)


def shared_convolution_loss(params, x):
    for _ in range(2):
        x = jnp.tanh(jax.lax.conv_general_dilated(x[None], params, (1,), "SAME")[0])
    return jnp.square(x).sum()


def shared_convolution():
    return Model(
        shared_convolution_loss, normal(2, 2, 3), normal(3, 2, 8), {"": CONVOLUTION}
    )


def weight_standardization_loss(params, x):
    centered = params - params.mean(0)[None]
    w = centered / jnp.sqrt(jnp.square(centered).mean(0) + 1e-3)[None]
    return jnp.square(jnp.tanh(x @ w)).sum()


def weight_standardization():
    return Model(
        weight_standardization_loss,
        normal(4, 3),
        normal(5, 4),
        {"": f"sum of {OUTER} + {STORED}"},
    )


def batched_experts_loss(params, x):
    gates = jax.nn.softmax(x @ params["gate"])
    hidden = jnp.tanh(jnp.einsum("d,edh->eh", x, params["up"]))
    outputs = jnp.einsum("eh,ehd->ed", hidden, params["down"])
    return jnp.square(gates @ outputs).sum()


def batched_experts():
    params = {"gate": normal(4, 3), "up": normal(3, 4, 5), "down": normal(3, 5, 2)}
    routes = {"['gate']": OUTER, "['up']": OUTER, "['down']": OUTER}
    return Model(batched_experts_loss, params, normal(5, 4), routes)


@jax.custom_vjp
def doubled_backwards(x):
    return jnp.sin(x)


doubled_backwards.defvjp(
    lambda x: (jnp.sin(x), x), lambda x, cotangent: (2 * jnp.cos(x) * cotangent,)
)


def custom_vjp_loss(params, x):
    return jnp.square(doubled_backwards(x @ params)).sum()


def custom_vjp():
    return Model(custom_vjp_loss, normal(4, 3), normal(5, 4), {"": OUTER})


@jax.custom_jvp
def tripled_tangent(x):
    return jnp.sin(x)


@tripled_tangent.defjvp
def tripled_tangent_jvp(primals, tangents):
    return jnp.sin(primals[0]), 3 * jnp.cos(primals[0]) * tangents[0]


def custom_jvp_loss(params, x):
    return jnp.square(tripled_tangent(x @ params)).sum()


def custom_jvp():
    return Model(custom_jvp_loss, normal(4, 3), normal(5, 4), {"": OUTER})


def odd_leaves_loss(params, example):
    x = example["x"] if example["missing"] is None else 0
    y = jnp.where(example["label"] > 0, 1.0, -1.0)
    return jnp.square(x @ params["w"] * params["scale"] - y).sum() + params["bias"] * y


def odd_leaves():
    params = {"w": normal(4, 3), "scale": normal(3), "bias": normal(), "none": None}
    batch = {
        "x": np.asarray(normal(5, 4)),
        "label": np.asarray([1, -1, 1, 1, -1], np.int8),
        "missing": None,
    }
    routes = {"['w']": OUTER, "['scale']": STORED, "['bias']": STORED}
    return Model(odd_leaves_loss, params, batch, routes)


def mode_of_look_up_loss(params, tokens):
    return jnp.sin(jnp.take(params, tokens, axis=1, mode="clip")).sum()


def clipped_look_up():
    # Ids beyond the table, which `clip` moves to its last column.
    tokens = jnp.asarray([[0, 3, 9], [9, 4, 4], [1, 1, 2]])
    return Model(mode_of_look_up_loss, normal(2, 5), tokens, {"": ROWS})


def dropped_look_up_loss(params, tokens):
    rows = jnp.take(params, tokens, axis=0, mode="fill", fill_value=1.0)
    return jnp.sin(rows).sum()


def dropped_look_up():
    tokens = jnp.asarray([[0, 3, 9], [9, 4, 4], [1, 1, 2]])
    return Model(dropped_look_up_loss, normal(5, 2), tokens, {"": ROWS})


def complex_parameters_loss(params, x):
    h = (x.astype(params.dtype) @ params) ** 2
    return jnp.sin(h.real).sum() + jnp.square(jnp.abs(h)).sum()


def complex_parameters():
    params = normal(4, 3) + 1j * normal(4, 3, seed=1)
    return Model(complex_parameters_loss, params, normal(5, 4), {"": OUTER})


def doubled_parameters_loss(params, x):
    return jnp.sin((params["b"] + params["b"]) * x).sum() + (
        jnp.sin((params["t"] + params["t"])[jnp.asarray([1, 1, 2])] @ x).sum()
    )


def doubled_parameters():
    params = {"b": normal(4), "t": normal(5, 4)}
    routes = {"['b']": STORED, "['t']": ROWS}
    return Model(doubled_parameters_loss, params, normal(5, 4), routes)


def fast_weights_loss(params, xs):
    def step(state, x):
        state = state + jnp.outer(x @ params["key"], x)
        return state, jnp.tanh(x @ params["query"]) @ state

    _, ys = jax.lax.scan(step, params["start"], xs)
    return jnp.square(jnp.sin(ys)).sum()


def fast_weights():
    # The gradient of `start` is a sum over steps that every step reads.
    params = {"start": normal(6, 4), "key": normal(4, 6), "query": normal(4, 6)}
    return Model(
        fast_weights_loss,
        params,
        normal(3, 3, 4),
        {"['start']": STORED, "['key']": THREE, "['query']": THREE},
    )


def parts_of_a_vector_loss(params, x):
    return jnp.square(jnp.sin(x @ params[:12].reshape(4, 3)) + params[12:]).sum()


def parts_of_a_vector():
    routes = {"": f"{OUTER}, {STORED}"}
    return Model(parts_of_a_vector_loss, normal(15), normal(5, 4), routes)


def one_row_of_a_mask_loss(params, x):
    row = jax.lax.dynamic_update_slice(
        jnp.zeros(4, bool), jnp.ones(1, bool), (jnp.argmax(x),)
    )
    return jnp.sin(jnp.where(row, x, 0) @ params).sum()


def one_row_of_a_mask():
    return Model(one_row_of_a_mask_loss, normal(4, 3), normal(5, 4), {"": OUTER})


MODELS = {
    make.__name__: make
    for make in (
        mnist_mlp,
        cifar10_3c3d,
        cifar100_allcnnc,
        transformer_block,
        lstm,
        embedding,
        tied_weights,
        dropout,
        l2_in_the_loss,
        rnn,
        unrolled_rnn,
        character_rnn,
        remat,
        scan_over_layers,
        nested_scans,
        loop_over_layers,
        joined_weights,
        cond,
        strided_convolution,
        dilated_convolution,
        grouped_convolution,
        depthwise_convolution,
        pointwise_convolution,
        transposed_convolution,
        whole_image_convolution,
        channels_first,
        shared_convolution,
        weight_standardization,
        batched_experts,
        custom_vjp,
        custom_jvp,
        odd_leaves,
        clipped_look_up,
        dropped_look_up,
        complex_parameters,
        doubled_parameters,
        fast_weights,
        parts_of_a_vector,
        one_row_of_a_mask,
    )
}
