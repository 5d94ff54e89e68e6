"""Sign maps as bits: exact, as NumPy packs them, and nothing else is taken for one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.core.sign_bits import bits_to_picture, picture_to_bits


@given(st.data())
def test_maps_come_back_exactly(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 7)) for _ in range(4))
    signs = data.draw(arrays.arrays(np.int8, shape, elements=st.integers(-1, 1)))
    pictures = ((signs + 1) * np.uint8(127)).astype(np.uint8)
    # Images lie in memory in either order.
    turned = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    stored = picture_to_bits(turned)
    assert stored.to_pylist() == [
        {"positive": np.packbits(one > 0).tobytes(), "zero": np.packbits(one == 0).tobytes()} for one in signs
    ]
    planes = [stored.field(name).to_pylist() for name in ("positive", "zero")]
    np.testing.assert_array_equal(bits_to_picture(planes[0], planes[1], shape[1:]), pictures)


@pytest.mark.parametrize(
    ("positive", "zero", "reason"),
    [
        (b"\x80", b"\x00\x00", "bytes"),
        (b"\x80\x00", b"\x00\x00\x00", "bytes"),
        (None, b"\x00\x00", "bytes"),
        (b"\x81\x00", b"\x01\x00", "both"),
        (b"\x80\x40", b"\x00\x00", "beyond"),
        (b"\x80\x00", b"\x00\x01", "beyond"),
    ],
)
def test_other_bits_are_refused(positive: Any, zero: bytes, reason: str) -> None:
    sound = b"\x80\x00", b"\x00\x80"
    assert bits_to_picture([sound[0]], [sound[1]], (3, 3, 1)).sum() == 254 + 127
    with pytest.raises(ValueError, match=reason):
        bits_to_picture([sound[0], positive], [sound[1], zero], (3, 3, 1))
