"""Every model on eight devices: exact, and only a mean and a spread travel."""

import pytest

from tests.gradient_variance.models import MODELS
from tests.sharding.eight_devices import lines_of

# Those of the experiments compile for long; what they are made of others have too.
# `python -m benchmarks.sharding variance` has them all.
EXPERIMENTS = [name for name in MODELS if name.startswith(("mnist", "cifar"))]
LARGE = [name for name in EXPERIMENTS if name.startswith("mnist")]
SMALL = [name for name in MODELS if name not in EXPERIMENTS]
GROUPS = [SMALL[k::4] for k in range(4)]
# How a batch is spread, with and without the types that `check_vma` looks at.
MESHES = "auto;explicit;shard_map, check_vma"


@pytest.mark.parametrize("names", GROUPS, ids=[group[0] for group in GROUPS])
def test_small_models(names):
    rows = lines_of("models", MESHES, *names, x64=True)
    assert {row["model"] for row in rows} == set(names)
    check(rows, len(MESHES.split(";")))


def test_large_models():
    rows = lines_of("models", "explicit", *LARGE, x64=True)
    check(rows, 1)


def check(rows, meshes):
    by_model = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["mesh"]] = row
    for name, found in by_model.items():
        alone, plain = found.pop("one device"), found.pop("plain gradient")
        assert len(found) == meshes
        sizes = alone["gradient bytes"], alone["variance bytes"]
        for kind, row in found.items():
            where = name, kind, row, plain
            assert row["error"] < 1e-12, where
            # Value and gradient in one, the variance in the other.
            assert set(row["collectives"]) == {"all-reduce"}, where
            assert row["collectives"]["all-reduce"]["bytes"] == 8 + sum(sizes), where
            # What one device needs for all examples is divided by eight, but for a
            # hundredth that compilers differ in.
            limit = alone["temporary bytes per device"] / 8 + sum(sizes)
            assert row["temporary bytes per device"] <= 1.01 * limit + 2**12, where
