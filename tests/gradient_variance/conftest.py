"""A mistake in a rule is an exception here, where users get a materialized gradient."""

from collections.abc import Iterator

import pytest

from dissect_optax.gradient_variance import _rules


@pytest.fixture(autouse=True)
def strict_rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_rules, "STRICT", True)
    yield
