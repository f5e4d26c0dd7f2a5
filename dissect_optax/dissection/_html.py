"""The report as HTML: one file without scripts that opens without network.

It holds aggregates only: tables, sentences and pictures, no losses of single runs.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2

from dissect_optax.dissection._effects import Effect, Effects
from dissect_optax.dissection._pictures import pictures
from dissect_optax.dissection._rows import MeasurementRow, is_interval, number
from dissect_optax.dissection._verdict import (
    anchor,
    effect_numbers,
    plain,
)

if TYPE_CHECKING:
    from dissect_optax.dissection._result import Dissection

_TEMPLATE = "_report.html.j2"
_LONGEST_VALUE = 300  # Characters of an entry about the environment.

# Where the sentences go, by the table behind them.
_GROUPS = {
    "effects": ("effects", "comparisons", "crossovers", "methods"),
    "forecasts": ("forecasts",),
    "secondary": ("secondary",),
    "measurements": ("measurements",),
}
_NAMES = {
    "sign": "sign",
    "variance_adaptation": "variance adaptation",
    "interaction": "interaction",
    "log_final_loss": "log of the final loss",
}


def render(result: "Dissection", *, fragment: bool) -> str:
    """The report of a result.

    Args:
      result: The result.
      fragment: Whether to return an element for a notebook instead of a whole page.

    Returns:
      HTML.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tied"] = _tied
    source = resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    # Several results in one notebook must not share ids.
    prefix = "d" + hashlib.sha256(result.to_json().encode()).hexdigest()[:6]
    return environment.from_string(source).render(
        fragment=fragment, **_context(result, prefix)
    )


def _tied(text: str) -> str:
    """The text with no line break inside "95 %" and "n = 5"."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace(
        " = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    )


def _context(result: "Dissection", prefix: str) -> dict[str, Any]:
    """Everything that the template shows, as text."""
    race = result.setup.budget == "race"
    by_batch_size = result.race_effects if race else result.headline_effects
    drawn = pictures(result, prefix)
    return {
        "prefix": prefix,
        "title": result.setup.title,
        "subtitle": result.title_line.removeprefix(f"{result.setup.title}: "),
        "race": race,
        "verdict": _verdict(result, prefix),
        "scope": result.scope,
        "warnings": [(w.name, w.sentence) for w in result.warnings],
        "pictures": {
            section: [picture for picture in drawn if picture.section == section]
            for section in ("effects", "curves", "step_sizes", "measurements")
        },
        "effects": _effect_rows(by_batch_size, prefix, "race" if race else "effects"),
        "comparisons": _comparison_rows(
            by_batch_size,
            prefix,
            "race-comparisons" if race else "comparisons",
            result.setup.methods,
        ),
        "crossovers": _crossover_rows(result, prefix),
        "forecasts": _forecast_rows(result, prefix),
        "secondary": _secondary_rows(result, prefix),
        "methods": _method_rows(result, prefix),
        "measurements": _measurement_table(result, prefix),
        "setup": _setup_rows(result),
    }


def _id(prefix: str, **cell: Any) -> str:
    return f"{prefix}-{anchor(cell)}"


def _verdict(result: "Dissection", prefix: str) -> dict[str, list[dict[str, str]]]:
    """Groups of sentences with links to the cells behind them."""
    return {
        group: [
            {"text": reading.text, "href": f"#{prefix}-{anchor(reading.evidence)}"}
            for reading in result.verdict
            if reading.evidence["table"] in tables
        ]
        for group, tables in _GROUPS.items()
    }


def _effect_cell(effect: Effect, identity: str) -> dict[str, Any]:
    """An effect as text in a cell."""
    estimate, low, high = effect_numbers(effect)
    bounded = math.isfinite(effect.half_width)
    return {
        "id": identity,
        "estimate": estimate,
        "interval": f"{low} to {high}" if bounded else "unbounded",
        "pairs": effect.pairs,
        "diverged": effect.diverged,
        "decided": effect.decided,
    }


def _effect_rows(
    by_batch_size: Mapping[int, Effects], prefix: str, table: str
) -> list[dict[str, Any]]:
    """The three effects, one row per batch size."""
    return [
        {
            "batch_size": f"{size:,}",
            "cells": [
                _effect_cell(
                    effect, _id(prefix, table=table, batch_size=size, column=name)
                )
                for name, effect in row.effects.items()
            ],
        }
        for size, row in by_batch_size.items()
        if row.effects
    ]


def _comparison_rows(
    by_batch_size: Mapping[int, Effects],
    prefix: str,
    table: str,
    labels: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Two methods against each other, one row per pair and batch size."""
    return [
        {
            "batch_size": f"{size:,}",
            "names": " − ".join(
                labels.get(name, name)
                for name in (comparison.method, comparison.reference)
            ),
            "cell": _effect_cell(
                comparison.effect,
                _id(prefix, table=table, batch_size=size, column=name),
            ),
        }
        for size, row in by_batch_size.items()
        for name, comparison in row.comparisons.items()
    ]


def _crossover_rows(result: "Dissection", prefix: str) -> list[dict[str, Any]]:
    """Batch sizes between which an effect changes its sign."""
    return [
        {
            "id": _id(
                prefix, table="crossovers", column=crossover.column, when=crossover.low
            ),
            "column": _column_name(crossover.column, result.setup.methods),
            "low": f"{crossover.low:,}",
            "high": f"{crossover.high:,}",
            "estimate": plain(crossover.estimate),
        }
        for crossover in result.crossovers
    ]


def _column_name(column: str, labels: Mapping[str, str]) -> str:
    parts = column.split(" − ")
    return _NAMES.get(column) or " − ".join(labels.get(name, name) for name in parts)


def _forecast_rows(result: "Dissection", prefix: str) -> list[dict[str, Any]]:
    """Forecasts, and where there are trained effects, the scores."""
    rows = []
    for size, forecasts in result.forecast.items():
        for column, forecast in forecasts.items():
            cell = {"table": "forecasts", "batch_size": size}
            score = result.forecast_score.get(size, {}).get(column)
            rows.append(
                {
                    "batch_size": f"{size:,}",
                    "column": _column_name(column, result.setup.methods),
                    "race": _effect_cell(
                        forecast.race, _id(prefix, **cell, column=column)
                    ),
                    "forecast": {-1: "lower loss", 0: "none", 1: "higher loss"}[
                        forecast.direction
                    ],
                    "trained": _effect_cell(
                        score.trained, _id(prefix, **cell, column=f"{column} score")
                    )
                    if score
                    else None,
                    "score": score.score if score else "–",
                    "race_steps": f"{forecast.race_steps:,}",
                    "steps": f"{forecast.steps:,}",
                }
            )
    return rows


def _secondary_rows(result: "Dissection", prefix: str) -> list[dict[str, Any]]:
    """Effects on the final loss and the metrics."""
    return [
        {
            "quantity": _NAMES.get(quantity, quantity),
            "batch_size": f"{size:,}",
            "cells": [
                _effect_cell(
                    effect,
                    _id(
                        prefix,
                        table="secondary",
                        quantity=quantity,
                        batch_size=size,
                        column=name,
                    ),
                )
                for name, effect in row.effects.items()
            ],
        }
        for quantity, by_batch_size in result.secondary.items()
        for size, row in by_batch_size.items()
        if row.effects
    ]


def _method_rows(result: "Dissection", prefix: str) -> dict[str, Any]:
    """Step sizes and outcomes of every method."""
    from dissect_optax.dissection._result import mean_with_std

    names = list(dict.fromkeys(name for row in result.summaries for name in row.values))
    return {
        "columns": [
            {"log_loss": "mean log loss", "log_final_loss": "log final loss"}.get(
                name, name
            )
            for name in names
        ],
        "rows": [
            {
                "id": _id(
                    prefix,
                    table="methods",
                    batch_size=row.batch_size,
                    method=row.method,
                    column="diverged",
                ),
                "batch_size": f"{row.batch_size:,}",
                "label": row.label,
                "learning_rate": plain(row.learning_rate),
                "largest_stable": row.largest_stable_text,
                "values": [mean_with_std(row.values.get(name)) for name in names],
                "diverged": f"{row.diverged} of {row.runs}",
                "race_cost": plain(row.race_cost),
                "full_cost": plain(row.full_cost),
            }
            for row in result.summaries
        ],
    }


def _intervals(row: MeasurementRow) -> dict[str, Mapping[str, Any]]:
    """The intervals of a measurement, and those of its directions, by dotted name."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, entry in row.diagnostics.items():
        if is_interval(entry):
            found[name] = entry
        # Layers have the same quantities again, too many for a page.
        elif isinstance(entry, Mapping) and name not in ("layers", "parameters"):
            for inner, value in entry.items():
                if is_interval(value):
                    found[f"{name}.{inner}"] = value
    return found


def _measurement_table(result: "Dissection", prefix: str) -> dict[str, Any]:
    """Measured quantities, one row per measurement."""
    intervals = [_intervals(row) for row in result.measurements]
    names = list(dict.fromkeys(name for row in intervals for name in row))
    rows = []
    for row, found in zip(result.measurements, intervals, strict=True):
        cell = {
            "table": "measurements",
            "batch_size": row.batch_size,
            "method": row.method,
            "when": row.when,
        }
        rows.append(
            {
                "batch_size": f"{row.batch_size:,}",
                "label": result.setup.methods.get(row.method, row.method),
                "when": row.when,
                "step": f"{row.step:,}",
                "cells": [
                    {
                        "id": _id(prefix, **cell, column=name),
                        "value": plain(number(found[name]["value"])),
                        "interval": _interval_text(found[name]),
                    }
                    if name in found
                    else None
                    for name in names
                ],
            }
        )
    return {"columns": names, "rows": rows}


def _interval_text(entry: Mapping[str, Any]) -> str:
    low, high = number(entry["low"]), number(entry["high"])
    if math.isfinite(low) and math.isfinite(high):
        return f"{plain(low)} to {plain(high)}"
    return "unbounded"


def _setup_rows(result: "Dissection") -> list[tuple[str, str]]:
    """Settings and environment."""
    setup = result.setup
    entries: Iterable[tuple[str, Any]] = [
        ("steps", f"{setup.steps:,}"),
        ("batch sizes", ", ".join(f"{size:,}" for size in setup.batch_sizes)),
        ("seeds", setup.seeds),
        ("schedule", setup.schedule),
        *setup.decays.items(),
        ("regularizer", "yes" if setup.regularizer else "no"),
        ("examples", f"{setup.examples:,}"),
        ("parameters", f"{setup.parameters:,}"),
        ("fingerprint of the data", setup.data),
        ("budget", setup.budget),
        ("time", f"{setup.seconds:,.0f} s" if math.isfinite(setup.seconds) else "–"),
        *setup.environment.items(),
    ]
    return [(name, _shortened(str(value))) for name, value in entries]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
