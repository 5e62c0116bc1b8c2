import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from wkd_jax.training import fingerprint

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"]


def numbers(shape, dtype, seed=0):
    values = np.random.default_rng(seed).normal(size=shape) * 50
    return (values > 0) if dtype == "bool" else np.asarray(values).astype(jnp.dtype(dtype))


def by_the_formula(array):
    """The docstring's sum in Python integers, word by word."""
    width = min(4, array.dtype.itemsize)
    raw, total = array.tobytes(), 0
    for i in range(0, len(raw), width):
        x = int.from_bytes(raw[i : i + width], "little") ^ (i // width * 0x9E3779B1 % 2**32)
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        total += x ^ x >> 16
    return total % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4, 5)])
def test_device_and_host_agree_with_the_formula(shape, dtype):
    array = numbers(shape, dtype)
    assert fingerprint.on_host(array) == by_the_formula(array)
    assert int(fingerprint.on_device(jnp.asarray(array))) == by_the_formula(array)


def test_long_arrays_cross_the_hosts_blocks():
    array = numbers((3, 50_001), "float32")
    assert fingerprint.on_host(array) == int(fingerprint.on_device(jnp.asarray(array)))


def test_every_sharding_gives_the_same_number():
    array = numbers((16, 8, 3), "float32")
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for spec in [(), ("data",), (None, "model"), ("data", "model"), (("data", "model"),)]:
        sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert int(fingerprint.on_device(sharded)) == fingerprint.on_host(array)


def test_any_one_bit_shows():
    array = numbers((5,), "float32")
    clean = fingerprint.on_host(array)
    for bit in range(8 * array.nbytes):
        raw = bytearray(array.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        assert fingerprint.on_host(np.frombuffer(bytes(raw), np.float32)) != clean


def test_order_signs_of_zero_and_nan_payloads_show():
    a = np.float32([1, 2, 3])
    assert fingerprint.on_host(a) != fingerprint.on_host(a[::-1])
    assert fingerprint.on_host(np.float32([0.0])) != fingerprint.on_host(np.float32([-0.0]))
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    for make in (fingerprint.on_host, lambda x: int(fingerprint.on_device(jnp.asarray(x)))):
        assert make(np.array([quiet])) != make(np.array([other]))
