"""Similarities in the user's cache: found by content, and never in the way."""

import numpy as np
import pytest

from wkd_jax import cache
from wkd_jax.interrelation import Interrelation, cached, provenance, save

NAMES = ("ant", "bee")
SIMILARITY = np.array([[1, 0.2], [0.2, 1]], np.float32)


def record(weights="aa", data="digits"):
    return provenance(
        teacher="resnet20",
        weights_hash=weights,
        data=data,
        data_fingerprint="bb",
        num_classes=2,
        dtype="float32",
        spec={"kind": "cka"},
    )


@pytest.fixture(autouse=True, name="folder")
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WKD_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_found_by_content(folder):
    notes = []
    assert cached.find(record(), NAMES, notes.append) is None and not notes
    cached.keep(Interrelation(SIMILARITY, NAMES, record(), {"rank_one_share": 0.5}), notes.append)
    assert not notes
    found = cached.find(record(data="a copy"), NAMES, notes.append)
    np.testing.assert_array_equal(found.similarity, SIMILARITY)
    assert found.structure == {"rank_one_share": 0.5}
    assert notes == [f"class similarity: found in the cache, {cached.file(record())}"]
    assert cached.file(record()).parent == folder / "interrelation"
    assert cached.find(record(weights="cc"), NAMES, notes.append) is None


@pytest.mark.parametrize("kind", ["damaged", "foreign", "other classes", "folder"])
def test_what_is_not_good_is_replaced(kind):
    path, notes = cached.file(record()), []
    cached.keep(Interrelation(SIMILARITY, NAMES, record()), notes.append)
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "foreign":
        save(path, Interrelation(SIMILARITY, NAMES, record(weights="cc")))
    elif kind == "other classes":
        save(path, Interrelation(SIMILARITY, NAMES[::-1], record()))
    else:
        path.unlink()
        path.mkdir()
    assert cached.find(record(), NAMES, notes.append) is None
    (note,) = notes
    assert str(path) in note
    cached.keep(Interrelation(SIMILARITY, NAMES, record()), notes.append)
    if kind == "folder":
        assert "not kept for later runs" in notes[1]
    else:
        np.testing.assert_array_equal(cached.find(record(), NAMES, notes.append).similarity, SIMILARITY)


def test_a_cache_that_cannot_be_used_is_no_error(folder, monkeypatch):
    folder.write_text("a file")
    notes = []
    assert cached.find(record(), NAMES, notes.append) is None
    cached.keep(Interrelation(SIMILARITY, NAMES, record()), notes.append)
    assert "not kept for later runs" in notes[-1] and str(folder) in notes[-1]
    monkeypatch.setenv("WKD_JAX_CACHE", "gs://bucket/cache")
    with pytest.raises(ValueError, match="WKD_JAX_CACHE=gs://bucket/cache: must be a folder"):
        cached.find(record(), NAMES, notes.append)


def test_where_the_cache_is():
    home = cache.folder({})
    assert home.parts[-2:] == (".cache", "wkd_jax") and home.is_absolute()
    assert cache.folder({"XDG_CACHE_HOME": "/xdg"}).as_posix() == "/xdg/wkd_jax"
    assert cache.folder({"XDG_CACHE_HOME": "/xdg", "WKD_JAX_CACHE": "/ours"}).as_posix() == "/ours"


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("WKD_JAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    notes = []
    assert cached.find(record(), NAMES, notes.append) is None
    cached.keep(Interrelation(SIMILARITY, NAMES, record()), notes.append)
    assert "set WKD_JAX_CACHE" in notes[-1]
