"""Files that PyTorch and pickle write, against what they read themselves."""

import argparse
import collections
import io
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from wkd_jax.weights import torch_file
from wkd_jax.weights.errors import WeightsError

FORMATS = [(zipped, protocol) for zipped in (True, False) for protocol in (2, 3, 4, 5)]
DTYPES = "float64 float32 float16 bfloat16 complex128 complex64 int64 int32 int16 int8 uint8 bool"
UNTYPED = "uint16 uint32 uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"


def saved(value, zipped=True, protocol=2) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.fixture
def read(tmp_path):
    def read_bytes(data):
        path = tmp_path / "weights.pth"
        path.write_bytes(data)
        return torch_file.read(path)

    return read_bytes


def expect(found, wanted):
    """Compares with what torch.load gives, in numpy's words."""
    if isinstance(wanted, torch.Tensor):
        dtype = np.dtype(getattr(ml_dtypes, str(wanted.dtype)[6:], str(wanted.dtype)[6:]))
        assert (found.shape, found.dtype) == (tuple(wanted.shape), dtype)
        flat = wanted.detach().contiguous().reshape(-1)
        assert np.ascontiguousarray(found).tobytes() == (bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
        assert not found.flags.writeable
    elif isinstance(wanted, dict):
        assert type(found) is dict
        assert list(found) == list(wanted)
        for key in wanted:
            expect(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert type(found) is (list if isinstance(wanted, list) else tuple)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            expect(one, other)
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, wanted)
        assert not found.flags.writeable
    else:
        assert type(found) is type(wanted)
        assert found == wanted


def training_checkpoint():
    """What a training script saves: model, optimizer with moments, schedule, averages, step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": 3,
        "best": (76.5, None, True, "resnet", b"raw", 2**70, -1.5, 1j),
        "shape": torch.Size([2, 3]),
        "losses": [1, -2, 300, 70000, 2**40, "\u00e9", {}],
    }


@pytest.mark.parametrize(("zipped", "protocol"), FORMATS)
def test_a_training_checkpoint(read, zipped, protocol):
    data = saved(training_checkpoint(), zipped, protocol)
    wanted = torch.load(io.BytesIO(data), weights_only=False)
    wanted["schedule"]["milestones"] = dict(wanted["schedule"]["milestones"])
    expect(read(data), wanted)


@pytest.mark.parametrize(
    ("zipped", "name"),
    [(True, name) for name in f"{DTYPES} {UNTYPED}".split()] + [(False, name) for name in DTYPES.split()],
)
def test_every_dtype(read, zipped, name):
    bits = torch.arange(1, 1 + 6 * 16, dtype=torch.uint8) % (2 if name == "bool" else 251)
    value = bits.view(getattr(torch, name)).reshape(2, 3, -1)
    expect(read(saved(value, zipped)), value)


def views():
    base = torch.arange(24.0).reshape(4, 6)
    yield "transposed", base.t()
    yield "part", base[1:3, 2:5]
    yield "steps", base[::2, 1::2]
    yield "scalar", torch.tensor(3.5)
    yield "empty", torch.zeros(0, 3)
    yield "empty part", base[4:, :2]
    yield "no axis is long", base[1:2, 2:3].reshape(1, 1, 1)
    yield "one number", base[3, 5]
    yield "expanded along one", torch.arange(3).expand(1, -1)
    yield "channels last", torch.arange(48.0).reshape(2, 3, 4, 2).contiguous(memory_format=torch.channels_last)
    yield "parameter", torch.nn.Parameter(base[1:])
    yield "needs gradient", base.clone().requires_grad_()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value", [pytest.param(value, id=name) for name, value in views()])
def test_views(read, zipped, value):
    expect(read(saved([value, value], zipped)), [value, value])


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_one_storage_share_memory(read, zipped):
    base = torch.arange(6.0)
    first, second, other = read(saved([base[:4], base[2:], base.clone()], zipped))
    assert np.shares_memory(first, second)
    assert not np.shares_memory(first, other)
    np.testing.assert_array_equal(second, [2, 3, 4, 5])


def test_arrays_are_aligned(read):
    for length in range(1, 20):
        for zipped in (True, False):
            assert read(saved({"x" * length: torch.zeros(3, dtype=torch.float64)}, zipped))["x" * length].flags.aligned


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_become_plain_data(read, zipped, protocol):
    nested = argparse.Namespace(lr=0.1, output=pathlib.PosixPath("/runs/a"), more=types.SimpleNamespace(x=[1]))
    value = {
        "args": nested,
        "device": [torch.device("cpu"), torch.device("cuda", 1)],
        "dtype": torch.float32,
        "class": argparse.ArgumentParser,
        "number": [np.float32(1.5), np.int64(-3), np.bool_(True), np.complex64(1j)],
        "array": np.arange(6, dtype=">i4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 4), np.float16),
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "sets": ({1, "a"}, frozenset([2])),
        "bytes": bytearray(b"x") if protocol == 5 else b"",
        "numpy dtype": np.dtype(">f4"),
        "storage": torch.arange(3).untyped_storage(),
    }
    found = read(saved(value, zipped, protocol))
    expect(found.pop("array"), value["array"])
    expect(found.pop("fortran"), value["fortran"])
    expect(found.pop("empty"), value["empty"])
    assert bytes(found.pop("storage")) == struct.pack("<3q", 0, 1, 2)
    expect(
        found,
        {
            "args": {"lr": 0.1, "output": "/runs/a", "more": {"x": [1]}},
            "device": ["cpu", "cuda:1"],
            "dtype": "torch.float32",
            "class": "argparse.ArgumentParser",
            "number": [1.5, -3, True, 1j],
            "counts": {"a": 2, "b": 1},
            "default": {"a": [1]},
            "sets": ({1, "a"}, frozenset([2])),
            "bytes": b"",
            "numpy dtype": "float32",
        },
    )


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_arrays(read, protocol):
    value = {
        "model": collections.OrderedDict(weight=np.arange(6.0).reshape(2, 3), bias=np.arange(2, dtype=np.int16)),
        "scalar": np.float64(2.5),
        "name": "R-50",
        "args": argparse.Namespace(depth=50),
        "big": np.arange(4, dtype=">f4"),
        "fortran": np.asfortranarray(np.eye(3, 2)),
        "bytes": b"\xff\x00",
        "many": list(range(2000)),
    }
    found = read(pickle.dumps(value, protocol))
    value["args"], value["model"], value["scalar"] = {"depth": 50}, dict(value["model"]), 2.5
    expect(found, value)
    assert not found["model"]["weight"].flags.writeable


class CfgNode(dict):
    """Pickles as yacs does."""


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_yacs_configs(read, protocol, monkeypatch):
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = CfgNode(MODEL=CfgNode(DEPTH=50))
    config.__dict__["__immutable__"] = True
    data = pickle.dumps({"config": config}, protocol)
    monkeypatch.undo()
    assert read(data) == {"config": {"MODEL": {"DEPTH": 50}}}


# By Python 2.7 and NumPy: {'w': numpy.array([[0, 128], [255, 65]], 'u1'), 's': 'caf\xe9'}
PYTHON2 = {
    0: b"(dp0\nS's'\np1\nS'caf\\xe9'\np2\nsS'w'\np3\ncnumpy.core.multiarray\n_reconstruct\np4\n(cnumpy\nndarray\np5\n"
    b"(I0\ntp6\nS'b'\np7\ntp8\nRp9\n(I1\n(I2\nI2\ntp10\ncnumpy\ndtype\np11\n(S'u1'\np12\nI0\nI1\ntp13\nRp14\n(I3\n"
    b"S'|'\np15\nNNNI-1\nI-1\nI0\ntp16\nbI00\nS'\\x00\\x80\\xffA'\np17\ntp18\nbs.",
    2: b"\x80\x02}q\x00(U\x01sq\x01U\x04caf\xe9q\x02U\x01wq\x03cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\n"
    b"ndarray\nq\x05K\x00\x85U\x01b\x87Rq\x06(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87Rq\x08(K\x03"
    b"U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x00\x80\xffAtbu.",
}


@pytest.mark.parametrize("protocol", PYTHON2)
def test_pickles_of_python_2(read, protocol):
    data = PYTHON2[protocol]
    wanted = pickle.loads(data, encoding="latin1")
    assert wanted["s"] == "caf\u00e9"
    expect(read(data), wanted)


def rewritten(data: bytes, change, root=None) -> bytes:
    """The zip archive with its entries (a dict from name without folder) as `change` leaves them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
        root = root or archive.namelist()[0].split("/")[0]
    change(entries)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["float32", "int64", "bfloat16", "complex64", "complex128", "uint8", "uint16"])
def test_big_endian_files(read, name):
    value = torch.arange(64, dtype=torch.uint8).view(getattr(torch, name))
    width = value.element_size() // (2 if value.is_complex() else 1)

    def swap(entries):
        entries["byteorder"] = b"big"
        entries["data/0"] = np.frombuffer(entries["data/0"], f"u{width}").byteswap().tobytes()

    expect(read(rewritten(saved([value[1:], value]), swap)), [value[1:], value])


def test_archives_without_byteorder_and_with_other_folders(read):
    value = {"a": torch.arange(5)}
    expect(read(rewritten(saved(value), lambda entries: entries.pop("byteorder"), "resnet18-f37072fd")), value)


def test_a_storage_view_of_the_older_format(read):
    """Written by PyTorch before 0.4, which no longer runs: the last item of a storage's id names a part of it."""
    data = saved({"a": torch.arange(6.0)}, zipped=False)
    assert data.count(b"K\x06Ntq") == 1
    key = data[data.index(b"X\x03\x00\x00\x00cpu") - 40 :]
    assert b"storage" in data[: len(data) - len(key) + 40]
    part = data.replace(b"K\x06Ntq", b"K\x06X\x01\x00\x00\x00vK\x02K\x03\x87tq").replace(
        b"K\x00K\x06\x85", b"K\x00K\x03\x85"
    )
    expect(read(part), {"a": torch.arange(2.0, 5.0)})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>", "web page"),
        (b"<html>", "web page"),
        (b'{"message": "Not Found"}', "JSON"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5"),
        (b"\x93NUMPY\x01\x00" + bytes(20), "one NumPy array"),
        (struct.pack("<Q", 2) + b"{}" + bytes(4), "safetensors"),
        (bytes(257) + b"ustar\x0000" + bytes(500), "tar archive"),
        (b"Not Found", "no pickle at byte"),
        (b"PK\x03\x04" + bytes(100), "no list of contents"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_of_files_are_named(read, tmp_path, data, says):
    with pytest.raises(WeightsError, match=says) as error:
        read(data)
    assert str(error.value).startswith(f"{tmp_path / 'weights.pth'}: ")


def test_old_tar_files_and_other_archives(read, tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"net/{name}", b"x")
    with pytest.raises(WeightsError, match="TorchScript"):
        read(stream.getvalue())
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    with pytest.raises(WeightsError, match="npz"):
        read(stream.getvalue())
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model.pth", b"x")
    with pytest.raises(WeightsError, match="not one of torch.save"):
        read(stream.getvalue())
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "nothing.pth")


def test_a_whole_model_is_refused_by_its_class(read):
    for zipped in (True, False):
        with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear.*state dict"):
            read(saved(torch.nn.Linear(2, 2), zipped))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "QInt8Storage"),
        (lambda: torch.eye(2).to_sparse(), "torch.serialization._get_layout"),
        (lambda: torch.empty(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugation"),
        (lambda: np.array([{}], object), "O8"),
        (lambda: np.zeros(2, [("a", "f4")]), "V4"),
        (lambda: np.array(["text"]), "U4"),
        (lambda: np.ma.masked_array([1.0]), "numpy.ma"),
        (lambda: torch.ones(1).expand(3), "contiguous"),
        (lambda: torch.distributions.Normal(0.0, 1.0), "torch.distributions.normal.Normal"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_plain_numbers_is_refused_by_name(read, value, name):
    with pytest.raises(WeightsError, match=name):
        read(saved(value()))
