"""Groups on eight virtual devices; prints JSON for `test_meshes`.

A script that needs the environment of `tests.virtual_devices`.
"""

import contextlib
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dissect_optax.dissection import (
    METHODS,
    Diagnosis,
    Method,
    UserError,
    complete,
    evaluate,
    get_method,
    make_mesh,
)
from dissect_optax.dissection import _running as running
from dissect_optax.dissection import _training as training
from dissect_optax.dissection._meshes import everywhere, over_replicas, place
from tests.dissection.toys import PROBLEM, SETTINGS, job, load_data, replicas

DEVICES = 8
MESHES = ({"replica": 8}, {"data": 8}, {"replica": 4, "data": 2})
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "permute")


def numbers_of_group(method: Method, mesh: jax.sharding.Mesh, runs: int) -> Any:
    """Parameters and evaluation after six steps, and what is sent in a step."""
    data = place(load_data(None), everywhere(mesh))
    group = place(
        replicas([0.01 * (i + 1) for i in range(runs)], list(range(runs))),
        over_replicas(mesh),
    )
    state = training.initialise(PROBLEM, method, group, mesh)
    compiled = training._advance_group.lower(
        PROBLEM, method, SETTINGS.batch_size, mesh, 1, data, group, state
    ).compile()
    counts = {
        name: len(re.findall(rf" [\w-]*{name}(?:-start)?\(", compiled.as_text()))
        for name in COLLECTIVES
    }
    for steps in (1, 5):
        state = compiled(steps, data, group, state)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_equivalent_to(over_replicas(mesh), leaf.ndim)
    found = evaluate(
        PROBLEM, SETTINGS, data, group, state.step, state.params, mesh=mesh
    )
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
    return leaves, found, counts


def differences(runs: int) -> list[dict[str, Any]]:
    """Of every mesh from one device."""
    lines = []
    # It asks for the variance in a mini-batch, too.
    method = get_method("m_svag_mb")
    expected, losses, _ = numbers_of_group(method, make_mesh({}), runs)
    for sizes in MESHES:
        if runs % sizes.get("replica", 1):
            continue
        leaves, found, counts = numbers_of_group(method, make_mesh(sizes), runs)
        lines.append(
            {
                "runs": runs,
                "mesh": sizes,
                "params": max(
                    float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
                    for a, b in zip(leaves, expected, strict=True)
                ),
                "losses": max(
                    float(np.max(np.abs(found[key] - losses[key]))) for key in losses
                ),
                "collectives": counts,
            }
        )
    return lines


def usual_meshes(root: Path) -> list[Any]:
    """The mesh and the runs per program of groups, without any argument."""
    found = []
    train = running._run_group

    def noted(job, method, title, group):
        mesh = dict(job.mesh_of(group.size).shape)
        found.append([len(group.configs), group.size, mesh])
        train(job, method, title, group)

    running._run_group = noted
    method = get_method("m_ssd")
    for count, batch_size in ((1, 6), (3, 6)):
        settings = dataclasses.replace(SETTINGS, batch_size=batch_size)
        runs = job(root, settings=settings, replicas=None)
        complete(runs, method, "", [runs.config(method, 0.1, i) for i in range(count)])
    running._run_group = train
    return found


def resumed(root: Path) -> list[Any]:
    """Losses of a group that other numbers of devices have begun."""
    method = Method(
        # Its state holds a random key.
        "noisy",
        "Noisy",
        lambda rate: optax.chain(
            optax.add_noise(0.01, 0.5, jax.random.key(0)), optax.sgd(rate)
        ),
    )
    save = running.checkpoints.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    # 3 runs fill 3, 8, 4 and again 3 places.
    meshes = [{}, {"replica": 8}, {"replica": 2, "data": 4}, {}]
    for index, sizes in enumerate(meshes):
        runs = job(root, replicas=3, mesh=make_mesh(sizes), checkpoint_seconds=0.0)
        configs = [runs.config(method, 0.1, seed) for seed in range(3)]
        is_last = index == len(meshes) - 1
        running.checkpoints.save = save if is_last else save_and_stop
        with contextlib.suppress(KeyboardInterrupt):
            records = complete(runs, method, "", configs)
    alone = job(None, replicas=3, mesh=make_mesh({}))
    return [
        [record.curve("training_loss") for record in found]
        for found in (records, complete(alone, method, "", configs))
    ]


def diagnosed() -> list[Any]:
    """What a diagnosis sees of the parameters of one run."""
    found = []
    for sizes in ({}, {"replica": 2, "data": 4}):

        def measure(params):
            assert len(params["hidden"]["kernel"].devices()) == 1
            return {"norm": float(np.linalg.norm(params["hidden"]["kernel"]))}

        runs = job(
            None,
            replicas=2,
            mesh=make_mesh(sizes),
            diagnosis=Diagnosis(1, measure),
        )
        method = METHODS["m_sgd"]
        records = complete(
            runs, method, "", [runs.config(method, 0.1, s) for s in (0, 1)]
        )
        found.append([record.diagnostics for record in records])
    return found


def mistakes() -> list[str]:
    """Sentences about meshes that cannot be."""
    method = METHODS["m_sgd"]
    sentences = []
    for sizes in ({"data": 16}, {"data": 3}):
        try:
            runs = job(None, mesh=make_mesh(sizes))
            complete(runs, method, "", [runs.config(method, 0.1, 0)])
        except UserError as error:
            sentences.append(str(error))
    return sentences


def main() -> None:
    """Everything, as one line of JSON."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.device_count() == DEVICES
    root = Path(sys.argv[1])
    found = {
        "differences": [*differences(8), *differences(1)],
        "usual": usual_meshes(root / "usual"),
        "resumed": resumed(root / "resumed"),
        "diagnosed": diagnosed(),
        "mistakes": mistakes(),
        "given": dict(make_mesh(jax.make_mesh((4, 2), ("data", "replica"))).shape),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
