"""Small sets in TFDS's format under the names of the real ones, and their archives."""

import contextlib
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZES = {"train": 200, "test": 50}
VERSIONS = {"mnist": "3.0.1", "cifar10": "3.0.2", "cifar100": "3.0.2"}
SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}
CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100}


class Half(NamedTuple):
    images: np.ndarray
    labels: np.ndarray
    coarse_labels: np.ndarray


def small_half(name: str, split: str) -> Half:
    """Random images; no two are the same."""
    rng = np.random.default_rng([*name.encode(), SIZES[split]])
    images = rng.integers(256, size=(SIZES[split], *SHAPES[name]), dtype=np.uint8)
    labels = rng.integers(CLASSES[name], size=SIZES[split], dtype=np.uint8)
    return Half(images, labels, labels // 5)


def digest(arrays: Any) -> str:
    """What tells one data set from another, order included."""
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays))
    return hashlib.sha256(content).hexdigest()


# ---- As TFDS keeps them -----------------------------------------------------------


def write_small_sets(data_dir: Path) -> None:
    """All three sets, each half in two files."""
    for name in VERSIONS:
        write_small_set(name, data_dir)


def write_small_set(name: str, data_dir: Path, alter: Callable = dict) -> None:
    """One set; every example is altered before it is written."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder._split_generators = lambda _: {
        split: ((index, alter(example)) for index, example in examples(name, split))
        for split in SIZES
    }
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(num_shards=2)
        )


def examples(name: str, split: str) -> Iterator[tuple[int, dict]]:
    images, labels, coarse_labels = small_half(name, split)
    for index, image in enumerate(images):
        # Given an array, TFDS would ask TensorFlow to encode it.
        example = {"image": Image.fromarray(image.squeeze())}
        example["label"] = int(labels[index])
        if name != "mnist":
            example["id"] = f"{split}_{index:05d}"
        if name == "cifar100":
            example["coarse_label"] = int(coarse_labels[index])
        yield index, example


# ---- As their authors publish them ------------------------------------------------


def idx_file(array: np.ndarray) -> bytes:
    """The format of MNIST's files: type, number of axes, lengths, numbers."""
    lengths = np.array(array.shape, ">i4").tobytes()
    header = bytes([0, 0, 8, array.ndim]) + lengths
    return gzip.compress(header + array.tobytes(), mtime=0)


def cifar_file(name: str, half: Half) -> bytes:
    """The format of a CIFAR's files: labels and colour planes, image by image."""
    labels = half.labels[:, None]
    if name == "cifar100":
        labels = np.stack([half.coarse_labels, half.labels], axis=1)
    planes = half.images.transpose(0, 3, 1, 2).reshape(len(half.images), -1)
    return np.concatenate([labels, planes], axis=1).tobytes()


def tar_file(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)


def class_names(count: int) -> bytes:
    """As in the archives, with an empty line at the end."""
    return "".join(f"class_{index}\n" for index in range(count)).encode() + b"\n"


def archives(name: str) -> dict[str, bytes]:
    """The files to download, with the images of the small set."""
    train, test = (small_half(name, split) for split in SIZES)
    if name == "mnist":
        return {
            "train-images-idx3-ubyte.gz": idx_file(train.images[..., 0]),
            "train-labels-idx1-ubyte.gz": idx_file(train.labels),
            "t10k-images-idx3-ubyte.gz": idx_file(test.images[..., 0]),
            "t10k-labels-idx1-ubyte.gz": idx_file(test.labels),
        }
    if name == "cifar10":
        folder = "cifar-10-batches-bin"
        files = {
            f"{folder}/test_batch.bin": cifar_file(name, test),
            f"{folder}/batches.meta.txt": class_names(10),
        }
        for number, rows in enumerate(np.split(np.arange(SIZES["train"]), 5), start=1):
            fifth = Half(*(column[rows] for column in train))
            files[f"{folder}/data_batch_{number}.bin"] = cifar_file(name, fifth)
        return {"cifar-10-binary.tar.gz": tar_file(files)}
    files = {
        "cifar-100-binary/train.bin": cifar_file(name, train),
        "cifar-100-binary/test.bin": cifar_file(name, test),
        "cifar-100-binary/fine_label_names.txt": class_names(100),
        "cifar-100-binary/coarse_label_names.txt": class_names(20),
    }
    return {"cifar-100-binary.tar.gz": tar_file(files)}


class ArchiveServer(http.server.ThreadingHTTPServer):
    """Serves the archives of every small set on this machine.

    Attributes:
      open: While this is not set, an answer stops after its header.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = {k: v for name in VERSIONS for k, v in archives(name).items()}
        self.open = threading.Event()
        self.open.set()

    def handle_error(self, request, client_address) -> None:
        """The other side may hang up; that is no error here."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = self.server.files.get(self.path.removeprefix("/"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.server.open.wait()
        self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        """Standard error is for what is tested."""


@contextlib.contextmanager
def archive_server() -> Iterator[ArchiveServer]:
    with ArchiveServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.open.set()
            server.shutdown()
            thread.join()


def url_infos(name: str, address: str) -> dict:
    """What TFDS knows of the downloads, with another address and its checksums."""
    return {
        f"{address}/{filename}": tfds.core.download.checksums.UrlInfo(
            size=tfds.core.utils.Size(len(content)),
            checksum=hashlib.sha256(content).hexdigest(),
            filename=filename,
        )
        for filename, content in archives(name).items()
    }


def download_from(address: str) -> None:
    """Has TFDS download the small sets from there, for the life of this process."""
    for name in VERSIONS:
        tfds.builder_cls(name).url_infos = url_infos(name, address)
