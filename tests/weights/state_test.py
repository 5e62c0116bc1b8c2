"""Files by their content: safetensors, .npz, and the state dict within what a training script saved."""

import pickle
import zipfile

import files
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from wkd_jax import weights
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
    with pytest.raises(WeightsError, match=r"x\.npz: is damaged"):
        state.read(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|V0', 'fortran_order': False, 'shape': (3,), }",
        b"{'descr': '|S0', 'fortran_order': False, 'shape': (3,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        b"{" * 190,
        b"-" * 9000 + b"1",
        b"{'descr': '<f4'}",
    ],
)
def test_npy_headers_that_lie(tmp_path, header):
    text = header + b"\n"
    data = b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + b"\0" * 16
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(WeightsError, match=r"x\.npz: is damaged"):
        state.read(tmp_path / "x.npz")


def test_google_arrays_of_other_shapes(tmp_path):
    block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    for arrays in (
        {"head/kernel": np.ones(3)},
        {f"{block}/out/kernel": np.float32(1)},
        {f"{block}/{part}/kernel": np.ones((2,) * axes) for axes, part in enumerate(("query", "key", "value"))},
    ):
        np.savez(tmp_path / "x.npz", **arrays, **{f"{block}/out/bias": np.ones(2)})
        with pytest.raises(WeightsError, match=r"x\.npz: is damaged"):
            state.read(tmp_path / "x.npz")


def test_numbers_that_numpy_has_not(tmp_path):
    header = b'{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WeightsError, match="has arrays of F8_E4M3: save them as F32, F16 or BF16"):
        state.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pkl"])
def test_nothing_but_counters(tmp_path, kind):
    path, arrays = tmp_path / f"x.{kind}", {"bn.num_batches_tracked": np.ones((), np.int64)}
    {"npz": lambda: np.savez(path, **arrays), "safetensors": lambda: save_file(arrays, path)}.get(
        kind, lambda: pickled(path, arrays)
    )()
    with pytest.raises(WeightsError, match="holds no weights"):
        state.read(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["npz", "google", "safetensors", "native"])
def test_broken_files_are_read_or_refused(tmp_path, kind):
    """The whole way in, on files with a few bytes changed or missing: an answer, or one kind of error."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x"
    model = files.abstract("resnet8")
    arrays = files.random_arrays(model)
    if kind == "native":
        path = weights.write(tmp_path, arrays, {"name": "resnet8"}, None)
    elif kind == "safetensors":
        save_file(files.state_dict(model, arrays), path)
    else:
        extra = {"Transformer/encoderblock_0/LayerNorm_0/scale": np.ones(3)} if kind == "google" else {}
        np.savez(tmp_path / "x.npz", **files.state_dict(model, arrays), **extra)
        path = tmp_path / "x.npz"
    whole, refused = path.read_bytes(), 0
    for turn in range(60):
        broken = bytearray(whole)
        spots = rng.integers(0, len(whole) if turn % 2 else 3000, 3)
        if turn % 3:
            broken[spots[0]], broken[spots[1]], broken[-1 - spots[2] % 2000] = rng.integers(0, 256, 3)
        else:
            del broken[spots[0] :]
        path.write_bytes(broken)
        try:
            weights.open_file(path).arrays(model)
        except WeightsError as error:
            assert path.name in str(error) or str(tmp_path) in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "record",
    [
        "nope",
        "[1]",
        "{}",
        '{"model": [1], "normalisation": null}',
        '{"model": {"name": "x"}, "normalisation": {"a": 1}}',
    ],
)
def test_records_that_lie(tmp_path, record):
    save_file(ARRAYS, tmp_path / "x.safetensors", {"wkd_jax": record})
    with pytest.raises(WeightsError, match=r"x\.safetensors: what its metadata say of it cannot be read"):
        weights.open_file(tmp_path / "x.safetensors")


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
    found = state.read(pickled(tmp_path / "x.pkl", {"net": {"state_dict": ARRAYS}}))
    assert found.notes == ("read 'net' of the file", "read 'state_dict' of the file")
    assert {*found.arrays} == {*ARRAYS}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1, 2], "holds a list, not a dict of arrays"),
        ({}, "it is empty"),
        ({"state_dict": {}}, "it is empty"),
        ({"nets": {"fc.weight": np.ones(2)}}, r"'nets' is a dict\): save a dict of arrays alone"),
    ],
)
def test_no_state_dict(tmp_path, tree, message):
    with pytest.raises(WeightsError, match=message):
        state.read(pickled(tmp_path / "x.pkl", tree))
