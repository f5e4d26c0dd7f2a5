"""Published optimizers as direction × variance source × factor × order.

For every direction d and every v > 0,

    d/√v = sign(d) (1+η²)^(-1/2)      with η² = v/d² - 1,

so that Adam and most of what came after it are chains of the same few parts as in
Table 1 of "Dissecting Adam". They differ in the direction, in what takes the place of
the variance, in the factor, and in whether it acts before or after the momentum. The
identity alone says little: whether v/d² - 1 *estimates a relative variance* is said in
`MEMBERS`, and by each part. docs/family.md has the table.

`estimate` pairs a direction with a source of variance; `scale_by_sign` and
`adapt_to_variance` of `dissect_optax` go on from there:

    optax.chain(
        family.estimate(family.moving_average(0.9), family.second_moment(0.999)),
        do.scale_by_sign(),
        do.adapt_to_variance(do.inverse_sqrt),
        optax.scale_by_learning_rate(1e-3),
    )  # Adam

Three neighbours are not members (`NEIGHBOURS`): Sophia divides by a curvature, which is
not a variance; Muon puts another map in the place of the sign, the nearest orthogonal
matrix, which is not element-wise; IVON and VAdam have the variance of a posterior.
SVAG here is the paper's stochastic *variance-adapted* gradient. Li, Malladi & Arora
(2021) use the name for the stochastic *variance amplified* gradient, a simulation of
SDEs that has nothing to do with it.
"""

from dissect_optax.family._directions import (
    ExtrapolateState,
    InterpolateState,
    MixAveragesState,
    MovingAverageState,
    extrapolate,
    interpolate,
    mix_averages,
    moving_average,
    nesterov,
)
from dissect_optax.family._estimates import EstimateState, estimate
from dissect_optax.family._factors import bounded, reciprocal, signal_to_noise
from dissect_optax.family._members import MEMBERS, NEIGHBOURS, Member
from dissect_optax.family._optimizers import (
    acprop,
    adabelief,
    adam,
    adam_erf,
    adam_mini,
    adam_star_mb_before_momentum,
    adam_unbiased,
    adan,
    ademamix,
    adopt,
    amsgrad,
    cautious_adam,
    factored_rms,
    lion,
    m_svag_decorrelated,
    m_svag_maximum,
    m_svag_mb_before_momentum,
    m_svag_mb_reciprocal,
    nadam,
    novograd,
    rmsprop,
    sign_sgd,
    signum,
    vrgd,
    yogi,
)
from dissect_optax.family._sources import (
    CentredSecondMomentState,
    DecorrelatedState,
    FactoredSecondMomentState,
    MaximumState,
    Observation,
    SecondMomentState,
    Source,
    centred_second_moment,
    decorrelated,
    deviation_from_mean,
    deviation_from_previous_mean,
    extrapolated_gradient,
    factored_second_moment,
    layer_mean,
    layer_sum,
    maximum,
    second_moment,
    sign_controlled_second_moment,
)
from dissect_optax.family._updates import (
    AddDecayedWeightsState,
    ClipByScheduleState,
    HeavyBallState,
    add_decayed_weights,
    cautious,
    clip_by_schedule,
    heavy_ball,
)

# Sorted by meaning, not by alphabet: in the order in which a gradient meets them.
__all__ = [  # noqa: RUF022
    # The table.
    "Member",
    "MEMBERS",
    "NEIGHBOURS",
    # A direction,
    "moving_average",
    "nesterov",
    "interpolate",
    "mix_averages",
    "extrapolate",
    # a source of variance: a second moment
    "Source",
    "second_moment",
    "centred_second_moment",
    "sign_controlled_second_moment",
    "factored_second_moment",
    "maximum",
    "decorrelated",
    # of something observed, element by element or by blocks,
    "Observation",
    "deviation_from_mean",
    "deviation_from_previous_mean",
    "extrapolated_gradient",
    "layer_sum",
    "layer_mean",
    # and both together are an Estimate,
    "estimate",
    # adapted by a factor.
    "reciprocal",
    "bounded",
    "signal_to_noise",
    # Before or after the momentum, and the rest of an update.
    "heavy_ball",
    "clip_by_schedule",
    "cautious",
    "add_decayed_weights",
    # The states of these.
    "MovingAverageState",
    "InterpolateState",
    "MixAveragesState",
    "ExtrapolateState",
    "SecondMomentState",
    "CentredSecondMomentState",
    "FactoredSecondMomentState",
    "MaximumState",
    "DecorrelatedState",
    "EstimateState",
    "HeavyBallState",
    "ClipByScheduleState",
    "AddDecayedWeightsState",
    # Published optimizers,
    "adam",
    "nadam",
    "amsgrad",
    "yogi",
    "ademamix",
    "adan",
    "adabelief",
    "adam_mini",
    "rmsprop",
    "acprop",
    "factored_rms",
    "adopt",
    "novograd",
    "sign_sgd",
    "signum",
    "lion",
    "cautious_adam",
    "vrgd",
    # and cells of the table that nobody has published.
    "m_svag_mb_reciprocal",
    "m_svag_decorrelated",
    "m_svag_maximum",
    "m_svag_mb_before_momentum",
    "adam_star_mb_before_momentum",
    "adam_unbiased",
    "adam_erf",
]
