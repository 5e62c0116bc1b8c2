"""Zip archives as `torch.save` writes them, read from memory and with suspicion.

The standard library's `zipfile` lists the entries. The bytes are taken here, because it would decompress them, and
because it believes entries that overlap or that contradict their own headers. Nothing is written to disk.
"""

from __future__ import annotations

import collections
import io
import struct
import zipfile
import zlib
from typing import NamedTuple

from wkd_jax.weights.errors import WeightsError, damaged, refused, short

_HEADER = struct.Struct("<4s5H3L2H")  # what precedes every entry
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags


class _Entry(NamedTuple):
    start: int
    size: int
    crc: int


class Archive:
    """The entries of an archive, without its one folder.

    Args:
      data: The file.

    Raises:
      WeightsError: If it is damaged or not as `torch.save` makes them.
    """

    def __init__(self, data: bytes) -> None:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                infos, directory = archive.infolist(), archive.start_dir
        except Exception as error:  # whatever zipfile raises on broken bytes
            raise damaged(f"it begins like a zip archive, but has no list of contents ({error})") from error
        self._data = memoryview(data)
        names = [info.orig_filename for info in infos]
        if other := _other_kind(names):
            raise WeightsError(other)
        root = _root(names)
        self._entries: dict[str, _Entry] = {}
        spans = [(directory, directory)]
        for info in infos:
            entry = self._locate(info)
            self._entries[info.orig_filename.removeprefix(root)] = entry
            spans.append((info.header_offset, entry.start + entry.size))
        spans.sort()
        for (_, end), (begin, _) in zip(spans, spans[1:], strict=False):
            if end > begin:
                raise refused(f"entries of the archive overlap at byte {begin}, as in a zip bomb")
        if spans[-1][0] > directory:
            raise refused("entries of the archive lie behind its list of contents")

    def size(self, name: str) -> int | None:
        """Bytes of an entry. None if there is none."""
        return self._entries[name].size if name in self._entries else None

    def read(self, name: str) -> memoryview:
        """The bytes of an entry, compared with their checksum."""
        if name not in self._entries:
            raise damaged(f"the archive has no entry {short(name)}")
        start, size, crc = self._entries[name]
        content = self._data[start : start + size]
        if zlib.crc32(content) != crc:
            raise damaged(f"the checksum of {short(name)} in the archive is wrong")
        return content

    def _locate(self, info: zipfile.ZipInfo) -> _Entry:
        """Where the bytes of an entry are. Its own header must agree with the list of contents."""
        what = f"{short(info.orig_filename)} in the archive"
        if info.flag_bits & _ENCRYPTED:
            raise refused(f"{what} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED:
            raise refused(f"{what} is compressed, which torch.save never does (it could be a zip bomb)")
        if info.compress_size != info.file_size:
            raise damaged(f"{what} has two sizes, {info.compress_size} and {info.file_size} bytes")
        begin = info.header_offset
        if not 0 <= begin <= len(self._data) - _HEADER.size:
            raise damaged(f"{what} begins outside of it")
        magic, _, flags, method, *_, name_size, extra_size = _HEADER.unpack_from(self._data, begin)
        start = begin + _HEADER.size + name_size + extra_size
        name = bytes(self._data[begin + _HEADER.size :][:name_size])
        expected = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        if (magic, method, flags & _ENCRYPTED, name) != (b"PK\x03\x04", zipfile.ZIP_STORED, 0, expected):
            raise damaged(f"{what} and its list of contents contradict each other")
        return _Entry(start, info.file_size, info.CRC)


def _other_kind(names: list[str]) -> str | None:
    """Of an archive that other programs make: what it is and what to do."""
    if names and all(name.endswith(".npy") for name in names):
        return "it is a NumPy .npz archive: read it with numpy.load"
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "it is a TorchScript archive, which holds a program: load it with torch.jit.load on a machine that you can "
            "spare, and save its state_dict() with safetensors"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        return "it is a zip archive, but not one of torch.save: unpack it, and give the file of weights inside"
    return None


def _root(names: list[str]) -> str:
    """The folder, with its slash, that all entries are in."""
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
            raise refused(f"the archive has an entry {short(name)}, which points outside of its folder")
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise refused(f"the archive has {count} entries {short(name)}")
    roots = {name.split("/", 1)[0] for name in names}
    if len(roots) > 1 or not all("/" in name for name in names):
        raise refused(f"the archive has entries outside of its one folder, such as {short(max(roots))}")
    return roots.pop() + "/"
