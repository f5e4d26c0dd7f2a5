"""Options, other meshes and errors of `value_grad_and_variance` on eight devices."""

import re

import jax
import pytest

from tests.sharding.eight_devices import lines_of


def test_every_option_gives_what_one_device_gives():
    lines = lines_of("options", "options", x64=True)
    assert len(lines) == 21
    for line in lines:
        # Two passes are exact where gradients differ by 1e-8 of their size.
        assert line["error"] < (1e-9 if "two passes" in line["case"] else 1e-12), line
        assert line["finite"], line
        assert set(line["collectives"]) == {"all-reduce"}, line
        # The value, with weights also their sum, that of their squares, the largest.
        scalars = 4 * 8
        _, travels = line["collectives"]["all-reduce"]
        assert travels <= line["gradient and variance"] + scalars, line


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason="XLA of JAX 0.7 ends the process where it divides some programs",
)
def test_parameters_and_batches_on_other_meshes():
    lines = lines_of("options", "meshes", x64=True)
    assert len(lines) == 12
    for line in lines:
        assert line["error"] < 1e-12, line


ERRORS = {
    "uneven": "ValueError: .*12 examples .* 8 devices along .*data.*Drop the last 4",
    "both": "ValueError: `batch_sharding` and `axis_name` exclude each other",
    "not mapped": "NameError: `axis_name='data'` .* use `batch_sharding`",
    "no context": "ValueError: .* needs a mesh in context",
    "a name": "TypeError: .*NamedSharding.* got str",
    "unknown axis": r"ValueError: .*\['batch'\].* has \('data',\)",
    "manual axis": "ValueError: .*split the batch already. Use `axis_name`",
    "different axes": "ValueError: .*spread over different mesh axes",
    "another axis": r"ValueError: .*\('data',\), but `batch_sharding` says",
}


def test_errors_name_what_the_caller_gave():
    lines = lines_of("options", "errors", x64=True)
    assert {line["case"] for line in lines} == set(ERRORS)
    for line in lines:
        assert line["error"] is not None, line
        assert re.match(ERRORS[line["case"]], line["error"]), line
