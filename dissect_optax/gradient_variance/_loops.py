"""Products that a program adds up in loops, taken out of the loops.

The gradient of a weight that a `lax.scan` uses in every step is added up in the loop's
carry, which would be one array of the weight's size per example. Where the step adds a
product, the loop stacks the product's factors instead, and the sum over the steps is
one deeper product after it. The gradient of a weight that belongs to one step (a scan
over layers) is stacked by the loop; there its mean and spread are taken inside the
loop's body, so that the factors of one step at a time exist. A `lax.cond` gives the
factors of whichever branch is taken, and zeros for those of the others.

What is a product, and how it is summed, is asked of the same rules and terms that serve
outside of loops.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from dissect_optax.gradient_variance import _rules
from dissect_optax.gradient_variance._contractions import Contraction, KernelGradient
from dissect_optax.gradient_variance._program import (
    Atom,
    Environment,
    Loop,
    Source,
    abstract,
    defining_equations,
    depends_on,
    dtype_of,
    evaluate,
    inline_calls,
    is_zero,
    leaves,
    loop_dependence,
    loop_of,
    read,
    retrace,
    run_with,
    select,
    shape_of,
    size_of,
    variables,
)
from dissect_optax.gradient_variance._rules import ADDITIONS, TAKEN_IN_LOOP
from dissect_optax.gradient_variance._tables import TableRows
from dissect_optax.gradient_variance._terms import (
    SMALL_SIZE,
    Batch,
    Constant,
    Elementwise,
    Materialized,
    Moments,
    Reindexed,
    Scaled,
    Several,
    Term,
)
from dissect_optax.gradient_variance._walk import UNKNOWN_FORM, Walk


class Options(NamedTuple):
    """How moments inside of loops are taken."""

    in_loops: bool
    """Whether they may be: not where the gradients themselves are needed."""
    two_pass: bool
    precision: Any
    weight_dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Inner:
    """The term of one step of a loop, as a parameter of an equation."""

    term: Term


Roots = Callable[[ClosedJaxpr], list[Atom]]


def exposed(
    program: ClosedJaxpr,
    varies: Sequence[bool],
    roots: Roots,
    options: Options,
) -> tuple[ClosedJaxpr, Walk]:
    """The same program, its products outside of loops, and the walk through it.

    The last input of the program is the share of the example; `varies` says of each
    input whether it differs by example; `roots` gives the values that are asked for.
    """
    while True:
        jaxpr = program.jaxpr
        inputs = [v for v, flag in zip(jaxpr.invars, varies, strict=True) if flag]
        walk = Walk(program, depends_on(jaxpr, inputs))
        for root in roots(program):
            walk.term(root)
        changes = _changes(walk, options)
        if not changes:
            return program, walk
        # What the changes computed may hold calls again.
        program = inline_calls(retrace(program, functools.partial(_changed, changes)))


def with_share(program: ClosedJaxpr, options: Options) -> ClosedJaxpr:
    """The program with one more input, the share of the example."""

    def run(*inputs: Any) -> list[Any]:
        return jax.core.eval_jaxpr(program.jaxpr, program.consts, *inputs[:-1])

    share = jax.ShapeDtypeStruct((), options.weight_dtype)
    return jax.make_jaxpr(run)(*map(abstract, program.jaxpr.invars), share)


Change = Callable[[Environment], list[Any]]


def _changes(walk: Walk, options: Options) -> dict[int, Change]:
    """For equations that are replaced, their outputs as a function of all values."""
    changes: dict[int, Change] = {}
    for equation, outputs in walk.requests.values():
        split = _split_loop if loop_of(equation) is not None else _split_condition
        try:
            change = split(walk, equation, outputs, options)
        except UNKNOWN_FORM:
            if _rules.STRICT:
                raise
            change = None
        if change is not None:
            changes[id(equation)] = change
    for equation in walk.program.jaxpr.eqns:
        if id(equation) not in changes and _chooses_by_example(walk, equation):
            changes[id(equation)] = functools.partial(_run_all_branches, equation)
    for variable, source in walk.replacements.items():
        equation = walk.produced_by[variable]
        changes[id(equation)] = functools.partial(_replacement, variable, source)
    return changes


def _replacement(variable: Var, source: Source, environment: Environment) -> list[Any]:
    """A value computed from factors."""
    value = evaluate(source, dict(environment))
    return [value.astype(dtype_of(variable))]


def _changed(
    changes: Mapping[int, Change], equation: JaxprEqn, environment: Environment
) -> list[Any] | None:
    """Outputs of an equation that is replaced."""
    change = changes.get(id(equation))
    return None if change is None else change(environment)


# ---- Loops ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _SplitLoop:
    """A loop whose products are taken out of it."""

    loop: Loop
    body: ClosedJaxpr
    """With the share of the example as its last input."""
    sums: dict[int, list[Term]]
    """For each carry that leaves the loop: the terms that the steps add to it."""
    rests: dict[int, list[Atom]]
    """For such a carry: increments that are the same for all examples."""
    stacks: dict[int, Term]
    """For each stacked output that is made of products after the loop: its term."""
    taken: dict[int, Term]
    """For each stacked output whose moments are taken in the loop: its term."""


def _split_loop(
    walk: Walk, equation: JaxprEqn, chosen: Collection[int], options: Options
) -> Change | None:
    """A change of the loop that takes products out of it, if there are any."""
    loop = loop_of(equation)
    assert loop is not None
    body = with_share(inline_calls(loop.body), options)
    flags = [not walk.is_constant(v) for v in equation.invars]
    varies = [*loop_dependence(loop, body.jaxpr, flags)[0], True]

    def roots(program: ClosedJaxpr) -> list[Atom]:
        jaxpr = program.jaxpr
        found: list[Atom] = []
        for index in sorted(chosen):
            if index < loop.carries:
                old = jaxpr.invars[loop.consts + index]
                found += _increments(jaxpr, index, old)
            else:
                found.append(jaxpr.outvars[index])
        return found

    body, inner = exposed(body, varies, roots, options)
    jaxpr = body.jaxpr
    changing = depends_on(jaxpr, jaxpr.invars[loop.consts : -1])
    split = _SplitLoop(loop, body, {}, {}, {}, {})
    for index in sorted(chosen):
        if index < loop.carries:
            old = jaxpr.invars[loop.consts + index]
            _plan_sum(split, inner, index, _increments(jaxpr, index, old), changing)
        else:
            _plan_stack(split, inner, index, options)
    if not (split.sums or split.stacks or split.taken):
        return None
    starts_at_zero = [is_zero(v, walk.produced_by) for v in equation.invars]
    share = walk.program.jaxpr.invars[-1]
    return functools.partial(
        _run_split_loop, split, equation, share, starts_at_zero, changing, options
    )


def _increments(jaxpr: Jaxpr, index: int, old: Var) -> list[Atom]:
    """Increments of a carry in a step; empty if a step does anything else with it."""
    produced_by = defining_equations(jaxpr)
    uses = Counter(v for equation in jaxpr.eqns for v in variables(equation))
    uses.update(v for v in jaxpr.outvars if isinstance(v, Var))
    if uses[old] != 1:
        return []
    terms: list[Atom] = []
    pending: list[Atom] = [jaxpr.outvars[index]]
    while pending:
        atom = pending.pop()
        equation = None if isinstance(atom, Literal) else produced_by.get(atom)
        # A running total that the step itself reads must stay in the loop.
        used_once = isinstance(atom, Var) and uses[atom] == 1
        if equation and equation.primitive.name in ADDITIONS and used_once:
            pending.extend(equation.invars)
        else:
            terms.append(atom)
    others = [t for t in terms if t is not old]
    return others if len(others) == len(terms) - 1 else []


def _plan_sum(
    split: _SplitLoop,
    inner: Walk,
    index: int,
    increments: list[Atom],
    changing: Collection[Var],
) -> None:
    """Take a carry out of the loop, if its steps add products to it."""
    products: list[Term] = []
    rest: list[Atom] = []
    for atom in increments:
        if is_zero(atom, inner.produced_by):
            continue
        term = inner.term(atom)
        if isinstance(term, Constant):
            rest.append(atom)
        elif _can_be_summed(term, changing, split.loop.length):
            products.append(term)
        else:
            return
    if products:
        split.sums[index] = products
        split.rests[index] = rest


def _can_be_summed(term: Term, changing: Collection[Var], steps: int) -> bool:
    """Whether a term has factors, and operations that are the same in every step."""
    if isinstance(term, Materialized):
        return False
    if any(v in changing for v in leaves(term.invariants)):
        return False
    return not _is_smaller_summed(term, steps, term.size)


def _is_smaller_summed(term: Term, steps: int, size: int) -> bool:
    """Whether the sum over the steps is smaller than a part of it in every step."""
    if isinstance(term, Contraction):
        return term.has_large_factors(steps)
    if isinstance(term, Elementwise):
        return _is_smaller_summed(term.term, steps, size)
    if isinstance(term, Several):
        return any(_is_smaller_summed(part, steps, size) for part in term.terms)
    return isinstance(term, Materialized) and steps * term.size > size


def _plan_stack(split: _SplitLoop, inner: Walk, index: int, options: Options) -> None:
    """Take a stacked output out of the loop, or its moments inside of it."""
    atom = split.body.jaxpr.outvars[index]
    term = inner.term(atom)
    if isinstance(term, Constant):
        return
    if isinstance(term, Materialized) and term.size <= SMALL_SIZE:
        return
    if options.in_loops:
        split.taken[index] = term
    elif not isinstance(term, Materialized):
        split.stacks[index] = term


def _run_split_loop(
    split: _SplitLoop,
    equation: JaxprEqn,
    share: Var,
    starts_at_zero: Sequence[bool],
    changing: Collection[Var],
    options: Options,
    environment: Environment,
) -> list[Any]:
    """Outputs of the loop, with what was taken out of it put together after it."""
    loop, jaxpr = split.loop, split.body.jaxpr
    operands = [read(v, environment) for v in equation.invars]
    consts = operands[: loop.consts]
    initial = operands[loop.consts : loop.consts + loop.carries]
    stacked = operands[loop.consts + loop.carries :]
    slices = dict(
        zip(jaxpr.invars[loop.consts + loop.carries : -1], stacked, strict=True)
    )
    terms = [t for ts in split.sums.values() for t in ts] + list(split.stacks.values())
    sources = [v for term in terms for v in term.sources]
    fixed = [v for v in sources if not any(leaf in changing for leaf in leaves([v]))]
    collected = [
        v for v in dict.fromkeys(sources) if v not in slices and v not in fixed
    ]
    gone = {i for i in split.sums if not split.rests[i]}
    kept = [i for i in range(loop.carries) if i not in gone]
    ys = [
        i
        for i in range(loop.carries, len(jaxpr.outvars))
        if i not in split.stacks and i not in split.taken
    ]
    needed = leaves(
        [*collected, *(v for term in split.taken.values() for v in term.sources)]
    )
    rest_atoms = [v for i in kept for v in split.rests.get(i, ())]
    run = select(
        split.body,
        [
            *(jaxpr.outvars[i] for i in kept if i not in split.sums),
            *rest_atoms,
            *(jaxpr.outvars[i] for i in ys),
            *needed,
        ],
    )
    share_value = environment[share]

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], Any]:
        # The carries taken out are read by dead code only, so any value will do.
        full = list(initial)
        for i, value in zip(kept, carry, strict=True):
            full[i] = value
        values = iter(run(*consts, *full, *xs, share_value))
        whole = {i: next(values) for i in kept if i not in split.sums}
        for i in kept:
            if i in split.sums:
                added = [next(values) for _ in split.rests[i]]
                whole[i] = functools.reduce(jnp.add, added, full[i])
        outputs = [next(values) for _ in ys]
        inside = dict(zip(needed, values, strict=True))
        factors = [evaluate(v, inside) for v in collected]
        taken = [
            _take_moments(term, inside, share_value, options)
            for term in split.taken.values()
        ]
        return [whole[i] for i in kept], (outputs, factors, taken)

    carry, (outputs, factors, taken) = jax.lax.scan(
        step,
        [initial[i] for i in kept],
        stacked,
        length=loop.length,
        reverse=loop.reverse,
        unroll=loop.unroll,
    )
    results: dict[int, Any] = dict(zip(kept, carry, strict=True))
    results.update(zip(ys, outputs, strict=True))
    known: Environment = dict(slices)
    known.update(zip(collected, factors, strict=True))
    known.update(_fixed_values(split, fixed, [*consts, *initial, *stacked], loop))
    for index, products in split.sums.items():
        total = functools.reduce(
            jnp.add, [_total_over_steps(t, known, fixed, loop) for t in products]
        ).astype(dtype_of(jaxpr.outvars[index]))
        if index in kept:
            total = results[index] + total
        elif not starts_at_zero[loop.consts + index]:
            total = initial[index] + total
        results[index] = total
    for index, term in split.stacks.items():
        stack = _stack_over_steps(term, known, fixed)
        results[index] = stack.astype(dtype_of(jaxpr.outvars[index]))
    for (index, term), (mean, spread) in zip(split.taken.items(), taken, strict=True):
        results[index] = TAKEN_IN_LOOP.bind(
            mean,
            spread,
            inner=Inner(term),
            length=loop.length,
            dtype=dtype_of(jaxpr.outvars[index]),
        )
    return [results[i] for i in range(len(jaxpr.outvars))]


def _fixed_values(
    split: _SplitLoop, fixed: Sequence[Source], operands: list[Any], loop: Loop
) -> Environment:
    """Values of the body that do not change from step to step."""
    if not fixed:
        return {}
    needed = leaves(fixed)
    jaxpr = split.body.jaxpr
    # What changes is not read.
    unread = [None] * (len(jaxpr.invars) - loop.consts)
    values = select(split.body, needed)(*operands[: loop.consts], *unread)
    environment = dict(zip(needed, values, strict=True))
    return {v: evaluate(v, environment) for v in dict.fromkeys(fixed)}


def _total_over_steps(
    term: Term, known: Environment, fixed: Collection[Source], loop: Loop
) -> jax.Array:
    """The sum of a term over all steps."""
    invariants = set(term.invariants)
    stacks = {}
    for v in dict.fromkeys(term.sources):
        value = known[v]
        if v in fixed and v not in invariants:
            value = jnp.broadcast_to(value, (loop.length, *value.shape))
        stacks[v] = value
    return term.total(stacks, None)


def _stack_over_steps(
    term: Term, known: Environment, fixed: Collection[Source]
) -> jax.Array:
    """The values of a term in all steps."""
    names = list(dict.fromkeys(term.sources))

    def of_step(values: list[jax.Array]) -> jax.Array:
        return term.value(dict(zip(names, values, strict=True)), None)

    axes = [None if v in fixed else 0 for v in names]
    return jax.vmap(of_step, in_axes=(axes,))([known[v] for v in names])


# ---- Moments inside of a loop --------------------------------------------------------


def _take_moments(
    term: Term, environment: Environment, share: jax.Array, options: Options
) -> Moments:
    """Mean and spread of a term over all examples, where `jax.vmap` maps them.

    The function that is mapped sees one example; its batching rule sees all, and what
    it returns has no batch axis.
    """
    names = list(dict.fromkeys(term.sources))
    values = [evaluate(v, environment) for v in names]

    @jax.custom_batching.custom_vmap
    def moments(values: list[jax.Array], share: jax.Array) -> Moments:
        shape = jax.eval_shape(lambda: _spread_of(term, names, values, share, options))
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)

    @moments.def_vmap
    def over_examples(
        axis_size: int, mapped: Any, values: list[jax.Array], shares: jax.Array
    ) -> tuple[Moments, tuple[bool, bool]]:
        del axis_size
        rows = dict(zip(names, zip(values, mapped[0], strict=True), strict=True))
        varying = {v: x for v, (x, flag) in rows.items() if flag}
        constant = {v: x for v, (x, flag) in rows.items() if not flag}
        # Padding may hold anything, also values whose gradient is not finite.
        varying = {v: masked(x, shares > 0) for v, x in varying.items()}
        batch = Batch(
            varying,
            constant,
            shares,
            jnp.ones((), options.weight_dtype),
            options.two_pass,
            options.precision,
        )
        return term.moments(batch), (False, False)

    return moments(values, share)


def _spread_of(
    term: Term,
    names: list[Source],
    values: list[jax.Array],
    share: jax.Array,
    options: Options,
) -> Moments:
    """Moments of a batch of one, for their shapes."""
    batch = Batch(
        {v: x[None] for v, x in zip(names, values, strict=True)},
        dict(zip(names, values, strict=True)),
        share[None],
        jnp.ones((), options.weight_dtype),
        options.two_pass,
        options.precision,
    )
    return term.moments(batch)


def masked(values: jax.Array, counts: jax.Array) -> jax.Array:
    """Zero in the examples that do not count."""
    return jnp.where(
        counts.reshape(-1, *(1,) * (values.ndim - 1)),
        values,
        jnp.zeros((), values.dtype),
    )


# ---- Conditions ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Branch:
    """One branch of a condition, and the terms of the chosen outputs."""

    body: ClosedJaxpr
    terms: dict[int, Term | None]
    """None where the branch gives zero."""


def _split_condition(
    walk: Walk, equation: JaxprEqn, chosen: Collection[int], options: Options
) -> Change | None:
    """A change of the condition that gives factors instead of products."""
    options = options._replace(in_loops=False)
    varies = [*(not walk.is_constant(v) for v in equation.invars[1:]), True]
    branches = []
    for branch in equation.params["branches"]:
        body = with_share(inline_calls(branch), options)

        def roots(program: ClosedJaxpr) -> list[Atom]:
            return [program.jaxpr.outvars[i] for i in sorted(chosen)]

        body, inner = exposed(body, varies, roots, options)
        terms: dict[int, Term | None] = {}
        for i in sorted(chosen):
            atom = body.jaxpr.outvars[i]
            zero = is_zero(atom, inner.produced_by)
            terms[i] = None if zero else inner.term(atom)
        branches.append(_Branch(body, terms))
    worth = [i for i in sorted(chosen) if _is_worth_splitting(branches, i)]
    if not worth:
        return None
    share = walk.program.jaxpr.invars[-1]
    by_example = _chooses_by_example(walk, equation)
    return functools.partial(
        _run_split_condition, branches, worth, equation, share, by_example
    )


def _chooses_by_example(walk: Walk, equation: JaxprEqn) -> bool:
    """Whether an equation is a condition of which examples take different branches."""
    if equation.primitive.name != "cond" or equation.effects:
        return False
    if not _rules.RULES["cond"].recognises(equation):
        return False
    return not walk.is_constant(equation.invars[0])


def _run_all_branches(equation: JaxprEqn, environment: Environment) -> list[Any]:
    """Outputs of a condition, chosen from those of all branches.

    As `jax.vmap` would, but for the inputs that all examples share: it repeats them
    for every example.
    """
    index, *operands = (read(v, environment) for v in equation.invars)
    runs = [
        functools.partial(run_with, _nothing, branch.jaxpr, branch.consts)
        for branch in equation.params["branches"]
    ]
    outputs: list[Any] = _select(jnp.asarray(index, jnp.int32), runs, *operands)
    return outputs


def _nothing(equation: JaxprEqn, environment: Environment) -> None:
    """No equation is replaced."""


def _select(index: jax.Array, runs: Sequence[Callable], *operands: Any) -> Any:
    """As `jax.lax.switch`, by running all branches."""
    results = [run(*operands) for run in runs]
    index = jnp.clip(index, 0, len(runs) - 1)

    def choose(*cases: Any) -> jax.Array:
        return functools.reduce(
            lambda chosen, k: jnp.where(index == k, cases[k], chosen),
            range(1, len(cases)),
            jnp.asarray(cases[0]),
        )

    return jax.tree.map(choose, *results)


def _is_worth_splitting(branches: Sequence[_Branch], index: int) -> bool:
    """Whether the factors of an output, of all branches, are smaller than itself."""
    terms = [branch.terms[index] for branch in branches]
    present = [term for term in terms if term is not None]
    if not present or any(isinstance(t, Materialized | Constant) for t in present):
        return False
    kinds, _ = _kinds(terms)
    sizes = (size_of(v) for term in kinds.values() for v in term.sources)
    return sum(sizes) < present[0].size


def _kinds(
    terms: Sequence[Term | None],
) -> tuple[dict[Hashable, Term], list[Hashable]]:
    """One term of each kind, and the kind of every term."""
    keys = [None if term is None else _kind(term) for term in terms]
    kinds: dict[Hashable, Term] = {}
    for key, term in zip(keys, terms, strict=True):
        if term is not None:
            kinds.setdefault(key, term)
    return kinds, keys


def _kind(term: Term) -> Hashable:
    """The same for terms that do the same to values of the same shapes."""
    shapes = tuple((shape_of(v), str(dtype_of(v))) for v in term.sources)
    if isinstance(term, Contraction | TableRows):
        return (type(term), term.layout, shapes)
    if isinstance(term, KernelGradient | Reindexed):
        return (type(term), term.key, _kind(term.term), shapes)
    if isinstance(term, Scaled):
        # A literal is not among the sources, which each branch brings.
        literal = isinstance(term.factor, Literal) and str(term.factor)
        return (type(term), term.kind, literal, _kind(term.term), shapes)
    if isinstance(term, Several):
        axis = getattr(term, "axis", None)
        return (type(term), axis, *map(_kind, term.terms), shapes)
    if isinstance(term, Materialized):
        return (type(term), shapes)
    return object()


def _run_split_condition(
    branches: Sequence[_Branch],
    worth: Sequence[int],
    equation: JaxprEqn,
    share: Var,
    by_example: bool,
    environment: Environment,
) -> list[Any]:
    """Outputs of the condition, the products put together after it."""
    index, *operands = (read(v, environment) for v in equation.invars)
    count = len(equation.outvars)
    others = [i for i in range(count) if i not in worth]
    kinds = {i: _kinds([branch.terms[i] for branch in branches]) for i in worth}

    def of_branch(which: int, *inputs: Any) -> tuple[list[Any], dict[int, Any]]:
        branch = branches[which]
        jaxpr = branch.body.jaxpr
        needed = leaves(
            v for i in worth if (t := branch.terms[i]) is not None for v in t.sources
        )
        wanted = [*(jaxpr.outvars[i] for i in others), *needed]
        values = select(branch.body, wanted)(*inputs)
        inside = dict(zip(needed, values[len(others) :], strict=True))
        given: dict[int, Any] = {}
        for i in worth:
            term = branch.terms[i]
            given[i] = []
            of_kind, keys = kinds[i]
            for key, example in of_kind.items():
                if term is not None and keys[which] == key:
                    own = [evaluate(v, inside) for v in term.sources]
                else:
                    # As if the product had not been added.
                    shapes = ((shape_of(v), dtype_of(v)) for v in example.sources)
                    own = [jnp.zeros(shape, dtype) for shape, dtype in shapes]
                given[i].append([jnp.asarray(x) for x in own])
        return values[: len(others)], given

    runs = [functools.partial(of_branch, which) for which in range(len(branches))]
    switch = _select if by_example else jax.lax.switch
    index = jnp.asarray(index, jnp.int32)
    values, given = switch(index, runs, *operands, environment[share])
    results: dict[int, Any] = dict(zip(others, values, strict=True))
    for i in worth:
        of_kind, _ = kinds[i]
        parts = []
        for term, own in zip(of_kind.values(), given[i], strict=True):
            inside = dict(zip(term.sources, own, strict=True))
            parts.append(term.value(inside, None))
        total = functools.reduce(jnp.add, parts)
        results[i] = total.astype(dtype_of(equation.outvars[i]))
    return [results[i] for i in range(count)]
