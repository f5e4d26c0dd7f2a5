"""The map of the family: members and empty cells trained with equal budgets.

Every member is dissected beside ADAM: a race over the step sizes, full runs around the
best ones, replications with equal seeds. A row is a cell of the table in
docs/family.md with what it changes against ADAM.
"""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from dissect_optax.dissection import Dissection, Method, get_method
from dissect_optax.family import MEMBERS

REFERENCE = "adam"
_PREFIX = "family."


def methods_of(names: Sequence[str]) -> list[Method]:
    """ADAM, which all are compared with, and members of the family by name."""
    others = [name for name in names if name != REFERENCE]
    return [
        get_method(REFERENCE),
        *(get_method(_PREFIX + name) for name in others),
    ]


def rows_of(result: Dissection) -> list[dict[str, Any]]:
    """One row per member, in the order of the family's table.

    Args:
      result: A dissection of `methods_of` at one batch size.

    Returns:
      Cell, number of buffers, outcome and its difference to ADAM, as JSON objects; a
      member without a stable step size has NaN.
    """
    (batch_size,) = result.setup.batch_sizes
    comparisons = result.comparisons.get(batch_size, {})
    by_method = {summary.method: summary for summary in result.summaries}
    rows = []
    for name, member in MEMBERS.items():
        method = name if name == REFERENCE else _PREFIX + name
        if method not in by_method:
            continue
        summary = by_method[method]
        row: dict[str, Any] = {
            "member": name,
            "direction": member.direction,
            "source": member.source,
            "factor": member.factor,
            "order": member.order,
            "buffers": member.buffers,
            "published": member.is_published,
            "step_size": summary.learning_rate,
            "runs": summary.runs,
            "diverged": summary.diverged,
            **{
                quantity: summary.values.get(quantity, (math.nan, math.nan))[0]
                for quantity in ("log_loss", "log_final_loss", "test_accuracy")
            },
        }
        for comparison in comparisons.values():
            if comparison.method == method and comparison.reference == REFERENCE:
                effect = comparison.effect
                row["difference"] = {
                    "estimate": effect.estimate,
                    "low": effect.low,
                    "high": effect.high,
                    "pairs": effect.pairs,
                    "decided": effect.decided,
                }
        rows.append(row)
    return rows


def _difference_text(row: dict[str, Any]) -> str:
    """The difference to ADAM with its interval."""
    if "difference" not in row:
        return "–"
    found = row["difference"]
    mark = "" if found["decided"] else " (not decided)"
    interval = f"{found['low']:+.2f} to {found['high']:+.2f}"
    return f"{found['estimate']:+.2f} ({interval}){mark}"


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The map as Markdown, ordered by cell."""
    table = Table(box=box.MARKDOWN)
    for column in ("member", "direction", "source", "factor", "order"):
        table.add_column(column, no_wrap=True)
    for column in ("buffers", "log loss", "difference to ADAM", "test accuracy"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        name = row["member"] if row["published"] else f"{row['member']} (new)"
        accuracy = row["test_accuracy"]
        table.add_row(
            name,
            row["direction"],
            row["source"] or "–",
            row["factor"],
            row["order"],
            str(row["buffers"]),
            f"{row['log_loss']:.2f}",
            _difference_text(row),
            "–" if math.isnan(accuracy) else f"{100 * accuracy:.1f} %",
        )
    return table


def reading_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which unpublished cells train better than ADAM, by the number of buffers.

    Args:
      rows: The map.

    Returns:
      One sentence per number of buffers.
    """
    sentences = []
    for buffers in sorted({row["buffers"] for row in rows if row["buffers"]}):
        better = [
            f"{row['member']} ({_difference_text(row)})"
            for row in rows
            if row["buffers"] == buffers
            and not row["published"]
            and "difference" in row
            and row["difference"]["decided"]
            and row["difference"]["estimate"] < 0
        ]
        found = ", ".join(better) if better else "no unpublished cell"
        noun = "buffer" if buffers == 1 else "buffers"
        sentences.append(f"With {buffers} {noun}, better than ADAM: {found}.")
    return sentences
