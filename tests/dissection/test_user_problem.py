"""Arguments of `dissect`: each mistake is a sentence, before anything is trained."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dissect_optax as do
from dissect_optax.dissection import UserError, get_method
from dissect_optax.dissection import _dissect as dissecting
from dissect_optax.dissection import _user_problem as user_problems
from dissect_optax.dissection._methods import method_from
from dissect_optax.dissection._programs import program_digest, uses_first_argument
from tests.dissection.small_problems import arguments, init, loss, mean_loss, points

pytestmark = pytest.mark.usefixtures("quick_compilation")

X, Y = points()


class Accepted(Exception):
    """The arguments passed all checks."""


@pytest.fixture
def accept(monkeypatch):
    """Checks arguments of `dissect`; the problem and its warnings."""

    def accepted(problem, *args, **kwargs):
        raise Accepted(problem, kwargs["warnings"])

    monkeypatch.setattr(dissecting, "dissect_problem", accepted)

    def check(**changes):
        with pytest.raises(Accepted) as found:
            do.dissect(**arguments(**changes))
        return found.value.args

    return check


@pytest.fixture
def reject(monkeypatch):
    """The sentence for arguments that `dissect` must refuse before any training."""
    trained = lambda *args, **kwargs: pytest.fail("not checked before training")  # noqa: E731
    monkeypatch.setattr(dissecting, "dissect_problem", trained)

    def check(**changes):
        with pytest.raises(UserError) as found:
            do.dissect(**arguments(**changes))
        return str(found.value)

    return check


# ---- The loss ---------------------------------------------------------------------


def vector(w, example):
    return jnp.square(example[0] @ w - example[1]) * jnp.ones(3)


def row_loss(w, batch):
    return jnp.mean(jnp.square(jnp.einsum("bi,i->b", batch[0], w)))


def indexed_loss(w, batch):
    x, y = batch
    return jnp.mean((x @ w)[jnp.arange(len(y))] - y) ** 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (vector, r"of one example must be one scalar, got \(3,\).*`batched=True`"),
        (lambda w, e: jnp.square(e[0] * w), r"got \(2,\).*`batched=True`"),
        (
            lambda w, e: (loss(w, e), w),
            r"got tuple of \(\), \(2,\). Return the loss al",
        ),
        (lambda w, e: {"loss": loss(w, e)}, r"got dict of \(\)"),
        (lambda w, e: None, "got NoneType of nothing"),
        (lambda w, e: jnp.int32(e[1]), "must be a real number, got int32"),
        (lambda w, e: loss(w, e) > 1, "must be a real number, got bool"),
        (lambda w, e: loss(w, e) + 0j, "must be a real number, got complex64"),
        (lambda w, e: 1.0, "one scalar, got float|does not use its parameters"),
        (lambda w, e: jnp.square(e[1]), "does not use its parameters"),
        (lambda w, e: jnp.log(-jnp.square(e[1])) * w[0], "finite .* got nan for 64 of"),
        (lambda w, e: loss(w, e) / 0, "must be finite .* got inf for 64 of 64"),
        (lambda w, e: jnp.sqrt(0 * w[0]) + 1, "gradient of `loss` must be finite"),
        (
            lambda w, e: loss(w, e) - 1000,
            "must be positive .* got -[0-9.]+ .* constant",
        ),
        (lambda w, e: -loss(w, e), "must be positive before the first step"),
        (lambda w, e: 0 * w[0], "must be positive before the first step, got 0"),
        (lambda w, e: e["x"] @ w, "cannot be called with one example"),
        (lambda w: w.sum(), r"must take `\(params, example\)`.* got a function of w"),
        (lambda w, x, y, z: w.sum(), "got a function of w, x, y, z"),
        (row_loss, "accepts a batch of one example.*pass `batched=True`"),
        (indexed_loss, "accepts a batch of one example.*pass `batched=True`"),
        (
            lambda w, e: jax.lax.while_loop(lambda c: c < 1, lambda c: c + 1, w[0]),
            "cannot be differentiated",
        ),
    ],
)
def test_a_wrong_loss_is_a_sentence(reject, wrong, sentence):
    assert re.search(sentence, reject(loss=wrong))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            lambda w, b: jnp.square(b[0] @ w - b[1]),
            r"batch of one example must be one s",
        ),
        (
            lambda w, b: 8 * mean_loss(w, b) * len(b[1]),
            "must be the mean over the batch",
        ),
        (
            lambda w, b: jnp.mean(
                jnp.square((b[0] - b[0].mean(0, keepdims=True)) @ (3 * w) - b[1])
            ),
            "as it does in batch normalization",
        ),
        (lambda w, b: jnp.dot(w, b[0]) + w[0] ** 2, "leave out `batched=True`"),
    ],
)
def test_a_wrong_loss_of_a_batch_is_a_sentence(reject, wrong, sentence):
    assert re.search(sentence, reject(loss=wrong, batched=True))


def test_a_mean_over_a_batch_that_takes_one_example_too_is_a_warning(accept):
    def per_row(w, batch):
        # Of one example without a batch axis, this is divided by its two features.
        return jnp.sum(jnp.square(batch[0] @ jnp.diag(w))) / batch[0].shape[0]

    _, (warning,) = accept(loss=per_row)
    assert warning.name == "LossLooksBatched"
    assert warning.batch_of_one == pytest.approx(2 * warning.one, rel=1e-5)
    assert "`batched=True`" in warning.sentence
    assert accept(loss=per_row, batched=True)[1] == ()


@pytest.mark.parametrize(
    "right",
    [
        loss,
        mean_loss,  # The mean of one number is that number.
        lambda w, example, key: loss(w, example),
        lambda w, example, key=None: loss(w, example) + 0 * jax.random.uniform(key),
        functools.partial(lambda scale, w, example: scale * loss(w, example), 2.0),
        jax.jit(loss),
        # Rows that are batches of their own are no batch of examples.
        lambda w, example: jnp.square(jnp.sum(example[0] * w) - jnp.sum(example[1])),
        lambda w, example: loss(w.astype(jnp.bfloat16), example),
    ],
)
def test_a_right_loss_raises_no_suspicion(accept, right):
    problem, warnings = accept(loss=right)
    assert warnings == ()
    value, _ = problem.evaluate(jnp.ones(2), (X[0], Y[0]))
    assert value.shape == ()


# ---- Data -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ((X, Y[:-1]), r"same number of examples .*\[0\]: 64, \[1\]: 63"),
        ((X, np.array(["a"] * 64)), r"must hold numbers, got <U1 at data\[1\]"),
        ((X, np.array([None] * 64)), r"must hold numbers, got object at data\[1\]"),
        ((X, np.zeros(64, "datetime64[s]")), "must hold numbers, got datetime64"),
        ((X, np.zeros(64, [("a", "f4")])), r"must hold .* at data\[1\]"),
        (
            (X, jax.random.split(jax.random.key(0), 64)),
            r"arrays of numbers.* data\[1\]",
        ),
        ((X.tolist(), Y), r"single number at data\[0\]\[0\]\[0\].*numpy.array"),
        (3.0, "single number at data"),
        ("a.csv", "must hold numbers, got <U5 at data"),
        (iter([1]), "`data` must .*(object at data|list_iterator)"),
        (None, "got NoneType without an array"),
        ({}, "got dict without an array"),
        ((X[:0], Y[:0]), "at least 2 examples, got 0"),
        ((X[:1], Y[:1]), "at least 2 examples, got 1"),
        (np.zeros((64, 0)), "examples without any"),
        ((X, np.full(64, 2**40)), "integers that JAX does not keep in int32"),
        ((X, np.where(np.arange(64) == 7, np.nan, Y)), "nan for 1 of 64.*data finite"),
        ((X, np.where(np.arange(64) == 7, np.float32(1e30), Y)), "inf for 1 of 64"),
        ((X, np.where(np.arange(64) == 7, 1e300, np.float64(Y))), "inf for 1 of 64"),
    ],
)
def test_wrong_data_are_a_sentence(reject, wrong, sentence):
    message = reject(data=wrong)
    assert re.search(sentence, message)
    assert len(message) < 400


def test_nan_far_back_in_large_data_is_found(reject):
    inputs, targets = points(5000)
    targets[4321] = np.nan
    assert "got nan for 1 of 64 examples" in reject(data=(inputs, targets))


@pytest.mark.parametrize(
    ("test", "sentence"),
    [
        (X, "examples like those of `data`"),
        ((X[:, :1], Y), "examples like those of `data`"),
        ((X.astype(int), Y), "examples like those of `data`"),
        ((X, Y[:5]), "`test`: All arrays"),
        ((X[:0], Y[:0]), "`test` must hold at least 1 example, got 0"),
    ],
)
def test_a_test_set_of_another_kind_is_a_sentence(reject, test, sentence):
    assert sentence in reject(test=test)


def test_data_may_be_any_tree_and_precision(accept):
    problem, _ = accept(
        loss=lambda w, e: loss(w, (e["x"], e["y"][0])),
        data={"x": X.astype(np.float64), "y": [jnp.asarray(Y)]},
        test={"x": X[:1], "y": [Y[:1]]},
    )
    data = problem.load_data(None)
    # In another order, but the same pairs.
    order = np.argsort(data.training["x"][:, 0])
    np.testing.assert_array_equal(data.training["y"][0][order], Y[np.argsort(X[:, 0])])


# ---- Parameters -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda key: jnp.array([1, 2]), "floating point, got int32 at params"),
        (lambda key: {"w": jnp.ones(2), "n": [jnp.arange(2)]}, r"params\['n'\]\[0\]"),
        (lambda key: {"w": jnp.ones(2), "key": key}, r"got key<.*> at params\['key'\]"),
        ({"w": np.ones(2), "n": 3}, r"got int32 at params\['n'\]"),
        ({"w": np.ones(2), "name": "layer"}, r"got dict with str at params\['name'\]"),
        ([jnp.ones(2), jnp.tanh], r"got list with .* at params\[1\]"),
        (None, "got NoneType"),
        ("xavier", "got str with str"),
        (lambda key: {}, "returned no parameters"),
        (lambda key: jnp.zeros((0, 2)), "returned no parameters"),
        (lambda: jnp.ones(2), "cannot be called with a random key"),
        (lambda key: np.asarray(key), "cannot be called with a random key"),
        (
            lambda key: jnp.asarray(np.random.default_rng().normal(size=2)),
            "another function each time .* random numbers from its key",
        ),
        (lambda key: jnp.array([jnp.nan, 1.0]), "must be finite"),
        (lambda key: jnp.ones(3), "cannot be called with one example"),
    ],
)
def test_wrong_parameters_are_a_sentence(reject, wrong, sentence):
    assert re.search(sentence, reject(init=wrong))


@jax.tree_util.register_pytree_node_class
class Module:
    """A callable tree of arrays, as in Equinox."""

    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x @ self.w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def squared_error(prediction, y):
    return 0.5 * jnp.square(prediction - y)


def test_a_callable_tree_is_the_parameters(accept):
    problem, _ = accept(
        loss=lambda module, e: squared_error(module(e[0]), e[1]),
        init=Module(jnp.ones(2)),
    )
    assert isinstance(problem.init(jax.random.key(0)), Module)


def test_a_partial_that_is_a_tree_is_a_function(accept):
    started = jax.tree_util.Partial(lambda mean, key: mean + init(key), jnp.ones(2))
    problem, _ = accept(init=started)
    assert problem.init(jax.random.key(0)).shape == (2,)


def test_the_state_of_an_nnx_model_is_parameters(accept):
    graph, state = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Param)

    def nnx_loss(state, example):
        model = nnx.merge(graph, state)
        return squared_error(model(example[0])[0], example[1])

    def nnx_init(key):
        return nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(params=key)), nnx.Param)

    problems = [accept(loss=nnx_loss, init=made)[0] for made in (state, nnx_init) * 2]
    described = [problem.description["program"] for problem in problems]
    assert described[:2] == described[2:]
    assert described[0] != described[1]


# ---- Regularizer, metrics, schedule -----------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"regularizer": jnp.square}, r"`regularizer` must be one scalar, got \(2,\)"),
        ({"regularizer": lambda w: {"l2": w @ w}}, "`regularizer` .* got dict"),
        ({"regularizer": lambda w: w["x"]}, "`regularizer` cannot be called"),
        ({"regularizer": lambda w: -1000 * w @ w}, "must be positive before the first"),
        ({"metrics": lambda w, e: e[0] @ w}, "must return a dictionary of scalars"),
        ({"metrics": lambda w, e: {"error": e[0] * w}}, r"'error' as float32\[2\]"),
        ({"metrics": lambda w, e: {"loss": e[1]}}, "other than 'loss' and"),
        ({"metrics": lambda w, e: {"data_loss": e[1]}}, "got 'data_loss'"),
        ({"metrics": lambda w, e: {0: e[1]}}, "got 0"),
        ({"metrics": lambda w, e: e["accuracy"]}, "must return a dictionary"),
        (
            {"schedule": lambda size: size},
            "return a function of the step, got a number",
        ),
        (
            {"schedule": optax.warmup_cosine_decay_schedule(0.0, 1.0, 5, 20)},
            "return a function of the step, got a number",
        ),
        ({"schedule": lambda size: lambda step: 0.1}, "ignores the step size"),
        ({"schedule": lambda size: lambda step: size * jnp.ones(2)}, "is not a scalar"),
        (
            {"schedule": lambda size: lambda step: size if step < 5 else size / 2},
            "cannot be called with a traced step size",
        ),
        (
            {"schedule": lambda size: optax.constant_schedule(float(size))},
            "cannot be called with a traced step size",
        ),
    ],
)
def test_a_wrong_function_is_a_sentence(reject, changes, sentence):
    assert re.search(sentence, reject(**changes))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda size: optax.cosine_decay_schedule(size, 20),
        lambda size: lambda step: size * jnp.linspace(1.0, 0.0, 20)[step],
        lambda size: (
            lambda step: jax.lax.cond(step < 5, lambda: size, lambda: 0.1 * size)
        ),
    ],
)
def test_a_schedule_may_do_anything_with_a_scalar_step(accept, schedule):
    problem, _ = accept(schedule=schedule)
    assert float(problem.schedule(0.3)(jnp.int32(0))) == pytest.approx(0.3)


# ---- Numbers and choices ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 997}, "from 10 to 50, .* got 997. Use 1000,"),
        ({"steps": 0}, "`steps` must be a positive integer, got 0"),
        ({"steps": 20.0}, "`steps` must be a positive integer, got 20.0"),
        ({"steps": True}, "`steps` must be a positive integer, got True"),
        ({"seeds": 0}, "`seeds` must be a positive integer"),
        ({"evaluation_interval": 0}, "`evaluation_interval` must be a positive"),
        ({"evaluation_interval": 7}, "must divide `steps` .* got 7 and 20"),
        ({"batch_size": ()}, "one or several different numbers"),
        ({"batch_size": (8, 8)}, r"different numbers, got \(8, 8\)"),
        ({"batch_size": (8, np.int64(8))}, r"different numbers, got \(8, 8\)"),
        ({"batch_size": 8.0}, "`batch_size` must be a positive integer, got 8.0"),
        ({"batch_size": "8"}, "`batch_size` must be a positive integer, got '8'"),
        ({"batch_size": (8, -1)}, "`batch_size` must be a positive integer, got -1"),
        ({"budget": "fast"}, "must be 'full' or 'race', got 'fast'"),
        ({"level": "complete"}, "`level` must be 'cheap', 'normal', 'full' or None"),
        ({"methods": "adam"}, "must be a list of names, got 'adam'"),
        ({"methods": ()}, "must name different methods, got none"),
        ({"methods": ("adam", "adam")}, "must name different methods, got adam, adam"),
        ({"methods": ("adm",)}, "no optimizer 'adm'. Did you mean 'adam'"),
        ({"methods": (optax.adam,)}, "list of names.* into `extra`"),
        ({"extra": [optax.adam]}, "must be a dictionary"),
        (
            {"extra": {"fixed": optax.adam(0.1)}},
            "got an optimizer, whose learning rate",
        ),
        ({"extra": {"number": 0.1}}, "must be a function from a learning rate"),
        (
            {"extra": {"clip": lambda rate: rate}},
            "from a learning rate to an optimizer",
        ),
        ({"extra": {"deaf": lambda rate: optax.sgd(0.1)}}, "ignores its learning rate"),
        ({"extra": {"adam": optax.adam}}, "'adam' is the method ADAM of this library"),
        ({"extra": {"m_ssd": "m_ssd"}}, "different methods, got m_ssd, m_ssd"),
        ({"extra": {"a/b": optax.adam}}, "must consist of letters"),
        (
            {
                "extra": {
                    "asks": lambda rate: optax.contrib.mechanize(optax.lbfgs(rate))
                }
            },
            "gradients and parameters alone",
        ),
        (
            {
                "extra": {"rprop": optax.rprop},
                "schedule": lambda size: optax.cosine_decay_schedule(size, 20),
            },
            "optimizer rprop cannot update these .* does not take this schedule",
        ),
        (
            {
                "extra": {
                    "rows": lambda rate: optax.masked(optax.sgd(rate), {"w": True})
                }
            },
            "extra\\['rows'\\]",
        ),
    ],
)
def test_wrong_choices_are_a_sentence(reject, changes, sentence):
    assert re.search(sentence, reject(**changes))


def test_a_file_is_no_directory(reject, tmp_path):
    file = tmp_path / "runs"
    file.write_text("")
    assert "must be a directory, got the file" in reject(directory=file)


def test_numbers_of_numpy_are_numbers(accept):
    problem, _ = accept(steps=np.int64(40), batch_size=np.array([16, 8]))
    assert problem.settings.batch_size == 8
    assert problem.settings.steps == 40
    # As records want them.
    assert type(problem.settings.steps) is int


# ---- Identity ---------------------------------------------------------------------


def closing_over(array):
    return jax.jit(lambda w, example: loss(w, example) + array @ jnp.square(w))


def own_derivative(scale):
    @jax.custom_jvp
    def square(x):
        return jnp.square(x)

    square.defjvp(lambda primals, tangents: (square(*primals), scale * tangents[0]))
    return lambda w, example: square(example[0] @ w - example[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"loss": loss}, {"loss": lambda w, e: 2 * loss(w, e)}),
        # Of arrays that a compiled function holds, the numbers count.
        (
            {"loss": closing_over(np.array([0.1, 0.2], np.float32))},
            {"loss": closing_over(np.array([0.1, 0.3], np.float32))},
        ),
        ({"loss": own_derivative(1.0)}, {"loss": own_derivative(2.0)}),
        ({"init": init}, {"init": lambda key: 2 * init(key)}),
        ({"init": np.zeros(2, np.float32)}, {"init": np.ones(2, np.float32)}),
        ({}, {"regularizer": lambda w: 0.1 * w @ w}),
        ({}, {"metrics": lambda w, e: {"error": e[1]}}),
        (
            {
                "loss": mean_loss,
                "batched": True,
                "metrics": lambda w, e: {"m": e[1][0]},
            },
            {"loss": mean_loss, "batched": True, "metrics": lambda w, e: {"m": w[0]}},
        ),
        ({}, {"schedule": lambda size: optax.cosine_decay_schedule(size, 20)}),
        (
            {"schedule": lambda size: optax.cosine_decay_schedule(size, 10)},
            {"schedule": lambda size: optax.cosine_decay_schedule(size, 20)},
        ),
        ({"loss": mean_loss}, {"loss": mean_loss, "batched": True}),
    ],
)
def test_another_problem_has_another_identity(accept, one, other, monkeypatch):
    # Programs are compared, none is compiled.
    monkeypatch.setattr(user_problems, "_check_numbers", lambda *_: ())
    problems = [accept(**changes)[0] for changes in (one, one, other)]
    first, same, another = (problem.description for problem in problems)
    assert first == same
    assert first != another


def test_methods_of_one_name_are_told_apart():
    identities = {
        method_from("mine", made).identity
        for made in (
            "m_svag_mb",
            "adam_star_mb",
            optax.adam,
            functools.partial(optax.adam, b1=0.8),
            do.m_svag_mb,
        )
    }
    assert len(identities) == 5
    assert get_method("m_svag_mb").identity == ""


def test_a_variance_is_given_to_a_method_that_asks(accept):
    accept(extra={"mine": do.adam_star_mb, "theirs": "m_svag_mb"})


@pytest.mark.parametrize(
    ("function", "used"),
    [
        (lambda x, y: x + y, True),
        (lambda x, y: y, False),
        (lambda x, y: jax.jit(jnp.multiply)(x, y), True),
        (lambda x, y: (y, jax.lax.fori_loop(0, 3, lambda _, c: c + x, y)), True),
        (lambda x, y: (jnp.sin(x), y)[1], False),
        (lambda x, y: 1.0, False),
    ],
)
def test_the_use_of_an_argument_is_read_off_the_program(function, used):
    assert uses_first_argument(function, 1.0, 2.0) is used


def test_digests_are_those_of_numbers_in_loops_too():
    def in_loop(array):
        step = jax.jit(lambda carry: carry * jnp.asarray(array))
        return lambda x: jax.lax.fori_loop(0, 3, lambda _, carry: step(carry), x)

    one, same, other = (
        program_digest(in_loop(np.array(values, np.float32)), jnp.ones(2))
        for values in ((1.0, 2.0), (1.0, 2.0), (2.0, 1.0))
    )
    assert one == same
    assert one != other
