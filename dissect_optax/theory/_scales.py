"""Numbers far from one, as a mantissa and a power of two.

The formulas of §2 contain third and fourth powers of gradients and eigenvalues. In
float32 these over- or underflow from about 1e13 and 1e-13 on, although the result does
not. Therefore each factor is divided by a power of two, which changes no digit, the
formula is evaluated on numbers close to one, and the powers are applied to the result.

All formulas are homogeneous. That makes the powers constants for differentiation.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def split(value: jax.Array, axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Split x into m·2^e with one exponent, so that the largest |m| lies in [1/2, 1).

    With an axis there is one exponent per slice along it, of size one on that axis. An
    array that is zero or not finite has exponent zero.
    """
    largest = jnp.max(
        jnp.abs(jax.lax.stop_gradient(value)),
        axis=axis,
        keepdims=axis is not None,
        initial=0.0,
    )
    _, exponent = jnp.frexp(largest)
    return times_power_of_two(value, -exponent), exponent


def times_power_of_two(value: jax.Array, exponent: jax.Array) -> jax.Array:
    """Exact x·2^e, wherever the result is a normal number."""
    # The power itself may overflow where the product does not. A third of any exponent
    # that the formulas reach does not overflow.
    third = exponent // 3
    one = jnp.ones((), value.dtype)
    share = jnp.ldexp(one, third)
    return value * share * share * jnp.ldexp(one, exponent - 2 * third)


def quotient_of_products(
    numerators: Sequence[jax.Array], denominators: Sequence[jax.Array]
) -> jax.Array:
    """Quotient of element-wise products whose parts may over- or underflow.

    For finite numbers, up to four above and two below the line.
    """
    mantissa = jnp.ones_like(numerators[0])
    exponent = jnp.zeros(mantissa.shape, jnp.int32)
    for value in numerators:
        m, e = _split_each(value)
        mantissa, exponent = mantissa * m, exponent + e
    for value in denominators:
        m, e = _split_each(value)
        mantissa, exponent = mantissa / m, exponent - e
    return times_power_of_two(mantissa, exponent)


@jax.custom_jvp
def quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Quotient whose derivative never forms the square of the denominator."""
    return numerator / denominator


@quotient.defjvp
def _quotient_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The derivative (dn - n/d·dd)/d of a quotient n/d."""
    numerator, denominator = primals
    d_numerator, d_denominator = tangents
    ratio = quotient(numerator, denominator)
    return ratio, (d_numerator - ratio * d_denominator) / denominator


def _split_each(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split x into m·2^e, element by element."""
    _, exponent = jnp.frexp(jax.lax.stop_gradient(value))
    return times_power_of_two(value, -exponent), exponent
