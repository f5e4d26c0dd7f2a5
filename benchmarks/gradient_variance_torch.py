"""The variance of a mini-batch gradient in PyTorch, by BackPACK and by torch.func.

Runs in an environment of its own (`pip install torch backpack-for-pytorch`), called by
`benchmarks.gradient_variance --torch`; prints JSON.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch  # type: ignore[import-not-found]
from backpack import (  # type: ignore[import-not-found]
    backpack,
    extend,
    extensions,
)
from torch import nn

RUNS = 3


def mnist_mlp() -> nn.Sequential:
    """784-1000-500-100-10."""
    widths = (784, 1000, 500, 100, 10)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cifar10_3c3d() -> nn.Sequential:
    """Three convolutions with max-pooling and three dense layers."""
    layers: list[nn.Module] = []
    for n, m, size, pad, pool_pad in (
        (3, 64, 5, 0, (0, 1, 0, 1)),
        (64, 96, 3, 0, (0, 1, 0, 1)),
        (96, 128, 3, 1, (0, 1, 0, 1)),
    ):
        layers += [nn.Conv2d(n, m, size, padding=pad), nn.ReLU()]
        layers += [nn.ZeroPad2d(pool_pad), nn.MaxPool2d(3, 2)]
    layers += [nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, 10))


def cifar100_allcnnc() -> nn.Sequential:
    """All-CNN-C."""
    widths = (3, 96, 96, 96, 192, 192, 192, 192, 192, 100)
    sizes = (3, 3, 3, 3, 3, 3, 3, 1, 1)
    strides = (1, 1, 2, 1, 1, 2, 1, 1, 1)
    pads = (1, 1, 1, 1, 1, 1, 0, 0, 0)
    layers: list[nn.Module] = []
    for n, m, size, stride, pad in zip(
        widths[:-1], widths[1:], sizes, strides, pads, strict=True
    ):
        layers += [nn.Conv2d(n, m, size, stride, pad), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten())


CASES: tuple[tuple[Callable[[], nn.Sequential], int, tuple[int, ...], int], ...] = (
    (mnist_mlp, 128, (784,), 10),
    (cifar10_3c3d, 256, (3, 32, 32), 10),
    (cifar100_allcnnc, 16, (3, 32, 32), 100),
    (cifar100_allcnnc, 32, (3, 32, 32), 100),
)


class Case:
    """One network with a batch, and the methods on it."""

    def __init__(
        self,
        make: Callable[[], nn.Sequential],
        batch: int,
        shape: tuple[int, ...],
        classes: int,
    ):
        """Make the network twice: as it is, and extended for BackPACK."""
        torch.manual_seed(0)
        self.x = torch.randn(batch, *shape)
        self.y = torch.randint(classes, (batch,))
        self.network = make()
        self.loss = nn.CrossEntropyLoss()
        self.extended = extend(make())
        self.extended_loss = extend(nn.CrossEntropyLoss())
        self.params = {k: p.detach() for k, p in self.network.named_parameters()}

    def plain(self) -> None:
        """The gradient of the mean loss."""
        self.network.zero_grad()
        self.loss(self.network(self.x), self.y).backward()

    def backpack_variance(self) -> None:
        """BackPACK's `Variance`."""
        self._backpack(extensions.Variance())

    def backpack_sum_grad_squared(self) -> None:
        """BackPACK's `SumGradSquared`: no variance yet, only the squares."""
        self._backpack(extensions.SumGradSquared())

    def _backpack(self, extension: Any) -> None:
        """The gradient with one extension."""
        self.extended.zero_grad()
        with backpack(extension):
            self.extended_loss(self.extended(self.x), self.y).backward()

    def torch_func(self) -> Any:
        """`torch.func.vmap(grad)`, mean and variance."""
        each = torch.func.vmap(torch.func.grad(self._loss_of_one), (None, 0, 0))(
            self.params, self.x, self.y
        )
        size = len(self.y)
        return {k: (g.mean(0), g.var(0) / size) for k, g in each.items()}

    def _loss_of_one(
        self, params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """The loss of one example."""
        logits = torch.func.functional_call(self.network, params, x[None])
        return self.loss(logits, y[None])


METHODS = ("plain", "backpack_variance", "backpack_sum_grad_squared", "torch_func")


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """For each method the median seconds of each run."""
    medians: dict[str, list[float]] = {method: [] for method in METHODS}
    for method in METHODS:
        getattr(case, method)()
    for _ in range(RUNS):
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for round_ in range(rounds):
            for method in METHODS:
                if round_ >= 1 and seconds[method][0] > 5 * seconds["plain"][0]:
                    continue
                start = time.perf_counter()
                getattr(case, method)()
                seconds[method].append(time.perf_counter() - start)
        for method in METHODS:
            medians[method].append(statistics.median(seconds[method]))
    return medians


def main() -> None:
    """Measure all cases and print JSON."""
    rounds = int(sys.argv[1])
    torch.set_num_threads(2)
    records = []
    for make, batch, shape, classes in CASES:
        medians = measure(Case(make, batch, shape, classes), rounds)
        for method in METHODS:
            pairs = zip(medians[method], medians["plain"], strict=True)
            ratios = [ours / plain for ours, plain in pairs]
            records.append(
                {
                    "network": make.__name__,
                    "batch": batch,
                    "method": "torch_plain" if method == "plain" else method,
                    "milliseconds": round(1e3 * statistics.median(medians[method]), 2),
                    "ratio": round(statistics.median(ratios), 3),
                    "ratio_of_each_run": [round(r, 3) for r in ratios],
                }
            )
    names = ("torch", "backpack-for-pytorch")
    print(
        json.dumps(
            {
                "environment": {name: version(name) for name in names}
                | {"threads": torch.get_num_threads()},
                "records": records,
            }
        )
    )


if __name__ == "__main__":
    main()
