"""Number of runs of one method that one device trains at a time, as one program.

An accelerator is filled: it takes as many runs as its memory holds. A CPU is full with
one run as soon as a step has enough arithmetic for its cores; below that, steps are
mostly overhead, which a group of runs shares.
"""

import functools
import math
import os
from typing import Any

import jax

from dissect_optax.dissection._data import Data
from dissect_optax.dissection._methods import Method
from dissect_optax.dissection._problem import Problem, Settings
from dissect_optax.dissection._training import lower_gradient

# A core does this much in about a millisecond, many times the overhead of a step.
_FLOPS_TO_FILL_A_CORE = 1e7
# On a CPU no more than the protocol's replications.
_LARGEST_ON_CPU = 10
# The rest is for the optimizer's temporaries, an evaluation and other programs.
_SHARE_OF_MEMORY = 0.5


def replicas_per_program(
    problem: Problem, method: Method, settings: Settings, data: Data, wanted: int
) -> int:
    """Number of runs that are trained at a time.

    Args:
      problem: The problem.
      method: The optimizer.
      settings: Batch size.
      data: The data, on the device.
      wanted: Number of runs that there are to train on this device.

    Returns:
      At least 1. On a CPU it may exceed a `wanted` of more than one: groups of one size
      are one program, which is compiled once.
    """
    if wanted == 1:
        return 1
    shapes = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), data.training
    )
    leaves, structure = jax.tree.flatten(shapes)
    program = (problem, method, settings, structure, tuple(leaves))
    if jax.default_backend() == "cpu":
        # Virtual devices share the cores.
        cores = _cores() / jax.local_device_count()
        return filling_cores(_flops(*program), cores)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:  # The device does not say.
        return max(wanted, 1)
    free = memory - sum(leaf.nbytes for leaf in jax.tree.leaves(data))
    return fitting_memory(_bytes_of_a_run(*program), free, wanted)


def filling_cores(flops: float, cores: float) -> int:
    """Number of runs that keeps all cores busy.

    Args:
      flops: Floating-point operations in one step of one run.
      cores: Number of cores, or a part of one.

    Returns:
      Between 1 and 10.

    Examples:
      >>> [filling_cores(flops, cores=2) for flops in (1e5, 1e7, 1e9)]
      [10, 2, 1]
    """
    wanted = round(cores * _FLOPS_TO_FILL_A_CORE / flops)
    return min(max(wanted, 1), _LARGEST_ON_CPU)


def fitting_memory(size: int, memory: int, wanted: int) -> int:
    """Number of runs that fits the memory of an accelerator.

    Args:
      size: Bytes that one run needs.
      memory: Bytes that there are beside the data.
      wanted: Number of runs that there are to train.

    Returns:
      Between 1 and `wanted`; groups are of about equal size.

    Examples:
      >>> gigabyte = 10**9
      >>> [fitting_memory(gigabyte, n * gigabyte, wanted=10) for n in (1, 10, 100)]
      [1, 5, 10]
      >>> fitting_memory(gigabyte, 16 * gigabyte, wanted=10)  # Not 8 and then 2.
      5
    """
    most = max(int(_SHARE_OF_MEMORY * memory / size), 1)
    groups = -(-max(wanted, 1) // most)
    return -(-max(wanted, 1) // groups)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # On Linux.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _flops(
    problem: Problem, method: Method, settings: Settings, structure: Any, leaves: Any
) -> float:
    """Floating-point operations in one gradient."""
    training = jax.tree.unflatten(structure, leaves)
    lowered, _ = lower_gradient(problem, method, settings, training)
    analysis = lowered.cost_analysis() or {}
    # A backend that does not say is taken to be full.
    return analysis.get("flops", math.inf)


@functools.cache
def _bytes_of_a_run(
    problem: Problem, method: Method, settings: Settings, structure: Any, leaves: Any
) -> int:
    """Bytes that a run needs while it computes a gradient."""
    training = jax.tree.unflatten(structure, leaves)
    lowered, params = lower_gradient(problem, method, settings, training)
    memory: Any = lowered.compile().memory_analysis()
    parameters = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)
    )
    # Parameters, two buffers of the optimizer and the updates, each also as a copy.
    return memory.temp_size_in_bytes + memory.output_size_in_bytes + 8 * parameters
