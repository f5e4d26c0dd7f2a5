"""From the output of a gradient program back to the terms that it is made of.

The walk knows no primitive. It asks the registry of `_rules` what each equation does to
the terms of its inputs; where no rule answers, the value itself is materialized for
every example, which is always right.
"""

from collections.abc import Collection

import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from dissect_optax.gradient_variance import _rules
from dissect_optax.gradient_variance._program import (
    Atom,
    Source,
    defining_equations,
    is_zero,
    known_value,
    shape_of,
)
from dissect_optax.gradient_variance._terms import (
    Applied,
    Concatenation,
    Constant,
    Elementwise,
    Materialized,
    Reindexed,
    Several,
    Sum,
    TakenInLoop,
    Term,
)

# What a rule may raise on a form of an equation that it does not know.
UNKNOWN_FORM = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)


class Walk:
    """The path back through one program; `dependent` variables differ by example.

    Attributes:
      requests: Equations that can be asked to give the factors of a product instead of
        the product (loops, conditions), and which of their outputs are wanted.
      replacements: Values that can be computed from factors at less cost.
    """

    def __init__(self, program: ClosedJaxpr, dependent: Collection[Var]) -> None:
        """Index the equations of the program."""
        self.program = program
        self.produced_by = defining_equations(program.jaxpr)
        self.requests: dict[int, tuple[JaxprEqn, set[int]]] = {}
        self.replacements: dict[Var, Source] = {}
        self._dependent = dependent
        self._terms: dict[Var, Term] = {}

    def term(self, atom: Atom) -> Term:
        """The term that a value of the program is; the same one when asked again."""
        if self.is_constant(atom):
            return Constant(atom)
        assert isinstance(atom, Var)
        if atom not in self._terms:
            self._terms[atom] = self._new_term(atom)
        return self._terms[atom]

    def is_constant(self, atom: Atom) -> bool:
        """Whether a value is the same for all examples."""
        return isinstance(atom, Literal) or atom not in self._dependent

    def is_zero(self, atom: Atom) -> bool:
        """Whether a value is known to be zero everywhere."""
        return is_zero(atom, self.produced_by)

    def known_value(self, atom: Atom) -> np.ndarray | None:
        """The value of an atom that depends on no input of the program."""
        return known_value(self.program, atom)

    def unbroadcast(self, atom: Atom) -> tuple[Atom, tuple[int | None, ...]]:
        """The smallest value that an array is a broadcast of.

        With it comes the axis of the array that each of its axes is; None for an axis
        of size one.
        """
        axes: tuple[int | None, ...] = tuple(range(len(shape_of(atom))))
        while isinstance(atom, Var) and atom in self.produced_by:
            step = _rules.undone_broadcast(self.produced_by[atom])
            if step is None:
                break
            atom, places = step
            axes = tuple(None if p is None else axes[p] for p in places)
        sizes = shape_of(atom)
        axes = tuple(None if n == 1 else a for a, n in zip(axes, sizes, strict=True))
        return atom, axes

    def request(self, equation: JaxprEqn, output: int) -> None:
        """Ask for the factors of one output of a loop or a condition."""
        self.requests.setdefault(id(equation), (equation, set()))[1].add(output)

    def _new_term(self, atom: Var) -> Term:
        """The term that a value of the program is."""
        equation = self.produced_by.get(atom)
        if equation is None:
            return Materialized(atom, "an input")
        name = equation.primitive.name
        found = _rules.RULES.get(name)
        term = None
        if found is not None and found.recognises(equation):
            try:
                term = found.rule(self, equation, equation.outvars.index(atom))
            except UNKNOWN_FORM:
                if _rules.STRICT:
                    raise
        if term is None or term.shape != shape_of(atom):
            return Materialized(atom, name)
        # What is stored in any case is stored as late as possible.
        reason = _reason_to_materialize(term)
        return Materialized(atom, reason) if reason else term


def _reason_to_materialize(term: Term) -> str | None:
    """Why a term is stored as a whole; None if that would lose something."""
    if isinstance(term, Materialized):
        return term.reason
    if isinstance(term, Reindexed) and term.size > term.term.size:
        # Stored before it is padded or repeated: it is smaller, and overlaps less.
        return None
    if isinstance(term, Applied):
        return None
    if isinstance(term, Elementwise):
        return _reason_to_materialize(term.term)
    if isinstance(term, Concatenation):
        groups: list[tuple[Term, ...]] = [(part,) for part in term.terms]
    elif isinstance(term, Sum):
        groups = list(term.groups)
    else:
        return None
    # One stored part is as large as the sum of all parts that it overlaps.
    reasons = [
        next(filter(None, map(_reason_to_materialize, group)), None)
        for group in groups
        if not all(isinstance(part, Constant) for part in group)
    ]
    return reasons[0] if reasons and all(reasons) else None


def needs_values_of_a_loop(term: Term) -> bool:
    """Whether a term adds or mixes what exists as mean and spread only."""
    if isinstance(term, Sum):
        return any(
            _has_moments(part) if len(group) > 1 else needs_values_of_a_loop(part)
            for group in term.groups
            for part in group
        )
    if isinstance(term, Applied):
        return _has_moments(term.term)
    if isinstance(term, Several):
        return any(map(needs_values_of_a_loop, term.terms))
    return isinstance(term, Elementwise) and needs_values_of_a_loop(term.term)


def _has_moments(term: Term) -> bool:
    """Whether a part of a term exists as mean and spread only."""
    if isinstance(term, Several):
        return any(map(_has_moments, term.terms))
    if isinstance(term, Elementwise):
        return _has_moments(term.term)
    return isinstance(term, TakenInLoop)
