"""Gradient and variance of some models on meshes; a JSON line for each."""

import json
import sys

import jax

from benchmarks import sharding
from dissect_optax.gradient_variance import _rules
from tests.gradient_variance.models import MODELS


def main() -> None:
    assert jax.device_count() == sharding.DEVICES
    _rules.STRICT = True
    meshes, *names = sys.argv[1:]
    for name in names:
        loss, params, batch, _, shared = MODELS[name]()
        model = sharding.Model(loss, params, batch, shared)
        for row in sharding.variance_rows(name, model, tuple(meshes.split(";"))):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
