"""The package as it is imported."""

import subprocess
import sys

import pytest

import dissect_optax as do


def test_every_public_name_is_there() -> None:
    assert all(hasattr(do, name) for name in do.__all__)
    assert len(set(do.__all__)) == len(do.__all__)
    assert set(do.__all__) <= set(dir(do))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'value_and_grad'"):
        do.value_and_grad  # noqa: B018


def test_the_import_leaves_what_is_slow_to_its_first_use() -> None:
    program = "import sys, dissect_optax; print('jax.extend.core' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert done.stdout == "False\n"
