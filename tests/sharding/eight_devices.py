"""Runs a module of this folder in a process with eight virtual devices.

The devices must be asked for before JAX starts, so that it takes another process; one
for a group of checks, as a process costs seconds. A module prints a JSON object per
line.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.virtual_devices import eight_devices

ROOT = Path(__file__).parents[2]


def lines_of(module: str, *arguments: str, x64: bool = False) -> list[dict[str, Any]]:
    """What `python -m tests.sharding.MODULE ARGUMENTS` prints."""
    environment = eight_devices() | {
        "JAX_ENABLE_X64": str(int(x64)),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        # The programs are exact however hard the compiler works.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"tests.sharding.{module}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
