"""Files made to run code, to fill the memory or to lie. Each is refused in words that name what is wrong with it."""

import io
import pathlib
import pickle
import random
import struct
import subprocess
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from wkd_jax.weights import inert, torch_file
from wkd_jax.weights.errors import WeightsError

MARKER = "executed"  # the file that code of a hostile file would leave in the working directory


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / MARKER).exists()


def refuse(data: bytes, says: str, mebibytes: float = 2.0) -> None:
    """Reads `data`, and expects an error that says so and a peak of memory beyond the file below the bound."""
    path = pathlib.Path("weights.pth")
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=says) as error:
            torch_file.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith("weights.pth: ")
    assert len(str(error.value)) < 1000
    assert peak - len(data) < mebibytes * 2**20


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(name: str, *arguments: str) -> bytes:
    """Opcodes that call module.name with strings."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(".encode() + b"".join(map(text, arguments)) + b"tR"


TOUCH = f"touch {MARKER}"
PYTHON = f"open({MARKER!r}, 'w')"
ATTRIBUTE = b"coperator\nattrgetter\n(" + text("system") + b"tR(cos\npath\ntR(" + text(TOUCH) + b"tR."
CODE = {
    "os.system": (call("os.system", TOUCH) + b".", "os.system"),
    "posix.system": (call("posix.system", TOUCH) + b".", "posix.system"),
    "subprocess.Popen": (call("subprocess.Popen", TOUCH) + b".", "subprocess.Popen"),
    "builtins.eval": (call("builtins.eval", PYTHON) + b".", "builtins.eval"),
    "builtins.exec": (call("builtins.exec", PYTHON) + b".", "builtins.exec"),
    "__builtin__.eval": (call("__builtin__.eval", PYTHON) + b".", "__builtin__.eval"),
    "builtins.getattr": (call("builtins.getattr", "", "join") + b".", "builtins.getattr"),
    "builtins.__import__": (call("builtins.__import__", "antigravity") + b".", "builtins.__import__"),
    "builtins.open": (call("builtins.open", MARKER, "w") + b".", "builtins.open"),
    "builtins.bytearray": (b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.", "builtins.bytearray"),
    "importlib": (call("importlib.import_module", "os") + b".", "importlib.import_module"),
    "runpy": (call("runpy._run_code", PYTHON) + b".", "runpy._run_code"),
    "pickle.loads": (call("pickle.loads", "N.") + b".", "pickle.loads"),
    "shutil.rmtree": (call("shutil.rmtree", ".") + b".", "shutil.rmtree"),
    "attrgetter within calls": (ATTRIBUTE, "operator.attrgetter"),
    "functools.partial": (call("functools.partial", TOUCH) + b".", "functools.partial"),
    "torch.load": (call("torch.load", "other.pth") + b".", "torch.load"),
    "torch.jit": (call("torch.jit._serialization.load", "x") + b".", "torch.jit._serialization.load"),
    "torch.storage._load_from_bytes": (call("torch.storage._load_from_bytes", "") + b".", "_load_from_bytes"),
    "torch.hub": (call("torch.hub.load", "a/b") + b".", "torch.hub.load"),
    "numpy.load": (call("numpy.load", "x.npy") + b".", "numpy.load"),
    "numpy runstring": (call("numpy.testing._private.utils.runstring", PYTHON) + b".", "runstring"),
    "numpy fromfile": (call("numpy.core.multiarray.fromfile", "x") + b".", "fromfile"),
    "dotted name": (b"\x80\x04" + text("builtins") + text("eval.__call__") + b"\x93)R.", r"builtins.eval.__call__"),
    "module of an allowed name": (call("torch._utils._rebuild_tensor_v2.__globals__") + b".", "__globals__"),
    "codec rot13": (call("_codecs.encode", "text", "rot13") + b".", "codec 'rot13'"),
    "codec zlib": (call("_codecs.encode", "text", "zlib_codec") + b".", "codec 'zlib_codec'"),
    "codec unicode_escape": (call("_codecs.decode", "text", "unicode_escape") + b".", "_codecs.decode"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n(" + text(TOUCH) + b"t\x81.", "subprocess.Popen"),
    "NEWOBJ_EX": (b"\x80\x04csubprocess\nPopen\n(" + text(TOUCH) + b"t}\x92.", "NEWOBJ_EX"),
    "INST": (b"(" + text(TOUCH) + b"ios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\n" + text(TOUCH) + b"o.", "os.system"),
    "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
    "EXT2": (b"\x80\x02\x83\x01\x00.", "EXT2"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
    "PERSID": (b"Pos.system\n.", "PERSID"),
    "BINPERSID": (b"cos\nsystem\nQ.", "BINPERSID|not a storage"),
    "BUILD of a function": (b"cos\nsystem\n}b.", "sets the state of 'os.system'"),
    "BUILD of a list": (b"]}" + text("__class__") + b"Nsb.", "sets the state of a list"),
    "_reconstructor": (
        b"ccopyreg\n_reconstructor\n(csubprocess\nPopen\nc__builtin__\nobject\nNtR.",
        "subprocess.Popen",
    ),
    "_reconstructor with a call": (b"ccopyreg\n_reconstructor\n(cargparse\nNamespace\ncos\nsystem\n]tR.", "Namespace"),
    "defaultdict of a factory": (
        b"ccollections\ndefaultdict\n(cos\nsystem\ntR" + text(TOUCH) + b"R.",
        "calls a Record",
    ),
    "call of a string": (text("os.system") + b"(" + text(TOUCH) + b"tR.", "calls a str"),
}


@pytest.mark.parametrize(("data", "says"), CODE.values(), ids=CODE)
def test_code_is_not_run(data, says):
    refuse(data, says)
    refuse(zipped(data), says)
    refuse(legacy(data), says)


def test_the_examples_would_run():
    """What is refused above does run under pickle, so the tests can fail."""
    pickle.loads(CODE["os.system"][0])
    assert pathlib.Path(MARKER).exists()
    pathlib.Path(MARKER).unlink()
    subprocess.run(TOUCH.split(), check=True)
    pathlib.Path(MARKER).unlink()


def archive(entries: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return stream.getvalue()


def zipped(data: bytes, **storages: bytes) -> bytes:
    """A file of the zip format with a pickle and storages s0, s1, ..."""
    return archive({"net/data.pkl": data} | {f"net/data/{key}": content for key, content in storages.items()})


def legacy(data: bytes, keys=(), storages: bytes = b"") -> bytes:
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
    return b"".join(start) + data + pickle.dumps(list(keys), 2) + storages


def number(value: int) -> bytes:
    return b"I%d\n" % value


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(numel: int, kind="torch\nFloatStorage", key="s0", view=b"") -> bytes:
    return b"(" + text("storage") + f"c{kind}\n".encode() + text(key) + text("cpu") + number(numel) + view + b"tQ"


def tensor(numel, offset, size, stride, **options) -> bytes:
    """Opcodes of a tensor on the storage s0."""
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel, **options)
    return head + number(offset) + numbers(size) + numbers(stride) + b"I00\nNtR"


def test_the_tensors_written_here_are_read():
    """The lies below are the only thing wrong with their files."""
    content = np.arange(6, dtype=np.float32)
    honest = tensor(6, 1, (2, 2), (2, 1)) + b"."
    raw = struct.pack("<q", 6) + content.tobytes()
    for data in (zipped(honest, s0=content.tobytes()), legacy(honest, ["s0"], raw)):
        pathlib.Path("weights.pth").write_bytes(data)
        np.testing.assert_array_equal(torch_file.read("weights.pth"), [[1, 2], [3, 4]])


def test_steps_along_axes_of_one_number_mean_nothing():
    data = tensor(2, 0, (1, 2), (2**61, 1)) + b"."
    pathlib.Path("weights.pth").write_bytes(zipped(data, s0=np.float32([1, 2]).tobytes()))
    np.testing.assert_array_equal(torch_file.read("weights.pth"), [[1, 2]])


LYING_TENSORS = {
    "stride 0": ((6, 0, (2**40,), (0,)), "repeats them"),
    "stride 0 within bounds": ((6, 0, (3,), (0,)), "repeats them"),
    "overlapping rows": ((6, 0, (3, 3), (1, 1)), "repeats them"),
    "more numbers than there are": ((6, 0, (7,), (1,)), "repeats them"),
    "offset beyond the end": ((6, 4, (3,), (1,)), "ends outside"),
    "stride beyond the end": ((6, 0, (2, 2), (5, 1)), "ends outside"),
    "an empty part beyond the end": ((6, 7, (0,), (1,)), "ends outside"),
    "negative offset": ((6, -1, (2,), (1,)), "no counts"),
    "negative stride": ((6, 5, (6,), (-1,)), "no counts"),
    "negative size": ((6, 0, (-6,), (1,)), "no counts"),
    "huge size": ((6, 0, (2**64,), (1,)), "no counts"),
    "product of sizes overflows": ((6, 0, (2**33, 2**33), (1, 1)), "repeats them"),
    "sum of strides overflows": ((6, 0, (2, 2), (2**61, 2**61)), "ends outside"),
    "sizes without strides": ((6, 0, (2, 3), (1,)), "no counts"),
    "forty axes": ((6, 0, (1,) * 40, (1,) * 40), "no counts"),
    "numel too large": ((7, 0, (6,), (1,)), "should have 7 float32 numbers, but has 24 bytes"),
    "numel too small": ((5, 0, (5,), (1,)), "should have 5 float32 numbers, but has 24 bytes"),
    "numel negative": ((-6, 0, (0,), (1,)), "impossible number"),
}


@pytest.mark.parametrize(("arguments", "says"), LYING_TENSORS.values(), ids=LYING_TENSORS)
def test_tensors_stay_within_their_storage(arguments, says):
    data = tensor(*arguments) + b"."
    refuse(zipped(data, s0=bytes(24)), says)
    if "should have" not in says:
        refuse(legacy(data, ["s0"], struct.pack("<q", 6) + bytes(24)), says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (zipped(tensor(6, 0, (6,), (1,), key="gone") + b".", s0=bytes(24)), "'gone' is missing"),
        (zipped(tensor(6, 0, (6,), (1,), key="../data.pkl") + b".", s0=bytes(24)), "is missing"),
        (zipped(tensor(6, 0, (6,), (1,), kind="torch\nQInt8Storage") + b"."), "torch.QInt8Storage"),
        (zipped(tensor(6, 0, (6,), (1,), kind="os\nsystem") + b"."), "os.system"),
        (zipped(tensor(6, 0, (6,), (1,), view=number(1)) + b".", s0=bytes(24)), "is a part, which only"),
        (zipped(b"(" + text("module") + b"cevil\nNet\nNNtQ."), "evil.Net"),
        (zipped(b"(" + text("path") + b"NtQ."), "not a storage"),
        (zipped(text("storage") + b"Q."), "not a storage"),
        (zipped(b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR."), "does not take"),
        (zipped(b"ctorch._utils\n_rebuild_parameter\n(NNNtR."), "does not take"),
        (zipped(b"ctorch\nSize\n(" + numbers((-1,)) + b"tR."), "does not take"),
        (zipped(b"ctorch\ndevice\n(Ntb."), "state of 'torch.device'"),
        (zipped(b"N.N."), "2 bytes follow"),
        (archive({"net/data.pkl": b"N.", "net/byteorder": b"middle"}), "'middle'"),
        (archive({"net/sub/data.pkl": b"N."}), "no entry 'data.pkl'"),
        (pickle.dumps(1) + b"N.", "2 bytes follow"),
    ],
)
def test_other_lies_about_storages(data, says):
    refuse(data, says)


ONE = tensor(2, 0, (2,), (1,)) + b"."
LYING_LEGACY = {
    "count too large": (legacy(ONE, ["s0"], struct.pack("<q", 2**61) + bytes(8)), "says 2305843009213693952 numbers"),
    "count negative": (legacy(ONE, ["s0"], struct.pack("<q", -2) + bytes(8)), "says -2 numbers"),
    "count too small": (legacy(ONE, ["s0"], struct.pack("<q", 1) + bytes(8)), "says 1 numbers"),
    "ends early": (legacy(ONE, ["s0"], struct.pack("<q", 2) + bytes(7)), "ends before the 8 bytes"),
    "ends in the count": (legacy(ONE, ["s0"], b"\x02"), "ends before"),
    "goes on": (legacy(ONE, ["s0"], struct.pack("<q", 2) + bytes(9)), "1 bytes follow"),
    "no list of storages": (legacy(ONE).removesuffix(pickle.dumps([], 2)) + b"N.", "list of storages is not one"),
    "a storage is missing": (legacy(ONE), "'s0' is missing"),
    "a storage too many": (legacy(ONE, ["s0", "s1"], struct.pack("<q", 2) + bytes(8)), "'s1' is there"),
    "a storage twice": (legacy(ONE, ["s0", "s0"], 2 * (struct.pack("<q", 2) + bytes(8))), "'s0' is there"),
    "numel of the pickle": (
        legacy(tensor(2**40, 0, (2,), (1,)) + b".", ["s0"], struct.pack("<q", 2**40) + bytes(8)),
        "ends before the 4398046511104 bytes",
    ),
    "two sizes": (
        legacy(tensor(2, 0, (2,), (1,)) + tensor(3, 0, (2,), (1,)) + b".", ["s0"], struct.pack("<q", 2) + bytes(8)),
        "has two sizes",
    ),
    "part beyond the end": (
        legacy(tensor(2, 0, (1,), (1,), view=b"(" + text("v") + number(1) + number(2) + b"t") + b"."),
        "part of the storage 's0' lies outside",
    ),
    "other protocol": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1002, 2), "another protocol"),
}


@pytest.mark.parametrize(("data", "says"), LYING_LEGACY.values(), ids=LYING_LEGACY)
def test_lies_in_the_older_format(data, says):
    refuse(data, says)


def array(dtype=b"f4", shape=(2,), data=bytes(8), order=b"<") -> bytes:
    kind = (
        b"cnumpy\ndtype\n("
        + text(dtype.decode())
        + b"I00\nI01\ntR(I3\n"
        + text(order.decode())
        + b"NNNI-1\nI-1\nI0\ntb"
    )
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\n\x85C\x01btR"
    return head + b"(I1\n" + numbers(shape) + kind + b"I00\nB" + struct.pack("<I", len(data)) + data + b"tb"


ARRAYS = {
    "object": (array(b"O"), "numpy.dtype 'O'"),
    "object of 8 bytes": (array(b"O8"), "numpy.dtype 'O8'"),
    "structure": (array(b"V8"), "numpy.dtype 'V8'"),
    "fields": (array().replace(b"NNNI-1", b"N(t}I-1"), "with fields"),
    "text": (array(b"U2"), "numpy.dtype 'U2'"),
    "huge void": (array(b"V2000000000"), "'V2000000000'"),
    "shape too large": (array(shape=(3,)), "has 8 bytes"),
    "shape of terabytes": (array(shape=(2**40,)), "has 8 bytes"),
    "shape that overflows": (array(shape=(2**62, 4)), "not a tuple of sizes"),
    "product that overflows": (array(shape=(2**31, 2**31, 4)), "has 8 bytes"),
    "negative shape": (array(shape=(-1, -2)), "not a tuple of sizes"),
    "empty and huge": (array(shape=(0, 2**61, 2**61), data=b""), "does not fit"),
    "no byte order": (array(order=b"?"), "unknown byte order"),
    "no contents": (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\n\x85C\x01btR", "has no contents"),
    "matrix": (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nmatrix\nI0\n\x85C\x01btR", "numpy.matrix"),
    "__setstate__": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\n\x85C\x01btR}"
        + text("__class__")
        + b"cos\nsystem\nsb",
        "state of a numpy.ndarray",
    ),
    "list of objects": (array().replace(b"B\x08\x00\x00\x00" + bytes(8), b"]cos\nsystem\na"), "are a list, not bytes"),
}


@pytest.mark.parametrize(("data", "says"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_are_numbers_of_the_size_they_say(data, says):
    refuse(data + b".", says)


def test_the_array_written_here_is_read():
    pathlib.Path("weights.pkl").write_bytes(array() + b".")
    np.testing.assert_array_equal(torch_file.read("weights.pkl"), np.zeros(2, np.float32))


HUGE = struct.pack("<Q", 2**62)
PAIRS = b"](" + b"".join(b"(J%bNl" % struct.pack("<i", i) for i in range(2**13)) + b"eq\x00"
COPY_PAIRS = PAIRS + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R0" * 1000 + b"N."
ENCODE = text("x" * 2**16) + b"q\x00c_codecs\nencode\nq\x01(" + b"h\x01(h\x00X\x06\x00\x00\x00latin1tR" * 2000 + b"l."
LAUGHS = b"]q\x00" + b"".join(b"(" + b"h%c" % i * 10 + b"lq%c" % (i + 1) for i in range(40)) + b"."
TEXTS = text("x" * 2**16) + b"q\x00(" + b"h\x00" * 10_000 + b"l."
TENSORS = tensor(2**18, 0, (2**18,), (1,)) + b"q\x00(" + b"h\x00" * 10_000 + b"l."
BOMBS = {  # opcodes, message, MiB that refusing them may take
    "LONG_BINPUT": (b"Nr\xff\xff\xff\xff0" * 100, "no opcode", 1),
    "BYTEARRAY8": (b"\x80\x05\x96" + HUGE, "no pickle at byte 2", 1),
    "BINBYTES8": (b"\x80\x04\x8e" + HUGE, "no pickle at byte 2", 1),
    "BINUNICODE8": (b"\x80\x04\x8d" + HUGE, "no pickle at byte 2", 1),
    "BINBYTES": (b"\x80\x03B\xff\xff\xff\xff", "no pickle at byte 2", 1),
    "BINSTRING": (b"T\xff\xff\xff\x7f", "no pickle at byte 0", 1),
    "LONG4": (b"\x80\x02\x8b\xff\xff\xff\x7f", "no pickle at byte 2", 1),
    "FRAME": (b"\x80\x04\x95" + HUGE + b"N.", "frame of", 1),
    "a long that is there": (b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20, "integer of 8388607 bits", 5),
    "OrderedDict of one list again and again": (COPY_PAIRS, "pickle bomb", 5),
    "encoding one text again and again": (ENCODE, "pickle bomb", 5),
    "sets": (b"(" + b"\x8f" * 2**17 + b"l.", "pickle bomb", 5),
    "lists": (b"(" + b"]" * 2**17 + b"l.", "pickle bomb", 5),
    "memo": (b"]" + b"\x94" * 2**17 + b".", "pickle bomb", 10),
    "marks": (b"(" * 2**17, "pickle bomb", 5),
    "deep lists": (b"]" * 5000 + b"a" * 4999 + b".", "levels deep", 2),
    "deep tuples": (b")" + b"\x85" * 5000 + b".", "levels deep", 2),
    "deep dicts": (b"}" + b"N}" * 5000 + b"s" * 5000 + b".", "levels deep", 3),
    "a billion laughs": (LAUGHS, "pickle bomb", 1),
    "one text many times": (TEXTS, "pickle bomb", 5),
}


@pytest.mark.parametrize(("data", "says", "mebibytes"), BOMBS.values(), ids=BOMBS)
def test_bombs_do_not_go_off(monkeypatch, data, says, mebibytes):
    monkeypatch.setattr(inert, "_HEAD_START", 2**20)  # so that small ones, which are quick, are bombs
    refuse(data, says, mebibytes)


def test_one_tensor_many_times_is_a_bomb(monkeypatch):
    monkeypatch.setattr(inert, "_HEAD_START", 2**20)
    refuse(zipped(TENSORS, s0=bytes(2**20)), "pickle bomb", 2)


def test_a_tensor_in_a_few_places_is_not(monkeypatch):
    """Shared weights are usual; here they are counted as 10 times the file."""
    monkeypatch.setattr(inert, "_HEAD_START", 2**20)
    data = tensor(2**18, 0, (2**18,), (1,)) + b"q\x00(" + b"h\x00" * 10 + b"l."
    pathlib.Path("weights.pth").write_bytes(zipped(data, s0=bytes(2**20)))
    assert len(torch_file.read("weights.pth")) == 10


FILE = {"net/data.pkl": pickle.dumps({"a": [1, 2, 3]}, 2), "net/version": b"3\n"}
NAME, CENTRAL = b"net/data.pkl", b"PK\x01\x02"


def patched(offset: int, content: bytes, data: bytes = b"", *, local: bool = False) -> bytes:
    """An archive with bytes of the first entry's header (in the list of contents, or in front of it) replaced."""
    changed = bytearray(data or archive(FILE))
    start = (0 if local else changed.index(CENTRAL)) + offset
    changed[start : start + len(content)] = content
    return bytes(changed)


def duplicated() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for content in (b"N.", b"I1\n."):
            file.writestr("net/data.pkl", content)
    return stream.getvalue()


def second_header_offset() -> int:
    data = archive(FILE)
    return data.index(CENTRAL, data.index(CENTRAL) + 1) + 42


BOMB = archive(FILE | {"net/data/0": bytes(10**8)}, zipfile.ZIP_DEFLATED)
ARCHIVES = {
    "parent folder": (
        lambda: archive(FILE | {"net/../../executed": b""}),
        r"'net/\.\./\.\./executed', which points outside",
    ),
    "absolute": (lambda: archive(FILE | {"/executed": b""}), "'/executed', which points outside"),
    "backslash": (lambda: archive(FILE | {"net\\..\\executed": b""}), "which points outside"),
    "zero byte": (lambda: archive(FILE | {"net/xy": b""}).replace(b"net/xy", b"net/x\0"), "which points outside"),
    "two folders": (lambda: archive(FILE | {"other/data.pkl": b"N."}), "outside of its one folder"),
    "no folder": (lambda: archive(FILE | {"data": b""}), "outside of its one folder"),
    "duplicate": (duplicated, "has 2 entries 'net/data.pkl'"),
    "deflated bomb": (lambda: BOMB, "'net/data.pkl' in the archive is compressed"),
    "encrypted": (lambda: patched(8, b"\x01\x00"), "is encrypted"),
    "encrypted in front only": (lambda: patched(6, b"\x01\x00", local=True), "contradict each other"),
    "compressed in front only": (lambda: patched(8, b"\x08\x00", local=True), "contradict each other"),
    "another name in front": (lambda: patched(30, b"net/else.pkl", local=True), "contradict each other"),
    "no header in front": (lambda: patched(0, b"PK\x03\x05", archive(FILE), local=True), "contradict each other"),
    "checksum": (lambda: patched(16, b"\0\0\0\0"), "checksum of 'data.pkl' in the archive is wrong"),
    "a flipped byte": (lambda: patched(45, b"\xff", local=True), "checksum of 'data.pkl'"),
    "two sizes": (lambda: patched(24, b"\xff\0\0\0"), "has two sizes, 26 and 255"),
    "size too large": (lambda: patched(20, 2 * struct.pack("<I", 10**9)), "overlap"),
    "size a little too large": (lambda: patched(20, 2 * struct.pack("<I", 60)), "overlap"),
    "size too small": (lambda: patched(20, 2 * struct.pack("<I", 20)), "checksum of 'data.pkl'"),
    "size of 4 GiB": (lambda: patched(20, b"\xff" * 8), "in the archive has two sizes|no list of contents|overlap"),
    "two entries are one": (
        lambda: archive(FILE)[: second_header_offset()] + bytes(4) + archive(FILE)[second_header_offset() + 4 :],
        "contradict",
    ),
    "begins outside": (lambda: patched(42, struct.pack("<I", 10**9)), "begins outside|no list of contents"),
    "truncated": (lambda: archive(FILE)[:-30], "no list of contents"),
    "the beginning only": (lambda: archive(FILE)[:60], "no list of contents"),
}


@pytest.mark.parametrize(("make", "says"), ARCHIVES.values(), ids=ARCHIVES)
def test_archives_that_lie(make, says):
    refuse(make(), says)
    assert sorted(path.name for path in pathlib.Path().iterdir()) == ["weights.pth"]


def test_entries_behind_the_list_of_contents_are_refused():
    data = archive(FILE)
    entry = data[: data.index(b"PK", 4)]
    changed = bytearray(data[:-2] + struct.pack("<H", len(entry)) + entry)  # the comment at the end is a whole entry
    struct.pack_into("<I", changed, changed.index(CENTRAL) + 42, len(data))
    refuse(bytes(changed), "behind its list of contents")


def test_overlapping_entries_are_refused():
    """A file in a file: the inner entry's header is part of the outer one's bytes, and both agree with theirs."""
    inner = archive({"net/data.pkl": b"N."})
    inner = inner[: inner.index(CENTRAL)]
    data = bytearray(archive({"net/outer.pkl": inner, "net/data.pkl": b"N."}))
    struct.pack_into("<I", data, data.rindex(CENTRAL) + 42, data.index(b"net/outer.pkl") + len(b"net/outer.pkl"))
    refuse(bytes(data), "overlap")


def seeds() -> list[bytes]:
    value = {
        "model": {"weight": torch.arange(6.0).reshape(2, 3).t(), "bias": torch.ones(2, dtype=torch.bfloat16)},
        "array": np.arange(3),
        "step": np.float32(3),
        "set": {1},
        "size": torch.Size([2]),
        "device": torch.device("cpu"),
    }
    files = []
    for zip_format in (True, False):
        stream = io.BytesIO()
        torch.save(value, stream, _use_new_zipfile_serialization=zip_format)
        files.append(stream.getvalue())
    plain = {"array": np.arange(3), "path": pathlib.PosixPath("/a"), "many": [1, "b", (2.5, None)]}
    return files + [pickle.dumps(plain, protocol) for protocol in (0, 2, 4, 5)]


def mutated(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    match rng.randrange(4):
        case 0:
            return data[: rng.randrange(len(data))]
        case 1:
            start = rng.randrange(len(data))
            del changed[start : start + rng.randrange(1, 9)]
        case 2:
            start = rng.randrange(len(data))
            changed[start:start] = data[rng.randrange(len(data)) :][: rng.randrange(1, 30)]
        case 3:
            for _ in range(rng.choice([1, 1, 2, 4])):
                changed[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(6))
def test_broken_files_are_read_or_refused(seed):
    """Any other exception fails the test; so does a result that is not plain."""
    rng = random.Random(seed)
    original = seeds()[seed]
    refused = 0
    path = pathlib.Path("weights.pth")
    for turn in range(150):
        broken = mutated(rng, original)
        if seed == 0 and turn % 2:  # behind the checksum of the archive
            with zipfile.ZipFile(io.BytesIO(original)) as file:
                entries = {name: file.read(name) for name in file.namelist()}
            name = next(name for name in entries if name.endswith("/data.pkl"))
            broken = archive(entries | {name: mutated(rng, entries[name])})
        path.write_bytes(broken)
        try:
            check_plain(torch_file.read(path))
        except WeightsError as error:
            assert str(error).startswith("weights.pth: ")
            refused += 1
    assert refused > 75


def check_plain(value):
    assert type(value) in (
        dict,
        list,
        tuple,
        set,
        frozenset,
        str,
        bytes,
        int,
        float,
        complex,
        bool,
        type(None),
        np.ndarray,
    )
    if isinstance(value, dict | list | tuple | set | frozenset):
        for item in value.values() if isinstance(value, dict) else value:
            check_plain(item)
