"""The environment of a process with eight virtual devices.

The devices must be asked for before JAX starts, and doctests import every module of the
tests: a module that asked for them itself would give them to all tests.
"""

import os


def eight_devices() -> dict[str, str]:
    """This environment, with eight devices of the CPU."""
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
