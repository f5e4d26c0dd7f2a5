"""What `explain_variance` says: a route and a cost for every parameter."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax


class VarianceRoute(NamedTuple):
    """How the variance of one parameter's gradient is computed, and what it costs."""

    parameter: str
    """Path of the parameter in its tree."""
    shape: tuple[int, ...]
    """Shape of the parameter."""
    routes: tuple[str, ...]
    """Terms of the gradient; several entries for a sum or a concatenation."""
    operations: int
    """Floating-point operations beyond those of the plain gradient."""
    numbers: int
    """Elements of the arrays that the moments of this parameter make on the way.

    An estimate from shapes. Parameters take their turns, so that the largest of them
    counts, and not their sum. The compiler may place these arrays where the program
    needs none at that time, or copy some: `VarianceReport.memory` knows.
    """

    def __str__(self) -> str:
        """One line of a report."""
        return (
            f"{self.parameter} {list(self.shape)}: {', '.join(self.routes)}; "
            f"{self.operations:.1e} operations, {self.numbers:.1e} numbers"
        )


class VarianceMemory(NamedTuple):
    """Temporary memory of two compiled programs, in bytes."""

    plain: int
    """Of the gradient of the mean loss."""
    with_variance: int
    """Of the gradient with its variance."""

    def __str__(self) -> str:
        """One line of a report."""
        plain, ours = (f"{size / 1e6:.1f} MB" for size in self)
        return f"temporary memory: {ours} with the variance, {plain} without"


class VarianceReport(list[VarianceRoute]):
    """The routes of all parameters, as a list, and the memory of the whole program."""

    def __init__(
        self,
        routes: Iterable[VarianceRoute],
        programs: Callable[[], tuple[jax.stages.Lowered, jax.stages.Lowered]],
    ) -> None:
        """Keep how the programs are lowered; nothing is compiled yet."""
        super().__init__(routes)
        self._programs = programs

    def memory(self) -> VarianceMemory:
        """Temporary memory of the compiled programs, on the default backend.

        Compiles the plain gradient and the gradient with its variance, each of which
        takes as long as its first call would, and runs nothing.

        Raises:
            NotImplementedError: If the backend does not report the memory.
        """
        sizes = []
        for program in self._programs():
            analysis = program.compile().memory_analysis()
            if analysis is None:
                raise NotImplementedError(
                    "The default backend does not say how much memory a program needs."
                )
            sizes.append(int(analysis.temp_size_in_bytes))
        return VarianceMemory(*sizes)

    def __str__(self) -> str:
        """A line for each parameter."""
        return "\n".join(map(str, self))


# Gradients of smaller parameters are stored without a word: a few kilobytes each.
WARNED_SIZE = 2**16


def warn_of_stored(parameter: str, size: int, examples: int, reasons: Any) -> None:
    """Warn of a parameter whose variance costs as much as all its gradients."""
    if size < WARNED_SIZE:
        return
    warnings.warn(
        f"The gradients of {parameter or 'the parameter'} by all {examples} examples "
        f"are stored side by side, {examples} times its size of {size} elements "
        f"({', '.join(reasons)}). `microbatch_size` bounds the memory.",
        UserWarning,
        stacklevel=4,
    )
