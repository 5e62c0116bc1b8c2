"""Names and layouts, there and back, for every registered network and every style it declares."""

import files
import numpy as np
import pytest

from wkd_jax import registry
from wkd_jax.models.base import KeyStyle
from wkd_jax.weights import keys, match


@pytest.mark.parametrize("name", sorted(registry.entries("models")))
def test_every_style_gives_one_key_an_array(name):
    model = files.abstract(name)
    shapes = match.shapes_of(model)
    assert {*model.by_class} <= {*shapes}
    for style in type(model).KEY_STYLES.values():
        entries = keys.layout(shapes, style)
        assert len({entry.key for entry in entries.values()}) == len(shapes)
        for array, entry in entries.items():
            if not entry.steps:  # what steps do is checked in detection_test.py
                assert sorted(entry.shape) == sorted((*shapes[array], *[1] * (len(entry.shape) - len(shapes[array]))))


def test_layouts():
    kernel = np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4)  # [kh, kw, in, out]
    torch_kernel = keys.to_torch("conv/kernel", kernel, (4, 3, 1, 2))
    assert torch_kernel[3, 2, 0, 1] == kernel[0, 1, 2, 3]
    np.testing.assert_array_equal(keys.from_torch("conv/kernel", torch_kernel, kernel.shape), kernel)
    matrix = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(keys.from_torch("fc/kernel", matrix.T, (2, 3)), matrix)
    # What is no kernel keeps its layout, also where it is a matrix.
    np.testing.assert_array_equal(keys.from_torch("relative_position_bias_table", matrix, (2, 3)), matrix)
    assert keys.from_torch("bn/scale", np.ones(3, np.float16), (3,)).dtype == np.float32


def test_columns():
    shapes = {"blocks/0/gamma": (8,), "norm/scale": (8,)}
    entries = keys.layout(shapes, KeyStyle(((r"gamma$", "layer_scale"),), columns=r"gamma$"))
    assert (entries["blocks/0/gamma"].key, entries["blocks/0/gamma"].shape) == ("blocks.0.layer_scale", (8, 1, 1))
    assert entries["norm/scale"].shape == (8,)


def test_two_arrays_of_one_key_are_refused():
    with pytest.raises(ValueError, match="a/bias and .* would both be called 'x.bias'|b/bias and a/bias"):
        keys.layout({"a/bias": (1,), "b/bias": (1,)}, KeyStyle(((r"^[ab]\.", "x."),)))
