"""MNIST, CIFAR-10 and CIFAR-100 from TFDS, read and prepared without TensorFlow.

TFDS keeps a data set in `<directory of all sets>/<name>/<version>`. What is there is
read, and every image counts: a shard that is missing or damaged is an error. What is
not there is downloaded and prepared on first use.
"""

import contextlib
import functools
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dissect_optax.dissection import Data, UserError, first_line, only_process
from experiments.image_archives import Half, cifar_half, files_of, mnist_halves
from experiments.paths import expand_home
from experiments.problems.image_problem import Examples

# TensorFlow Datasets and what comes with it are imported late: that takes two seconds,
# and problems that bring their data do not need them.

_IMAGES_AT_ONCE = 1000
_SECONDS_TO_ANSWER = 15
_ELSEWHERE = (
    "To use another directory of data sets, name it by --data-dir or by the environment"
    " variable TFDS_DATA_DIR. The problem digits needs no data."
)


def load_tfds(name: str, data_dir: Path | None) -> Data:
    """A data set of TFDS, downloaded and prepared on first use.

    The order is that of the files: TFDS shuffles while it writes, always in the same
    way, so each half is in a random order that every machine shares.

    Args:
      name: "mnist", "cifar10" or "cifar100".
      data_dir: Directory of all data sets. None for the one that the environment
        variable TFDS_DATA_DIR named when TFDS was imported, or else for TFDS's own,
        `~/tensorflow_datasets`.

    Returns:
      Both halves whole, on the device: images uint8 `[N, height, width, channels]`,
      labels int32 `[N]`.

    Raises:
      UserError: The data set is not there and cannot be prepared, or what is there is
        not whole.
    """
    import tensorflow_datasets as tfds

    # It reports there on its housekeeping, and recommends another decoder of images.
    logging.getLogger("absl").setLevel(logging.ERROR)
    root = expand_home(Path(data_dir or tfds.core.constants.DATA_DIR)).absolute()
    directory = root / name / str(tfds.builder_cls(name).VERSION)
    try:
        if not _exists(directory):
            _prepare(name, directory)
    except OSError as error:
        raise UserError(
            f"No data set can be read from or written to {root} ({error}). Expected a"
            f" directory that you may read and write. {_ELSEWHERE}"
        ) from error
    try:
        halves = _read(name, directory)
    except UserError:
        raise
    # Each layer below has errors of its own: JSON, protocol buffers, TFDS, records,
    # images.
    except Exception as error:
        raise UserError(
            f"The data set in {directory} is damaged or cannot be read:"
            f" {first_line(error)} Remove that directory, and the same command"
            f" prepares the data anew. {_ELSEWHERE}"
        ) from error
    return Data(
        *(
            Examples(jnp.asarray(images), jnp.asarray(labels))
            for images, labels in halves
        )
    )


def _exists(path: Path) -> bool:
    """Whether there is something; unlike `Path.exists`, raises where it cannot tell."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


# ---- Reading ----------------------------------------------------------------------


def _read(name: str, directory: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of the training and the test half."""
    import tensorflow_datasets as tfds

    for description in ("dataset_info.json", "features.json"):
        try:
            json.loads((directory / description).read_text())
        except ValueError as error:
            raise ValueError(f"{description} is no JSON: {error}") from error
    builder = tfds.builder(name, data_dir=directory.parents[1])
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"The data set in {directory} is stored as {file_format}, which needs"
            " TensorFlow; expected array_record. With another directory of data sets,"
            f" the same command prepares it there as array_record. {_ELSEWHERE}"
        )
    halves = []
    for split in ("train", "test"):
        try:
            halves.append(_read_half(builder, split))
        except Exception as error:
            # Those of the records do not say where they come from.
            raise ValueError(f"half '{split}': {first_line(error)}") from error
    return halves


def _read_half(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a half, in the order of the files."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    described = builder.info.splits[split]
    count = described.num_examples
    # TFDS itself reads as many records as are described, of however many there are.
    stored = len(
        ArrayRecordDataSource([os.fspath(path) for path in described.filepaths])
    )
    if stored != count:
        raise ValueError(
            f"dataset_info.json describes {count} examples, the files hold {stored}"
        )
    shape = builder.info.features["image"].shape
    images = np.empty((count, *shape), np.uint8)
    labels = np.empty(count, np.int32)
    source = builder.as_data_source(split)
    for start in range(0, count, _IMAGES_AT_ONCE):
        chunk = slice(start, min(start + _IMAGES_AT_ONCE, count))
        examples = source.__getitems__(range(chunk.start, chunk.stop))
        read = np.stack([example["image"] for example in examples])
        if read.shape[1:] != shape or read.dtype != images.dtype:
            raise ValueError(
                f"expected images of {images.dtype} {shape}, got {read.dtype}"
                f" {read.shape[1:]}"
            )
        images[chunk] = read
        labels[chunk] = [example["label"] for example in examples]
    classes = builder.info.features["label"].num_classes
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"expected labels from 0 to {classes - 1}, got {labels.min()} to"
            f" {labels.max()}"
        )
    return images, labels


# ---- First use --------------------------------------------------------------------


def _prepare(name: str, directory: Path) -> None:
    """Downloads the data set and has TFDS write it."""
    import tensorflow_datasets as tfds

    root = directory.parents[1]
    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    urls = {info.filename: url for url, info in builder.url_infos.items()}
    _check_connection(name, directory, next(iter(urls.values())))
    root.mkdir(parents=True, exist_ok=True)
    news = f"Another process prepares {directory}; waiting for it to finish."
    with only_process(root / f".{name}.lock", _tell, news):
        if _exists(directory):
            return  # Another process was faster.
        for remains in directory.parent.glob("incomplete.*"):
            _tell(f"{remains} remains of an interrupted attempt; you can remove it.")
        # TFDS's own way with the archives needs TensorFlow.
        builder._split_generators = functools.partial(_halves, builder, urls)
        tfds.display_progress_bar(sys.stderr.isatty())
        try:
            with contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare()
        except Exception as error:
            raise UserError(
                f"The data set {name} could not be prepared in {directory}:"
                f" {first_line(_origin(error))} Nothing of it is there now; the same"
                f" command tries again. {_ELSEWHERE}"
            ) from error


def _halves(builder: Any, urls: Mapping[str, str], downloads: Any) -> dict[str, Half]:
    """The examples of both halves, in place of TFDS's `_split_generators`."""
    paths = downloads.download(urls)
    if builder.name == "mnist":
        return mnist_halves(paths)
    (path,) = paths.values()
    files = files_of(path)
    layout = builder._cifar_info
    for key, file in zip(layout.label_keys, layout.label_files, strict=True):
        builder.info.features[key].names = files[file].decode().split()
    return {
        split: cifar_half(split, [files[name] for name in names], layout.label_keys)
        for split, names in (("train", layout.train_files), ("test", layout.test_files))
    }


def _check_connection(name: str, directory: Path, url: str) -> None:
    """Says what to do without network, where TFDS would try for three minutes."""
    import requests

    try:
        with requests.get(url, stream=True, timeout=_SECONDS_TO_ANSWER) as response:
            response.raise_for_status()
    except requests.RequestException as error:
        root = directory.parents[1]
        others = sorted(
            path.name for path in directory.parent.glob("*") if path.is_dir()
        )
        found = f" (found only: {', '.join(others)})" if others else ""
        raise UserError(
            f"The data set {name} is not there: expected it in {directory}{found}. It"
            f" cannot be downloaded either: {url}: {first_line(_origin(error))}\n"
            "On a machine with network,\n"
            f"    python -m experiments train {name} --optimizer m_svag --learning-rate"
            f" 0.03 --smoke --data-dir {shlex.quote(str(root))}\n"
            f"downloads and prepares it; copy {directory} from there. {_ELSEWHERE}"
        ) from error


def _origin(error: BaseException) -> BaseException:
    """The error at the beginning of a chain, the one that says what happened."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _tell(sentence: str) -> None:
    """A line on standard error: standard output is for results."""
    print(sentence, file=sys.stderr, flush=True)
