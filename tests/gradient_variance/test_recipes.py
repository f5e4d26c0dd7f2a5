"""The sharded recipe of docs/gradient_variance.md on eight devices."""

import re
import subprocess
import sys
from pathlib import Path

from tests.virtual_devices import eight_devices

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gradient_variance.md"


def recipe():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    # The first block makes the model and the batch, the last one shards them.
    assert "batch_sharding" in blocks[-1]
    return blocks[0] + blocks[-1]


SHARDED = """
assert jax.device_count() == 8
whole = dissect_optax.value_grad_and_variance(loss)
results = [
    jax.jit(everywhere)(params, sharded),
    jax.jit(whole)(params, sharded),
    jax.jit(whole)(params, batch),
]
leaves = [jax.tree.leaves(result) for result in results]
for one, two, three in zip(*leaves, strict=True):
    scale = abs(three).max()
    assert abs(one - three).max() <= 1e-12 * scale
    assert abs(two - three).max() <= 1e-12 * scale
each = jax.vmap(jax.grad(loss), (None, 0))(params, batch)["w1"]
wanted = each.var(0, ddof=1) / 64
assert abs(results[0][2]["w1"] - wanted).max() <= 1e-12 * wanted.max()
"""


def test_a_batch_on_eight_devices_gives_the_same_in_float64():
    done = subprocess.run(
        [sys.executable, "-c", recipe() + SHARDED],
        cwd=ROOT,
        env=eight_devices() | {"JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
