"""Runs a study once, with a bar, and keeps its record beside those of the runs.

runs/studies/quadratic_1f0c2a9b/
    config.json         the study's settings
    environment.json    what it ran on, when, by which command
    evaluations.jsonl   one line per result
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import track

from experiments import interrupts
from experiments.environment import environment
from experiments.records import (
    DRAFT_PREFIX,
    StudyRecord,
    digest,
    to_text,
    write_atomically,
)


class Study(Protocol):
    """The settings of a study, a dataclass that knows how to run itself."""

    @property
    def name(self) -> str:
        """The study's name on the command line."""

    @property
    def count(self) -> int:
        """How many results it has."""

    def run(self) -> Iterator[dict[str, Any]]:
        """The results, in the order in which they are finished."""


def complete(study: Study, runs_dir: Path) -> StudyRecord:
    """The record of a study, which runs unless there is one.

    Args:
      study: The settings.
      runs_dir: The directory of all records.

    Returns:
      The record.
    """
    config = dataclasses.asdict(study)  # type: ignore[call-overload]
    directory = runs_dir / "studies" / f"{study.name}_{digest(config)}"
    if not directory.is_dir():
        console = Console(stderr=True)
        results = track(
            study.run(),
            description=study.name,
            total=study.count,
            console=console,
            transient=True,
        )
        finished = []
        for result in results:
            interrupts.check()
            finished.append(result)
        _write(directory, config, finished)
    return _read(directory)


def _write(
    directory: Path, config: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    """Adds a finished record, which appears under its name when it is complete."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=directory.parent, prefix=DRAFT_PREFIX))
    draft.chmod(0o755)
    lines = "".join(json.dumps(result) + "\n" for result in results)
    write_atomically(draft / "config.json", to_text(config))
    write_atomically(draft / "environment.json", to_text(environment()))
    write_atomically(draft / "evaluations.jsonl", lines)
    try:
        draft.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
        # Another process was faster.
        shutil.rmtree(draft)


def _read(directory: Path) -> StudyRecord:
    """The record in a directory."""
    lines = (directory / "evaluations.jsonl").read_text().splitlines()
    return StudyRecord(
        directory=directory,
        config=json.loads((directory / "config.json").read_text()),
        environment=json.loads((directory / "environment.json").read_text()),
        results=[json.loads(line) for line in lines],
    )
