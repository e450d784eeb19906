"""Patterns and names: braces as the braceexpand package has them, names that are safe and come back."""

import os

import braceexpand
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import patterns
from curation.names import MAX_KEY, MAX_SHARD_NAME, escaped, safe_key, safe_shard_name, unescaped, webdataset_key
from curation.patterns import braces, expand
from curation.tar import Damage, Source, members

NAMES = st.binary(max_size=300).map(os.fsdecode) | st.text(max_size=300).filter(lambda text: "\0" not in text)
WORDS = st.sampled_from(["a", "b", "00", "x/y", "*", ".tar", ""])
ENDS = st.sampled_from(["0", "3", "007", "12", "5"])
RANGES = st.builds("{{{}..{}}}".format, ENDS, ENDS) | st.sampled_from(["{a..e}", "{0..10..3}", "{e..a}", "{5..1..2}"])
PATTERNS = st.recursive(
    WORDS | RANGES,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}") | st.lists(inner, max_size=3).map("".join)
    ),
    max_leaves=6,
)


@given(PATTERNS)
@settings(max_examples=300, deadline=None)
def test_braces_are_expanded_as_the_braceexpand_package_does(pattern):
    assert braces(pattern) == list(braceexpand.braceexpand(pattern))


@given(st.text("{},.0123ab\\$", max_size=14))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_braces(pattern):
    found = braces(pattern)
    assert found and all(isinstance(path, str) for path in found)


def test_braces_that_make_too_many_paths_are_refused(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_PATTERNS", 5000)
    with pytest.raises(ValueError, match="over 5000 paths"):
        braces("{0..9}" * 12)
    with pytest.raises(ValueError, match="over"):
        braces("{0..99999999999}")


@given(NAMES)
@settings(deadline=None)
def test_an_escaped_name_is_plain_text_and_comes_back(name):
    text = escaped(name)
    assert unescaped(text) == name
    assert text.encode("utf-8") is not None and not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text)
    assert len(safe_key(name).encode()) <= MAX_KEY


@given(NAMES, NAMES)
@settings(deadline=None)
def test_two_names_never_become_one(first, second):
    if first != second:
        assert safe_key(first) != safe_key(second)
        if "/" not in first + second:
            assert safe_shard_name(first) != safe_shard_name(second)


@given(NAMES)
@settings(deadline=None)
def test_a_shard_name_is_a_safe_file_name(name):
    safe = safe_shard_name(name)
    assert "/" not in safe and "\0" not in safe and not safe.startswith(".") and len(safe.encode()) <= MAX_SHARD_NAME and safe.isprintable()


@given(NAMES)
@settings(deadline=None)
def test_a_key_is_split_as_webdataset_does(name):
    from webdataset.tariterators import base_plus_ext

    key, suffix = base_plus_ext(name)
    if "\n" not in name:
        assert webdataset_key(name) == (key, suffix.lower() if key is not None else "")


def test_a_list_is_read_relative_to_its_folder(tmp_path):
    (tmp_path / "list.txt").write_text("# all of it\n\na/{0..1}.tar\ns3://bucket/x.tar\n/abs/*.tar\n a/0.tar \n")
    assert expand([f"@{tmp_path}/list.txt", "b"]) == [f"{tmp_path}/a/0.tar", f"{tmp_path}/a/1.tar", "s3://bucket/x.tar", "/abs/*.tar", "b"]
    (tmp_path / "loop.txt").write_text("@loop.txt\n")
    with pytest.raises(ValueError, match="names another list"):
        expand(f"@{tmp_path}/loop.txt")
    with pytest.raises(ValueError, match="cannot read the list"):
        expand(f"@{tmp_path}/gone.txt")


KINDS = st.sampled_from([bytes([kind]) for kind in b"01235LKxgSVX7"])


def tar_of_noise(draw_headers: list[tuple[bytes, int, bytes]], tail: bytes) -> bytes:
    """Headers with true checksums and anything else in them."""
    blocks = []
    for name, size, kind in draw_headers:
        block = bytearray(512)
        block[: len(name[:100])] = name[:100]
        block[124:136] = b"%011o\0" % size
        block[156:157] = kind
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        blocks.append(bytes(block))
    return b"".join(blocks) + tail


@given(
    st.lists(
        st.tuples(
            st.binary(max_size=100),
            st.integers(0, 8**11 - 1) | st.integers(0, 1500),
            st.sampled_from(list(map(bytes, zip(b"01235LKxgSVX7")))),
        )
    ),
    st.binary(max_size=3000),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_end_as_members_or_damage(headers, tail):
    import io

    try:
        for member in members(Source(io.BytesIO(tar_of_noise(headers, tail)))):
            if member.kind == "file" and member.size < 1 << 20:
                assert len(member.read()) == member.size
    except Damage as damage:
        assert str(damage)
