"""Tars: grouped as WebDataset does, whatever their format, and what is cut, damaged or odd is a row that says so."""

import bz2
import gzip
import hashlib
import io
import random
import re
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset
from conftest import encode, photographs, tar_of

from curation import readers, tar
from curation.sources import fetch, list_shards, read_samples

PICTURES = [encode(picture) for picture in photographs(6, 48)]


def rows_of(path: Path) -> list[dict]:
    return [row for shard in list_shards(str(path)) for batch in read_samples(shard) for row in batch.to_pylist()]


def entry(name: str, kind: bytes, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def write(path: Path, entries: list, **options) -> Path:
    """A tar of TarInfo entries and (name, bytes)."""
    with tarfile.open(path, "w", **options) as archive:
        for item in entries:
            if isinstance(item, tarfile.TarInfo):
                archive.addfile(item)
            else:
                info = tarfile.TarInfo(item[0])
                info.size = len(item[1])
                archive.addfile(info, io.BytesIO(item[1]))
    return path


SAMPLES = [
    ("a/0.jpg", PICTURES[0]),
    ("a/0.txt", "früh\nam Morgen ☀".encode()),
    ("a/1.second.png", PICTURES[1]),
    ("a/1.JPG", PICTURES[2]),
    ("b.c/2.v1.jpg", PICTURES[3]),
    ("b.c/2.json", b'{"caption": "words", "url": "http://x"}'),
    ("b.c/3.cls", b"7"),
    ("b.c/4.jpg", PICTURES[4]),
]
KEYS = ["a/0", "a/1", "a/1.jpg", "b.c/2", "b.c/3", "b.c/4"]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.zst", ".tar.xz"])
def test_plain_and_compressed_tars_give_the_same_rows(tmp_path, ending):
    plain = tar_of(SAMPLES, tmp_path / "x.plain").read_bytes()
    if ending.endswith("z") and ending != ".tar.xz":
        data = gzip.compress(plain[:5000]) + gzip.compress(plain[5000:])  # pigz and bgzip write several members
    elif ending == ".tar.xz":
        import lzma

        data = lzma.compress(plain)
    else:
        data = {"": plain, ".bz2": bz2.compress(plain), ".zst": pa.compress(plain, "zstd", asbytes=True)}[ending.removeprefix(".tar")]
    (tmp_path / f"x{ending}").write_bytes(data)
    rows = rows_of(tmp_path / f"x{ending}")
    assert [row["uid"] for row in rows] == [f"x/{key}" for key in KEYS]
    assert [row["image"] for row in rows] == [PICTURES[0], PICTURES[1], PICTURES[2], PICTURES[3], None, PICTURES[4]]
    assert [row["caption"] for row in rows][:4:3] == ["früh\nam Morgen ☀", "words"]
    assert rows[4]["error"] == "sample has no image, only cls"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_no_utf8_are_keys_of_valid_text(tmp_path, form):
    long = "d" * 60 + "/" + "e" * 80
    names = [long, "caf\udce9", "tab\there", "back\\slash", "snow ❄"]
    files = [(f"{name}.jpg", picture) for name, picture in zip(names, PICTURES, strict=False)]
    path = write(tmp_path / "x.tar", files, format=form, encoding="utf-8", errors="surrogateescape")
    rows = rows_of(path)
    assert [row["key"] for row in rows] == [long, "caf\\xe9", "tab\\x09here", "back\\x5cslash", "snow ❄"]
    assert [row["image"] for row in rows] == PICTURES[:5]
    assert {row["uid"] for row in fetch(list_shards(str(path)), {"x/caf\\xe9"})} == {"x/caf\\xe9"}


def test_a_name_of_a_megabyte_is_cut_and_stays_unique(tmp_path):
    names = ["x" * 300_000 + end for end in ("a", "b")]
    rows = rows_of(write(tmp_path / "x.tar", [(f"{name}.jpg", PICTURES[0]) for name in names], format=tarfile.GNU_FORMAT))
    assert len({row["key"] for row in rows}) == 2 and all(len(row["key"]) <= 1000 for row in rows)


def test_links_devices_and_nested_archives_are_rows_with_an_error_and_are_never_followed(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(PICTURES[5])
    inner = tar_of([("inner.jpg", PICTURES[0])], tmp_path / "inner.tar").read_bytes()
    entries = [
        ("0.jpg", PICTURES[0]),
        entry("soft.jpg", tarfile.SYMTYPE, linkname=str(secret)),
        entry("hard.jpg", tarfile.LNKTYPE, linkname="0.jpg"),
        entry("null.jpg", tarfile.CHRTYPE, devmajor=1, devminor=3),
        entry("pipe.jpg", tarfile.FIFOTYPE),
        entry("folder.jpg", tarfile.DIRTYPE),
        ("nested.tar", inner),
        ("no_suffix", PICTURES[1]),
        ("../../etc/escape.jpg", PICTURES[2]),
        ("/abs/olute.jpg", PICTURES[3]),
        ("__meta__/x.jpg", PICTURES[4]),
    ]
    rows = {row["key"]: row for row in rows_of(write(tmp_path / "x.tar", entries))}
    assert {key: row["error"] and row["error"].split(" is ")[-1] for key, row in rows.items()} == {
        "0": None,
        "soft.jpg": "a symbolic link: not followed, not read",
        "hard.jpg": "a hard link: not followed, not read",
        "null.jpg": "a device: not followed, not read",
        "pipe.jpg": "a FIFO: not followed, not read",
        "nested": "sample has no image, only tar",
        "no_suffix": "a file without a suffix",
        "../../etc/escape": None,
        "/abs/olute": None,
    }
    assert PICTURES[5] not in [row["image"] for row in rows.values()]


def test_a_sparse_file_is_a_row_with_an_error_and_the_next_member_is_found(tmp_path):
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x" * 5000)
    (tmp_path / "next.jpg").write_bytes(PICTURES[0])
    for form in ("gnu", "posix"):
        subprocess.run(["tar", "-S", f"--format={form}", "-cf", f"{form}.tar", "hole.jpg", "next.jpg"], cwd=tmp_path, check=True)
        rows = rows_of(tmp_path / f"{form}.tar")
        assert [(row["key"], row["image"]) for row in rows] == [("hole.jpg", None), ("next", PICTURES[0])], rows
        assert "sparse file" in rows[0]["error"]


def test_a_tar_cut_at_any_byte_gives_the_samples_before_the_cut_and_says_where_it_ends(tmp_path):
    files = [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in (("jpg", PICTURES[i][:700]), ("txt", b"words"))]
    whole = tar_of(files, tmp_path / "whole.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512
    for place in range(0, end + 1, 37):
        (tmp_path / "cut.tar").write_bytes(whole[:place])
        rows = rows_of(tmp_path / "cut.tar")
        assert rows[-1]["key"] == "~lost" and re.search(r"lost: .*(tar|empty)", rows[-1]["error"]), (place, rows[-1])
        good = [row for row in rows if row["error"] is None]
        assert [row["image"] for row in good] == [PICTURES[i][:700] for i in range(len(good))]
        assert len(good) >= place // (512 * 5) and rows == rows_of(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])
    assert [row["error"] for row in rows_of(tmp_path / "cut.tar")] == [None] * 3


@pytest.mark.parametrize("ending", ["gz", "bz2", "zst", "xz"])
def test_a_compressed_tar_that_is_cut_or_damaged_keeps_its_first_samples(tmp_path, ending):
    noise = random.Random(0)
    files = [(f"{i:03d}.jpg", noise.randbytes(30_000)) for i in range(40)]
    plain = tar_of(files, tmp_path / "plain").read_bytes()
    import lzma

    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    data = compress[ending](plain)
    for broken in (
        data[: len(data) // 2],
        data[: len(data) // 2] + b"\xff" * 1000 + data[len(data) // 2 + 1000 :] if ending != "zst" else data[:-9],
    ):
        (tmp_path / f"x.tar.{ending}").write_bytes(broken)
        rows = rows_of(tmp_path / f"x.tar.{ending}")
        if rows[-1]["key"] == "~lost":
            assert [row["image"] for row in rows[:-2]] == [content for _, content in files[: max(len(rows) - 2, 0)]]
        else:
            assert len(rows) == 40  # noise is stored, not packed: the damage lies inside an image
    assert rows == rows_of(tmp_path / f"x.tar.{ending}")


def test_a_damaged_header_in_the_middle_does_not_pass_for_the_end(tmp_path):
    path = tar_of([(f"{i}.jpg", PICTURES[i]) for i in range(4)], tmp_path / "x.tar")
    data = bytearray(path.read_bytes())
    place = data.index(b"2.jpg\0")
    data[place + 100] ^= 0x55
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 2  # what tarfile makes of it: two members, no word
    rows = rows_of(path)
    assert [row["key"] for row in rows] == ["0", "1", "~lost"] and f"damaged header at byte {place}" in rows[-1]["error"]


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>" * 40, b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8])
def test_a_file_that_is_no_tar_is_one_row_that_says_so(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    rows = rows_of(tmp_path / "x.tar")
    assert [row["key"] for row in rows] == ["~lost"] and re.search("not a tar|empty", rows[0]["error"])


def test_members_over_the_limits_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_TEXT", 100)
    monkeypatch.setattr(readers, "MAX_SAMPLE", 3 * len(PICTURES[0]))
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 5 << 30
    files = [("a.jpg", PICTURES[0]), ("a.txt", b"w" * 101), *((f"many.{i}.jpg", PICTURES[0]) for i in range(5))]
    path = tar_of(files, tmp_path / "x.tar")
    with open(path, "r+b") as file:
        file.truncate(len(path.read_bytes().rstrip(b"\0")) // 512 * 512 + 512)
        file.seek(0, 2)
        file.write(huge.tobuf())
        file.truncate(file.tell() + huge.size)  # a hole of 5 GB on the disk
        file.seek(0, 2)
        file.write(bytes(1024))
    rows = {row["key"]: row for row in rows_of(path)}
    assert rows["a"]["image"] == PICTURES[0] and rows["a"]["error"] == "txt: file of 101 bytes is over the limit of 100"
    assert [row["error"] is None for key, row in rows.items() if key.startswith("many")] == [True, True, True, False, False]
    assert rows["huge"]["error"] == f"file of {5 << 30} bytes is over the limit of {256 << 20}"


def test_extended_headers_are_bounded_and_checked(tmp_path):
    def pax(data: bytes, size: int | None = None) -> bytes:
        info = entry("x", b"x", size=len(data) if size is None else size)
        return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)

    good = tar_of([("0.jpg", PICTURES[0])], tmp_path / "good").read_bytes()
    for header in (
        pax(b"", 9 << 30),
        pax(b"99 path=x\n"),
        pax(b"0 path=x\n"),
        pax(b"-3 a=b\n"),
        pax(b"15 size=-12345\n"),
        pax(b"\xff" * 600),
    ):
        (tmp_path / "x.tar").write_bytes(header + good)
        rows = rows_of(tmp_path / "x.tar")
        assert rows[-1]["key"] == "~lost" and "header" in rows[-1]["error"], rows


@pytest.mark.parametrize("size", [-1, -(1 << 60), 1 << 40, (1 << 63) - 1, 1 << 64, 1 << 80])
@pytest.mark.parametrize("name", ["x.jpg", "x.cls", "x.txt"])
def test_a_header_that_lies_about_its_size_costs_nothing(tmp_path, size, name):
    block = bytearray(entry(name, tarfile.REGTYPE).tobuf())
    block[124:136] = (size % (1 << 95) | 1 << 95).to_bytes(12) if size >= 0 else (size % (1 << 96)).to_bytes(12)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    tar_of([("0.jpg", PICTURES[0])], tmp_path / "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    for content in (block + data, gzip.compress(block + data)):
        (tmp_path / "x.tar").write_bytes(content)
        rows = rows_of(tmp_path / "x.tar")
        assert rows[-1]["key"] == "~lost" and re.search("inside|size", rows[-1]["error"]), rows


def test_thirty_thousand_equal_names_take_linear_time_and_stay_unique(tmp_path):
    block = tarfile.TarInfo("a.jpg").tobuf()
    (tmp_path / "x.tar").write_bytes(block * 30_000 + bytes(1024))
    keys = [key for batch in read_samples(list_shards(str(tmp_path / "x.tar"))[0], 10_000) for key in batch["key"].to_pylist()]
    assert len(set(keys)) == 30_000 and keys[-1] == "a~30000"


def test_fetch_reads_only_the_wanted_members_and_finds_every_kind_of_key(tmp_path, monkeypatch):
    path = tar_of([*SAMPLES, ("a/0.jpg", PICTURES[5])], tmp_path / "x.tar")
    rows = {row["uid"]: row for row in rows_of(path)}
    read = []
    monkeypatch.setattr(tar.Member, "read", lambda self, old=tar.Member.read: (read.append(self.name), old(self))[1])
    for uid, row in rows.items():
        assert list(fetch(list_shards(str(path)), {uid})) == [row]
    read.clear()
    assert list(fetch(list_shards(str(path)), {"x/a/1.jpg"})) == [rows["x/a/1.jpg"]]
    assert read == ["a/1.second.png", "a/1.JPG"]
    assert list(fetch(list_shards(str(path)), {"x/nothing", "y/a/0"})) == []


def test_bytes_and_captions_come_out_as_they_went_in(tmp_path):
    captions = [
        "a\ncat\n",
        "  spaces kept  ",
        "日本語 🎌 é",
        "x" * 1_000_000,
        "tab\tand\r\nline",
        "'; DROP TABLE x; --",
        "<script>alert(1)</script>",
    ]
    files = [f for i, text in enumerate(captions) for f in ((f"{i}.jpg", PICTURES[i % 6] + bytes([i])), (f"{i}.txt", text.encode()))]
    rows = rows_of(tar_of(files, tmp_path / "x.tar"))
    assert [row["caption"] for row in rows] == captions
    digests = [hashlib.sha256(content).hexdigest() for name, content in files if name.endswith("jpg")]
    assert [hashlib.sha256(row["image"]).hexdigest() for row in rows] == digests


def test_our_groups_are_those_of_the_webdataset_package_on_an_odd_tar(tmp_path):
    names = [
        "a.jpg",
        "a.txt",
        "d.e/a.jpg",
        "d.e/a.b.jpg",
        "d.e/._a.jpg",
        "x/y.z/q.tar.jpg",
        "nodot",
        "d.e/nodot",
        "__x__/k.jpg",
        "u.JPG",
        "u.Txt",
        ".h.jpg",
    ]
    path = write(tmp_path / "x.tar", [*((name, name.encode()) for name in names), entry("l.jpg", tarfile.SYMTYPE, linkname="a.jpg")])
    theirs = [
        (sample["__key__"], data)
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        for suffix, data in sample.items()
        if not suffix.startswith("__") and suffix.endswith("jpg")
    ]
    ours = [(row["key"].removesuffix(".b.jpg"), row["image"]) for row in rows_of(path) if row["image"] is not None]
    assert ours == theirs
