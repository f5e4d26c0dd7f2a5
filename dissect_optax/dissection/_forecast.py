"""Forecasts of a race and how full training scored them.

A race trains every method for a part of the steps. It forecasts the sign of an effect
over all steps: that which the effect has over the race, where it is decided there.
"""

import dataclasses
from typing import Literal

from dissect_optax.dissection._effects import Effect

Score = Literal["right", "wrong", "no forecast", "not decidable"]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a race forecasts about one effect.

    Attributes:
      batch_size: Examples per mini-batch.
      column: "sign", "variance_adaptation", "interaction", or "adam − m_sgd".
      race: The effect over the race. Its interval holds the spread of seeds and of
        retuning within the race, not the difference between the race and the rest of
        training.
      race_steps: Steps of the race.
      steps: Steps that the forecast is about.
    """

    batch_size: int
    column: str
    race: Effect
    race_steps: int
    steps: int

    @property
    def direction(self) -> int:
        """−1 for a lower loss, 1 for a higher one, 0 where nothing is forecast."""
        if not self.race.decided:
            return 0
        return 1 if self.race.estimate > 0 else -1


@dataclasses.dataclass(frozen=True)
class ForecastScore:
    """A forecast beside the effect of full training.

    Attributes:
      forecast: The forecast.
      trained: The effect over all steps.
    """

    forecast: Forecast
    trained: Effect

    @property
    def score(self) -> Score:
        """Whether the forecast was right.

        "not decidable" where full training did not decide the effect either, "no
        forecast" where the race did not.
        """
        if not self.trained.decided:
            return "not decidable"
        if not self.forecast.direction:
            return "no forecast"
        same_sign = self.forecast.direction * self.trained.estimate > 0
        return "right" if same_sign else "wrong"

    @property
    def inside(self) -> bool:
        """Whether the trained effect lies in the interval of the race."""
        return (
            self.forecast.race.low <= self.trained.estimate <= self.forecast.race.high
        )
