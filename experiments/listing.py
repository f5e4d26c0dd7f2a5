"""What a directory of runs holds: a table of it, and all of it as CSV."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dissect_optax.dissection import Record, RunConfig, Store, unfinished_groups

_LOOK: dict[str, Any] = {"box": box.SIMPLE, "pad_edge": False}
_CONFIGURATION = (
    "problem",
    "optimizer",
    "learning_rate",
    "seed",
    "batch_size",
    "steps",
)


def stores(runs_dir: Path) -> list[Store]:
    """The directory itself, and that of the dissections in it."""
    return [Store(runs_dir), Store(runs_dir / "dissections")]


def table_of_runs(runs_dir: Path) -> Table:
    """Finished and unfinished runs, a row per problem, method and number of steps.

    Args:
      runs_dir: The directory of all records.

    Returns:
      A table for Rich.

    Raises:
      UserError: A record, or the list of the runs of a checkpoint, is damaged.
    """
    # By problem, method and steps; the dissections' problems have their folder's name.
    finished: Counter[tuple[str, ...]] = Counter()
    diverged: Counter[tuple[str, ...]] = Counter()
    unfinished: Counter[tuple[str, ...]] = Counter()
    rates: dict[tuple[str, ...], set[float]] = {}
    for store in stores(runs_dir):
        prefix = "" if store.root == runs_dir else f"{store.root.name}/"
        for record in store.everything():
            config = record.config
            row = _row(prefix, config)
            finished[row] += 1
            diverged[row] += record.diverged
            rates.setdefault(row, set()).add(config.learning_rate)
        for path in sorted(store.root.glob("*/*/unfinished")):
            problem, optimizer = path.parts[-3:-1]
            for group in unfinished_groups(store, problem, optimizer):
                for config in group.configs:
                    row = _row(prefix, config)
                    unfinished[row] += 1
                    rates.setdefault(row, set()).add(config.learning_rate)

    table = Table(**_LOOK)
    for column in ("problem", "method"):
        table.add_column(column)
    for column in ("steps", "step sizes", "finished", "diverged", "unfinished"):
        table.add_column(column, justify="right")
    for row in sorted(rates):
        low, high = min(rates[row]), max(rates[row])
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        counts = (finished[row], diverged[row], unfinished[row])
        table.add_row(*row, span, *map(str, counts))
    return table


def _row(prefix: str, config: RunConfig) -> tuple[str, ...]:
    """Where a run is counted."""
    return prefix + config.problem, config.optimizer, str(config.settings.steps)


def as_csv(runs_dir: Path) -> str:
    """Every evaluation of every finished run, one per line.

    Args:
      runs_dir: The directory of all records.

    Returns:
      The text of a CSV file: what determines the run, the step, and each quantity that
      was measured; empty where a run did not measure it.

    Raises:
      UserError: A record is damaged.
    """
    records = [record for store in stores(runs_dir) for record in store.everything()]
    quantities = dict.fromkeys(
        name for record in records for name in record.evaluations[0].values
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_CONFIGURATION, "step", *quantities])
    writer.writeheader()
    for record in records:
        writer.writerows(_lines(record))
    return text.getvalue()


def _lines(record: Record) -> Iterator[dict[str, object]]:
    """One line per evaluation."""
    config, settings = record.config, record.config.settings
    values = (
        config.problem,
        config.optimizer,
        config.learning_rate,
        config.seed,
        settings.batch_size,
        settings.steps,
    )
    shared = dict(zip(_CONFIGURATION, values, strict=True))
    for line in record.evaluations:
        yield {**shared, "step": line.step, **line.values}
