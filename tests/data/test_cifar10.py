"""CIFAR-10: both file formats, augmentation, and files that must not be trusted."""

import io
import os
import pickle

import numpy as np
import pytest
import torch

from qexp.data import CIFAR10
from qexp.data.cifar10 import MEAN, STD


class Python2Pickler(pickle._Pickler):
    """Writes byte strings the way Python 2 did, as the published files have them."""

    def save_string(self, value):
        value = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def python2_dumps(batch):
    """The bytes of a published file, with the name that numpy had then."""
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(batch)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def modern_dumps(batch):
    return pickle.dumps(batch, protocol=4)


def pickled_root(root, cifar_batches, dumps):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, images, labels in cifar_batches:
        batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": b"x"}
        (folder / name).write_bytes(dumps(batch))
    return root


@pytest.mark.parametrize("dumps", [python2_dumps, modern_dumps])
def test_both_versions_hold_the_same_images(tmp_path, cifar_root, dumps, cifar_batches):
    other = tmp_path / "other"
    other.mkdir()
    splits = []
    for root in (cifar_root, pickled_root(other, cifar_batches, dumps)):
        data = CIFAR10(root, calibration_size=4)
        data.setup()
        splits.append(data.splits)
    for binary, pickled in zip(*splits, strict=True):
        assert torch.equal(binary.sources, pickled.sources)
        assert torch.equal(binary.labels, pickled.labels)
    assert len(splits[0][0]) == 100 and len(splits[0][1]) == 20


def test_the_binary_version_is_read_first(cifar_root):
    folder = cifar_root / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"never read")
    data = CIFAR10(cifar_root, calibration_size=4)
    data.setup()
    assert len(data.splits[0]) == 100


def test_pixels_are_stored_channel_first_and_normalised(cifar_root, cifar_batches):
    data = CIFAR10(cifar_root, calibration_size=4)
    _, images, labels = cifar_batches[0]
    data.setup()
    image, label = data.splits[0][7]
    expected = torch.from_numpy(images[7].reshape(3, 32, 32)).float() / 255
    torch.testing.assert_close(image * STD + MEAN, expected)
    assert label == labels[7]


def test_augmentation_shifts_and_flips_and_can_be_switched_off(cifar_root):
    plain = CIFAR10(cifar_root, augment=False, calibration_size=4)
    augmented = CIFAR10(cifar_root, calibration_size=4)
    for data in (plain, augmented):
        data.setup()
    original = plain.splits[0][0][0]
    assert all(torch.equal(plain.splits[0][0, seed][0], original) for seed in range(20))
    # Each view is the original, flipped or not, cut from a border of four black pixels.
    black = ((0 - MEAN) / STD).expand(3, 40, 40)
    views = set()
    for flip in (False, True):
        padded = black.clone()
        padded[:, 4:36, 4:36] = original
        padded = padded.flip(2) if flip else padded
        views |= {padded[:, y : y + 32, x : x + 32].contiguous().numpy().tobytes() for y in range(9) for x in range(9)}
    drawn = {augmented.splits[0][0, seed][0].contiguous().numpy().tobytes() for seed in range(300)}
    assert drawn <= views
    assert len(drawn) > 100


class Attack:
    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("place", ["alone", "as labels", "beside the images"])
def test_a_malicious_pickle_is_refused_before_it_runs(tmp_path, place, cifar_batches):
    attack = Attack()
    attack.target = str(tmp_path / "attacked")
    root = pickled_root(tmp_path, cifar_batches, modern_dumps)
    path = root / "cifar-10-batches-py" / "data_batch_2"
    good = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}
    bad = {
        "alone": attack,
        "as labels": {**good, b"labels": attack},
        "beside the images": {**good, b"x": attack},
    }
    path.write_bytes(pickle.dumps(bad[place], protocol=4))
    with pytest.raises(ValueError, match=f"^data.root: {path} was refused, it asks for posix.mkdir, .* allowed$"):
        CIFAR10(root).setup()
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": [0]}),
        pickle.dumps({b"data": 3, b"labels": [0]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": 0.5}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), np.int8), b"labels": [0]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [0]}, protocol=4),
        pickle.dumps({b"data": np.array([["x"]], object), b"labels": [0]}, protocol=4),
    ],
)
def test_a_damaged_pickle_is_named(tmp_path, content, cifar_batches):
    root = pickled_root(tmp_path, cifar_batches, modern_dumps)
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^data.root: {path} is no CIFAR-10 batch, "):
        CIFAR10(root).setup()


@pytest.mark.parametrize("content", [b"", b"\x00" * 3072, b"\x0a" + b"\x00" * 3072])
def test_a_damaged_binary_file_is_named(cifar_root, content):
    path = cifar_root / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^data.root: {path} is no CIFAR-10 batch, "):
        CIFAR10(cifar_root).setup()


def test_a_missing_batch_and_a_folder_without_batches_are_named(cifar_root, tmp_path):
    path = cifar_root / "cifar-10-batches-bin" / "data_batch_5.bin"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"^data.root: {path} is missing$"):
        CIFAR10(cifar_root).setup()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds neither cifar-10-batches-bin nor cifar-10-batches-py$"):
        CIFAR10(empty).setup()


def test_a_bad_augment_is_named(cifar_root):
    with pytest.raises(ValueError, match="^data.augment='yes': must be true or false$"):
        CIFAR10(cifar_root, augment="yes")


def test_the_fingerprint_changes_with_a_training_pixel(cifar_root):
    before = CIFAR10(cifar_root, calibration_size=4).fingerprint()
    path = cifar_root / "cifar-10-batches-bin" / "data_batch_3.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert CIFAR10(cifar_root, calibration_size=4).fingerprint() != before
