"""Exact numbers for the paper's theory: when signs help, and why variance factors do.

Pure functions for §1.4, §2, §3 and §B of "Dissecting Adam"; they are differentiable and
work under jit and vmap. They compute in at least float32, and check the values of
concrete arguments only. The public names and the letters of the paper:

| name                                               | paper           | equation   |
|----------------------------------------------------|-----------------|------------|
| `mean`, `std`                                      | p or ∇L, σ      |            |
| `success_probability`                              | ρ               | (8)        |
| `sign_certainty`                                   | 2ρ-1            | (15)       |
| `expected_sign`                                    | (2ρ-1)sign(p)   | §1.4       |
| `optimal_factor`, `adam_factor`                    | γ               | (14), (6)  |
| `momentum_correction`                              | κ(μ,t)          | (19)       |
| `expected_sign_product`, `orthant_probability`     | E[s_i s_j], Φ₂  | §B.1       |
| `gaussian_direction`, `sign_direction`             | E[z], E[zzᵀ]    | §2.1       |
| `expected_loss_change`                             |                 | (10)       |
| `optimal_step_size`, `expected_improvement`        | α*, I(z)        | (11)       |
| `gradient_improvement`                             | I(g)            | (12), (20) |
| `sign_improvement_bound`                           |                 | (12), (13) |
| `quadratic_problem`                                | Q, x*, ν        | (9)        |
| `convergence_bound`                                | 1/(1/e₀+cT)     | Theorem 1  |
"""

from dissect_optax.theory._convergence import convergence_bound
from dissect_optax.theory._directions import (
    Direction,
    gaussian_direction,
    sign_direction,
)
from dissect_optax.theory._factors import (
    adam_factor,
    momentum_correction,
    optimal_factor,
)
from dissect_optax.theory._improvement import (
    expected_improvement,
    expected_loss_change,
    gradient_improvement,
    optimal_step_size,
    sign_improvement_bound,
)
from dissect_optax.theory._orthants import expected_sign_product, orthant_probability
from dissect_optax.theory._quadratics import (
    QuadraticProblem,
    partial_rotation,
    quadratic_problem,
    random_rotation,
)
from dissect_optax.theory._signs import (
    expected_sign,
    sign_certainty,
    success_probability,
)

# Sorted by meaning, not by alphabet.
__all__ = [  # noqa: RUF022
    # The sign of a stochastic gradient, §1.4,
    "success_probability",
    "sign_certainty",
    "expected_sign",
    # and of two at once.
    "expected_sign_product",
    "orthant_probability",
    # Optimal factors, §3.
    "optimal_factor",
    "adam_factor",
    "momentum_correction",
    # Stochastic quadratic problems, §2,
    "QuadraticProblem",
    "quadratic_problem",
    "random_rotation",
    "partial_rotation",
    # random directions,
    "Direction",
    "gaussian_direction",
    "sign_direction",
    # and what one step gains.
    "expected_loss_change",
    "optimal_step_size",
    "expected_improvement",
    "gradient_improvement",
    "sign_improvement_bound",
    # Theorem 1.
    "convergence_bound",
]
