"""The pickle machine against pickle itself, and its bounds."""

import collections
import pickle
import pickletools

import numpy as np
import pytest

from wkd_jax.weights import inert, pickles
from wkd_jax.weights.errors import WeightsError
from wkd_jax.weights.inert import Budget
from wkd_jax.weights.objects import BUILDERS


def load(data, builders=BUILDERS, persistent=None):
    budget = Budget(len(data))
    value, end = pickles.load(data, 0, budget, builders, persistent)
    return inert.plain(value, budget), end


SHARED = [1, 2]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    255,
    -(2**31),
    2**31,
    2**63,
    -(2**200),
    1.5,
    float("inf"),
    -0.0,
    2 - 3j,
    "",
    "text\n'\"\\",
    "\u00e9\u20ac\U0001f600\ud800",
    "x" * 70_000,
    b"",
    b"\x00\xff\n",
    b"x" * 70_000,
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    [],
    [None],
    list(range(3000)),
    {},
    {"a": 1},
    {i: str(i) for i in range(3000)},
    {1: 1, 65_535: 2, "s": 3, b"b": 4, None: 5, False: 6},
    set(),
    {1, "a", b"b", None},
    frozenset({1, 2}),
    [SHARED, SHARED, (SHARED, {"again": SHARED})],
    collections.OrderedDict(a=1, b=[2]),
    collections.Counter("hello"),
    collections.defaultdict(list, a=[1]),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values(value, protocol):
    data = pickle.dumps(value, protocol)
    found, end = load(data)
    assert end == len(data)
    assert found == value
    assert type(found) is (dict if isinstance(value, dict) else type(value))
    if not isinstance(value, set | frozenset):
        assert repr(found) == repr(dict(value) if isinstance(value, dict) else value)  # types and signs of the parts


def test_shared_objects_stay_shared():
    first, second, (third, _) = load(pickle.dumps([SHARED, SHARED, (SHARED, None)]))[0]
    assert first is second is third


@pytest.mark.parametrize("protocol", range(6))
def test_python_and_c_write_the_same(protocol):
    data = pickle._dumps({"a": [1, (2, "b")], "c": {3}}, protocol)
    assert load(data)[0] == {"a": [1, (2, "b")], "c": {3}}


HAND_WRITTEN = {
    "INT true and false": b"(I01\nI00\nl.",
    "LONG": b"L123456789012345678901234567890L\n.",
    "FLOAT": b"F1e-3\n.",
    "STRING": b"S'a\\x41\\n\\'\\\\'\n.",
    "UNICODE": b"Va\\u20acb\n.",
    "BINSTRING": b"T\x02\x00\x00\x00ab.",
    "LIST TUPLE DICT": b"((lp0\n(I1\ntp1\n(S'a'\nI2\ndp2\nt.",
    "GET and PUT": b"(lp7\nI1\nag7\n0.",
    "BINGET and DUP": b"]q\x05h\x052\x86.",
    "LONG_BINPUT": b"]r\xff\xff\x00\x00j\xff\xff\x00\x00\x86.",
    "MEMOIZE": b"\x80\x04]\x94h\x00\x86.",
    "POP": b"I1\nI2\n0.",
    "POP of a mark": b"I1\n(0.",
    "POP_MARK": b"I1\n(I2\nI3\n1.",
    "LONG4": b"\x8b\x02\x00\x00\x00\xff\x7f.",
    "BINUNICODE8 and BINBYTES8": b"\x8d\x01\0\0\0\0\0\0\0a\x8e\x01\0\0\0\0\0\0\0b\x86.",
    "BYTEARRAY8": b"\x96\x01\0\0\0\0\0\0\0a.",
    "EMPTY_SET ADDITEMS FROZENSET": b"\x8f(K\x01K\x02\x90(K\x03\x91\x86.",
    "FRAME": b"\x80\x04\x95\x02\0\0\0\0\0\0\0N.",
    "OBJ": b"(ccollections\nOrderedDict\no.",
    "INST": b"(icollections\nOrderedDict\n.",
    "NEWOBJ": b"ccollections\nOrderedDict\n)\x81.",
    "STACK_GLOBAL": b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R.",
}


@pytest.mark.parametrize("data", HAND_WRITTEN.values(), ids=HAND_WRITTEN)
def test_opcodes(data):
    wanted = pickle.loads(data, encoding="latin1")
    assert load(data)[0] == (bytes(wanted) if isinstance(wanted, bytearray) else wanted)


def test_every_opcode_is_supported_or_refused_by_name():
    refused = {"EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
    assert {opcode.name for opcode in pickletools.opcodes} - set(pickles._OPERATIONS) == refused | {"STOP"}
    for opcode in pickletools.opcodes:
        if opcode.name in refused:
            with pytest.raises(WeightsError, match=f"opcode {opcode.name} at byte 0 "):
                load(opcode.code.encode("latin-1") + b"0\n.")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no opcode"),
        (b"\xff.", "byte 0: no opcode"),
        (b"N", "byte 1: no opcode"),
        (b".", "stack is empty"),
        (b"0.", "stack is empty"),
        (b"(.", "stack is empty"),
        (b"N(\x85.", "stack is empty"),
        (b"t.", "no mark"),
        (b"h\x00.", "not there"),
        (b"p-1\n.", "stack is empty|out of range"),
        (b"Np-1\n.", "out of range"),
        (b"Np99999999999\n.", "out of range"),
        (b"NNa.", "appends to a NoneType"),
        (b"}Na.", "appends to a dict"),
        (b"]NNs.", "sets items of a list"),
        (b"}(Nu.", "a key without a value"),
        (b"](N\x90.", "adds to a list"),
        (b"NN\x93.", "not text"),
        (b"(o.", "without a class"),
        (b"N)R.", "calls a NoneType with a tuple"),
        (b"cos\nsystem\nNR.", "calls a Name with a NoneType"),
        (b"}NNb.", "state of a NoneType"),
        (b"]}b.", "state of a list"),
        (b"ccollections\nOrderedDict\n)R]b.", "state of type list"),
        (b"Ixyz\n.", "invalid literal"),
        (b"I" + b"9" * 5000 + b"\n.", "no pickle at byte 0"),
        (b"\x8b" + (200).to_bytes(4, "little") + b"\x7f" * 200 + b".", "1599 bits"),
        (b"S'a\\q'\n.", "unknown escape"),
        (b"S'a\n.", "quote"),
        (b"U\x05ab.", "byte 0"),
        (b"X\x01\x00\x00\x00\xff.", "utf-8"),
        (b"c\xff\nx\n.", "utf-8"),
        (b"c" + b"m" * 400 + b"\nx\n.", "^it names .* longer than 300"),
        (b"\x80\x04\x95\xff\0\0\0\0\0\0\0N.", "frame of 255 bytes"),
        (b"}]Ns.", "a key in it is a list"),
        (b"})Ns.", "a key in it is a tuple"),
        (b"}\x8a\x09" + b"\xff" * 8 + b"\x01Ns.", "a key in it is the number 36893488147419103231, not one from 0"),
        (b"}J\xff\xff\xff\xffNs.", "a key in it is the number -1"),
        (b"}G" + bytes(8) + b"Ns.", "a key in it is a float"),
        (b"}Q.", "BINPERSID"),
    ],
)
def test_broken_pickles_say_where_and_why(data, says):
    with pytest.raises(WeightsError, match=says):
        load(data)


def test_calls_reach_listed_builders_only():
    calls = []

    def build(arguments, budget):
        calls.append(arguments)
        return "built"

    data = b"cos\nsystem\n(S'ls'\ntR."
    assert load(data, {"os.system": build})[0] == "built"
    assert calls == [("ls",)]
    with pytest.raises(WeightsError, match=r"it calls 'os\.system'"):
        load(data, {})


def test_persistent_ids_go_to_their_function():
    assert load(b"(S'a'\nI1\ntQ.", persistent=lambda key: [key])[0] == [("a", 1)]


def test_a_name_that_is_not_called_is_text():
    assert load(b"cos\nsystem\n.")[0] == "os.system"


def nested(depth):
    return b"]" * depth + b"a" * (depth - 1) + b"."


def test_depth_is_bounded():
    assert load(nested(inert.MAX_DEPTH))[0] is not None
    for depth in (inert.MAX_DEPTH + 2, 10_000):
        with pytest.raises(WeightsError, match="more than 100 levels"):
            load(nested(depth))


def test_depth_counts_where_an_object_is_met_last():
    """The inner lists are first met near the top, then again below as many others."""
    inner = b"]" * 60 + b"a" * 59 + b"q\x01"
    with pytest.raises(WeightsError, match="more than 100 levels"):
        load(b"(" + inner + b"]" * 60 + b"h\x01" + b"a" * 60 + b"l.")


@pytest.mark.parametrize(
    "data",
    [b"]q\x00h\x00a.", b"}q\x00S'a'\nh\x00s.", b"]q\x00h\x00\x85a.", b"ccollections\nOrderedDict\n)Rq\x00Nh\x00s."],
)
def test_objects_that_contain_themselves_are_refused(data):
    with pytest.raises(WeightsError, match="contains itself"):
        load(data)


def test_the_budget_grows_with_the_file():
    Budget(2**20).charge(2**25 + 2**24)
    with pytest.raises(WeightsError, match="far more than its 0 bytes"):
        Budget(0).charge(2**25 + 1)


def test_builders_have_no_state_between_files():
    data = pickle.dumps(np.arange(3))
    assert load(data)[0] is not load(data)[0]
