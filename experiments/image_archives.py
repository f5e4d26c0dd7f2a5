"""The archives of MNIST and the CIFARs as published, for TFDS to write as data sets.

TFDS's own readers of them need TensorFlow. The keys of the examples are the same here,
and so is the order in which TFDS writes them, since it follows from the keys.
"""

import gzip
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# A key and an example after the other.
Half = Iterator[tuple[int, dict[str, Any]]]


def mnist_halves(paths: Mapping[str, Path]) -> dict[str, Half]:
    """Both halves of MNIST, each a file of images and a file of labels.

    Args:
      paths: Where the four files are, by their published names.

    Returns:
      The examples of "train" and "test".
    """
    return {
        split: _mnist_half(
            paths[f"{prefix}-images-idx3-ubyte.gz"],
            paths[f"{prefix}-labels-idx1-ubyte.gz"],
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def _mnist_half(images_path: Path, labels_path: Path) -> Half:
    """The examples of a half; a header of 4 bytes and 4 for each axis comes first."""
    with gzip.open(images_path) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(labels_path) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": _encodable(image), "label": int(label)}


def files_of(archive: Path) -> dict[str, bytes]:
    """The contents of a tar archive, by file name without directory."""
    with tarfile.open(archive) as tar:
        return {
            Path(member.name).name: file.read()
            for member in tar
            if (file := tar.extractfile(member)) is not None
        }


def cifar_half(split: str, files: Sequence[bytes], label_keys: Sequence[str]) -> Half:
    """A half of a CIFAR: each example is its labels, then its three colour planes.

    Args:
      split: Name of the half.
      files: Its files.
      label_keys: Names of the labels, in their order.

    Returns:
      The examples.
    """
    size = len(label_keys) + 3 * 32 * 32
    rows = np.frombuffer(b"".join(files), np.uint8).reshape(-1, size)
    for index, row in enumerate(rows):
        labels, planes = np.split(row, [len(label_keys)])
        example = dict(zip(label_keys, labels.tolist(), strict=True))
        example["id"] = f"{split}_{index:05d}"
        example["image"] = _encodable(planes.reshape(3, 32, 32).transpose(1, 2, 0))
        yield index, example


def _encodable(image: np.ndarray) -> Any:
    """The image for Pillow, since TFDS has TensorFlow encode an array."""
    from PIL import Image  # Imported late: few processes prepare data.

    return Image.fromarray(image)
