"""Exact orthant probabilities of two correlated Gaussian variables.

For X ~ N(h, 1) and Y ~ N(k, 1) with correlation r, Plackett's identity ∂Φ₂/∂r = φ₂
gives the expected product of signs as an integral over the angle of the correlation
(Drezner & Wesolowsky 1990),

    E[sign(X) sign(Y)] = erf(h/√2) erf(k/√2)
                         + 2/π ∫₀^{asin r} exp(-(h²+k²-2hk sin θ) / (2cos²θ)) dθ.

The tangent of half the angle makes the integrand free of trigonometric functions, and
smooth while r is not close to one. Close to one the integral is taken from the other
end, r = 1, where its value is known, and the part of the integrand that is not analytic
there is integrated in closed form, as in Genz (2004).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import as_same_shape, check_correlation

# Beyond, a sign is certain to the last bit.
_CERTAIN = 40.0
# The correlation at which the integral from r = 1 replaces the one from r = 0, and the
# numbers of nodes that leave an error below 1e-12 on either side of it.
_CLOSE_TO_ONE = 0.95
_NODES_FROM_ZERO = 16
_NODES_FROM_ONE = 8


def expected_sign_product(
    first: ArrayLike, second: ArrayLike, correlation: ArrayLike
) -> jax.Array:
    """Expected product of the signs of two Gaussian variables of unit variance.

    E[sign(X) sign(Y)] = 1 - 2 P[sign(X) ≠ sign(Y)], an entry of the E[ssᵀ] that gives
    E[sᵀQs] in Eq. (11). Absolute error below 1e-12 in float64, and about 1e-6
    in float32.

    Args:
      first: h = E[X], of any shape, in standard deviations of X.
      second: k = E[Y], in standard deviations of Y; shapes broadcast.
      correlation: r in [-1, 1], of X and Y; shapes broadcast.

    Returns:
      E[sign(X) sign(Y)] in [-1, 1], of the broadcast shape; without unit.

    Raises:
      ValueError: If a concrete `correlation` lies outside [-1, 1].

    Edge cases:
      * r = ±1: the limit, which is 1 - |erf(h/√2) - erf(k/√2)| for r = 1. There the
        derivative with respect to r may be infinite, and is set to zero.
      * Infinite h or k: a sign that is certain.
      * For r close to ±1 the error of the value is the square root of a rounding error
        in r.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> r = jnp.array([-1.0, 0.0, 0.5, 1.0])
      >>> centred = theory.expected_sign_product(0.0, 0.0, r)
      >>> bool(jnp.allclose(centred, 2 / jnp.pi * jnp.arcsin(r)))
      True

    References:
      Drezner & Wesolowsky (1990), "On the computation of the bivariate normal
      integral". Genz (2004), "Numerical computation of rectangular bivariate and
      trivariate normal and t probabilities".
    """
    h, k, r = as_same_shape(first, second, correlation)
    check_correlation(r)
    h, k = (jnp.clip(x, -_CERTAIN, _CERTAIN) for x in (h, k))
    return _sign_product(h, k, r)


def orthant_probability(
    first: ArrayLike, second: ArrayLike, correlation: ArrayLike
) -> jax.Array:
    """Probability that two Gaussian variables of unit variance are both positive.

    P[X > 0, Y > 0] = (1 + E[sign X] + E[sign Y] + E[sign X sign Y]) / 4, which is
    Φ₂(h, k; r), the bivariate normal distribution function. Absolute error below 1e-12
    in float64, and about 1e-6 in float32.

    Args:
      first: h = E[X], of any shape, in standard deviations of X.
      second: k = E[Y], in standard deviations of Y; shapes broadcast.
      correlation: r in [-1, 1], of X and Y; shapes broadcast.

    Returns:
      The probability, of the broadcast shape.

    Raises:
      ValueError: If a concrete `correlation` lies outside [-1, 1].

    Edge cases:
      As for `expected_sign_product`.

    Examples:
      >>> from dissect_optax import theory
      >>> print(f"{theory.orthant_probability(0.0, 0.0, 0.5):.4f}")  # 1/4 + asin(r)/2π
      0.3333

    References:
      Genz (2004), "Numerical computation of rectangular bivariate and trivariate normal
      and t probabilities".
    """
    h, k, r = as_same_shape(first, second, correlation)
    product = expected_sign_product(h, k, r)
    return 0.25 * (1 + _erf(h) + _erf(k) + product)


@jax.custom_jvp
@jax.jit
def _sign_product(h: jax.Array, k: jax.Array, r: jax.Array) -> jax.Array:
    """E[sign X sign Y] by the integral that converges for the correlation."""
    # A negative correlation of X with Y is a positive one of X with -Y.
    side = jnp.where(r < 0, -1.0, 1.0).astype(r.dtype)
    k, r = side * k, jnp.abs(r)
    from_zero = _from_independence(h, k, jnp.minimum(r, _CLOSE_TO_ONE))
    from_one = _from_dependence(h, k, jnp.maximum(r, _CLOSE_TO_ONE))
    return side * jnp.where(r <= _CLOSE_TO_ONE, from_zero, from_one)


@_sign_product.defjvp
def _sign_product_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The derivatives in closed form: 2φ(h)(2Φ(·)-1), the same for k, and 4φ₂."""
    h, k, r = primals
    dh, dk, dr = tangents
    rest = (1 - r) * (1 + r)
    degenerate = rest <= 0
    safe = jnp.where(degenerate, 1.0, rest)
    width = jnp.sqrt(safe)
    by_h = 2 * _pdf(h) * _conditional_sign(k - r * h, width, degenerate)
    by_k = 2 * _pdf(k) * _conditional_sign(h - r * k, width, degenerate)
    density = jnp.exp(-(h * h - 2 * r * h * k + k * k) / (2 * safe)) / width
    by_r = jnp.where(degenerate, 0.0, 2 / math.pi * density)
    return _sign_product(h, k, r), by_h * dh + by_k * dk + by_r * dr


def _conditional_sign(
    mean: jax.Array, width: jax.Array, degenerate: jax.Array
) -> jax.Array:
    """Expected sign of one variable where the other is zero."""
    return jnp.where(degenerate, jnp.sign(mean), _erf(mean / width))


def _from_independence(h: jax.Array, k: jax.Array, r: jax.Array) -> jax.Array:
    """The integral from r = 0, for 0 ≤ r ≤ 0.95, over u = tan(θ/2)."""
    end = r / (1 + jnp.sqrt((1 - r) * (1 + r)))
    squares, product = 0.5 * (h * h + k * k), 2 * h * k
    integral = jnp.zeros_like(r)
    for node, weight in _gauss_legendre(_NODES_FROM_ZERO):
        u = node * end
        u2 = u * u
        up, down = 1 + u2, 1 - u2
        inverse = 1 / (up * down * down)
        exponent = (squares * up - product * u) * up * up * inverse
        jacobian = 2 * down * down * inverse
        integral = integral + weight * end * jacobian * jnp.exp(-exponent)
    return _erf(h) * _erf(k) + 2 / math.pi * integral


def _from_dependence(h: jax.Array, k: jax.Array, r: jax.Array) -> jax.Array:
    """The integral from r = 1, for 0.95 ≤ r ≤ 1.

    In w = tan(ψ/2), with ψ = π/2 - θ, the integrand is

        exp(-(h²+k²)/4) exp(-(h-k)²/(8w²)) S(w),   S(w) = 2/(1+w²) exp(-(h+k)²w²/8).

    Three terms of S(w) = 2 (1 + s₁w² + s₂w⁴) + O(w⁶) are integrated by parts. The rest
    is so flat at w = 0 that the singularity there does not affect the quadrature.
    """
    end = jnp.sqrt((1 - r) / (1 + r))
    certain = end == 0
    end = jnp.where(certain, 1.0, end)
    gap, base = 0.5 * jnp.abs(h - k), 0.25 * (h * h + k * k)
    fall = jnp.square(h + k) / 8
    s1, s2 = -(1 + fall), 1 + fall + 0.5 * fall * fall

    at_end = jnp.exp(-base - 0.5 * jnp.square(gap / end))
    tail = jnp.exp(-base) * jax.scipy.special.ndtr(-gap / end)
    # ∫ wⁿ exp(-gap²/(2w²)) dw for n = 0, 2, 4.
    w0 = end * at_end - math.sqrt(2 * math.pi) * gap * tail
    w2 = (end**3 * at_end - gap * gap * w0) / 3
    w4 = (end**5 * at_end - gap * gap * w2) / 5
    integral = 2 * (w0 + s1 * w2 + s2 * w4)

    for node, weight in _gauss_legendre(_NODES_FROM_ONE):
        w = node * end
        square = w * w
        exponent = base + 0.5 * jnp.square(gap / w)
        expansion = 2 * (1 + square * (s1 + square * s2)) * jnp.exp(-exponent)
        integrand = 2 / (1 + square) * jnp.exp(-exponent - fall * square)
        integral = integral + weight * end * (integrand - expansion)

    limit = 1 - jnp.abs(_erf(h) - _erf(k))
    return jnp.where(certain, limit, limit - 2 / math.pi * integral)


def _erf(z: jax.Array) -> jax.Array:
    """2Φ(z)-1, the expected sign of a variable of mean z and unit variance."""
    return jax.lax.erf(z * math.sqrt(0.5))


def _pdf(z: jax.Array) -> jax.Array:
    """The standard normal density."""
    return jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


@functools.cache
def _gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    pairs = zip((nodes + 1) / 2, weights / 2, strict=True)
    return tuple((float(node), float(weight)) for node, weight in pairs)
