"""Image folders: class order, views, workers and errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qexp.data import ImageFolder
from qexp.data.image_folder import center_box, random_box, read_image


def test_classes_are_numbered_by_sorted_folder_name(image_root):
    data = ImageFolder(image_root, image_size=16, calibration_size=2, num_workers=0)
    data.setup()
    assert data.classes == ["ant", "bird"] and data.num_classes == 2
    for split in data.splits:
        assert all(
            path.parent.name == data.classes[label] for path, label in zip(split.sources, split.labels, strict=True)
        )


def test_workers_do_not_change_the_images(image_root, batches):
    options = {"image_size": 16, "batch_size": 4, "calibration_size": 2}
    loaders = [ImageFolder(image_root, num_workers=n, **options).train_dataloader() for n in (0, 2)]
    here, there = (batches(loader) for loader in loaders)
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])


def test_training_views_vary_and_test_views_do_not(image_root):
    data = ImageFolder(image_root, image_size=16, calibration_size=2, num_workers=0)
    data.setup()
    train = data.splits[0]
    assert len({train[0, seed][0].numpy().tobytes() for seed in range(10)}) == 10
    assert torch.equal(train[0, 5][0], train[0, 5][0])
    assert torch.equal(train[0][0], train[0][0])


def test_training_views_are_mirrored_half_of_the_time(tmp_path):
    ramp = np.arange(100, dtype=np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    views = [read_image(tmp_path / "ramp.png", torch.Generator().manual_seed(n), size=8) for n in range(200)]
    mirrored = sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in views)
    assert 70 < mirrored < 130


def test_an_image_is_cropped_in_the_center_and_normalised(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = [255, 0, 0]  # the central square is red, the rest black
    Image.fromarray(pixels).save(tmp_path / "red.png")
    image = read_image(tmp_path / "red.png", None, size=32)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]).view(3, 1, 1)
    torch.testing.assert_close(image, expected.expand(3, 32, 32))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_color_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new(mode, (20, 20)).save(path)
    assert read_image(path, None, size=8).shape == (3, 8, 8)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 100))
def test_boxes_stay_inside_the_image(width, height, seed):
    for box in (
        center_box((width, height)),
        random_box((width, height), torch.Generator().manual_seed(seed)),
    ):
        left, top, right, bottom = box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_boxes_cover_the_documented_range():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([random_box((100, 100), generator) for _ in range(500)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = wide * high / 100**2, wide / high
    assert 0.08 <= area.min() < 0.12 and 0.9 < area.max() <= 1
    assert 0.749 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.334


@pytest.mark.parametrize("keep", [0, 40, 200])
def test_a_corrupt_image_is_named(image_root, keep):
    path = image_root / "val" / "bird" / "1.jpg"
    path.write_bytes(path.read_bytes()[:keep])
    data = ImageFolder(image_root, image_size=16, calibration_size=2, num_workers=0)
    with pytest.raises(ValueError, match=f"^data.root: {path} is no readable image$"):
        list(data.test_dataloader())


def test_empty_and_differing_folders_are_named(image_root):
    extra = image_root / "val" / "cat"
    extra.mkdir()
    with pytest.raises(ValueError, match="train and val hold different class folders$"):
        ImageFolder(image_root, calibration_size=2).setup()
    (image_root / "train" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="train/cat holds no jpg, jpeg or png image$"):
        ImageFolder(image_root, calibration_size=2).setup()


def test_a_folder_without_classes_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^data.root={tmp_path}: train must hold one folder"):
        ImageFolder(tmp_path)


def test_a_bad_image_size_is_named(image_root):
    with pytest.raises(ValueError, match="^data.image_size=0: must be a whole number of at least 1$"):
        ImageFolder(image_root, image_size=0)


def test_the_fingerprint_changes_with_a_training_image_alone(image_root):
    def fingerprint() -> str:
        return ImageFolder(image_root, calibration_size=2).fingerprint()

    before = fingerprint()
    (image_root / "val" / "ant" / "0.png").write_bytes((image_root / "val" / "bird" / "0.png").read_bytes())
    assert fingerprint() == before
    (image_root / "train" / "ant" / "0.png").write_bytes((image_root / "train" / "bird" / "0.png").read_bytes())
    assert fingerprint() != before
