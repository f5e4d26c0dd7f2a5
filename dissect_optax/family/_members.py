"""The table: for each member its cell, its buffers, and what it estimates."""

import dataclasses
from collections.abc import Callable

import optax

from dissect_optax import _optimizers as paper
from dissect_optax.family import _optimizers as published

Factory = Callable[
    [optax.ScalarOrSchedule],
    optax.GradientTransformation | optax.GradientTransformationExtraArgs,
]


@dataclasses.dataclass(frozen=True)
class Member:
    """One row of the table.

    Attributes:
      name: Its name, the key in `MEMBERS`.
      factory: From a learning rate to the optimizer, with its defaults otherwise.
      direction: The direction d.
      source: The variance s, or what stands in its place; "" if there is none.
      factor: The factor γ of η² = s/d²; "1" if there is none.
      order: "after momentum" if the factor acts on a momentum, "before momentum" if the
        momentum is one of adapted gradients, "no momentum".
      buffers: The number of buffers of the size of the parameters in its state.
      estimates: The relative variance that η² estimates, and its bias; "" if η² does
        not estimate one.
      reference: Where it is published; for a cell that nobody has published, where
        the nearest one is.
      optax: The name of its namesake in Optax, with "contrib." in front where it is
        there; "" if there is none.
      is_published: Whether somebody has published it.
      needs_variance: Whether `update` needs the extra argument `grad_variance`.
    """

    name: str
    factory: Factory
    direction: str
    source: str
    factor: str
    order: str
    buffers: int
    estimates: str
    reference: str
    optax: str = ""
    is_published: bool = True
    needs_variance: bool = False


AFTER, BEFORE, NONE = "after momentum", "before momentum", "no momentum"
_ADAM = "Kingma & Ba, ICLR 2015"
_DISSECTING = "Balles & Hennig, ICML 2018"
_OF_GRADIENT = "of the gradient, too small by 1-κ(β,t)"

_ROWS = (
    # Without a variance.
    Member("sgd", paper.sgd, "g", "", "1", NONE, 0, "", "Robbins & Monro, 1951", "sgd"),
    Member(
        "m_sgd", paper.m_sgd, "Σ μ^k g", "", "1", AFTER, 1, "", "Polyak, 1964", "sgd"
    ),
    Member(
        "sign_sgd",
        published.sign_sgd,
        "sign g",
        "",
        "1",
        NONE,
        0,
        "",
        "Bernstein et al., ICML 2018",
        "sign_sgd",
    ),
    Member(
        "signum",
        published.signum,
        "sign m",
        "",
        "1",
        AFTER,
        1,
        "",
        "Bernstein et al., ICML 2018",
        "signum",
    ),
    Member(
        "lion",
        published.lion,
        "sign(β1 m₋ + (1-β1) g)",
        "",
        "1",
        AFTER,
        1,
        "",
        "Chen et al., NeurIPS 2023",
        "lion",
    ),
    # A second moment about zero.
    Member(
        "adam",
        published.adam,
        "sign m",
        "v - m², two decays",
        "(1+η²)^(-1/2)",
        AFTER,
        2,
        f"{_OF_GRADIENT}; off either way under drift, since β1 ≠ β2",
        _ADAM,
        "adam",
    ),
    Member(
        "adam_equal_decays",
        lambda learning_rate: published.adam(learning_rate, b1=0.95, b2=0.95),
        "sign m",
        "v - m², one decay",
        "(1+η²)^(-1/2)",
        AFTER,
        2,
        _OF_GRADIENT,
        "Orvieto & Gower, 2025",
        "adam",
    ),
    Member(
        "nadam",
        published.nadam,
        "sign of the Nesterov m",
        "v - d², two decays",
        "(1+η²)^(-1/2)",
        AFTER,
        2,
        "of the gradient, too small by 1-Σw² of the direction's weights",
        "Dozat, ICLR workshop 2016",
        "nadam",
    ),
    Member(
        "amsgrad",
        published.amsgrad,
        "sign m",
        "max v - m²",
        "(1+η²)^(-1/2)",
        AFTER,
        3,
        "",
        "Reddi et al., ICLR 2018",
        "amsgrad",
    ),
    Member(
        "yogi",
        published.yogi,
        "sign m",
        "sign-controlled v - m²",
        "(1+η²)^(-1/2)",
        AFTER,
        2,
        "",
        "Zaheer et al., NeurIPS 2018",
        "yogi",
    ),
    Member(
        "ademamix",
        published.ademamix,
        "sign(m₁ + α m₂)",
        "v - d²",
        "(1+η²)^(-1/2)",
        AFTER,
        3,
        "",
        "Pagliardini et al., ICLR 2025",
        "contrib.ademamix",
    ),
    Member(
        "adan",
        published.adan,
        "sign(m + b EMA(Δ))",
        "v of g+bΔ, minus d²",
        "(1+η²)^(-1/2)",
        AFTER,
        4,
        "of g+bΔ, nearly; too small as Adam's",
        "Xie et al., TPAMI 2024",
        "adan",
    ),
    Member(
        "rmsprop",
        published.rmsprop,
        "sign g",
        "v - g²",
        "(1+η²)^(-1/2)",
        NONE,
        1,
        "",
        "Tieleman & Hinton, 2012",
        "rmsprop",
    ),
    Member(
        "factored_rms",
        published.factored_rms,
        "sign g",
        "rank-one v - g²",
        "(1+η²)^(-1/2)",
        NONE,
        0,
        "",
        "Shazeer & Stern, ICML 2018",
    ),
    Member(
        "adam_mini",
        published.adam_mini,
        "sign m",
        "block mean of v, minus m²",
        "(1+η²)^(-1/2)",
        AFTER,
        1,
        "of a block, not of an element",
        "Zhang et al., ICLR 2025",
    ),
    Member(
        "novograd",
        published.novograd,
        "sign g",
        "v of ‖g‖², minus g²",
        "(1+η²)^(-1/2)",
        BEFORE,
        1,
        "",
        "Ginsburg et al., 2019",
        "novograd",
    ),
    Member(
        "adopt",
        published.adopt,
        "sign g",
        "v₋ - g², one step old",
        "(1+η²)^(-1/2)",
        BEFORE,
        2,
        "",
        "Taniguchi et al., NeurIPS 2024",
        "contrib.adopt",
    ),
    # A variance.
    Member(
        "adabelief",
        published.adabelief,
        "sign m",
        "EMA of (g-m)²",
        "η⁻¹",
        AFTER,
        2,
        "of the gradient, too small by 2β1²/(1+β1)",
        "Zhuang et al., NeurIPS 2020",
        "adabelief",
    ),
    Member(
        "rmsprop_centered",
        lambda learning_rate: published.rmsprop(learning_rate, centered=True),
        "sign g",
        "v - m², one decay",
        "η⁻¹",
        NONE,
        2,
        f"{_OF_GRADIENT}; the zero it starts with counts as a gradient",
        "Graves, 2013",
        "rmsprop",
    ),
    Member(
        "acprop",
        published.acprop,
        "sign g",
        "EMA of (g-m₋)², one step old",
        "η⁻¹",
        NONE,
        2,
        "of the gradient, too large by 2/(1+β1), independent of g",
        "Zhuang et al., NeurIPS 2021",
        "contrib.acprop",
    ),
    Member(
        "m_svag",
        paper.m_svag,
        "m",
        "κ (v - m²), one decay",
        "1/(1+η²)",
        AFTER,
        2,
        "of the momentum, too small by 1-κ(μ,t)",
        _DISSECTING,
    ),
    Member(
        "adam_star",
        paper.adam_star,
        "sign m",
        "κ (v - m²), one decay",
        "(1+η²)^(-1/2)",
        AFTER,
        2,
        "of the momentum, too small by 1-κ(μ,t)",
        _DISSECTING,
    ),
    # The variance of the mini-batch.
    Member(
        "m_svag_mb",
        paper.m_svag_mb,
        "Σ μ^k g",
        "Σ μ^2k ŝ, mini-batch",
        "1/(1+η²)",
        AFTER,
        2,
        "of the momentum, unbiased",
        _DISSECTING,
        needs_variance=True,
    ),
    Member(
        "adam_star_mb",
        paper.adam_star_mb,
        "sign Σ μ^k g",
        "Σ μ^2k ŝ, mini-batch",
        "(1+η²)^(-1/2)",
        AFTER,
        2,
        "of the momentum, unbiased",
        _DISSECTING,
        needs_variance=True,
    ),
    Member(
        "vrgd",
        published.vrgd,
        "g",
        "ŝ, mini-batch",
        "clip(η⁻²/mean, 0.1, 1)",
        NONE,
        0,
        "of the gradient, unbiased",
        "Jiang et al., 2023",
        needs_variance=True,
    ),
    # Another factor.
    Member(
        "cautious_adam",
        published.cautious_adam,
        "sign m",
        "v - m², two decays",
        "(1+η²)^(-1/2) · 1[m·g>0]/mean",
        AFTER,
        2,
        f"{_OF_GRADIENT}; the mask tests its sign by one sample",
        "Liang et al., 2024",
    ),
    # Nobody's.
    Member(
        "m_svag_mb_reciprocal",
        published.m_svag_mb_reciprocal,
        "Σ μ^k g",
        "Σ μ^2k ŝ, mini-batch",
        "min(η⁻¹, 10)",
        AFTER,
        2,
        "of the momentum, unbiased",
        _DISSECTING,
        is_published=False,
        needs_variance=True,
    ),
    Member(
        "m_svag_decorrelated",
        published.m_svag_decorrelated,
        "m",
        "κ EMA of (g-m₋)², one step old",
        "1/(1+η²)",
        AFTER,
        2,
        "of the momentum, too large by 2/(1+μ), independent of g",
        _DISSECTING,
        is_published=False,
    ),
    Member(
        "m_svag_maximum",
        published.m_svag_maximum,
        "m",
        "κ max EMA of (g-m₋)²",
        "1/(1+η²)",
        AFTER,
        3,
        "",
        _DISSECTING,
        is_published=False,
    ),
    Member(
        "m_svag_mb_before_momentum",
        published.m_svag_mb_before_momentum,
        "g",
        "ŝ, mini-batch",
        "1/(1+η²)",
        BEFORE,
        1,
        "of the gradient, unbiased",
        _DISSECTING,
        is_published=False,
        needs_variance=True,
    ),
    Member(
        "adam_star_mb_before_momentum",
        published.adam_star_mb_before_momentum,
        "sign g",
        "ŝ, mini-batch",
        "(1+η²)^(-1/2)",
        BEFORE,
        1,
        "of the gradient, unbiased",
        _DISSECTING,
        is_published=False,
        needs_variance=True,
    ),
    Member(
        "adam_unbiased",
        published.adam_unbiased,
        "sign m",
        "(v - m²)/(1-κ), one decay",
        "(1+η²)^(-1/2)",
        AFTER,
        2,
        "of the gradient, unbiased",
        _ADAM,
        is_published=False,
    ),
    Member(
        "adam_erf",
        published.adam_erf,
        "sign m",
        "v - m², two decays",
        "erf(1/(√2 η))",
        AFTER,
        2,
        f"{_OF_GRADIENT}; off either way under drift, since β1 ≠ β2",
        _ADAM,
        is_published=False,
    ),
)

MEMBERS: dict[str, Member] = {member.name: member for member in _ROWS}
"""Every member of the family, published or not, by its name."""

NEIGHBOURS: dict[str, str] = {
    "sophia": (
        "sign m by min(1, |m|/(γh)) with a curvature h: a factor, but not of a "
        "relative variance. optax.contrib.sophia"
    ),
    "muon": (
        "the nearest orthogonal matrix to m: another map in the place of the sign, "
        "which is not element-wise. optax.contrib.muon"
    ),
    "ivon": (
        "IVON and VAdam: the variance is that of a posterior over the parameters, from "
        "which they sample, not of the gradient."
    ),
}
"""Well-known optimizers that are not members, each with the reason."""
