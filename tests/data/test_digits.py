"""The digits split, and the stratified draw that calibration uses."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.data import Digits
from qexp.data.base import stratified_indices


def keys(images):
    return [image.numpy().tobytes() for image in images]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stratified_draw_is_balanced_unique_and_nested(data):
    classes, each = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    labels = torch.arange(classes * each) % classes
    size = data.draw(st.integers(1, len(labels)))
    seed = data.draw(st.integers(0, 5))
    chosen = stratified_indices(labels, size, seed).tolist()
    assert len(set(chosen)) == size
    counts = Counter(labels[chosen].tolist())
    assert all(abs(counts[c] - size / classes) < 1 for c in range(classes))
    assert stratified_indices(labels, len(labels), seed).tolist()[:size] == chosen


def test_a_stratified_draw_follows_unequal_shares():
    labels = torch.tensor([0] * 80 + [1] * 20)
    assert labels[stratified_indices(labels, 10, seed=3)].bincount().tolist() == [8, 2]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_digits_are_split_without_loss_or_overlap(share):
    from sklearn.datasets import load_digits

    data = Digits(train_share=share, calibration_size=10, seed=3)
    data.setup()
    train, test = data.splits
    assert len(train) == int(1797 * share)
    images = torch.cat([train.sources, test.sources])
    pixels = ((images - images.min()) / (images.max() - images.min()) * 16).round()
    expected = torch.from_numpy(load_digits().images).float().unsqueeze(1)
    assert Counter(keys(pixels)) == Counter(keys(expected))


def test_digits_are_stratified_and_normalised_by_the_training_split():
    data = Digits(train_share=0.5)
    data.setup()
    train, test = (split.labels.bincount() for split in data.splits)
    assert (train - test).abs().max() <= 1
    std, mean = torch.std_mean(data.splits[0].sources)
    assert mean.abs() < 1e-5 and (std - 1).abs() < 1e-5
    assert data.splits[1].sources.mean().abs() > 1e-5


def test_the_seed_decides_the_digits_split():
    first, again, other = (Digits(seed=seed) for seed in (0, 0, 1))
    for data in (first, again, other):
        data.setup()
    assert torch.equal(first.splits[1].labels, again.splits[1].labels)
    assert not torch.equal(first.splits[1].labels, other.splits[1].labels)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2, "half", None, float("nan")])
def test_a_bad_share_is_named(share):
    with pytest.raises(ValueError, match=f"^data.train_share={share!r}: must be between 0.01 and 0.99$"):
        Digits(train_share=share)
