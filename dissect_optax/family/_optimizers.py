"""Published optimizers as chains of parts; no mathematics here.

Each has the argument names and defaults of its namesake in Optax, and its update, in
float64, to about the last digit. Where v may be far below d² (moments of a block, or of
the step before), 1 + η² would cancel: there v itself stands in the place of the
variance, with `reciprocal` for the factor, which is the same d/√v.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from dissect_optax._adaptation import (
    adapt_to_variance,
    gaussian_sign,
    inverse,
    inverse_sqrt,
)
from dissect_optax._momentum import accumulate_momentum, correct_for_momentum
from dissect_optax._precision import scale_by_learning_rate, with_float32_accumulation
from dissect_optax._sign import scale_by_sign
from dissect_optax._sources import attach_variance, moving_average_estimate
from dissect_optax.family._directions import (
    extrapolate,
    interpolate,
    mix_averages,
    moving_average,
)
from dissect_optax.family._directions import (
    nesterov as nesterov_direction,
)
from dissect_optax.family._equations import Start
from dissect_optax.family._estimates import estimate
from dissect_optax.family._factors import bounded, reciprocal, signal_to_noise
from dissect_optax.family._sources import (
    centred_second_moment,
    decorrelated,
    deviation_from_mean,
    deviation_from_previous_mean,
    extrapolated_gradient,
    factored_second_moment,
    layer_mean,
    layer_sum,
    maximum,
    power_decay,
    second_moment,
    sign_controlled_second_moment,
)
from dissect_optax.family._updates import (
    add_decayed_weights,
    cautious,
    clip_by_schedule,
    fourth_root,
    heavy_ball,
)

Mask = Any | Callable[[optax.Params], Any] | None


def _chain(
    *transformations: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A chain in at least float32, whose updates have the gradient's dtype."""
    return with_float32_accumulation(optax.chain(*transformations))


# ---- sign m × v - m² × (1+η²)^(-1/2) -------------------------------------------------


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam, θ ← θ - α m/(√(v+ε_root)+ε).

    The sign of m with the relative variance η² = (v-m²)/m². v - m² is about the
    variance of the gradient: too small by the factor 1-κ(β1,t) for independent
    gradients, and off either way, even negative, while the slow v has not yet seen what
    the fast m has. With β1 = β2 it is a weighted variance and never negative.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: ε ≥ 0 inside the root, in its unit squared.
      mu_dtype: Dtype of the average; None means at least float32.
      nesterov: Take the direction of `nesterov` in place of the average.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.adam(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Kingma & Ba, "Adam: A method for stochastic optimization", ICLR 2015.
    """
    direction = nesterov_direction if nesterov else moving_average
    return _chain(
        estimate(
            direction(b1, accumulator_dtype=mu_dtype),
            second_moment(b2),
            eps=eps,
            eps_root=eps_root,
        ),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        scale_by_learning_rate(learning_rate),
    )


def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """NAdam: Adam along the `nesterov` direction d, θ ← θ - α d/(√v+ε).

    η² = (v-d²)/d². For independent gradients v - d² is too small by the factor 1 - Σw²
    with the weights w of d, which gives the newest gradient about twice Adam's.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: ε ≥ 0 inside the root, in its unit squared.
      mu_dtype: Dtype of the average; None means at least float32.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.nadam(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016.
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=True)


def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad: Adam with the largest v so far, θ ← θ - α m/(√max v+ε).

    η² = (max v - m²)/m², which never falls where the variance does: an upper end, not
    an estimate.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: ε ≥ 0 inside the root, in its unit squared.
      mu_dtype: Dtype of the average; None means at least float32.
      bias_correction_mu: Whether m is divided by 1-β1^t.
      bias_correction_nu: Whether v is divided by 1-β2^t before the maximum is taken.

    Returns:
      The optimizer. Its state holds three buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.amsgrad(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Reddi, Kale & Kumar, "On the convergence of Adam and beyond", ICLR 2018.
    """
    mean_start: Start = "corrected" if bias_correction_mu else "zero"
    moment_start: Start = "corrected" if bias_correction_nu else "zero"
    return _chain(
        estimate(
            moving_average(b1, start=mean_start, accumulator_dtype=mu_dtype),
            maximum(second_moment(b2, start=moment_start)),
            eps=eps,
            eps_root=eps_root,
        ),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        scale_by_learning_rate(learning_rate),
    )


def yogi(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Yogi: Adam with a sign-controlled v, θ ← θ - α m/(√v+ε).

    η² = (v-m²)/m² with v ← v - (1-β2) sign(v-g²) g², which is not an estimate of a
    second moment. Both averages start at 1e-6.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.yogi(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Zaheer et al., "Adaptive methods for nonconvex optimization", NeurIPS 2018.
    """
    return _chain(
        estimate(
            moving_average(b1, initial_value=1e-6),
            sign_controlled_second_moment(b2, initial_value=1e-6),
            eps=eps,
        ),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        scale_by_learning_rate(learning_rate),
    )


def ademamix(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """AdEMAMix: Adam along m₁ + α m₂ with a very slow m₂.

    The direction is of a size of its own, (1+α) times a gradient's in the long run, so
    that η² = (v-d²)/d² does not estimate its relative variance.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      b3: The decay β3 of the slow average, or a schedule of it.
      alpha: The multiple of the slow average, or a schedule of it.
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: ε ≥ 0 inside the root, in its unit squared.
      mu_dtype: Dtype of all three buffers; None means at least float32.
      weight_decay: Decoupled weight decay λ ≥ 0, or a schedule of it, times α.
      mask: Where weights decay, a tree of booleans or a function; None: everywhere.

    Returns:
      The optimizer. Its state holds three buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.ademamix(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Pagliardini, Ablin & Grangier, "The AdEMAMix optimizer: Better, faster, older",
      ICLR 2025.
    """
    return _chain(
        estimate(
            mix_averages(b1, b3, alpha, accumulator_dtype=mu_dtype),
            second_moment(b2, accumulator_dtype=mu_dtype),
            eps=eps,
            eps_root=eps_root,
        ),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def adan(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.98,
    b2: jax.typing.ArrayLike = 0.92,
    b3: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Adan: the `extrapolate` direction, v of the extrapolated gradient.

    With Δ = g - g₋ and b = 1-β2, d = m + b EMA(Δ) and v = EMA of (g+bΔ)²: η² =
    (v-d²)/d² nearly estimates the relative variance of g + bΔ.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the average change of the gradient, in [0, 1).
      b3: The decay β3 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: ε ≥ 0 inside the root, in its unit squared.
      weight_decay: Decoupled weight decay λ ≥ 0, or a schedule of it, times α.
      mask: Where weights decay, a tree of booleans or a function; None: everywhere.

    Returns:
      The optimizer. Its state holds four buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.adan(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Xie et al., "Adan: Adaptive Nesterov momentum algorithm for faster optimizing deep
      models", TPAMI 2024.
    """
    return _chain(
        estimate(
            extrapolate(b1, b2),
            second_moment(b3, extrapolated_gradient(b2)),
            eps=eps,
            eps_root=eps_root,
        ),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


# ---- sign m × a variance × η⁻¹ -------------------------------------------------------


def adabelief(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-16,
    eps_root: jax.typing.ArrayLike = 1e-16,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdaBelief, θ ← θ - α m/(√s+ε) with s the moving average of (g-m)².

    The sign of m by η⁻¹ with η² = s/m². s estimates the variance of the gradient, too
    small by 2β1²/(1+β1) for independent gradients: with β1 = β2 it is β times Adam's v
    - m², and AdaBelief is Adam with another factor.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: Added to s in every step, so that 1/(1-β2) times as much bounds η from
        below, in the gradient's unit squared.
      nesterov: Take the direction of `nesterov` in place of the average.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.adabelief(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Zhuang et al., "AdaBelief optimizer: Adapting stepsizes by the belief in observed
      gradients", NeurIPS 2020.
    """
    direction = nesterov_direction if nesterov else moving_average
    return _chain(
        estimate(
            direction(b1),
            second_moment(b2, deviation_from_mean(b1), increment=eps_root),
            minus_square=False,
            eps=eps,
        ),
        scale_by_sign(),
        adapt_to_variance(reciprocal),
        scale_by_learning_rate(learning_rate),
    )


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    block: Callable[[jax.Array], jax.Array] = layer_mean,
) -> optax.GradientTransformationExtraArgs:
    """Adam-mini: Adam with one v for a block of parameters.

    θ ← θ - α m/(√v_b+ε) with v_b the moving average of the mean of g² over a block. v_b
    - m² estimates the variance of a block, not of an element.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      block: From the values of one parameter to the means of their squares over
        blocks, which broadcast against them: `layer_mean`, or for one block per row of
        a matrix `lambda g: jnp.mean(g * g, axis=1, keepdims=True)`.

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters, and one
      number for each block.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.adam_mini(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Zhang et al., "Adam-mini: Use fewer learning rates to gain more", ICLR 2025.
    """
    return _chain(
        estimate(
            moving_average(b1),
            second_moment(b2, block=block),
            minus_square=False,
            eps=eps,
        ),
        scale_by_sign(),
        adapt_to_variance(reciprocal),
        scale_by_learning_rate(learning_rate),
    )


# ---- sign g --------------------------------------------------------------------------


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp, θ ← θ - α g/√(v+ε), or centred, θ ← θ - α g/√(v-m²+ε).

    The sign of the gradient by (1+η²)^(-1/2) with η² = (v-g²)/g², which is not an
    estimate of a relative variance. Centred, by η⁻¹ with η² = (v-m²)/g²: v - m²
    estimates the variance of the gradient, too small by 1-κ(β,t). Momentum, if any,
    comes after the adaptation and the learning rate.

    Args:
      learning_rate: The step size α, a float or a schedule.
      decay: The decay of the averages, in [0, 1).
      eps: ε ≥ 0, in the gradient's unit squared inside the root, else in its unit.
      initial_scale: What v starts with.
      eps_in_sqrt: Whether ε is inside the root.
      centered: Whether the variance about the mean takes the place of v.
      momentum: The decay of `heavy_ball`, or None for no momentum.
      nesterov: Whether that momentum is one step ahead.
      bias_correction: Whether the averages are divided by 1-β^t.

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters, one more
      if it is centred and one more with momentum.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.rmsprop(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Tieleman & Hinton, COURSERA lecture 6.5, 2012. Graves, "Generating sequences with
      recurrent neural networks", 2013.
    """
    source = centred_second_moment if centered else second_moment
    start: Start = "corrected" if bias_correction else "zero"
    return _chain(
        estimate(
            optax.identity(),
            source(decay, start=start, initial_value=initial_scale),
            minus_square=not centered,
            eps=0.0 if eps_in_sqrt else eps,
            eps_root=eps if eps_in_sqrt else 0.0,
        ),
        scale_by_sign(),
        adapt_to_variance(reciprocal if centered else inverse_sqrt),
        scale_by_learning_rate(learning_rate),
        optax.identity()
        if momentum is None
        else heavy_ball(momentum, nesterov=nesterov),
    )


def acprop(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-16,
    eps_root: jax.typing.ArrayLike = 1e-16,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """ACProp, θ ← θ - α g_t/(√s_(t-1)+ε) with s the moving average of (g-m₋)².

    The sign of the gradient by η⁻¹ with η² = s/g². s estimates the variance of the
    gradient from its deviations from the mean before it, too large by 2/(1+β1) for
    independent gradients, and one step old: independent of g. The first step is along g
    itself.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: Added to s in every step, in the gradient's unit squared.
      weight_decay: Decoupled weight decay λ ≥ 0, or a schedule of it, times α.
      mask: Where weights decay, a tree of booleans or a function; None: everywhere.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.acprop(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Zhuang et al., "Momentum centering and asynchronous update for adaptive gradient
      methods", NeurIPS 2021.
    """
    deviations = second_moment(
        b2, deviation_from_previous_mean(from_zero=True), increment=eps_root
    )
    return _chain(
        estimate(
            optax.identity(),
            decorrelated(deviations, first=1.0),
            mean=moving_average(b1, start="zero"),
            minus_square=False,
            eps=eps,
        ),
        scale_by_sign(),
        adapt_to_variance(reciprocal),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def factored_rms(
    learning_rate: optax.ScalarOrSchedule,
    decay_rate: float = 0.8,
    epsilon: jax.typing.ArrayLike = 1e-30,
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformationExtraArgs:
    """The core of Adafactor, θ ← θ - α g/√v with v of rank one.

    v is the outer product of the mean squares of rows and columns, with the decay
    1 - t^(-0.8). `optax.adafactor` also clips updates and scales them by the
    parameters. v - g² is not an estimate of a variance.

    Args:
      learning_rate: The step size α, a float or a schedule.
      decay_rate: The exponent of the decay's schedule.
      epsilon: Added to every square.
      min_dim_size_to_factor: Parameters whose second largest axis is shorter keep every
        square.

    Returns:
      The optimizer. Its state holds for a matrix one number for each row and each
      column, and one buffer for other parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.factored_rms(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Shazeer & Stern, "Adafactor", ICML 2018.
    """
    return _chain(
        estimate(
            optax.identity(),
            factored_second_moment(
                power_decay(decay_rate),
                eps=epsilon,
                smallest_axis=min_dim_size_to_factor,
            ),
            minus_square=False,
        ),
        scale_by_sign(),
        adapt_to_variance(reciprocal),
        scale_by_learning_rate(learning_rate),
    )


# ---- The factor before the momentum --------------------------------------------------


def adopt(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.9999,
    eps: jax.typing.ArrayLike = 1e-6,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[jax.Array], jax.Array] = fourth_root,
) -> optax.GradientTransformationExtraArgs:
    """ADOPT: the momentum of g_t/max(√v_(t-1), ε).

    The factor acts on the gradient, before the momentum, by the v of the step before,
    which is independent of g: decorrelated, but v and not a variance. The first step
    only initialises v.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: The least √v, ε ≥ 0, in the gradient's unit.
      mu_dtype: Dtype of the average; None means at least float32.
      nesterov: Take one more step along the present update, as `nesterov` does.
      use_clipping: Whether adapted gradients are clipped.
      clip_value_fn: From the number of steps before to the clipping value.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.adopt(0.5)
      >>> gradient = jnp.array([3.0, -2.0])
      >>> first, state = optimizer.update(gradient, optimizer.init(gradient))
      >>> second, _ = optimizer.update(gradient, state)
      >>> bool(jnp.all(first == 0)), bool(jnp.all(second * gradient < 0))
      (True, True)

    References:
      Taniguchi et al., "ADOPT: Modified Adam can converge with any β2 with the optimal
      rate", NeurIPS 2024.
    """
    momentum = nesterov_direction if nesterov else moving_average
    return _chain(
        estimate(
            optax.identity(),
            decorrelated(second_moment(b2, start="first"), first=math.inf),
            minus_square=False,
            floor=eps,
        ),
        scale_by_sign(),
        adapt_to_variance(reciprocal),
        clip_by_schedule(clip_value_fn) if use_clipping else optax.identity(),
        momentum(b1, start="zero", accumulator_dtype=mu_dtype),
        scale_by_learning_rate(learning_rate),
    )


def novograd(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.25,
    eps: jax.typing.ArrayLike = 1e-6,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """NovoGrad: the momentum of g/(√v+ε), with v the squared norm of a layer.

    The factor acts before the momentum, by one v for each parameter, the moving average
    of ‖g‖², which starts with the first. v estimates how the norm fluctuates, not a
    variance.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the sum of adapted gradients, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: ε ≥ 0 inside the root, in its unit squared.
      weight_decay: Weight decay λ ≥ 0, or a schedule of it, inside the momentum.

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters, and one
      number for each parameter array.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.novograd(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Ginsburg et al., "Stochastic gradient methods with layer-wise adaptive moments for
      training of deep networks", 2019.
    """
    return _chain(
        estimate(
            optax.identity(),
            second_moment(b2, block=layer_sum, start="first"),
            minus_square=False,
            eps=eps,
            eps_root=eps_root,
        ),
        scale_by_sign(),
        adapt_to_variance(reciprocal),
        add_decayed_weights(weight_decay),
        heavy_ball(b1),
        scale_by_learning_rate(learning_rate),
    )


# ---- Signs alone ---------------------------------------------------------------------


def sign_sgd(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Sign descent, θ ← θ - α sign(g).

    The paper's SSD; no variance.

    Args:
      learning_rate: The step size α, a float or a schedule.

    Returns:
      The optimizer. Its state holds nothing of the size of the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.sign_sgd(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Bernstein et al., "signSGD: Compressed optimisation for non-convex problems", ICML
      2018.
    """
    return _chain(
        scale_by_sign(),
        scale_by_learning_rate(learning_rate),
    )


def signum(
    learning_rate: optax.ScalarOrSchedule,
    beta: jax.typing.ArrayLike = 0.9,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Sign descent with momentum, θ ← θ - α sign(m).

    The paper's M-SSD with an average in place of a sum; no variance.

    Args:
      learning_rate: The step size α, a float or a schedule.
      beta: The decay β of the average, in [0, 1).
      accumulator_dtype: Dtype of the average; None means at least float32.
      weight_decay: Decoupled weight decay λ ≥ 0, or a schedule of it, times α.
      mask: Where weights decay, a tree of booleans or a function; None: everywhere.

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters.

    Raises:
      ValueError: If β is outside [0, 1), or λ is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.signum(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Bernstein et al., "signSGD", ICML 2018.
    """
    return _chain(
        moving_average(beta, start="zero", accumulator_dtype=accumulator_dtype),
        scale_by_sign(),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion, θ ← θ - α (sign(β1 m + (1-β1) g) + λ θ).

    The sign of an interpolation between the gradient and the average before it; no
    variance.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The share β1 of the average in the direction, in [0, 1).
      b2: The decay β2 of the average, in [0, 1).
      mu_dtype: Dtype of the average; None means at least float32.
      weight_decay: Decoupled weight decay λ ≥ 0, or a schedule of it, times α.
      mask: Where weights decay, a tree of booleans or a function; None: everywhere.

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), λ is negative or, from `update`, if
        weights decay and there are no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.lion(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023.
    """
    return _chain(
        interpolate(b1, b2, accumulator_dtype=mu_dtype),
        scale_by_sign(),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


# ---- Other factors -------------------------------------------------------------------


def cautious_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Adam on the elements whose sign agrees with the gradient's, C-Adam.

    θ ← θ - α 1[m·g>0]/mean ⊙ m/(√v+ε): beside Adam's factor a test of the sign of m by
    one sample.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.cautious_adam(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Liang et al., "Cautious optimizers: Improving training with one line of code",
      arXiv 2411.16085, 2024.
    """
    return _chain(
        cautious(
            optax.chain(
                estimate(moving_average(b1), second_moment(b2), eps=eps),
                scale_by_sign(),
                adapt_to_variance(inverse_sqrt),
            )
        ),
        scale_by_learning_rate(learning_rate),
    )


def vrgd(
    learning_rate: optax.ScalarOrSchedule,
    lowest: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """VRGD: θ ← θ - α clip(r/mean(r), lowest, 1) ⊙ g with r = g²/σ².

    The gradient, with its magnitude, by a factor that is η⁻² relative to the mean over
    the layer. The variance of the mini-batch gradient is the extra argument
    `grad_variance` of `update`; its scale does not matter.

    Args:
      learning_rate: The step size α, a float or a schedule.
      lowest: The least factor, in [0, 1].

    Returns:
      The optimizer. Its state holds nothing of the size of the parameters.

    Raises:
      TypeError: From `update`, if `grad_variance` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.vrgd(1.0)
      >>> gradient, variance = jnp.array([2.0, 2.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(gradient)
      >>> updates, _ = optimizer.update(gradient, state, grad_variance=variance)
      >>> bool(updates[0] < updates[1] < 0)  # a longer step where it is surer
      True

    References:
      Jiang et al., "Accelerating large batch training via gradient signal to noise
      ratio (GSNR)", arXiv 2309.13681, 2023.
    """
    return _chain(
        attach_variance(),
        adapt_to_variance(signal_to_noise(lowest)),
        scale_by_learning_rate(learning_rate),
    )


# ---- Cells that nobody has published -------------------------------------------------


def m_svag_mb_reciprocal(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    bound: jax.typing.ArrayLike = 10.0,
) -> optax.GradientTransformationExtraArgs:
    """M-SVAG with mini-batch variance and η⁻¹: magnitude × exact variance × η⁻¹.

    θ ← θ - α min(η⁻¹, bound) ⊙ r with η² = s/r², r ← μ r + g and s ← μ² s + ŝ, Eq.
    (48). The variance ŝ of the gradient is the extra argument `grad_variance` of
    `update`.

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ, in [0, 1).
      bound: The largest factor: η⁻¹ has a pole where all examples agree.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If μ is outside [0, 1), or the bound is negative.
      TypeError: From `update`, if `grad_variance` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.m_svag_mb_reciprocal(1.0)
      >>> gradient, variance = jnp.array([2.0, 2.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(gradient)
      >>> updates, _ = optimizer.update(gradient, state, grad_variance=variance)
      >>> bool(updates[0] < updates[1] < 0)  # a longer step where it is surer
      True

    References:
      Balles & Hennig, "Dissecting Adam", Algorithm 3, for all but the factor.
    """
    return _chain(
        attach_variance(),
        accumulate_momentum(momentum),
        adapt_to_variance(bounded(reciprocal, bound)),
        scale_by_learning_rate(learning_rate),
    )


def m_svag_decorrelated(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """M-SVAG by the variance of the step before.

    θ ← θ - α γ⊙m_t, γ = 1/(1+η²) with η² = κ(μ,t) s_(t-1)/m_t², where s is the moving
    average of (g_t-m_(t-1))². For independent gradients s is too large by 2/(1+μ). The
    first step has γ = 1.

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ of both averages, in [0, 1).

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If μ is outside [0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.m_svag_decorrelated(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3.4, for all but the step between.
    """
    deviations = second_moment(momentum, deviation_from_previous_mean())
    return _chain(
        estimate(
            moving_average(momentum),
            decorrelated(deviations, first=0.0),
            minus_square=False,
        ),
        correct_for_momentum(momentum),
        adapt_to_variance(inverse),
        scale_by_learning_rate(learning_rate),
    )


def m_svag_maximum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """M-SVAG by the largest variance so far, as AMSGrad is Adam by the largest v.

    θ ← θ - α γ⊙m, γ = 1/(1+η²) with η² = κ(μ,t) max s/m², where s is the moving average
    of (g_t-m_(t-1))².

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ of both averages, in [0, 1).

    Returns:
      The optimizer. Its state holds three buffers of the size of the parameters.

    Raises:
      ValueError: If μ is outside [0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.m_svag_maximum(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3.4; Reddi, Kale & Kumar, "On the convergence
      of Adam and beyond", ICLR 2018, for the maximum.
    """
    deviations = second_moment(momentum, deviation_from_previous_mean())
    return _chain(
        estimate(moving_average(momentum), maximum(deviations), minus_square=False),
        correct_for_momentum(momentum),
        adapt_to_variance(inverse),
        scale_by_learning_rate(learning_rate),
    )


def m_svag_mb_before_momentum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """M-SVAG with mini-batch variance, the factor before the momentum.

    r ← μ r + γ⊙g, θ ← θ - α r with γ = 1/(1+η²) and η² = ŝ/g². The variance ŝ of the
    gradient is the extra argument `grad_variance` of `update`; nothing of it is kept.

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ, in [0, 1).

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters.

    Raises:
      ValueError: If μ is outside [0, 1).
      TypeError: From `update`, if `grad_variance` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.m_svag_mb_before_momentum(1.0)
      >>> gradient, variance = jnp.array([2.0, 2.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(gradient)
      >>> updates, _ = optimizer.update(gradient, state, grad_variance=variance)
      >>> bool(updates[0] < updates[1] < 0)  # a longer step where it is surer
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3.4, Algorithm 3, for all but the order.
    """
    return _chain(
        attach_variance(),
        adapt_to_variance(inverse),
        heavy_ball(momentum),
        scale_by_learning_rate(learning_rate),
    )


def adam_star_mb_before_momentum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """ADAM* with mini-batch variance, sign and factor before the momentum.

    r ← μ r + γ⊙sign(g), θ ← θ - α r with γ = (1+η²)^(-1/2) and η² = ŝ/g². The variance
    ŝ of the gradient is the extra argument `grad_variance` of `update`; nothing of it
    is kept.

    Args:
      learning_rate: The step size α, a float or a schedule.
      momentum: The decay μ, in [0, 1).

    Returns:
      The optimizer. Its state holds one buffer of the size of the parameters.

    Raises:
      ValueError: If μ is outside [0, 1).
      TypeError: From `update`, if `grad_variance` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.adam_star_mb_before_momentum(1.0)
      >>> gradient, variance = jnp.array([2.0, 2.0]), jnp.array([1.0, 100.0])
      >>> state = optimizer.init(gradient)
      >>> updates, _ = optimizer.update(gradient, state, grad_variance=variance)
      >>> bool(updates[0] < updates[1] < 0)  # a longer step where it is surer
      True

    References:
      Balles & Hennig, "Dissecting Adam", §4.2, Algorithm 5, for all but the order.
    """
    return _chain(
        attach_variance(),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        heavy_ball(momentum),
        scale_by_learning_rate(learning_rate),
    )


def adam_unbiased(
    learning_rate: optax.ScalarOrSchedule,
    b: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Adam with equal decays and the unbiased variance.

    θ ← θ - α (1+η²)^(-1/2) ⊙ sign(m) with η² = s/m² and s = (v-m²)/(1-κ(β,t)), the
    unbiased variance of the gradient, and ε as its noise floor.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b: The decay β of both averages, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.adam_unbiased(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3.3, §C.1.
    """
    return _chain(
        moving_average_estimate(b, eps=eps, debias_variance=True),
        scale_by_sign(),
        adapt_to_variance(inverse_sqrt),
        scale_by_learning_rate(learning_rate),
    )


def adam_erf(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Adam with the factor that is optimal for a Gaussian sign, erf(1/(√2 η)).

    θ ← θ - α γ⊙sign(m), γ = 2ρ-1 of Eq. (15), with Adam's η² = ((√v+ε)²-m²)/m². A
    negative η², which two decays allow, counts as zero: no step is longer than α.

    Args:
      learning_rate: The step size α, a float or a schedule.
      b1: The decay β1 of the average, in [0, 1).
      b2: The decay β2 of the second moment, in [0, 1).
      eps: ε ≥ 0, outside the root, in the gradient's unit.

    Returns:
      The optimizer. Its state holds two buffers of the size of the parameters.

    Raises:
      ValueError: If a decay is outside [0, 1), or an ε is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> optimizer = family.adam_erf(0.5)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.all(updates * params < 0))  # downhill
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3.1.
    """
    return _chain(
        estimate(moving_average(b1), second_moment(b2), eps=eps),
        scale_by_sign(),
        adapt_to_variance(gaussian_sign),
        scale_by_learning_rate(learning_rate),
    )
