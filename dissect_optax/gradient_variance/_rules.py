"""From the output of a gradient program back to the terms that it is made of."""

import math
from collections.abc import Collection

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from dissect_optax.gradient_variance._program import (
    ADDITIONS,
    Atom,
    is_cast,
    is_permutation,
    is_zero,
    producers,
    shaped,
)
from dissect_optax.gradient_variance._terms import (
    Constant,
    Contraction,
    Joined,
    KernelEntries,
    KernelGradient,
    Mapped,
    Patches,
    Rows,
    Scaled,
    Stored,
    Term,
    Total,
)


class Walk:
    """The way back through one program; `dependent` variables differ by example."""

    def __init__(self, jaxpr: Jaxpr, dependent: Collection[Var]) -> None:
        """Index the equations of the program."""
        self._dependent = dependent
        self._produced_by = producers(jaxpr)
        self._terms: dict[Var, Term] = {}

    def term(self, atom: Atom) -> Term:
        """The term that a value of the program is; the same one when asked again."""
        if isinstance(atom, Literal) or atom not in self._dependent:
            return Constant(atom)
        if atom not in self._terms:
            self._terms[atom] = self._new_term(atom)
        return self._terms[atom]

    def _new_term(self, atom: Var) -> Term:
        """The term that a value of the program is."""
        equation = self._produced_by.get(atom)
        if equation is None:
            return Stored(atom, "an input")
        term = self._from_equation(atom, equation)
        if term is None:
            return Stored(atom, equation.primitive.name)
        # What is stored in any case is stored as late as possible.
        reason = _reason_to_store(term)
        return Stored(atom, reason) if reason else term

    def _from_equation(self, atom: Var, equation: JaxprEqn) -> Term | None:
        """The term that an equation makes, or nothing where it is of another kind."""
        name = equation.primitive.name
        first = equation.invars[0]
        if name in ADDITIONS:
            return self._total(atom)
        if name == "sub":
            return _added([self.term(first), self._negative(equation.invars[1])])
        if name == "neg":
            return self._negative(first)
        if is_cast(equation):
            return self.term(first)
        if is_permutation(equation, self._produced_by):
            return self._mapped(atom, equation)
        if name == "concatenate":
            terms = tuple(map(self.term, equation.invars))
            return Joined(terms, equation.params["dimension"])
        if name in ("mul", "div"):
            return self._scaled(equation)
        if name == "dot_general":
            return self._product(equation)
        if name == "conv_general_dilated":
            return self._convolution(equation)
        if name == "scatter-add":
            return self._rows(equation)
        return None

    def _negative(self, atom: Atom) -> Term:
        """The term with its sign changed."""
        return Scaled(self.term(atom), -1.0, divide=False)

    def _total(self, atom: Var) -> Term:
        """The sum that ends in a value, all its additions at once."""
        terms: list[Term] = []
        pending: list[Atom] = [atom]
        while pending:
            part = pending.pop()
            equation = (
                None if isinstance(part, Literal) else self._produced_by.get(part)
            )
            if equation is not None and equation.primitive.name in ADDITIONS:
                pending.extend(equation.invars)
            elif not is_zero(part, self._produced_by):
                terms.append(self.term(part))
        return _added(terms)

    def _mapped(self, atom: Var, equation: JaxprEqn) -> Term:
        """A permutation; one that swaps the sides of a product is absorbed in it."""
        term = self.term(equation.invars[0])
        if equation.primitive.name == "copy":
            return term
        if isinstance(term, Contraction) and equation.primitive.name == "transpose":
            (left_dims, right_dims), (left_batch, right_batch) = term.dimensions
            batch = len(left_batch)
            left = len(term.factors[0].shape) - len(left_dims) - batch
            swapped = (
                *range(batch),
                *range(batch + left, len(term.shape)),
                *range(batch, batch + left),
            )
            if tuple(equation.params["permutation"]) == swapped:
                return Contraction(
                    term.right,
                    term.left,
                    term.right_view,
                    term.left_view,
                    ((right_dims, left_dims), (right_batch, left_batch)),
                    term.precision,
                    term.name,
                )
        return Mapped(term, equation, equation.outvars.index(atom))

    def _scaled(self, equation: JaxprEqn) -> Term | None:
        """A product or quotient of a term with something constant."""
        left, right = equation.invars
        divide = equation.primitive.name == "div"
        if not divide and self._is_constant(left):
            left, right = right, left
        if (
            not self._is_constant(right)
            or shaped(left).shape != shaped(equation.outvars[0]).shape
        ):
            return None
        return Scaled(self.term(left), Constant(right), divide)

    def _is_constant(self, atom: Atom) -> bool:
        """Whether a value is the same for all examples."""
        return isinstance(atom, Literal) or atom not in self._dependent

    def _product(self, equation: JaxprEqn) -> Term | None:
        """A matrix product, unless it is smaller than what it multiplies."""
        left, right = equation.invars
        if isinstance(left, Literal) or isinstance(right, Literal):
            return None
        (left_dims, right_dims), (left_batch, right_batch) = equation.params[
            "dimension_numbers"
        ]
        depth = math.prod(shaped(left).shape[d] for d in left_dims)
        size = shaped(equation.outvars[0]).size
        if depth != 1 and size <= max(shaped(left).size, shaped(right).size):
            return None
        return Contraction(
            (left,),
            (right,),
            None,
            None,
            (
                (tuple(left_dims), tuple(right_dims)),
                (tuple(left_batch), tuple(right_batch)),
            ),
            equation.params["precision"],
            "dot_general",
        )

    def _convolution(self, equation: JaxprEqn) -> Term | None:
        """A convolution as a product of patches."""
        image, kernel = equation.invars
        params = equation.params
        if isinstance(image, Literal) or isinstance(kernel, Literal):
            return None
        if params["feature_group_count"] != 1:
            return None
        numbers = params["dimension_numbers"]
        lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        shape = shaped(equation.outvars[0]).shape
        positions = tuple(shape[d] for d in out[2:])
        groups = params["batch_group_count"]
        padding = tuple(
            (low, high, dilation - 1)
            for (low, high), dilation in zip(
                params["padding"], params["lhs_dilation"], strict=True
            )
        )
        patches = Patches(
            tuple(lhs),
            padding,
            tuple(shaped(kernel).shape[d] for d in rhs[2:]),
            tuple(params["rhs_dilation"]),
            positions,
            tuple(params["window_strides"]),
            groups,
        )
        product = Contraction(
            (image,),
            (kernel,),
            patches,
            KernelEntries(tuple(rhs), groups),
            # [entries, positions, groups, batch] with [entries, groups, out]
            (((0,), (0,)), ((2,), (1,))),
            params["precision"],
            "conv_general_dilated",
        )
        return KernelGradient(product, positions, tuple(out))

    def _rows(self, equation: JaxprEqn) -> Term | None:
        """Whole rows along one axis, added to something."""
        table, indices, updates = equation.invars
        if isinstance(indices, Literal) or isinstance(updates, Literal):
            return None
        numbers = equation.params["dimension_numbers"]
        inserted = tuple(numbers.inserted_window_dims)
        whole = all(
            shaped(updates).shape[u] == shaped(table).shape[t]
            for u, t in zip(
                numbers.update_window_dims,
                [d for d in range(shaped(table).ndim) if d not in inserted],
                strict=False,
            )
        )
        if (
            len(inserted) != 1
            or tuple(numbers.scatter_dims_to_operand_dims) != inserted
            or numbers.operand_batching_dims
            or not whole
        ):
            return None
        rows = Rows(indices, updates, equation)
        if is_zero(table, self._produced_by):
            return rows
        return _added([self.term(table), rows])


def _reason_to_store(term: Term) -> str | None:
    """Why a term is stored as a whole; None if that would lose something."""
    if isinstance(term, Stored):
        return term.reason
    if isinstance(term, Mapped) and term.size > term.term.size:
        # Stored before it is padded: it is smaller, and overlaps less.
        return None
    if isinstance(term, Mapped | Scaled):
        return _reason_to_store(term.term)
    if isinstance(term, Joined):
        groups: list[tuple[Term, ...]] = [(part,) for part in term.terms]
    elif isinstance(term, Total):
        groups = list(term.groups)
    else:
        return None
    # One stored part is as large as the sum of all parts that it overlaps.
    reasons = [
        next(filter(None, map(_reason_to_store, group)), None)
        for group in groups
        if not all(isinstance(part, Constant) for part in group)
    ]
    return reasons[0] if reasons and all(reasons) else None


def _added(terms: list[Term]) -> Term:
    """The sum of terms; products with the same layout become one deeper product."""
    merged: dict[object, Term] = {}
    for term in terms:
        parts = term.terms if isinstance(term, Total) else (term,)
        for part in parts:
            key = _layout(part)
            if key in merged:
                merged[key] = _deepened(merged[key], part)
            else:
                merged[key] = part
    flat = tuple(merged.values())
    return flat[0] if len(flat) == 1 else Total(flat)


def _layout(term: Term) -> object:
    """What two products must share to be computed as one."""
    if isinstance(term, KernelGradient):
        return (term.positions, term.spec, _layout(term.term))
    if isinstance(term, Contraction):
        factors = tuple((f.shape, f.dtype) for f in term.factors)
        views = (term.left_view, term.right_view)
        return (factors, views, term.dimensions, str(term.precision))
    # Nothing, not even itself: the gradient of w + w adds one value to itself.
    return object()


def _deepened(one: Term, other: Term) -> Term:
    """Two products of the same layout as one."""
    if isinstance(one, KernelGradient) and isinstance(other, KernelGradient):
        return KernelGradient(_deepened(one.term, other.term), one.positions, one.spec)
    assert isinstance(one, Contraction)
    assert isinstance(other, Contraction)
    return Contraction(
        (*one.left, *other.left),
        (*one.right, *other.right),
        one.left_view,
        one.right_view,
        one.dimensions,
        one.precision,
        one.name,
    )
