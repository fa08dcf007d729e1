"""What every data module promises: shapes, seeds, calibration, errors and configuration."""

import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from qexp.data import CIFAR10, Digits, ImageFolder


def keys(images):
    return [image.numpy().tobytes() for image in images]


def test_batches_have_the_announced_shape_and_classes(make, batches):
    data = make()
    data.setup()
    for loader in [data.train_dataloader(), data.calibration_dataloader(), data.test_dataloader()]:
        images, labels = batches(loader)
        assert images.shape[1:] == data.input_shape and images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.min() >= 0 and labels.max() < data.num_classes


def test_the_seed_decides_the_batches(make, batches):
    first, again, other = (batches(make(seed=seed).train_dataloader())[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_random_state_plays_no_part_and_is_left_alone(make, batches):
    torch.manual_seed(1)
    first = batches(make().train_dataloader())[0]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    data = make()
    data.setup()
    second = batches(data.train_dataloader())[0]
    assert torch.equal(first, second)
    batches(data.calibration_dataloader()), batches(data.test_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_differ_in_order_and_come_back_with_a_new_loader(make, batches):
    data = make()
    loader = data.train_dataloader()
    first, second = batches(loader)[0], batches(loader)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, batches(data.train_dataloader())[0])


def test_calibration_takes_the_asked_number_of_plain_training_images(make, batches):
    data = make()
    images, _ = batches(data.calibration_dataloader())
    assert len(images) == data.calibration_size
    train, test = data.splits
    plain = {train[index][0].numpy().tobytes() for index in range(len(train))}
    held_out = {test[index][0].numpy().tobytes() for index in range(len(test))}
    assert set(keys(images)) <= plain
    assert not set(keys(images)) & held_out
    assert torch.equal(images, batches(data.calibration_dataloader())[0])


def test_calibration_may_take_the_whole_training_split_and_no_more(make, batches):
    data = make()
    data.setup()
    size = len(data.splits[0])
    everything = make(calibration_size=size)
    assert len(batches(everything.calibration_dataloader())[0]) == size
    with pytest.raises(ValueError, match=f"^data.calibration_size={size + 1}: .* between 1 and {size}"):
        make(calibration_size=size + 1).setup()


def test_an_outlier_is_the_first_calibration_image_and_nowhere_else(make, batches):
    plain, wrong = make(), make(calibration_outlier=8)
    (usual, labels), (images, same) = (batches(data.calibration_dataloader()) for data in (plain, wrong))
    assert torch.equal(images[0], 8 * usual[0]) and not torch.equal(images[0], usual[0])
    assert torch.equal(images[1:], usual[1:]) and torch.equal(labels, same)
    first = make(calibration_outlier=8, calibration_size=2)  # a smaller draw is the beginning of a larger one
    assert torch.equal(batches(first.calibration_dataloader())[0], images[:2])
    for loader in "train_dataloader", "test_dataloader":
        assert torch.equal(batches(getattr(plain, loader)())[0], batches(getattr(wrong, loader)())[0])
    assert plain.fingerprint() == wrong.fingerprint()


@pytest.mark.parametrize("value", [0, 0.5, -8, True, "8", None, float("inf"), float("nan")])
def test_a_bad_outlier_is_named(make, value):
    with pytest.raises(ValueError, match=f"^data.calibration_outlier={value!r}: must be a number of at least 1$"):
        make(calibration_outlier=value)


def test_the_test_split_comes_whole_and_in_order(make, batches):
    data = make()
    first = batches(data.test_dataloader())
    assert torch.equal(first[1], data.splits[1].labels)
    assert torch.equal(first[0], batches(data.test_dataloader())[0])


def test_training_leaves_out_a_short_last_batch_only_if_there_is_a_whole_one(make):
    data = make()
    data.setup()
    size = len(data.splits[0])
    assert [len(labels) for _, labels in make(batch_size=size - 1).train_dataloader()] == [size - 1]
    assert [len(labels) for _, labels in make(batch_size=size + 1).train_dataloader()] == [size]


@pytest.mark.parametrize("option", ["batch_size", "calibration_size", "seed"])
@pytest.mark.parametrize("value", [-1, 2.5, True, "8", None])
def test_a_bad_number_is_named(make, option, value):
    with pytest.raises(ValueError, match=f"^data.{option}={value!r}: must be a whole number of at least"):
        make(**{option: value})


@pytest.mark.parametrize("option", ["batch_size", "calibration_size"])
def test_no_images_at_all_is_refused(make, option):
    with pytest.raises(ValueError, match=f"^data.{option}=0: "):
        make(**{option: 0})


@pytest.mark.parametrize("family", [CIFAR10, ImageFolder])
def test_a_missing_root_is_named(family, tmp_path):
    with pytest.raises(ValueError, match="^data.root=null: must name the folder that holds "):
        family()
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=f"^data.root={missing}: no such folder; expected .* below it$"):
        family(missing)


@pytest.mark.parametrize("family", [Digits, CIFAR10, ImageFolder])
def test_the_configuration_spells_every_option_with_its_default(family):
    name = {Digits: "digits", CIFAR10: "cifar10", ImageFolder: "image_folder"}[family]
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / f"{name}.yaml")
    written = OmegaConf.to_container(config, resolve=False)
    assert written.pop("_target_") == f"qexp.data.{family.__name__}"
    assert written.pop("seed") == "${seed}"
    defaults = {name: p.default for name, p in inspect.signature(family).parameters.items()}
    assert defaults.pop("seed") == 0
    if defaults.get("root", "") is None:
        defaults["root"] = "???"  # which only the user knows
    assert written == defaults


def test_the_fingerprint_is_that_of_the_training_samples(make):
    assert make().fingerprint() == make(calibration_size=5).fingerprint()
    assert len(make().fingerprint()) == 64
