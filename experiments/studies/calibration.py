"""Does a race, or the improvement of one step, forecast which method trains better?

Every setting is dissected: a race of a tenth of the steps, then training to the end.
The race forecasts the effects of the sign and of the variance adaptation, and so does
the improvement I of Eq. (11), measured before the first step. Both are held against
the trained effects, failures included.

    runs/calibration/digits_64_8.json      one setting at one batch size
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dissect_optax.dissection import (
    FOUR_METHODS,
    Dissection,
    Monitor,
    UserError,
    dissect_problem,
    get_method,
    read_checked,
    share_interval,
    write_checked,
)
from experiments.studies.calibration_settings import SETTINGS, Setting

EFFECTS = ("sign", "variance_adaptation")
# The directions whose improvements are compared: with the aspect, and without it.
_COMPARED = {
    "sign": (("sign", "gradient"), ("adapted_sign", "adapted_gradient")),
    "variance_adaptation": (("adapted_gradient", "gradient"), ("adapted_sign", "sign")),
}


def one_step_effect(improvement: Mapping[str, Any], effect: str) -> float:
    """Log ratio of improvements without and with an aspect; negative is better.

    Args:
      improvement: `Diagnostics.to_dict()["improvement"]`.
      effect: One of `EFFECTS`.

    Returns:
      The mean over both pairs of directions; NaN where an improvement is not positive.

    Examples:
      >>> values = {"gradient": 1.0, "sign": 2.0, "adapted_gradient": 1.0,
      ...           "adapted_sign": 2.0}
      >>> nested = {name: {"value": value} for name, value in values.items()}
      >>> round(one_step_effect(nested, "sign"), 3)
      -0.693
    """
    logs = []
    for with_aspect, without in _COMPARED[effect]:
        # JSON has strings for numbers that are not finite.
        values = [float(improvement[name]["value"]) for name in (with_aspect, without)]
        if not all(0 < value < math.inf for value in values):
            return math.nan
        logs.append(math.log(values[1] / values[0]))
    return sum(logs) / len(logs)


def _rows_of(name: str, batch_size: int, result: Dissection) -> list[dict[str, Any]]:
    """One row per effect."""
    rows = []
    start = next((row for row in result.measurements if row.when == "start"), None)
    for effect in EFFECTS:
        score = result.forecast_score[batch_size][effect]
        race, trained = score.forecast.race, score.trained
        one_step = math.nan
        if start is not None:
            one_step = one_step_effect(start.diagnostics["improvement"], effect)
        rows.append(
            {
                "setting": name,
                "batch_size": batch_size,
                "effect": effect,
                "race": dataclasses.asdict(race),
                "race_decided": race.decided,
                "trained": dataclasses.asdict(trained),
                "trained_decided": trained.decided,
                "one_step": one_step,
            }
        )
    return rows


def _dissect(
    setting: Setting, batch_size: int, runs_dir: Path, seeds: int, monitor: Monitor
) -> dict[str, Any]:
    """The content of the file of one setting at one batch size."""
    try:
        result = dissect_problem(
            setting.make(),
            [get_method(name) for name in FOUR_METHODS],
            [batch_size],
            seeds=seeds,
            level="normal",
            directory=runs_dir / "runs",
            monitor=monitor,
        )
        rows = _rows_of(setting.name, batch_size, result)
    except (UserError, KeyError) as error:
        return {"failure": str(error), "rows": []}
    return {
        "failure": None,
        "environment": dict(result.setup.environment),
        "seconds": result.setup.seconds,
        "race_fraction": (result.setup.race_steps or 0) / result.setup.steps,
        "race_cost": {t.method: t.race_cost for t in result.tunings},
        "tuning_cost": {t.method: t.full_cost for t in result.tunings},
        "rows": rows,
    }


def calibrate(
    names: Sequence[str], runs_dir: Path, seeds: int, monitor: Monitor
) -> dict[str, Any]:
    """Dissects the settings that are not finished; returns the summary of all.

    Args:
      names: Names of settings.
      runs_dir: Directory of the study.
      seeds: Replications of every method.
      monitor: Where progress is shown.

    Returns:
      Rows, failures and scores, as a JSON object.
    """
    for name in names:
        setting = SETTINGS[name]
        for batch_size in setting.batch_sizes:
            path = runs_dir / f"{name}_{batch_size}.json"
            if not path.exists():
                monitor.say(f"{name}, batch size {batch_size}")
                content = _dissect(setting, batch_size, runs_dir, seeds, monitor)
                write_checked(path, json.loads(json.dumps(content, default=str)))
    return summary(
        {
            f"{name}, {size}": read_checked(runs_dir / f"{name}_{size}.json")
            for name in names
            for size in SETTINGS[name].batch_sizes
        }
    )


# ---- Scores -----------------------------------------------------------------------


def _share(outcomes: Iterable[bool]) -> dict[str, Any]:
    """How many are right, with a 95 % interval of the share."""
    found = list(outcomes)
    low, high = share_interval(sum(found), len(found)) if found else (0.0, 1.0)
    return {"right": sum(found), "of": len(found), "low": low, "high": high}


def scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often each forecast has the sign of the trained effect, where there is one.

    Args:
      rows: Rows of the study.

    Returns:
      Shares by effect and forecast: of the race where it decides, of the race by its
      estimate alone, of the improvement of one step, and of "the aspect always helps".
    """
    found: dict[str, Any] = {}
    for effect in (*EFFECTS, "both"):
        decided = [
            row
            for row in rows
            if row["trained_decided"] and effect in (row["effect"], "both")
        ]
        truth = [row["trained"]["estimate"] < 0 for row in decided]

        def agreement(
            forecasts: Iterable[float | None], truth: list[bool] = truth
        ) -> dict[str, Any]:
            return _share(
                (forecast < 0) == better
                for forecast, better in zip(forecasts, truth, strict=True)
                if forecast is not None and math.isfinite(forecast)
            )

        found[effect] = {
            "decidable": len(decided),
            "race, where decided": agreement(
                row["race"]["estimate"] if row["race_decided"] else None
                for row in decided
            ),
            "race, by its estimate": agreement(
                row["race"]["estimate"] for row in decided
            ),
            "one step": agreement(row["one_step"] for row in decided),
            "always better": agreement(-1.0 for _ in decided),
        }
    return found


def summary(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rows, failures and scores of the files of a study."""
    rows = [row for content in contents.values() for row in content["rows"]]
    return {
        "environment": next(
            (c["environment"] for c in contents.values() if "environment" in c), {}
        ),
        "settings": len(contents),
        "failures": {
            name: content["failure"]
            for name, content in contents.items()
            if content["failure"]
        },
        # In units of one full run: the race, and the full runs that followed it.
        **{
            cost: {
                name: content[cost]
                for name, content in contents.items()
                if cost in content
            }
            for cost in ("race_cost", "tuning_cost")
        },
        "scores": scores(rows),
        "rows": rows,
    }


def score_table(found: Mapping[str, Any]) -> Table:
    """The scores as Markdown."""
    table = Table(box=box.MARKDOWN)
    table.add_column("forecast")
    for effect in (*EFFECTS, "both"):
        table.add_column(effect.replace("_", " "), justify="right")
    names = [name for name in found["both"] if name != "decidable"]
    for name in names:
        cells = (found[effect][name] for effect in (*EFFECTS, "both"))
        table.add_row(
            name,
            *(
                f"{cell['right']} of {cell['of']}"
                f" ({100 * cell['low']:.0f} to {100 * cell['high']:.0f} %)"
                for cell in cells
            ),
        )
    return table
