"""Device, versions, source and date of a run, as records keep them."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import dissect_optax

_PACKAGES = (
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "numpy",
    "tensorflow-datasets",
    "dm-pix",
)


@functools.cache
def _git_commit() -> str | None:
    """Commit of a source checkout of this project, with a mark if files differ."""
    root = Path(dissect_optax.__file__).parent.parent
    if not (root / ".git").exists():  # An installed package has no commit.
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(
            describe, cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def processor() -> str:
    """The processor's name as the operating system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _command() -> str:
    """The command that runs, as a user would type it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = [Path(sys.argv[0] or "python").name]
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Device, versions, command and date of this process."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "processor": processor(),
        "cpu_cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": _git_commit(),
        "dissect_optax": dissect_optax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **versions,
    }
