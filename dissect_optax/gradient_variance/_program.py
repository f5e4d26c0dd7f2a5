"""The loss and gradient of one example as a flat jaxpr, made ready for cutting.

Three steps, each of which keeps what the program computes:

1. `trace` records a function and dissolves calls (jit, remat) into their equations.
   What remat protects from being stored stays protected: its inputs pass through the
   same optimization barrier that JAX itself would put there.
2. `without_accumulation` takes sums of products out of loops. The gradient of a weight
   that a `lax.scan` uses in every step is accumulated in the loop's carry, which would
   be one array of the weight's size per example. Collecting the two small factors of
   every step instead, and contracting them after the loop, computes the same sum.
3. `select` gives the part of the program that certain values need, dead code removed.

Custom differentiation rules have done their work before the first step.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters import partial_eval

Atom = Var | Literal
Environment = dict[Var, Any]

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
ADDITIONS = ("add", "add_any")
# One operand, the same elements in other places (or among zeros).
PERMUTATIONS = (
    "broadcast_in_dim",
    "copy",
    "pad",
    "reduce_sum",
    "reshape",
    "rev",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "transpose",
)


def run_equation(equation: JaxprEqn, *operands: Any) -> list[Any]:
    """Outputs of one equation; `operands` replace its variables, literals stay."""
    values = iter(operands)
    inputs = [
        v.val if isinstance(v, Literal) else next(values) for v in equation.invars
    ]
    bound = equation.primitive.get_bind_params(equation.params)
    # Older versions of JAX give the functions that a primitive calls beside them.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def producers(jaxpr: Jaxpr) -> dict[Var, JaxprEqn]:
    """For each variable the equation that computes it."""
    return {v: equation for equation in jaxpr.eqns for v in equation.outvars}


def variables(equation: JaxprEqn) -> list[Var]:
    """Inputs of an equation that are not literals."""
    return [v for v in equation.invars if isinstance(v, Var)]


def abstract(value: Atom) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable, as an argument for tracing."""
    aval = shaped(value)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def shaped(atom: Atom) -> jax.core.ShapedArray:
    """Shape and dtype of a variable or literal."""
    aval = atom.aval
    assert isinstance(aval, jax.core.ShapedArray)
    return aval


def trace(function: Callable, *arguments: Any) -> tuple[ClosedJaxpr, Any]:
    """Jaxpr of `function` with all calls dissolved, and the tree that it returns."""
    program, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return _dissolved(program), result


def select(program: ClosedJaxpr, wanted: Sequence[Atom]) -> Callable[..., list[Any]]:
    """The part of `program` that computes `wanted`, as a function of its inputs."""
    jaxpr = _with_outputs(program.jaxpr, wanted)
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(wanted), instantiate=True)
    return functools.partial(jax.core.eval_jaxpr, live, program.consts)


def depends_on(jaxpr: Jaxpr, sources: Collection[Var]) -> set[Var]:
    """All variables whose value may depend on one of `sources`."""
    dependent = set(sources)
    for equation in jaxpr.eqns:
        if any(v in dependent for v in variables(equation)):
            dependent.update(equation.outvars)
    return dependent


def is_zero(atom: Atom, produced_by: dict[Var, JaxprEqn]) -> bool:
    """Whether a value is known to be zero everywhere."""
    if isinstance(atom, Literal):
        return jnp.ndim(atom.val) == 0 and bool(atom.val == 0)
    equation = produced_by.get(atom)
    return (
        equation is not None
        and equation.primitive.name in ("broadcast_in_dim", "convert_element_type")
        and is_zero(equation.invars[0], produced_by)
    )


def is_permutation(equation: JaxprEqn, produced_by: dict[Var, JaxprEqn]) -> bool:
    """Whether the output holds elements of the one operand, each at most once."""
    name = equation.primitive.name
    if name not in PERMUTATIONS:
        return False
    if name == "pad":
        return is_zero(equation.invars[1], produced_by)
    if name in ("broadcast_in_dim", "reduce_sum"):
        return shaped(equation.invars[0]).size == shaped(equation.outvars[0]).size
    return True


def is_cast(equation: JaxprEqn) -> bool:
    """Whether the equation changes the precision of a number and nothing else."""
    if equation.primitive.name != "convert_element_type":
        return False
    before, after = shaped(equation.invars[0]).dtype, shaped(equation.outvars[0]).dtype
    kinds = (jnp.floating, jnp.complexfloating)
    return any(
        jnp.issubdtype(before, kind) and jnp.issubdtype(after, kind) for kind in kinds
    )


# ---- Dissolving calls --------------------------------------------------------------


def _dissolved(program: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without calls."""
    run = functools.partial(_run_without_calls, program.jaxpr, program.consts)
    return jax.make_jaxpr(run)(*map(abstract, program.jaxpr.invars))


def _run_without_calls(jaxpr: Jaxpr, consts: Sequence[Any], *inputs: Any) -> list[Any]:
    """Evaluate a jaxpr, and the jaxprs it calls equation by equation."""
    environment: Environment = dict(zip(jaxpr.constvars, consts, strict=True))
    environment.update(zip(jaxpr.invars, inputs, strict=True))
    produced_by = producers(jaxpr)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in CALLS:
            operands = [_read(v, environment) for v in equation.invars]
            if name in ("remat2", "checkpoint"):
                operands = _behind_barrier(equation, operands)
            called = equation.params[CALLS[name]]
            consts = called.consts if isinstance(called, ClosedJaxpr) else ()
            called = called.jaxpr if isinstance(called, ClosedJaxpr) else called
            outputs = _run_without_calls(called, consts, *operands)
        elif _places_one_row(equation, produced_by):
            operands = [_read(v, environment) for v in equation.invars]
            outputs = [_place_one_row(*operands)]
        else:
            outputs = run_equation(equation, *_operands(equation, environment))
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [_read(v, environment) for v in jaxpr.outvars]


def _places_one_row(equation: JaxprEqn, produced_by: dict[Var, JaxprEqn]) -> bool:
    """Whether the output is zero but for one row: the gradient of reading that row."""
    if equation.primitive.name != "dynamic_update_slice":
        return False
    table, row, *_ = equation.invars
    if not jnp.issubdtype(shaped(table).dtype, jnp.inexact):
        return False
    partial = [
        n for n, m in zip(shaped(row).shape, shaped(table).shape, strict=True) if n != m
    ]
    return partial == [1] and is_zero(table, produced_by)


def _place_one_row(table: jax.Array, row: jax.Array, *starts: jax.Array) -> jax.Array:
    """The same as a scatter, which is how several rows at once are placed."""
    axis = next(d for d in range(table.ndim) if row.shape[d] != table.shape[d])
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(table.ndim - 1)),
        inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,),
    )
    return jax.lax.scatter_add(
        table,
        jnp.reshape(starts[axis], 1),
        jnp.squeeze(row, axis),
        numbers,
        # A slice that starts outside is moved inside.
        mode=jax.lax.GatherScatterMode.CLIP,
    )


def _behind_barrier(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    """Operands of remat's second forward pass, kept apart from the first."""
    protect = equation.params["prevent_cse"]
    if not equation.params["differentiated"]:
        return operands
    flags = protect if isinstance(protect, tuple) else (protect,) * len(operands)
    chosen = [x for x, flag in zip(operands, flags, strict=True) if flag]
    if not chosen:
        return operands
    guarded = iter(jax.lax.optimization_barrier(chosen))
    return [
        next(guarded) if flag else x for x, flag in zip(operands, flags, strict=True)
    ]


def _read(atom: Atom, environment: Environment) -> Any:
    """Value of a variable or literal."""
    return atom.val if isinstance(atom, Literal) else environment[atom]


def _operands(equation: JaxprEqn, environment: Environment) -> list[Any]:
    """Values of an equation's variables, literals left out."""
    return [environment[v] for v in variables(equation)]


def _with_outputs(jaxpr: Jaxpr, outputs: Sequence[Atom]) -> Jaxpr:
    """The same equations with other outputs."""
    return jaxpr.replace(outvars=list(outputs))


# ---- Taking sums of products out of loops ------------------------------------------


def without_accumulation(program: ClosedJaxpr, outputs: Collection[int]) -> ClosedJaxpr:
    """The same program; loops that add up products for `outputs` collect factors."""
    jaxpr = program.jaxpr
    produced_by = producers(jaxpr)
    loops: dict[int, set[int]] = {}
    pending = [jaxpr.outvars[i] for i in outputs]
    while pending:
        atom = pending.pop()
        if isinstance(atom, Literal) or atom not in produced_by:
            continue
        equation = produced_by[atom]
        if equation.primitive.name == "scan":
            index = equation.outvars.index(atom)
            loops.setdefault(id(equation), set()).add(index)
            if index < equation.params["num_carry"]:
                pending.append(equation.invars[equation.params["num_consts"] + index])
        elif (
            equation.primitive.name in ("concatenate", *ADDITIONS)
            or is_permutation(equation, produced_by)
            or is_cast(equation)
        ):
            pending.extend(equation.invars)
    if not loops:
        return program
    run = functools.partial(_run_with_split_loops, program, loops)
    return jax.make_jaxpr(run)(*map(abstract, jaxpr.invars))


def _run_with_split_loops(
    program: ClosedJaxpr, loops: dict[int, set[int]], *inputs: Any
) -> list[Any]:
    """Evaluate a program whose chosen loops are split from their accumulations."""
    jaxpr = program.jaxpr
    environment: Environment = dict(zip(jaxpr.constvars, program.consts, strict=True))
    environment.update(zip(jaxpr.invars, inputs, strict=True))
    produced_by = producers(jaxpr)
    for equation in jaxpr.eqns:
        chosen = loops.get(id(equation))
        if chosen is None:
            outputs = run_equation(equation, *_operands(equation, environment))
        else:
            operands = [_read(v, environment) for v in equation.invars]
            outputs = _run_split_loop(equation, chosen, produced_by, operands)
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [_read(v, environment) for v in jaxpr.outvars]


def _run_split_loop(
    equation: JaxprEqn,
    chosen: Collection[int],
    outer: dict[Var, JaxprEqn],
    operands: list[Any],
) -> list[Any]:
    """Run a scan whose `chosen` outputs are contracted after the loop if they can be.

    A chosen carry must be its old value plus products; a chosen stacked output must
    be made of products.
    """
    consts_count, carry_count = (
        equation.params["num_consts"],
        equation.params["num_carry"],
    )
    body = without_accumulation(_dissolved(equation.params["jaxpr"]), chosen)
    jaxpr = body.jaxpr
    produced_by = producers(jaxpr)
    carried = jaxpr.invars[consts_count : consts_count + carry_count]
    slices = jaxpr.invars[consts_count + carry_count :]
    increments: dict[int, list[Atom]] = {}
    for index in sorted(chosen):
        is_carry = index < carry_count
        old = carried[index] if is_carry else None
        terms = _increment(jaxpr, index, old, produced_by)
        if terms and all(_is_product(t, produced_by, is_carry) for t in terms):
            increments[index] = terms
    factors = dict.fromkeys(
        factor
        for terms in increments.values()
        for term in terms
        for factor in _factors(term, produced_by)
    )
    collected = [v for v in factors if v not in slices]

    consts = operands[:consts_count]
    initial = operands[consts_count : consts_count + carry_count]
    stacks = operands[consts_count + carry_count :]
    total_count = len(jaxpr.outvars)
    kept = [i for i in range(carry_count) if i not in increments]
    kept_stacks = [i for i in range(carry_count, total_count) if i not in increments]
    extended = _with_outputs(jaxpr, [*jaxpr.outvars, *collected])
    stacked_outputs = [*kept_stacks, *range(total_count, len(extended.outvars))]
    carry, stacked = jax.lax.scan(
        functools.partial(
            _step, extended, body.consts, consts, initial, kept, stacked_outputs
        ),
        [initial[i] for i in kept],
        stacks,
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
    )
    outputs = dict(zip(kept, carry, strict=True))
    outputs.update(zip(kept_stacks, stacked[: len(kept_stacks)], strict=True))
    environment: Environment = dict(zip(slices, stacks, strict=True))
    environment.update(zip(collected, stacked[len(kept_stacks) :], strict=True))
    for index, terms in increments.items():
        is_carry = index < carry_count
        values = [_contracted(t, produced_by, environment, is_carry) for t in terms]
        outputs[index] = sum(values[1:], values[0])
        if is_carry and not is_zero(equation.invars[consts_count + index], outer):
            outputs[index] = initial[index] + outputs[index]
    return [outputs[i] for i in range(total_count)]


def _step(
    jaxpr: Jaxpr,
    jaxpr_consts: Sequence[Any],
    consts: list[Any],
    initial: list[Any],
    kept: list[int],
    stacked_outputs: list[int],
    carry: list[Any],
    slices: list[Any],
) -> tuple[list[Any], list[Any]]:
    """One step of a loop from which some carries were taken out."""
    # The carries taken out are read by dead code only, so any value will do.
    full = list(initial)
    for i, value in zip(kept, carry, strict=True):
        full[i] = value
    outputs = jax.core.eval_jaxpr(jaxpr, jaxpr_consts, *consts, *full, *slices)
    return [outputs[i] for i in kept], [outputs[i] for i in stacked_outputs]


def _increment(
    jaxpr: Jaxpr, index: int, old: Var | None, produced_by: dict[Var, JaxprEqn]
) -> list[Atom]:
    """Terms that a loop adds to its carry `old`, or that make a stacked output."""
    if old is None:
        return list[Atom]([jaxpr.outvars[index]])
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


def _is_product(atom: Atom, produced_by: dict[Var, JaxprEqn], is_carry: bool) -> bool:
    """Whether a value is made of products that are larger than their factors."""
    equation = None if isinstance(atom, Literal) else produced_by.get(atom)
    if equation is None:
        return False
    first, *others = equation.invars
    name = equation.primitive.name
    if name in ADDITIONS:
        return all(_is_product(v, produced_by, is_carry) for v in equation.invars)
    if name == "neg" or is_cast(equation) or is_permutation(equation, produced_by):
        plain = all(isinstance(v, Literal) for v in others)
        return plain and _is_product(first, produced_by, is_carry)
    size = shaped(equation.outvars[0]).size
    if name == "dot_general":
        return (
            len(variables(equation)) == 2
            and size > shaped(first).size + shaped(others[0]).size
        )
    if name == "scatter-add":
        return (
            is_carry
            and not any(isinstance(v, Literal) for v in others)
            and is_zero(first, produced_by)
            and not equation.params["dimension_numbers"].operand_batching_dims
            and size > shaped(others[1]).size
        )
    return False


def _factors(atom: Atom, produced_by: dict[Var, JaxprEqn]) -> list[Var]:
    """The variables that the products behind a value multiply."""
    assert isinstance(atom, Var)
    equation = produced_by[atom]
    if equation.primitive.name == "dot_general":
        return variables(equation)
    if equation.primitive.name == "scatter-add":
        return variables(equation)[-2:]
    return [factor for v in variables(equation) for factor in _factors(v, produced_by)]


def _contracted(
    atom: Atom, produced_by: dict[Var, JaxprEqn], stacks: Environment, is_carry: bool
) -> jax.Array:
    """A product of every step of a loop: their sum for a carry, else their stack."""
    assert isinstance(atom, Var)
    equation = produced_by[atom]
    name = equation.primitive.name
    if name == "dot_general":
        (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
        left, right = ([d + 1 for d in dims] for dims in (left, right))
        left_batch, right_batch = (
            [d + 1 for d in dims] for dims in (left_batch, right_batch)
        )
        if is_carry:
            left, right = [0, *left], [0, *right]
        else:
            left_batch, right_batch = [0, *left_batch], [0, *right_batch]
        first, second = variables(equation)
        return jax.lax.dot_general(
            stacks[first],
            stacks[second],
            ((left, right), (left_batch, right_batch)),
            precision=equation.params["precision"],
            preferred_element_type=equation.params["preferred_element_type"],
        )
    if name == "scatter-add":
        numbers = equation.params["dimension_numbers"]
        windows = tuple(d + 1 for d in numbers.update_window_dims)
        result = shaped(equation.outvars[0])
        *_, indices, updates = variables(equation)
        return jax.lax.scatter_add(
            jnp.zeros(result.shape, result.dtype),
            stacks[indices],
            stacks[updates],
            numbers._replace(update_window_dims=windows),
            mode=equation.params["mode"],
        )
    operands = [
        _contracted(v, produced_by, stacks, is_carry) for v in variables(equation)
    ]
    run = functools.partial(run_equation, equation)
    outputs = (run if is_carry else jax.vmap(run))(*operands)
    return outputs[equation.outvars.index(atom)]
