"""What several devices say to each other in a detector's passes: nothing but gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from wkd_jax.models import functional
from wkd_jax.models.detection.faster_rcnn import FasterRCNN
from wkd_jax.models.detection.parallel import over_images
from wkd_jax.training import sharding

SMALL = {
    "features": 16, "hidden": 32, "anchor_sizes": (16, 32, 64, 128, 256), "pre_nms": (50, 50), "post_nms": (30, 30),
    "anchor_samples": 32, "region_samples": 24, "detections": 10,
}  # fmt: skip
BATCH, CANVAS = 8, (32, 64)


def collectives(function, mesh, *arguments):
    """Names of the collectives of the compiled function, the last arguments cut over the devices."""
    places = [NamedSharding(mesh, PartitionSpec()), *[NamedSharding(mesh, PartitionSpec("data"))] * len(arguments)]
    arguments = [
        jax.tree.map(lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), argument)
        for argument, place in zip(arguments, places, strict=False)
    ]
    text = jax.jit(sharding.on(mesh, function)).lower(*arguments).compile().as_text()
    return set(re.findall(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text))


def abstract(shape, dtype):
    return jax.ShapeDtypeStruct((BATCH, *shape), dtype)


@pytest.mark.parametrize("train", [True, False])
def test_images_stay_on_their_devices(train):
    mesh = sharding.make_mesh({"data": 4, "model": 1}, jax.devices()[:4])
    network = nnx.eval_shape(lambda: FasterRCNN("faster_rcnn_r18", 4, **SMALL, rngs=nnx.Rngs(0)))
    structure, params, variables, _ = functional.split(network)
    image, size = abstract((*CANVAS, 3), jnp.float32), abstract((2,), jnp.int32)
    truth = abstract((2, 4), jnp.float32), abstract((2,), jnp.int32), abstract((2,), jnp.bool_)

    def loss(arrays, image, size, boxes, labels, box_valid):
        given = {"size": size, "boxes": boxes, "labels": labels, "box_valid": box_valid}
        outputs = structure.merge(arrays)(image, train=True, rngs=nnx.Rngs(0), **given)
        return sum(jnp.sum(x) for x in (outputs.logits, outputs.extra["objectness"], outputs.extra["anchor_deltas"]))

    def detect(arrays, image, size):
        return structure.merge(arrays)(image, train=False, size=size).extra["detections"]

    arrays = {**params, **variables}
    if train:
        assert collectives(jax.grad(loss), mesh, arrays, image, size, *truth) == {"all-reduce"}
    else:
        assert collectives(detect, mesh, arrays, image, size) == set()


def test_what_the_compiler_does_by_itself():
    """Why `over_images` exists. Where this fails it may no longer be needed."""
    mesh = sharding.make_mesh({"data": 4, "model": 1}, jax.devices()[:4])
    best = lambda x: jax.lax.top_k(x, 3)  # noqa: E731
    scores = jax.ShapeDtypeStruct((BATCH, 50), jnp.float32)
    assert "all-gather" in collectives(lambda _, x: jax.vmap(best)(x), mesh, {}, scores)
    assert collectives(lambda _, x: over_images(best)(x), mesh, {}, scores) == set()


def test_results_are_those_of_one_device():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 50)), jnp.float32)
    expected = jax.vmap(lambda x: jax.lax.top_k(x, 3))(x)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    found = jax.jit(sharding.on(mesh, over_images(lambda x: jax.lax.top_k(x, 3))))(placed)
    jax.tree.map(np.testing.assert_array_equal, list(expected), list(found))
