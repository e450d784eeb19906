"""Decoding in a child: the same arrays, and an error where the child dies."""

import ctypes
import os
import time

import hostile
import numpy as np
import pytest
from conftest import encode, photographs
from PIL import Image

from curation.decode import Decoded, DecodeError, Limits, decode_for
from curation.isolated import Bounds, Isolated, decode_isolated

PICTURE = photographs(1, 64)[0]


def troubled(encoded: bytes, reads: str, limits) -> Decoded:
    """A decoder that some bytes send astray, the way a bug in a C library would."""
    match encoded:
        case b"crash":
            ctypes.string_at(0)
        case b"hang":
            while True:
                pass
        case b"sleep":
            time.sleep(60)
        case b"eat":
            chunks = []
            while True:
                chunks.append(bytearray(1 << 26))
        case b"abort":
            os.abort()
        case b"exit":
            os._exit(3)
        case b"print":
            print("noise on stdout", flush=True)
            os.write(1, b"more noise")
            return decode_for(encode(PICTURE), reads, limits)
    return decode_for(encoded, reads, limits)


@pytest.fixture(scope="module")
def isolated():
    with Isolated(Bounds(seconds=60, memory=1 << 28), decoder="test_isolated:troubled") as decoder:
        yield decoder


@pytest.fixture(scope="module")
def hasty():
    with Isolated(Bounds(seconds=1), decoder="test_isolated:troubled") as decoder:
        yield decoder


def test_a_child_gives_the_same_arrays_and_header():
    large = encode(np.asarray(Image.fromarray(PICTURE).resize((1100, 1200))), quality=80)
    for encoded in (encode(PICTURE), large, encode(PICTURE, "PNG")):
        for reads in ("view", "pixels"):
            here, there = decode_for(encoded, reads), decode_isolated(encoded, reads)
            assert there.header == here.header and np.array_equal(there.view, here.view)
            assert (there.pixels is None) == (here.pixels is None) and (here.pixels is None or np.array_equal(there.pixels, here.pixels))


@pytest.mark.parametrize("encoded", [None, b"", b"<html>", encode(PICTURE)[:-9]])
def test_a_broken_image_has_the_same_error_as_without_a_child(encoded):
    with pytest.raises(DecodeError) as here:
        decode_for(encoded, "view")
    with pytest.raises(DecodeError) as there:
        decode_isolated(encoded, "view")
    assert str(here.value) == str(there.value)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"crash", "crashed .SIGSEGV"),
        (b"abort", "crashed .SIGABRT"),
        (b"exit", "exit status 3"),
        (b"eat", "out of memory"),
    ],
)
def test_a_decoder_that_dies_or_eats_memory_is_an_error_and_the_next_image_decodes(isolated, encoded, reason):
    with pytest.raises(DecodeError, match=reason):
        isolated.decode_for(encoded)
    assert isolated.decode_for(encode(PICTURE)).header.width == 64


@pytest.mark.parametrize("encoded", [b"hang", b"sleep"])
def test_a_decoder_that_hangs_is_an_error(hasty, encoded):
    with pytest.raises(DecodeError, match="more than 1 s"):
        hasty.decode_for(encoded)


def test_bombs_that_no_limit_stops_are_stopped_by_the_bounds(isolated, hasty):
    bombs = {file.name: file.content for file in hostile.images() if file.name.startswith("bomb")}
    anything = Limits(max_pixels=10**12, max_scans=10**9, max_scan_pixels=10**18)
    with pytest.raises(DecodeError, match="more than 1 s"):
        hasty.decode_for(bombs["bomb_jpeg_many_large_scans.jpg"], "view", anything)
    with pytest.raises(DecodeError, match="memory"):
        isolated.decode_for(bombs["bomb_png_900_megapixels.png"], "view", anything)


def test_what_a_library_prints_does_not_get_into_the_answer(isolated):
    assert isolated.decode_for(b"print").pixels.shape == (64, 64, 3)


def test_a_killed_server_is_started_again(isolated):
    isolated.decode_for(encode(PICTURE))
    isolated._server.kill()
    isolated._server.wait()
    assert isolated.decode_for(encode(PICTURE)).header.width == 64
