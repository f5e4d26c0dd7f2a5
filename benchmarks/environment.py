"""The circumstances of a measurement."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "optax", "numpy")


def environment() -> dict[str, str | int]:
    """Versions, machine and date, as they belong beside every measured number."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count() or 0,
        "threads": len(os.sched_getaffinity(0)),
    }


def _processor() -> str:
    """The processor's name as the operating system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
