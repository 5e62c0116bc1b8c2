"""Mixup, cutmix and random erasing against timm's, for the same random numbers."""

import functools
import types

import harness  # noqa: F401  (makes torchvision, and so timm, importable beside a CPU build of torch)
import jax
import numpy as np
import pytest
import timm.data.mixup
import timm.data.random_erasing
import torch

from wkd_jax.data import mix
from wkd_jax.losses import cross_entropy

CLASSES, BATCH = 7, 6


@pytest.mark.parametrize(
    ("cutmix", "size", "part", "centre"),
    [
        (False, (9, 14), 21845, None),
        (False, (9, 14), 65000, None),
        (True, (32, 32), 20000, (3, 30)),  # cut off at two borders
        (True, (9, 14), 40000, (4, 7)),
        (True, (9, 14), 65535, (4, 7)),  # less than a pixel
        (True, (9, 14), 0, (8, 0)),
    ],
)
def test_mixing_and_smoothed_targets(monkeypatch, cutmix, size, part, centre):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, *size, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, BATCH)
    lam = part / 65536  # what `draw_mix` can draw

    reference = timm.data.mixup.FastCollateMixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    monkeypatch.setattr(reference, "_params_per_batch", lambda: (lam, cutmix))
    numbers = iter(centre or ())
    monkeypatch.setattr(np.random, "randint", lambda low, high, size=None: next(numbers))
    wanted, target = reference(list(zip(images.transpose(0, 3, 1, 2), labels, strict=True)))

    box = np.zeros((1, 4), np.int32)
    if cutmix:
        box = jax.jit(mix.cut_box, static_argnums=3)(np.float32([lam]), *np.array(centre)[:, None], size)
    share = np.ones(1, np.float32) if cutmix else np.float32([lam])
    apply = jax.jit(functools.partial(mix.apply_mix, num_classes=CLASSES))
    mixed, soft = apply(images, labels, np.ones(BATCH, bool), share, box)
    np.testing.assert_array_equal(mixed, wanted.numpy().transpose(0, 2, 3, 1))

    logits = rng.normal(size=(BATCH, CLASSES)).astype(np.float32)
    loss = -(target * torch.log_softmax(torch.tensor(logits), dim=-1)).sum(dim=-1)
    np.testing.assert_allclose(cross_entropy(logits, soft, label_smoothing=0.1), loss, rtol=2e-6)  # float32 sums


@pytest.mark.parametrize(("size", "probability"), [((48, 48), 0.25), ((3, 60), 0.9)])
def test_erased_boxes(monkeypatch, size, probability):
    count = 200
    numbers = np.random.default_rng(1).random((count, mix.ERASE_NUMBERS)).astype(np.float32)
    draw = jax.jit(jax.vmap(lambda one: mix.erase_box(one, size, probability=probability)))
    boxes = np.asarray(draw(numbers))
    reference = timm.data.random_erasing.RandomErasing(probability, mode="pixel", device="cpu")
    erased = 0
    for one, box in zip(numbers.astype(float), boxes, strict=True):
        tries = iter(one[1:21].reshape(2, 10).T.ravel())  # area, aspect, area, ...
        place = iter(one[21:])
        fake = types.SimpleNamespace(
            random=lambda one=one: one[0],
            uniform=lambda low, high, tries=tries: low + (high - low) * next(tries),
            randint=lambda low, high, place=place: low + int(next(place) * (high - low + 1)),
        )
        monkeypatch.setattr(timm.data.random_erasing, "random", fake)
        changed = reference(torch.zeros(3, *size)).numpy().all(axis=0)
        expected = np.zeros(size, bool)
        expected[box[0] : box[2], box[1] : box[3]] = True
        np.testing.assert_array_equal(changed, expected)
        erased += changed.any()
    assert 0 < erased < count
