"""Stochastic quadratic problems: a spectrum, an orientation and a noise level, §2.

ℓ(θ, x) = ½ (θ-x)ᵀ Q (θ-x),      x ~ N(x*, ν²I),      Q = R Λ Rᵀ
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import (
    as_floats,
    check_finite,
    check_not_negative,
    check_orthogonal,
    check_positive,
    check_rotation,
    check_shape,
    check_vector,
)
from dissect_optax.theory._scales import split, times_power_of_two

# Accelerators multiply matrices in reduced precision unless told otherwise.
_EXACT = jax.lax.Precision.HIGHEST


class QuadraticProblem(NamedTuple):
    """A stochastic quadratic problem, Eq. (9); created by `quadratic_problem`.

    A pytree: it can be passed to jit, and a batch of problems to vmap.

    Attributes:
      eigenvalues: The diagonal of Λ, positive, of shape [d].
      basis: R, whose columns are the eigenvectors of Q, orthogonal, of shape [d, d].
      minimizer: x*, of shape [d].
      noise: ν ≥ 0, the standard deviation of the data, a scalar.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> rotation = theory.random_rotation(jax.random.key(0), 3)
      >>> problem = theory.quadratic_problem(
      ...     jnp.array([1.0, 2.0, 5.0]), rotation, noise=0.1
      ... )
      >>> theta = jnp.ones(3)
      >>> exact = jax.grad(problem.loss)(theta)
      >>> bool(jnp.allclose(problem.gradient(theta), exact, atol=1e-5))
      True
    """

    eigenvalues: jax.Array
    basis: jax.Array
    minimizer: jax.Array
    noise: jax.Array

    @property
    def hessian(self) -> jax.Array:
        """Q = RΛRᵀ, of shape [d, d]."""
        return self._with_spectrum(self.eigenvalues)

    @property
    def gradient_covariance(self) -> jax.Array:
        """The covariance ν²QQ of a stochastic gradient, of shape [d, d], §B.1."""
        # Scaled, so that an overflow gives infinite elements rather than ∞ - ∞.
        spectrum, exponent = split(self.noise * self.eigenvalues)
        return times_power_of_two(
            self._with_spectrum(jnp.square(spectrum)), 2 * exponent
        )

    @property
    def gradient_std(self) -> jax.Array:
        """σ, the element-wise standard deviation of a stochastic gradient, [d]."""
        # Each row has a scale of its own: one may be flat and another steep.
        spectrum, exponent = split(self.eigenvalues)
        rows, exponents = split(self.basis * spectrum[jnp.newaxis, :], axis=1)
        norms = jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))
        return self.noise * times_power_of_two(norms, exponents[:, 0] + exponent)

    @property
    def lipschitz(self) -> jax.Array:
        """The Lipschitz constant of the gradient, the largest eigenvalue."""
        return jnp.max(self.eigenvalues)

    @property
    def strong_convexity(self) -> jax.Array:
        """The constant μ of strong convexity, the smallest eigenvalue."""
        return jnp.min(self.eigenvalues)

    @property
    def diagonal_dominance(self) -> jax.Array:
        """The largest c of Eq. (13), Σ|q_ii| / Σ|q_ij|, in (0, 1]."""
        spectrum, _ = split(self.eigenvalues)  # The scale cancels.
        magnitudes = jnp.abs(self._with_spectrum(spectrum))
        return jnp.trace(magnitudes) / jnp.sum(magnitudes)

    def excess_loss(self, params: ArrayLike) -> jax.Array:
        """L(θ) - L(x*) = ½ (θ-x*)ᵀ Q (θ-x*), a scalar, of `params` of shape [d]."""
        return 0.5 * self.curvature_along(self._displacement(params))

    def loss(self, params: ArrayLike) -> jax.Array:
        """L(θ) of Eq. (9) with its constant ν²/2 tr(Q), of `params` of shape [d]."""
        constant = 0.5 * self.noise * (self.noise * jnp.sum(self.eigenvalues))
        return self.excess_loss(params) + constant

    def gradient(self, params: ArrayLike) -> jax.Array:
        """∇L(θ) = Q(θ-x*), of shape [d], of `params` of shape [d]."""
        return self._times_hessian(self._displacement(params))

    def sample_gradient(self, key: jax.Array, params: ArrayLike) -> jax.Array:
        """A stochastic gradient Q(θ-x) ~ N(∇L, ν²QQ), of shape [d]."""
        displacement = self._displacement(params)
        noise = jax.random.normal(key, displacement.shape, displacement.dtype)
        return self._times_hessian(displacement - self.noise * noise)

    def curvature_along(self, vector: ArrayLike) -> jax.Array:
        """vᵀQv = Σ λ_i (Rᵀv)_i², a scalar, of a vector of shape [d]."""
        (vector,) = as_floats(vector)
        coordinates = jnp.matmul(vector, self.basis, precision=_EXACT)
        # In this order nothing over- or underflows unless the result does.
        return jnp.sum(self.eigenvalues * coordinates * coordinates)

    def _with_spectrum(self, eigenvalues: jax.Array) -> jax.Array:
        """The matrix with the basis of Q and these eigenvalues."""
        scaled = self.basis * eigenvalues[jnp.newaxis, :]
        return jnp.matmul(scaled, self.basis.T, precision=_EXACT)

    def _times_hessian(self, vector: jax.Array) -> jax.Array:
        """Qv by way of the eigenbasis."""
        coordinates = jnp.matmul(vector, self.basis, precision=_EXACT)
        return jnp.matmul(self.basis, self.eigenvalues * coordinates, precision=_EXACT)

    def _displacement(self, params: ArrayLike) -> jax.Array:
        """θ - x*, checked."""
        (params,) = as_floats(params)
        shape = self.minimizer.shape
        check_shape("params", params, shape, f"a problem of {shape[-1]} dimensions")
        return params - self.minimizer


def quadratic_problem(
    eigenvalues: ArrayLike,
    basis: ArrayLike | None = None,
    *,
    noise: ArrayLike = 0.0,
    minimizer: ArrayLike | None = None,
) -> QuadraticProblem:
    """Create a stochastic quadratic problem from spectrum and orientation, Eq. (9).

    Args:
      eigenvalues: The spectrum of Q, positive, of shape [d].
      basis: R, orthogonal, of shape [d, d], with the eigenvectors as columns, e.g. from
        `random_rotation`. None is the identity: axis-aligned, Q = Λ.
      noise: ν ≥ 0, the standard deviation of the data x, a scalar in the unit of θ.
      minimizer: x*, of shape [d]; None is the origin.

    Returns:
      The `QuadraticProblem`.

    Raises:
      ValueError: If shapes do not go together, concrete eigenvalues are not positive
        and finite, a concrete basis is not orthogonal, or a concrete noise is negative
        or infinite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> problem = theory.quadratic_problem(jnp.array([1.0, 30.0]), noise=4.0)
      >>> print(problem.lipschitz, problem.strong_convexity, problem.diagonal_dominance)
      30.0 1.0 1.0

    References:
      Balles & Hennig, "Dissecting Adam", §2.
    """
    (spectrum,) = as_floats(eigenvalues)
    size = check_vector("eigenvalues", spectrum)
    check_positive("eigenvalues", spectrum, finite=True)
    like = f"{size} eigenvalues"
    rotation = jnp.eye(size) if basis is None else basis
    centre = jnp.zeros(size) if minimizer is None else minimizer
    spectrum, rotation, centre, nu = as_floats(spectrum, rotation, centre, noise)
    check_shape("basis", rotation, (size, size), like)
    check_shape("minimizer", centre, (size,), like)
    check_shape("noise", nu, (), "one noise level per problem")
    check_orthogonal("basis", rotation)
    check_finite("minimizer", centre)
    check_not_negative("noise", nu, finite=True)
    return QuadraticProblem(spectrum, rotation, centre, nu)


def random_rotation(
    key: jax.Array, size: int, dtype: jax.typing.DTypeLike = float
) -> jax.Array:
    """A rotation matrix drawn uniformly over the rotations of space, §2.2.

    The orthogonal factor of a Gaussian matrix, with the sign ambiguity of the QR
    decomposition removed; otherwise the distribution would depend on the algorithm. A
    reflection is turned into a rotation by negating one column.

    Args:
      key: A JAX random key.
      size: d, at least one.
      dtype: The floating dtype of the result.

    Returns:
      R of shape [d, d] with RᵀR = I and determinant +1.

    Raises:
      ValueError: If `size` is below one.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> rotation = theory.random_rotation(jax.random.key(0), 5)
      >>> bool(jnp.allclose(rotation.T @ rotation, jnp.eye(5), atol=1e-5))
      True

    References:
      Mezzadri (2007), "How to generate random matrices from the classical compact
      groups". Diaconis & Shahshahani (1987), "The subgroup algorithm for generating
      uniform random variables".
    """
    if size < 1:
        raise ValueError(f"`size` must be at least one, got {size}.")
    normal = jax.random.normal(key, (size, size), dtype)
    orthogonal, triangular = jnp.linalg.qr(normal)
    # A diagonal element of exactly zero leaves its column unchanged.
    flips = jnp.where(jnp.diagonal(triangular) < 0, -1.0, 1.0).astype(normal.dtype)
    uniform = orthogonal * flips[jnp.newaxis, :]
    handedness, _ = jnp.linalg.slogdet(uniform)
    return uniform.at[:, 0].multiply(handedness)


def partial_rotation(rotation: ArrayLike, fraction: ArrayLike) -> jax.Array:
    """The rotation in the same planes by a fraction of the angles, R^t.

    The shortest path from the identity (t = 0) to the rotation (t = 1): R turns each of
    its planes by an angle θ in (-π, π), and R^t by tθ.

    Args:
      rotation: R, of shape [d, d], orthogonal with determinant +1.
      fraction: t, a scalar; without unit.

    Returns:
      R^t, a rotation of shape [d, d].

    Raises:
      ValueError: If `rotation` is not a square matrix, `fraction` is not a scalar, or
        concrete ones are not a rotation and a finite number.

    Edge cases:
      * A rotation by exactly π in some plane has two shortest paths, and gives NaN. For
        a random rotation this has probability zero.
      * Close to π, digits are lost: about four of float32's seven for d = 100.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> quarter = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> eighth = theory.partial_rotation(quarter, 0.5)
      >>> bool(jnp.allclose(eighth @ eighth, quarter, atol=1e-6))
      True
    """
    rotation, t = as_floats(rotation, fraction)
    if rotation.ndim != 2 or rotation.shape[0] != rotation.shape[1]:
        raise ValueError(
            f"`rotation` must be a square matrix, got shape {rotation.shape}."
        )
    check_shape("fraction", t, (), "one rotation")
    check_rotation("rotation", rotation)
    check_finite("fraction", t)
    identity = jnp.eye(rotation.shape[0], dtype=rotation.dtype)
    # Cayley's transform is skew-symmetric with the eigenvalues -i tan(θ/2). They
    # distinguish θ from -θ, unlike those of R + Rᵀ.
    skew = jnp.linalg.solve(identity + rotation, identity - rotation)
    skew = 0.5 * (skew - skew.T)
    tangents, planes = jnp.linalg.eigh(1j * skew)
    turns = jnp.exp(2j * t * jnp.arctan(tangents))
    scaled = planes * turns[jnp.newaxis, :]
    return jnp.matmul(scaled, planes.conj().T, precision=_EXACT).real
