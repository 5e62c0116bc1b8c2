"""Files by their content: safetensors, .npz, and the state dict within what a training script saved."""

import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from wkd_jax.weights import WeightsError, state

ARRAYS = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "fc.bias": np.zeros(2, np.float32)}


def pickled(path, tree):
    path.write_bytes(pickle.dumps(tree, protocol=2))
    return path


def test_safetensors(tmp_path):
    path = tmp_path / "any.name"
    save_file({**ARRAYS, "half": np.ones(2, ml_dtypes.bfloat16), "bn.num_batches_tracked": np.ones((), np.int64)}, path)
    found = state.read(path)
    assert {*found.arrays} == {*ARRAYS, "half"}  # counters are not weights
    np.testing.assert_array_equal(found.arrays["fc.weight"], ARRAYS["fc.weight"])
    assert found.arrays["half"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("cut", [20, -1])
def test_damaged_safetensors(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        state.read(path)


def test_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **ARRAYS, fortran=np.asfortranarray(ARRAYS["fc.weight"]))
    found = state.read(path).arrays
    np.testing.assert_array_equal(found["fc.weight"], ARRAYS["fc.weight"])
    np.testing.assert_array_equal(found["fortran"], ARRAYS["fc.weight"])


def test_npz_with_objects_or_lies(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('was run')",))

    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([Bomb()], object))
    with pytest.raises(WeightsError, match=r"x\.npz: .*Python objects"):
        state.read(path)
    np.savez_compressed(path, **ARRAYS)
    with pytest.raises(WeightsError, match="is compressed: save the arrays with numpy.savez"):
        state.read(path)
    header = (
        b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }".ljust(117)
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header + b"\n" + b"\0" * 16)
    with pytest.raises(WeightsError, match="not a plain .npz file"):
        state.read(path)


def test_entries(tmp_path):
    """An average of weights comes before the last ones; what was not read is named."""
    last = {key: value + 1 for key, value in ARRAYS.items()}
    tree = {"epoch": 3, "model": {"x": np.ones(1)}, "state_dict": last, "state_dict_ema": ARRAYS, "args": {"lr": 0.1}}
    found = state.read(pickled(tmp_path / "x.pkl", tree))
    np.testing.assert_array_equal(found.arrays["fc.weight"], ARRAYS["fc.weight"])
    assert found.notes == ("read 'state_dict_ema' of the file, which also holds 'state_dict', 'model'",)
    del tree["state_dict_ema"]
    found = state.read(pickled(tmp_path / "x.pkl", tree))
    np.testing.assert_array_equal(found.arrays["fc.weight"], last["fc.weight"])
    assert state.read(pickled(tmp_path / "x.pkl", ARRAYS)).notes == ()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1, 2], "holds a list, not a dict of arrays"),
        ({}, "it is empty"),
        ({"state_dict": {}}, "it is empty"),
        ({"net": {"fc.weight": np.ones(2)}}, r"'net' is a dict\): save a dict of arrays alone"),
    ],
)
def test_no_state_dict(tmp_path, tree, message):
    with pytest.raises(WeightsError, match=message):
        state.read(pickled(tmp_path / "x.pkl", tree))
