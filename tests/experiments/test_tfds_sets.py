"""The data sets of TFDS: every image or an error that helps, and no TensorFlow."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dissect_optax.dissection import UserError
from experiments.command_line import main
from experiments.tfds_sets import load_tfds
from tests.experiments import small_tfds
from tests.experiments.small_tfds import digest

REPOSITORY = Path(__file__).parents[2]
NAMES = list(small_tfds.VERSIONS)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def server():
    with small_tfds.archive_server() as server:
        yield server


@pytest.fixture
def downloads(server, monkeypatch):
    """Has TFDS download the small sets, so that only the addresses are not real."""
    for name in NAMES:
        serve(monkeypatch, name, small_tfds.url_infos(name, server.address))


@pytest.fixture
def no_network(monkeypatch):
    """Nobody listens where TFDS would download from."""
    for name in NAMES:
        serve(monkeypatch, name, small_tfds.url_infos(name, "http://127.0.0.1:9"))


def serve(monkeypatch, name, url_infos):
    monkeypatch.setattr(tfds.builder_cls(name), "url_infos", url_infos)


@pytest.fixture
def mnist(small_data_dir, tmp_path):
    """A copy of the small MNIST, to be damaged."""
    copy = tmp_path / "data" / "mnist" / "3.0.1"
    shutil.copytree(small_data_dir / "mnist" / "3.0.1", copy)
    return copy


def load_error(data_dir, name="mnist"):
    with pytest.raises(UserError) as caught:
        load_tfds(name, data_dir)
    message = str(caught.value)
    assert "--data-dir" in message
    assert "TFDS_DATA_DIR" in message
    assert "digits needs no data" in message
    return message


def label_of_each_image(images, labels):
    return {
        image.tobytes(): int(label)
        for image, label in zip(np.asarray(images), labels.tolist(), strict=True)
    }


def start(code, *arguments, **options):
    """Another process, which ends well unless it imports TensorFlow."""
    code += "\nimport sys; assert 'tensorflow' not in sys.modules"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ---- Reading ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_image_is_read_with_its_label(name, small_data_dir):
    dataset = load_tfds(name, small_data_dir)
    for split, half in (("train", dataset.training), ("test", dataset.test)):
        expected = small_tfds.small_half(name, split)
        assert half.image.shape == expected.images.shape
        assert half.image.dtype == np.uint8
        assert half.label.dtype == np.int32
        assert isinstance(half.image, jax.Array)
        assert label_of_each_image(*half) == label_of_each_image(*expected[:2])


def test_reading_needs_no_tensorflow_and_makes_no_noise(small_data_dir):
    code = """
from experiments.tfds_sets import load_tfds
from tests.experiments.small_tfds import digest
print(digest(load_tfds("mnist", None)))
"""
    process = start(code, env={**os.environ, "TFDS_DATA_DIR": str(small_data_dir)})
    output, errors = process.communicate()
    assert errors == ""
    assert process.returncode == 0
    assert output.strip() == digest(load_tfds("mnist", small_data_dir))


def test_home_directory_may_be_abbreviated(small_data_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(small_data_dir))
    dataset = load_tfds("mnist", Path("~"))
    assert len(dataset.test.label) == small_tfds.SIZES["test"]


# ---- Damage -----------------------------------------------------------------------


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def shard(directory, split="test"):
    return directory / f"mnist-{split}.array_record-00001-of-00002"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "shard missing": (
        lambda directory: shard(directory).unlink(),
        "No such file.*mnist-test.array_record-00001-of-00002",
    ),
    "shard empty": (lambda directory: shard(directory).write_bytes(b""), "64KB"),
    "shard truncated": (
        lambda directory: os.truncate(shard(directory), 65536),
        "half 'test': .+",
    ),
    "shard altered": (lambda directory: flip_a_bit(shard(directory)), "mismatch"),
    "shard of the other half": (
        lambda directory: shutil.copy(shard(directory, "train"), shard(directory)),
        "half 'test': .* describes 50 examples, the files hold 125",
    ),
    "fewer described": (
        lambda directory: rewrite(directory / "dataset_info.json", '"25"', '"24"'),
        "half 'test': .* describes 48 examples, the files hold 50",
    ),
    "half missing": (
        lambda directory: rewrite(directory / "dataset_info.json", '"test"', '"tset"'),
        "test",
    ),
    "description missing": (
        lambda directory: (directory / "dataset_info.json").unlink(),
        "No such file.*dataset_info.json",
    ),
    "description corrupt": (
        lambda directory: os.truncate(directory / "dataset_info.json", 300),
        "dataset_info.json is no JSON",
    ),
    "description of nothing": (
        lambda directory: (directory / "dataset_info.json").write_text("{}"),
        "version",
    ),
    "features missing": (
        lambda directory: (directory / "features.json").unlink(),
        "No such file.*features.json",
    ),
    "features corrupt": (
        lambda directory: os.truncate(directory / "features.json", 300),
        "features.json is no JSON",
    ),
    "empty": (
        lambda directory: (shutil.rmtree(directory), directory.mkdir()),
        "dataset_info.json",
    ),
    "a file": (
        lambda directory: (shutil.rmtree(directory), directory.touch()),
        "Not a directory",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind, mnist):
    damage, reason = DAMAGES[kind]
    damage(mnist)
    message = load_error(mnist.parents[1])
    assert f"The data set in {mnist} is damaged" in message
    assert re.search(reason, message)
    assert "Remove that directory" in message


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        (
            "image",
            Image.new("L", (28, 27)),
            r"uint8 \(28, 28, 1\), got uint8 \(27, 28, 1\)",
        ),
        (
            "image",
            Image.new("RGB", (28, 28)),
            r"uint8 \(28, 28, 1\), got uint8 \(28, 28, 3\)",
        ),
        ("label", 10, "labels from 0 to 9, got 10 to 10"),
    ],
)
def test_examples_that_the_set_does_not_have(
    part, value, reason, tmp_path, monkeypatch
):
    # TFDS would not write such a label.
    monkeypatch.setattr(tfds.features.ClassLabel, "encode_example", lambda _, x: x)
    small_tfds.write_small_set(
        "mnist", tmp_path, alter=lambda example: {**example, part: value}
    )
    message = load_error(tmp_path)
    assert f"{tmp_path / 'mnist' / '3.0.1'} is damaged" in message
    assert re.search(reason, message)


def test_another_file_format_is_named(mnist):
    rewrite(mnist / "dataset_info.json", "array_record", "tfrecord")
    message = load_error(mnist.parents[1])
    assert str(mnist) in message
    assert "stored as tfrecord" in message


def test_data_directory_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    message = load_error(path)
    assert f"No data set can be read from or written to {path}" in message
    assert "Not a directory" in message


def test_data_directory_that_may_not_be_read(mnist):
    data_dir = mnist.parents[1]
    data_dir.chmod(0)
    user = os.geteuid()
    if user == 0:  # To whom nothing is forbidden.
        os.seteuid(65534)
    try:
        message = load_error(data_dir)
    finally:
        os.seteuid(user)
        data_dir.chmod(0o755)
    assert f"No data set can be read from or written to {data_dir}" in message
    assert "Permission denied" in message


# ---- First use --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_first_use_downloads_and_prepares(
    name, downloads, small_data_dir, tmp_path, capsys
):
    data_dir = tmp_path / "not" / "yet"
    dataset = load_tfds(name, data_dir)
    # TFDS wrote the other one from the same images: the order is the same as well.
    assert digest(dataset) == digest(load_tfds(name, small_data_dir))
    images = small_tfds.small_half(name, "train").images
    assert not np.array_equal(dataset.training.image, images)
    # The classes have names, and the download is remembered.
    info = tfds.builder(name, data_dir=data_dir).info
    assert (info.features["label"].names[0] == "class_0") == (name != "mnist")
    assert info.download_size > 0
    assert capsys.readouterr().out == ""
    # Another use downloads nothing.
    shutil.rmtree(data_dir / "downloads")
    load_tfds(name, data_dir)
    assert not (data_dir / "downloads").exists()


def load_and_stop(job, *_):
    raise UserError(f"{len(job.data.test.label)} test images are there")


def test_without_network_it_says_which_command_prepares_the_data(
    no_network, server, monkeypatch, tmp_path, capsys
):
    data_dir = tmp_path / "my data"
    directory = data_dir / "mnist" / "3.0.1"
    message = load_error(data_dir)
    assert f"expected it in {directory}" in message
    assert "Connection refused" in message
    assert "On a machine with network" in message
    assert f"copy {directory}" in message
    assert not data_dir.exists()

    # The command works where there is a network. Training is tested elsewhere.
    serve(monkeypatch, "mnist", small_tfds.url_infos("mnist", server.address))
    monkeypatch.setattr("experiments.commands.complete", load_and_stop)
    (command,) = re.findall("python -m experiments (.*)", message)
    assert main([*shlex.split(command), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert directory.is_dir()
    assert "test images are there" in capsys.readouterr().err


def test_what_is_found_instead_of_the_set_is_named(no_network, mnist):
    (mnist.parent / "incomplete.AB12CD_3.0.1").mkdir()
    mnist.rename(mnist.with_name("3.0.0"))
    message = load_error(mnist.parents[1])
    assert f"expected it in {mnist} (found only: 3.0.0, incomplete.AB12CD" in message


def test_server_that_has_no_such_file(server, monkeypatch, tmp_path):
    url_infos = small_tfds.url_infos("mnist", f"{server.address}/moved")
    serve(monkeypatch, "mnist", url_infos)
    assert "404" in load_error(tmp_path)


def test_download_that_is_not_the_known_one(downloads, server, monkeypatch, tmp_path):
    known = small_tfds.url_infos("mnist", server.address)
    url = f"{server.address}/t10k-labels-idx1-ubyte.gz"
    serve(monkeypatch, "mnist", {**known, url: dataclasses.replace(known[url], size=1)})
    message = load_error(tmp_path)
    assert f"could not be prepared in {tmp_path / 'mnist' / '3.0.1'}" in message
    assert "wrong checksum" in message
    assert not list(tmp_path.glob("mnist/*"))

    serve(monkeypatch, "mnist", known)
    load_tfds("mnist", tmp_path)


PREPARING = """
import os, signal, sys
import tensorflow_datasets as tfds
from experiments.tfds_sets import load_tfds
from tests.experiments import small_tfds

data_dir, address = sys.argv[1:3]
small_tfds.download_from(address)
if sys.argv[3:]:
    # Everything else is written then, and nothing is in its place yet.
    tfds.core.DatasetInfo.write_to_directory = lambda *_: signal.raise_signal(9)
print(small_tfds.digest(load_tfds("mnist", data_dir)))
"""


def test_killed_preparation_is_begun_again(
    downloads, server, small_data_dir, tmp_path, capsys
):
    process = start(PREPARING, tmp_path, server.address, "to be killed")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (remains,) = tmp_path.glob("mnist/*")
    assert list(remains.glob("mnist-train.array_record*"))
    dataset = load_tfds("mnist", tmp_path)
    assert digest(dataset) == digest(load_tfds("mnist", small_data_dir))
    assert f"{remains} remains of an interrupted attempt" in capsys.readouterr().err


def test_two_processes_prepare_one_after_the_other(server, small_data_dir, tmp_path):
    server.open.clear()  # Downloads begin and stop there.
    processes = [start(PREPARING, tmp_path, server.address) for _ in range(2)]
    downloading, waiting = sorted(
        (process.stderr.readline() for process in processes), reverse=True
    )
    assert downloading.startswith("Downloading and preparing")
    directory = tmp_path / "mnist" / "3.0.1"
    assert (
        waiting == f"Another process prepares {directory}; waiting for it to finish.\n"
    )
    server.open.set()
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    expected = digest(load_tfds("mnist", small_data_dir))
    assert [output.strip() for output in outputs] == [expected] * 2
