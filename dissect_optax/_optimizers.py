"""The paper's algorithms as chains; no mathematics here.

Table 1, with momentum:

|                      | sign + magnitude | sign only |
|----------------------|------------------|-----------|
| not variance-adapted | `m_sgd`          | `m_ssd`   |
| variance-adapted     | `m_svag`         | `adam`    |

Step sizes are not comparable between the methods: `m_sgd` and the mini-batch variants
step along a sum of gradients, `m_svag` along an average of them, the sign methods along
numbers of size one. Tune each by itself.
"""

import jax
import optax

from dissect_optax._adaptation import adapt_to_variance, inverse, inverse_sqrt
from dissect_optax._checks import check_floating, checked_decay
from dissect_optax._momentum import (
    accumulate_gradients,
    accumulate_momentum,
    correct_for_momentum,
)
from dissect_optax._precision import (
    scale_by_learning_rate,
    with_float32_accumulation,
)
from dissect_optax._sign import scale_by_sign
from dissect_optax._sources import (
    attach_variance,
    moving_average_estimate,
    with_relative_variance_of,
)


def _chain(
    *transformations: optax.GradientTransformation,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A chain in at least float32, whose updates have the gradient's dtype."""
    return with_float32_accumulation(optax.chain(*transformations), accumulator_dtype)


# ---- Table 1 without momentum -----------------------------------------------------


def sgd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent: θ ← θ - α g.

    Args:
      learning_rate: The step size α, a float or a schedule.

    Returns:
      The optimizer.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.sgd(0.5)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> print(updates)
      [-0.5  1. ]

    References:
      Balles & Hennig, "Dissecting Adam", Table 1.
    """
    return _chain(scale_by_learning_rate(learning_rate))


def ssd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Stochastic sign descent: θ ← θ - α sign(g).

    Args:
      learning_rate: The step size α, a float or a schedule; the length of a step in
        every coordinate, in the unit of the parameters.

    Returns:
      The optimizer.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.ssd(0.5)
      >>> params = jnp.array([3.0, -1e-9, 0.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> print(updates)
      [-0.5  0.5 -0. ]

    References:
      Balles & Hennig, "Dissecting Adam", §1.2, Table 1.
    """
    return _chain(
        scale_by_sign(),
        scale_by_learning_rate(learning_rate),
    )


def svag(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    *,
    debias_variance: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic variance-adapted gradient: θ ← θ - α γ⊙g, γ = 1/(1+η²).

    The relative variance η² = (v-m²)/m² comes from moving averages (§3.3); the factor
    acts on the gradient itself.

    Args:
      learning_rate: The step size α, a float or a schedule.
      decay: The decay of the moving averages, in [0, 1).
      debias_variance: Use (v-m²)/(1-κ) for the variance, as the later publication
        does (ICML 2018).
      accumulator_dtype: Dtype of both averages; None means at least float32.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If `decay` is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.svag(1.0)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])):
      ...     updates, state = optimizer.update(gradient, state)
      >>> bool(updates[0] == -1.0), bool(abs(updates[1]) < 0.01)  # sure, unsure
      (True, True)

    References:
      Balles & Hennig, "Dissecting Adam", §3.2, §3.3.
    """
    decay = checked_decay("decay", decay)
    estimator = moving_average_estimate(
        decay, debias_variance=debias_variance, accumulator_dtype=accumulator_dtype
    )
    return _chain(
        with_relative_variance_of(estimator),
        adapt_to_variance(inverse),
        scale_by_learning_rate(learning_rate),
    )


# ---- Table 1 with momentum --------------------------------------------------------


def m_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum: r ← μ r + g, θ ← θ - α r.

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ, in [0, 1).
      accumulator_dtype: Dtype of r; None means at least float32.

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters.

    Raises:
      ValueError: If `momentum` is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.m_sgd(1.0, momentum=0.5)
      >>> state = optimizer.init(jnp.zeros(1))
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(jnp.array([2.0]), state)
      >>> print(updates)
      [-3.]

    References:
      Balles & Hennig, "Dissecting Adam", §3.4.
    """
    momentum = checked_decay("momentum", momentum)
    check_floating("accumulator_dtype", accumulator_dtype)
    return _chain(
        accumulate_gradients(momentum),
        scale_by_learning_rate(learning_rate),
        accumulator_dtype=accumulator_dtype,
    )


def m_ssd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic sign descent with momentum, Algorithm 1: θ ← θ - α sign(r).

    Args:
      learning_rate: The step size α, a float or a schedule; the length of a step in
        every coordinate, in the unit of the parameters.
      momentum: The decay μ of r ← μ r + g, in [0, 1).
      accumulator_dtype: Dtype of r; None means at least float32.

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters.

    Raises:
      ValueError: If `momentum` is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.m_ssd(0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> updates, _ = optimizer.update(jnp.array([1e-6, -1e6]), state)
      >>> print(updates)
      [-0.5  0.5]

    References:
      Balles & Hennig, "Dissecting Adam", §4, Algorithm 1.
    """
    momentum = checked_decay("momentum", momentum)
    check_floating("accumulator_dtype", accumulator_dtype)
    return _chain(
        accumulate_gradients(momentum),
        scale_by_sign(),
        scale_by_learning_rate(learning_rate),
        accumulator_dtype=accumulator_dtype,
    )


def m_svag(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    debias_variance: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Variance-adapted momentum, Algorithm 2: θ ← θ - α γ⊙m, γ = 1/(1+η²).

    The relative variance of the momentum is η² = κ(μ,t) (v-m²)/m², Eq. (19), from
    bias-corrected moving averages with one decay μ.

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ of both averages, in [0, 1).
      debias_variance: Use (v-m²)/(1-κ) for the variance of the gradient, as the later
        publication does (ICML 2018); the first step takes it as zero.
      accumulator_dtype: Dtype of both averages; None means at least float32.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If `momentum` is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.m_svag(1.0)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])):
      ...     updates, state = optimizer.update(gradient, state)
      >>> bool(updates[0] == -1.0), bool(abs(updates[1]) < 0.01)  # sure, unsure
      (True, True)

    References:
      Balles & Hennig, "Dissecting Adam", §3.4, Algorithm 2.
    """
    momentum = checked_decay("momentum", momentum)
    return _chain(
        moving_average_estimate(
            momentum,
            debias_variance=debias_variance,
            accumulator_dtype=accumulator_dtype,
        ),
        correct_for_momentum(momentum),
        adapt_to_variance(inverse),
        scale_by_learning_rate(learning_rate),
    )


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam as a variance-adapted sign: θ ← θ - α (1+η²)^(-1/2) ⊙ sign(m).

    The relative variance is η² = ((√v+ε)² - m²)/m², Eq. (7) with ε as a noise floor, so
    that the step is Adam's m/(√v+ε), Eqs. (3)-(6), taken apart.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the mean, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root and after bias correction, in the gradient's unit.
      accumulator_dtype: Dtype of both moments; None means at least float32.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), ε is negative, or `accumulator_dtype` is
        not a floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import dissect_optax
      >>> gradient = jnp.array([1e-3, -2.0])
      >>> ours, theirs = dissect_optax.adam(0.1), optax.adam(0.1)
      >>> u, _ = ours.update(gradient, ours.init(gradient))
      >>> v, _ = theirs.update(gradient, theirs.init(gradient))
      >>> bool(jnp.allclose(u, v, rtol=1e-4))
      True

    References:
      Balles & Hennig, "Dissecting Adam", §1.1. Kingma & Ba, "Adam: A method for
      stochastic optimization", ICLR 2015.
    """
    return _chain(
        moving_average_estimate(b1, b2, eps=eps, accumulator_dtype=accumulator_dtype),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        scale_by_learning_rate(learning_rate),
    )


# ---- Variants (§D) ----------------------------------------------------------------


def adam_star(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with the momentum's own relative variance, ADAM*, Algorithm 4.

    θ ← θ - α (1+η²)^(-1/2) ⊙ sign(m) with η² = κ(μ,t) (v-m²)/m²: Adam with one decay
    and ε = 0, but for the correction κ of Eq. (19).

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ of both averages, in [0, 1).
      accumulator_dtype: Dtype of both averages; None means at least float32.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If `momentum` is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.adam_star(0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> print(optimizer.update(jnp.array([1e-6, -1e6]), state)[0])
      [-0.5  0.5]

    References:
      Balles & Hennig, "Dissecting Adam", §D, Algorithm 4.
    """
    momentum = checked_decay("momentum", momentum)
    return _chain(
        moving_average_estimate(momentum, accumulator_dtype=accumulator_dtype),
        correct_for_momentum(momentum),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        scale_by_learning_rate(learning_rate),
    )


def m_svag_mb(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """M-SVAG with mini-batch variance estimates, Algorithm 3: θ ← θ - α γ⊙r.

    γ = 1/(1+η²) with η² = s/r², r ← μ r + g and s ← μ² s + ŝ, Eq. (48). The variance ŝ
    of the gradient, Eq. (44), is the extra argument `grad_variance` of `update`.

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ, in [0, 1).
      accumulator_dtype: Dtype of r and s; None means at least float32.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If `momentum` is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.
      TypeError: From `update`, if `grad_variance` is missing.

    Edge cases:
      * Inside `optax.MultiSteps` only the variance of the last micro-batch arrives; see
        `attach_variance`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.m_svag_mb(1.0)
      >>> gradient, variance = jnp.array([1.0, 1.0]), jnp.array([0.0, 3.0])
      >>> state = optimizer.init(gradient)
      >>> print(optimizer.update(gradient, state, grad_variance=variance)[0])
      [-1.   -0.25]

    References:
      Balles & Hennig, "Dissecting Adam", §C, §D, Algorithm 3.
    """
    momentum = checked_decay("momentum", momentum)
    return _chain(
        attach_variance(),
        accumulate_momentum(momentum, accumulator_dtype=accumulator_dtype),
        adapt_to_variance(inverse),
        scale_by_learning_rate(learning_rate),
    )


def adam_star_mb(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ADAM* with mini-batch variance estimates, Algorithm 5.

    θ ← θ - α (1+η²)^(-1/2) ⊙ sign(r) with η² = s/r², r ← μ r + g and s ← μ² s + ŝ,
    Eq. (48). The variance ŝ of the gradient, Eq. (44), is the extra argument
    `grad_variance` of `update`.

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ, in [0, 1).
      accumulator_dtype: Dtype of r and s; None means at least float32.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If `momentum` is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.
      TypeError: From `update`, if `grad_variance` is missing.

    Edge cases:
      * Inside `optax.MultiSteps` only the variance of the last micro-batch arrives; see
        `attach_variance`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> optimizer = dissect_optax.adam_star_mb(1.0)
      >>> gradient, variance = jnp.array([-9.0, 1.0]), jnp.array([0.0, 3.0])
      >>> state = optimizer.init(gradient)
      >>> print(optimizer.update(gradient, state, grad_variance=variance)[0])
      [ 1.  -0.5]

    References:
      Balles & Hennig, "Dissecting Adam", §C, §D, Algorithm 5.
    """
    momentum = checked_decay("momentum", momentum)
    return _chain(
        attach_variance(),
        accumulate_momentum(momentum, accumulator_dtype=accumulator_dtype),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        scale_by_learning_rate(learning_rate),
    )
