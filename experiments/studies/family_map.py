"""The map of the family: members and empty cells trained with equal budgets.

Every member is dissected beside ADAM: a race over the step sizes, full runs around the
best ones, replications with equal seeds. A row is a cell of the table in
docs/family.md with what it changes against ADAM.
"""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from dissect_optax.dissection import Dissection, Effect, Method, get_method
from dissect_optax.family import MEMBERS

REFERENCE = "adam"
_PREFIX = "family."

# One part exchanged and the others kept: the axis, what is exchanged, and the members
# before and after. Where the sign comes in, Adam's factor takes the place of SVAG's.
CHANGES = (
    ("direction", "g → sign g", "sgd", "sign_sgd"),
    ("direction", "m → sign m", "m_sgd", "signum"),
    ("direction", "m → sign m, adapted", "m_svag", "adam_star"),
    ("direction", "sign m → sign of β1 m₋ + (1-β1) g", "signum", "lion"),
    ("direction", "sign m → sign of the Nesterov m", "adam", "nadam"),
    ("direction", "sign m → sign(m₁ + α m₂)", "adam", "ademamix"),
    ("source", "v - m²: two decays → one", "adam", "adam_equal_decays"),
    ("source", "v - m² → (v - m²)/(1-κ)", "adam_equal_decays", "adam_unbiased"),
    (
        "source",
        "of the gradient → of the momentum, κ",
        "adam_equal_decays",
        "adam_star",
    ),
    ("source", "v → max v", "adam", "amsgrad"),
    ("source", "v → sign-controlled v", "adam", "yogi"),
    ("source", "v → block mean of v", "adam", "adam_mini"),
    ("source", "κ (v - m²) → mini-batch, sign", "adam_star", "adam_star_mb"),
    ("source", "κ (v - m²) → mini-batch", "m_svag", "m_svag_mb"),
    ("source", "v - m² → one step old", "m_svag", "m_svag_decorrelated"),
    ("source", "v - m² → largest so far", "m_svag", "m_svag_maximum"),
    ("factor", "sign m: 1 → (1+η²)^(-1/2)", "signum", "adam"),
    ("factor", "m: 1 → 1/(1+η²)", "m_sgd", "m_svag"),
    ("factor", "(1+η²)^(-1/2) → erf(1/(√2 η))", "adam", "adam_erf"),
    ("factor", "(1+η²)^(-1/2) → η⁻¹", "adam", "adabelief"),
    ("factor", "(1+η²)^(-1/2) → with the cautious mask", "adam", "cautious_adam"),
    ("factor", "1/(1+η²) → min(η⁻¹, 10)", "m_svag_mb", "m_svag_mb_reciprocal"),
    ("order", "after → before momentum", "m_svag_mb", "m_svag_mb_before_momentum"),
    (
        "order",
        "after → before momentum, sign",
        "adam_star_mb",
        "adam_star_mb_before_momentum",
    ),
)


def methods_of(names: Sequence[str]) -> list[Method]:
    """ADAM, which all are compared with, and members of the family by name."""
    others = [name for name in names if name != REFERENCE]
    return [get_method(_method_name(name)) for name in (REFERENCE, *others)]


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
        method = _method_name(name)
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
                row["difference"] = _as_json(comparison.effect)
        rows.append(row)
    return rows


def changes_of(result: Dissection) -> list[dict[str, Any]]:
    """What one part exchanged changes, for each of `CHANGES` that was trained.

    Args:
      result: A dissection of `methods_of` at one batch size.

    Returns:
      Axis, what is exchanged, both members, and the outcome after minus before.
    """
    trained = {run.method for run in result.runs if run.role == "replicate"}
    return [
        {
            "axis": axis,
            "change": change,
            "before": before,
            "after": after,
            "difference": _as_json(
                result.compare(_method_name(after), _method_name(before))
            ),
        }
        for axis, change, before, after in CHANGES
        if {_method_name(before), _method_name(after)} <= trained
    ]


def _method_name(member: str) -> str:
    """The name of a member among the methods of a dissection."""
    return member if member == REFERENCE else _PREFIX + member


def _as_json(effect: Effect) -> dict[str, Any]:
    """A difference with its interval."""
    return {
        "estimate": effect.estimate,
        "low": effect.low,
        "high": effect.high,
        "pairs": effect.pairs,
        "decided": effect.decided,
    }


def _difference_text(row: dict[str, Any]) -> str:
    """The difference with its interval."""
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
            escape(row["factor"]),
            row["order"],
            str(row["buffers"]),
            f"{row['log_loss']:.2f}",
            _difference_text(row),
            "–" if math.isnan(accuracy) else f"{100 * accuracy:.1f} %",
        )
    return table


def changes_table(changes: Sequence[dict[str, Any]]) -> Table:
    """What each axis changes, as Markdown."""
    table = Table(box=box.MARKDOWN)
    for column in ("axis", "exchanged", "from", "to"):
        table.add_column(column, no_wrap=True)
    table.add_column("difference in log loss", justify="right", no_wrap=True)
    for row in changes:
        cells = (row["axis"], row["change"], row["before"], row["after"])
        table.add_row(*cells, _difference_text(row))
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
