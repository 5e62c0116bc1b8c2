"""benchmarks/bench_scaling.py reads compiled programs: counts against programs whose collectives are known."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import bench_scaling, scaling_times


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=16] {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=16], device_ids=([16,4]T(1,0)) {'axis_0','axis_1'}", 64),
        ("replica_groups=mesh['axis_0'=256] {'axis_0':(32)8}", 8),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_group_sizes(groups, size):
    (found,) = bench_scaling.collectives(f"  ROOT %a.1 = f32[3,5]{{1,0}} all-reduce(%b), channel_id=1, {groups}, to=%c")
    assert (found["group"], found["bytes"], found["kind"]) == (size, 60, "all-reduce")


def test_unknown_notation_is_an_error():
    with pytest.raises(ValueError, match="replica_groups"):
        bench_scaling.collectives("  %a = f32[3]{0} all-reduce(%b), replica_groups=new, to_apply=%c")


def test_a_compiled_gradient():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    weight = jax.ShapeDtypeStruct((6, 10), jnp.float32, sharding=NamedSharding(mesh, P(None, "model")))
    images = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.square(x @ w))), out_shardings=weight.sharding)
    (found,) = bench_scaling.collectives(step.lower(weight, images).compile().as_text())
    # Each device has half of the kernel, and adds it up over the data axis.
    assert (found["kind"], found["elements"], found["group"], found["source"]) == ("all-reduce", 30, 4, "gradients")
    (row,) = bench_scaling.summary([found], 8, 2)
    assert (row["axis"], row["bytes"], row["sent_bytes"]) == ("data", 120, 180.0)


@pytest.mark.parametrize("kind", bench_scaling.KINDS)
def test_sent_bytes_are_those_of_a_simulated_ring(kind):
    count, size = 4, 24  # devices, bytes of the result
    chunk = {"reduce-scatter": size}.get(kind, size // count)
    steps = {"all-reduce": 2 * (count - 1), "all-gather": count - 1, "reduce-scatter": count - 1}
    if kind in steps:
        assert scaling_times.sent(kind, size, count) == steps[kind] * chunk
    else:
        expected = {"collective-permute": size, "all-to-all": size * (count - 1) / count}[kind]
        assert scaling_times.sent(kind, size, count) == expected


def test_committed_tables_can_be_made():
    rows = json.loads(scaling_times.RESULTS.read_text())["cases"]
    assert len(rows) == len(bench_scaling.cases())
    for table in scaling_times.tables(rows).split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    # What a data-parallel step sends depends neither on the number of devices nor on the batch.
    plain = [row for row in rows if row["mesh"]["model"] == 1 and row["dtype"] == "bfloat16"]
    for pair in bench_scaling.PAIRS:
        assert len({scaling_times.total(row, "bytes", "gradients") for row in plain if row["pair"] == pair}) == 1
