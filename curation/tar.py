"""The members of a tar in order, with bounded memory; what is damaged or cut is said, never passed over.

`tarfile` parses the headers. The walk from header to header is ours, because `tarfile` takes a damaged header for the end of
the archive (the samples after it vanish) and reads an extended header of any size into memory.
"""

import contextlib
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

BLOCK = 512
MAX_EXTENDED = 1 << 20  # bytes of one pax or GNU header: names and attributes, not data
_CHUNK = 1 << 20
_FILE, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "FIFO", b"S": "sparse file"}
_BROKEN = (OSError, ValueError, EOFError, KeyError, MemoryError, zlib.error, lzma.LZMAError, pa.ArrowException)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}


class Damage(Exception):
    """The archive cannot be read on from here; the text says where and why. The same file gives the same text."""


class Source:
    """A binary file that remembers its own failure, so that a lost connection is not taken for a damaged file."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: Exception | None = None
        self.seekable, self.tell, self.readable = file.seekable, file.tell, lambda: True

    def read(self, size: int = -1) -> bytes:
        """As the file's own `read`."""
        return self._tried(self.file.read, size)

    def seek(self, position: int, whence: int = 0) -> int:
        """As the file's own `seek`."""
        return self._tried(self.file.seek, position, whence)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def flush(self) -> None:
        """Nothing: the file is only read."""

    def _tried(self, function: Any, *values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            self.error = error
            raise

    @contextlib.contextmanager
    def damage(self, what: str) -> Iterator[None]:
        """Turn any error of a parser into Damage, except those of the file itself.

        Raises:
            Damage: what the parser said.
        """
        try:
            yield
        except _BROKEN as problem:
            raise self.damaged(what, problem) from problem

    def damaged(self, what: str, problem: Exception) -> Exception:
        """The error to raise for a parser's: that of the file itself where it failed, else Damage."""
        if self.error is not None:
            return self.error
        return Damage(f"{what}: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}")


class Member:
    """One entry of a tar: `name` (bytes that are not UTF-8 as surrogate escapes), `size` in bytes, and `kind`: file, directory, or
    what else it is in words. `read` gives the bytes of a file while it is the current entry."""

    def __init__(self, name: str, kind: str, size: int, stream: "_Stream"):
        self.name, self.kind, self.size, self._stream = name, kind, size, stream

    def read(self) -> bytes:
        """The bytes, read once.

        Raises:
            Damage: the archive ends inside this file.
        """
        data = self._stream.take(self.size, self.name)
        self._stream.pending -= self.size
        return data


class _Stream:
    """The archive's bytes, decompressed, with a place in them and the rest of the current member to be skipped."""

    def __init__(self, source: Source):
        self.source, self.position, self.pending = source, 0, 0
        end = source.seek(0, 2)
        source.seek(0)
        start = source.read(6)
        source.seek(0)
        self.codec = next((codec for magic, codec in _COMPRESSED.items() if start.startswith(magic)), None)
        self.end = None if self.codec else end  # where an uncompressed archive stops, so that a lie about a size costs nothing
        if self.codec == "xz":
            self.file: Any = lzma.LZMAFile(source)  # noqa: SIM115  it closes with its source
        else:
            self.file = pa.CompressedInputStream(pa.PythonFile(source, "r"), self.codec) if self.codec else source

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        try:
            data = self.file.read(size)
            while len(data) < size and (more := self.file.read(size - len(data))):
                data += more
        except _BROKEN as problem:
            raise self.source.damaged(f"the {self.codec or 'tar'} data is damaged near byte {self.position}", problem) from problem
        self.position += len(data)
        return data

    def take(self, size: int, name: str) -> bytes:
        """Exactly `size` bytes."""
        self._reach(size, name)
        data = self.read(size)
        if len(data) < size:
            raise self._cut(size - len(data), name)
        return data

    def skip(self, name: str) -> None:
        """Pass over what is left of the current member."""
        if self.end is not None:
            self._reach(self.pending, name)
            if self.pending >= BLOCK:
                self.source.seek(self.pending, 1)
                self.position += self.pending
            else:
                self.read(self.pending)  # padding: a seek would cost the file its buffer
        else:
            while self.pending:
                self.pending -= len(self.take(min(self.pending, _CHUNK), name))
        self.pending = 0

    def _reach(self, size: int, name: str) -> None:
        if self.end is not None and size > self.end - self.position:
            raise self._cut(size - (self.end - self.position), name)

    def _cut(self, size: int, name: str) -> Damage:
        return Damage(f"the tar ends at byte {self.position if self.end is None else self.end}, inside {name[:200]!r}, {size} bytes short")


def members(source: Source) -> Iterator[Member]:
    """Every entry of a tar, plain or compressed (gzip, bz2, zstd, xz: told from its first bytes). Nothing is written to disk and
    no link is followed.

    Raises:
        Damage: the archive is cut, damaged or no tar; all members before that were yielded.
    """
    stream = _Stream(source)
    everywhere: dict[str, str] = {}  # pax fields of all members to come
    fields: dict[str, str] = {}  # pax and GNU fields of the next member
    name = ""
    while True:
        stream.skip(name)
        start = stream.position
        block = stream.read(BLOCK)
        if not block.strip(b"\0") and len(block) == BLOCK:
            return
        if not block:
            raise Damage(f"the tar has no end mark at byte {start}: it was cut here" if start else "the file is empty (0 bytes)")
        if len(block) < BLOCK:
            raise Damage(f"the tar ends at byte {stream.position}, inside a header")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as problem:
            what = f"damaged header at byte {start} ({problem})" if start else f"not a tar: it starts with {block[:16]!r}"
            raise Damage(what) from problem
        size = header.size
        if size < 0:
            raise Damage(f"damaged header at byte {start} (size {size})")
        if header.type in (b"x", b"X", b"g", b"L", b"K"):
            if size > MAX_EXTENDED:
                raise Damage(f"extended header of {size} bytes at byte {start}, over the limit of {MAX_EXTENDED}")
            data = stream.take(size + -size % BLOCK, "an extended header")[:size]
            if header.type == b"L":
                fields["path"] = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif header.type != b"K":
                (everywhere if header.type == b"g" else fields).update(_pax(data, start))
            continue
        fields = everywhere | fields
        name = fields.get("GNU.sparse.name") or fields.get("path") or header.name
        kind = "file" if header.type in _FILE else "directory" if header.type == _DIRECTORY else _KINDS.get(header.type, "unknown entry")
        if "size" in fields and kind == "file":
            size = _number(fields["size"], start)
        if any(field.startswith("GNU.sparse.") for field in fields):
            kind = "sparse file"
        if header.type == b"S" and block[482]:
            while stream.take(BLOCK, name)[504]:
                pass
        # As tarfile: links, directories and devices have no data, whatever size they state.
        holds_data = kind in ("file", "sparse file", "unknown entry")
        stream.pending = size + -size % BLOCK if holds_data else 0
        fields = {}
        yield Member(name.rstrip("/") if kind == "directory" else name, kind, size if holds_data else 0, stream)


def _pax(data: bytes, start: int) -> dict[str, str]:
    """Fields of a pax header: records of '<length> <name>=<value>' and a line end."""
    fields, place = {}, 0
    while place < len(data) and data[place]:
        length, _, _ = data[place : place + 20].partition(b" ")
        end = place + _number(length.decode("ascii", "replace"), start)
        name, equals, value = data[place + len(length) + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or end <= place:
            raise Damage(f"damaged extended header at byte {start}")
        fields[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        place = end
    return fields


def _number(text: str, start: int) -> int:
    """A decimal number of an extended header."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Damage(f"damaged extended header at byte {start} (number {text[:20]!r})")
    return int(text)
