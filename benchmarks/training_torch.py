"""The training steps of `experiments` in PyTorch.

Runs in an environment of its own (`pip install torch`), called by
`benchmarks.training --torch`. It is told the number of threads and of images, and
prints its environment. Then it waits: for every line of JSON that it reads, the
arguments of a `Training` and a number of `steps`, it takes these steps and prints the
seconds that one took. Between two lines it sleeps.
"""

import itertools
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch  # type: ignore[import-not-found]
from torch import nn

WARM_UP_STEPS = 2

# Of the uint8 images, with the number of classes.
SHAPES = {
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
}


def mnist() -> nn.Sequential:
    """Three hidden layers of rectified units."""
    layers: list[nn.Module] = [nn.Flatten()]
    for n, m in itertools.pairwise((784, 1000, 500, 100, 10)):
        layers += [nn.Linear(n, m), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def cifar10() -> nn.Sequential:
    """Three convolutions, each with a max-pool behind it, and three dense layers."""
    layers: list[nn.Module] = []
    for n, m, size, padding in ((3, 64, 5, 0), (64, 96, 3, 0), (96, 128, 3, 1)):
        layers += [nn.Conv2d(n, m, size, padding=padding), nn.ReLU(inplace=True)]
        # What "SAME" adds here lies behind the last row and column.
        layers += [nn.MaxPool2d(3, 2, ceil_mode=True)]
    layers += [nn.Flatten()]
    for n, m in itertools.pairwise((1152, 512, 256, 10)):
        layers += [nn.Linear(n, m), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def cifar100() -> nn.Sequential:
    """All-CNN-C."""
    widths = (3, 96, 96, 96, 192, 192, 192, 192, 192, 100)
    sizes = (3, 3, 3, 3, 3, 3, 3, 1, 1)
    strides = (1, 1, 2, 1, 1, 2, 1, 1, 1)
    # At stride 2 "SAME" pads behind the image only, this on all sides: as much work.
    paddings = (1, 1, 1, 1, 1, 1, 0, 0, 0)
    dropout = {0: 0.2, 3: 0.5, 6: 0.5}
    layers: list[nn.Module] = []
    for index, (n, m) in enumerate(itertools.pairwise(widths)):
        if index in dropout:
            layers += [nn.Dropout(dropout[index])]
        convolution = nn.Conv2d(n, m, sizes[index], strides[index], paddings[index])
        layers += [convolution, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten())


NETWORKS = {"mnist": mnist, "cifar10": cifar10, "cifar100": cifar100}


def standardize(images: torch.Tensor) -> torch.Tensor:
    """Every image with mean 0 and standard deviation 1."""
    deviation, mean = torch.std_mean(images, (1, 2, 3), correction=0, keepdim=True)
    return (images - mean) / deviation.clamp(min=images[0].numel() ** -0.5)


def distort(images: torch.Tensor) -> torch.Tensor:
    """Random crop, mirroring, brightness, saturation and contrast of every image."""
    batch, height, width, _ = images.shape
    padded = nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    rows = torch.randint(5, (batch, 1)) + torch.arange(height)
    columns = torch.randint(5, (batch, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    number = torch.arange(batch)[:, None, None]
    views = padded[number, rows[:, :, None], columns[:, None, :]].float()
    views += _uniform(batch, -63 / 255, 63 / 255)
    # Saturation in hue, saturation and value, without going there and back.
    value, smallest = views.amax(-1, keepdim=True), views.amin(-1, keepdim=True)
    most = value / (value - smallest).clamp(min=1e-6)
    views = value - (value - views) * torch.minimum(_uniform(batch, 0.5, 1.5), most)
    mean = views.mean((1, 2), keepdim=True)
    return (views - mean) * _uniform(batch, 0.2, 1.8) + mean


def _uniform(batch: int, low: float, high: float) -> torch.Tensor:
    """One random number for every image."""
    return torch.rand(batch, 1, 1, 1) * (high - low) + low


class Training:
    """One network that is trained, on images that lie in memory."""

    def __init__(
        self,
        images: int,
        problem: str,
        optimizer: str,
        learning_rate: float,
        batch_size: int,
        l2: float,
        parameters: int,
        augmented: bool,
        channels_last: bool,
    ):
        """Make data, network and optimizer, and warm up."""
        shape, classes = SHAPES[problem]
        self._images = torch.randint(256, (images, *shape), dtype=torch.uint8)
        self._labels = torch.randint(classes, (images,))
        self._batch_size = batch_size
        self._augmented = augmented
        self._scaled_only = problem == "mnist"
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._network = NETWORKS[problem]().to(memory_format=self._layout)
        named = dict(self._network.named_parameters())
        groups = [
            {"params": [p for k, p in named.items() if "weight" in k]}
            | {"weight_decay": l2},
            {"params": [p for k, p in named.items() if "bias" in k]},
        ]
        make = {
            "m_sgd": lambda: torch.optim.SGD(
                groups, learning_rate, momentum=0.9, fused=True
            ),
            "adam": lambda: torch.optim.Adam(groups, learning_rate, fused=True),
        }
        self._optimizer = make[optimizer]()
        assert sum(p.numel() for p in named.values()) == parameters
        self.seconds_per_step(WARM_UP_STEPS)

    def seconds_per_step(self, steps: int) -> float:
        """Take some steps; nothing here is asynchronous."""
        start = time.perf_counter()
        for _ in range(steps):
            indices = torch.randint(len(self._labels), (self._batch_size,))
            inputs = self._inputs(self._images[indices])
            self._optimizer.zero_grad()
            logits = self._network(inputs)
            nn.functional.cross_entropy(logits, self._labels[indices]).backward()
            self._optimizer.step()
        return (time.perf_counter() - start) / steps

    def _inputs(self, images: torch.Tensor) -> torch.Tensor:
        """What the network sees, channels first."""
        if self._scaled_only:
            return images.float() / 255
        images = distort(images) if self._augmented else images.float()
        channels_first = standardize(images).permute(0, 3, 1, 2)
        return channels_first.contiguous(memory_format=self._layout)


def main() -> None:
    """Answer one line after the other until there are no more."""
    threads, images = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    environment = {"torch": version("torch"), "threads": torch.get_num_threads()}
    print(json.dumps(environment), flush=True)
    trainings: dict[str, Training] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        steps = request.pop("steps")
        name = json.dumps(request)
        if name not in trainings:
            trainings[name] = Training(images, **request)
        print(json.dumps(trainings[name].seconds_per_step(steps)), flush=True)


if __name__ == "__main__":
    main()
