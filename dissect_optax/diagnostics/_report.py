"""Measurements as text of 80 columns, and as plain numbers for JSON."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dissect_optax.diagnostics._measure import Diagnostics

_WIDTH = 80
_NAME = 26


def plain(value: Any) -> Any:
    """Dataclasses and named tuples as dictionaries; infinities and NaN as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def number(value: float) -> str:
    """Three digits, in as few characters as that takes."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}"


def interval(value: Any) -> str:
    """An estimate and its interval."""
    return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"


def text(d: "Diagnostics") -> str:
    """All numbers in 80 columns."""
    lines = [
        f"{d.batches} mini-batches of {d.batch_size} from {d.examples} examples, "
        f"{d.parameters} parameters, loss {number(d.loss)}",
        "Estimates [95 % interval] at these parameters",
        "",
        _row("Noise scale tr Σ/‖∇L‖², in examples", interval(d.noise_scale)),
        _row("Relative variance of the gradient", interval(d.relative_variance)),
        _row("Sign success, mean over elements", interval(d.sign_success)),
        _row("  counted with the mean gradient", number(d.counted_sign_success)),
        _row("  predicted by Eq. (8) for the same", number(d.predicted_sign_success)),
        _row("Elements with more noise than signal", _percent(d.noise_dominated)),
        _row("Elements whose sign is not known", _percent(d.unresolved)),
    ]
    if d.improvement:
        lines += ["", "Decrease of the loss by the next step at its best step size"]
        lines += [
            _row("  " + name.replace("_", " "), interval(value))
            for name, value in d.improvement.items()
        ]
    if d.dominance is not None:
        assert d.dominance_by_cauchy is not None
        lines += [
            "",
            _row("Diagonal dominance c, by columns", interval(d.dominance)),
            _row("  by Cauchy products", interval(d.dominance_by_cauchy)),
        ]
    lines += ["", *_layers(d)]
    for warning in d.warnings:
        lines += ["", *_wrapped(f"{warning.name}: {warning.text}")]
    if d.improvement:
        lines += [
            "",
            *_wrapped(
                "The decrease is that of one step from here. It does not say which "
                "method trains better."
            ),
        ]
    return "\n".join(lines)


def _layers(d: "Diagnostics") -> list[str]:
    """A table with a line for every parameter."""
    columns = ["noise scale", "sign", "η² median", "γ<½"]
    if d.improvement:
        columns.append("I(sign)")
    if d.dominance is not None:
        columns.append("c")
    lines = [_cells("parameter", columns)]
    for layer in d.layers.values():
        cells = [
            number(layer.noise_scale.value),
            number(layer.sign_success.value),
            number(layer.relative_variance_quantiles[0.5]),
            _percent(layer.noise_dominated),
        ]
        if layer.improvement:
            cells.append(number(layer.improvement["sign"].value))
        if layer.dominance is not None:
            cells.append(number(layer.dominance.value))
        lines.append(_cells(layer.name, cells))
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else "nan"


def _row(name: str, value: str) -> str:
    return f"{name:<40}{value}"


def _cells(name: str, cells: list[str]) -> str:
    """A line of the table; a long name keeps its end."""
    if len(name) > _NAME:
        name = "…" + name[-(_NAME - 1) :]
    widths = (12, 7, 10, 7, 9, 7)
    row = "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False))
    return f"{name:<{_NAME}}{row}"


def _wrapped(sentence: str) -> list[str]:
    """Lines of at most 80 columns."""
    lines, line = [], ""
    for word in sentence.split():
        if line and len(line) + 1 + len(word) > _WIDTH:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]
