"""Whatever happens to the bytes of an image: the verdict is one, and it comes as an array or as a `DecodeError`."""

import hostile
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.decode import Decoded, DecodeError, Limits, decode_for
from curation.formats import early_size, gif_frames, jpeg_scans, looks_like, png_is_short, tiff_pages

LIMITS = Limits(max_pixels=4_000_000)


def verdict(encoded: bytes, reads: str) -> Decoded | str:
    try:
        return decode_for(encoded, reads, LIMITS)
    except DecodeError as error:
        return str(error)


@st.composite
def torn(draw) -> bytes:
    """A whole image with bytes changed, cut away or put in."""
    content = bytearray(hostile.clean(draw(st.sampled_from(hostile.CONTAINERS))))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(content) - 1) | st.integers(0, min(120, len(content) - 1)))
        what = draw(st.sampled_from(("flip", "flip", "cut", "drop", "put")))
        if what == "flip":
            content[place] = draw(st.integers(0, 255))
        elif what == "cut" and place:
            del content[place:]
        elif what == "drop" and len(content) > 9:
            del content[place : place + draw(st.integers(1, 8))]
        else:
            content[place:place] = draw(st.binary(max_size=8))
    return bytes(content)


@settings(max_examples=400, deadline=None)
@given(torn())
def test_view_and_pixels_give_the_same_verdict_and_the_same_view(encoded):
    view, pixels = verdict(encoded, "view"), verdict(encoded, "pixels")
    if isinstance(view, str) or isinstance(pixels, str):
        assert view == pixels and view
        return
    assert view.pixels is None and view.header == pixels.header and np.array_equal(view.view, pixels.view)
    assert pixels.pixels.shape == (view.header.height, view.header.width, 3) and pixels.pixels.dtype == np.uint8


@settings(max_examples=300, deadline=None)
@given(torn() | st.binary(max_size=200))
def test_reading_a_header_never_fails(encoded):
    if encoded:
        looks_like(encoded), early_size(encoded), tiff_pages(encoded), png_is_short(encoded)
        scans, first, _ = jpeg_scans(encoded, 100)
        assert 0 <= scans <= 101 and first <= len(encoded)
        assert 1 <= gif_frames(encoded) <= 1000
