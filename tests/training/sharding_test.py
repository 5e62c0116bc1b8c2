"""Mesh, placement rules and global batches on eight fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from wkd_jax.training import sharding
from wkd_jax.training.step import Frozen
from wkd_jax.types import Batch


@pytest.mark.parametrize(
    ("data", "model", "shape"), [(-1, 1, (8, 1)), (-1, 2, (4, 2)), (2, 4, (2, 4)), (8, -1, (8, 1))]
)
def test_mesh(data, model, shape):
    mesh = sharding.make_mesh({"data": data, "model": model})
    assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(("data", "model"), [(-1, 3), (3, 2), (-1, -1), (4, 1)])
def test_mesh_that_does_not_fit(data, model):
    with pytest.raises(ValueError, match="do not fit 8 devices"):
        sharding.make_mesh({"data": data, "model": model})


def test_batch_must_divide():
    with pytest.raises(ValueError, match="global_batch_size=12: must be a multiple of the 8 devices"):
        sharding.check_batch(12, 1, sharding.make_mesh({"data": -1, "model": 1}))


def test_rules_place_parameters_and_their_moments_alike():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    params = {"student/fc/kernel": jnp.ones((4, 6)), "student/fc/bias": jnp.ones(6)}
    state = {"params": params, "opt": optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda s: s)).init(params)}
    placed = sharding.place(state, mesh, [("fc/kernel$", (None, "model"))])
    specs = [leaf.spec for leaf in jax.tree.leaves(placed)]
    assert specs.count(P(None, "model")) == 2  # the kernel and its momentum
    assert specs.count(P()) == 3  # the bias, its momentum, the schedule's count


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("fc/kernle", ("model",)), "'fc/kernle' matches no array"),
        (("fc/bias", ("model", "data")), "fc/bias"),
        (("fc/odd", ("model",)), "fc/odd"),
    ],
)
def test_bad_rules(rule, message):
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    with pytest.raises(ValueError, match=message):
        sharding.place({"fc/bias": jnp.ones(6), "fc/odd": jnp.ones(5)}, mesh, [rule])


def test_what_a_method_prefers_is_followed_where_it_fits():
    mesh = sharding.make_mesh({"data": 8, "model": 1})
    state = {"methods/crd/bank": jnp.ones((10, 16)), "methods/crd/odd_bank": jnp.ones((10, 12))}
    preferred = [("^methods/crd/.*bank", (None, "data"))]
    placed = sharding.place(state, mesh, (), preferred)
    assert [placed[name].spec for name in state] == [P(None, "data"), P()]
    placed = sharding.place(state, mesh, [("/bank$", ())], preferred)
    assert placed["methods/crd/bank"].spec == P()  # a rule of the config goes first


def test_global_batch_is_cut_over_the_data_axis():
    mesh = sharding.make_mesh({"data": -1, "model": 1})
    images = np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3)
    batch = Batch(images, np.arange(16, dtype=np.int32), np.arange(16, dtype=np.int32), np.ones(16, bool))
    placed = sharding.global_batch(batch, mesh)
    assert placed.image.sharding.spec == P("data")
    assert {shard.data.shape for shard in placed.image.addressable_shards} == {(2, 2, 2, 3)}
    np.testing.assert_array_equal(placed.image, images)


def test_a_teacher_has_rules_of_its_own():
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    frozen = Frozen(constants={}, teacher={"fc/kernel": jnp.ones((4, 6))}, seed=jnp.int32(0))
    params = {"student/fc/kernel": jnp.ones((4, 6))}
    placed, teacher = sharding.place((params, frozen), mesh, [("^teacher/fc/kernel$", (None, "model"))])
    assert teacher.teacher["fc/kernel"].spec == P(None, "model")
    assert placed["student/fc/kernel"].spec == P()
    with pytest.raises(ValueError, match="matches no array"):
        sharding.place((params, frozen), mesh, [("^fc/kernel$", (None, "model"))])
