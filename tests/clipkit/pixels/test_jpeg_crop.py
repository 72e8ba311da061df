"""The compiled crop gives libjpeg's pixels and Pillow's bicubic, refuses all else, and survives any bytes."""

import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from natural_images import encoded, natural
from photographs import photographs
from PIL import Image

from clipkit.pixels.images import ImageError, UInt8Array, plain_jpeg_size
from clipkit.pixels.jpeg_crop import crop
from clipkit.train.loader.crop import Box, crop_of_jpeg, exact_crop_resize, random_resized_crop

WAYS: tuple[dict[str, object], ...] = (
    {},
    {"optimize": True},
    {"restart_marker_blocks": 1},
    {"restart_marker_blocks": 3},
    {"restart_marker_rows": 1},
)
# How far a pixel may be from libjpeg's at the most. Libjpeg interpolates chroma of fewer pixels linearly.
BOUNDS = {"grey": 1, "444": 2, "422": 14, "440": 14, "420": 22}
SOI, EOI, DQT, DHT, SOF, SOS = b"\xff\xd8", b"\xff\xd9", b"\xff\xdb", b"\xff\xc4", b"\xff\xc0", b"\xff\xda"


def cropped(
    data: bytes | memoryview, box: tuple[float, float, float, float], size: int, plain: bool = False
) -> UInt8Array:
    out = np.empty((size, size, 3), np.uint8)
    assert crop(data, box, size, out, plain)
    return out


def refuses(data: bytes, size: int = 8, box: tuple[float, float, float, float] = (0, 0, 16, 16)) -> bool:
    out = np.empty((size, size, 3), np.uint8)
    return not any(crop(data, box, size, out, plain) for plain in (False, True))


def coded(pixels: UInt8Array, kind: str, quality: int = 90, **options: object) -> bytes:
    """A JPEG of a kind of `BOUNDS`."""
    if kind == "440":  # Pillow writes none
        return simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="440")
    if kind == "grey":
        return encoded(Image.fromarray(pixels).convert("L"), quality=quality, **options)
    return encoded(pixels, quality=quality, subsampling={"444": 0, "422": 1, "420": 2}[kind], **options)


def segment(marker: bytes, body: bytes) -> bytes:
    return marker + struct.pack(">H", 2 + len(body)) + body


def replaced(data: bytes, marker: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The same with each segment of a kind changed: `change` has its body and gives whole segments."""
    at, result = 2, SOI
    while True:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        found = data[at : at + 2]
        result += change(data[at + 4 : end]) if found == marker else data[at:end]
        at = end
        if found == SOS:
            return result + data[at:]


PIXELS = natural(16, 16)
DATA = coded(PIXELS, "444")

# ---- The pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOUNDS)
def test_at_its_own_size_it_is_libjpegs_decoding(kind: str) -> None:
    for quality in (5, 30, 60, 85, 95, 100):
        for side in (1, 7, 8, 9, 16, 31, 97):
            for way in WAYS if kind != "440" else ({},):
                data = coded(natural(side, side, side), kind, quality, **way)
                apart = np.abs(cropped(data, (0, 0, side, side), side).astype(int) - simplejpeg.decode_jpeg(data))
                assert apart.max() <= BOUNDS[kind], (quality, side, way)
                assert side < 16 or apart.mean() < (2.5 if BOUNDS[kind] > 2 else 0.6)


def test_quantisation_of_sixteen_bits() -> None:
    def widen(body: bytes) -> bytes:
        tables = [body[at : at + 65] for at in range(0, len(body), 65)]
        return b"".join(segment(DQT, bytes([16 | table[0]]) + struct.pack(">64H", *table[1:])) for table in tables)

    for side in (16, 41):
        data = coded(natural(side, side), "444", 60)
        wide = replaced(data, DQT, widen)
        assert len(wide) > len(data) + 100
        np.testing.assert_array_equal(cropped(wide, (0, 0, side, side), side), cropped(data, (0, 0, side, side), side))


@pytest.mark.parametrize("kind", ["grey", "444", "422", "420"])
def test_crops_are_pillows_bicubic_of_the_full_decoding(kind: str) -> None:
    """Each scale of decoding, and enlarging."""
    differences = []
    for name, pixels in photographs().items():
        data = coded(pixels, kind)
        full = simplejpeg.decode_jpeg(data)
        height, width = full.shape[:2]
        boxes: tuple[Box, ...] = (
            (0, 0, height, width),
            (11, 23, height - 40, width - 61),
            (height // 3, width // 4, height // 3, width // 2),
        )
        for size in (32, 64, 112, 224, 336):
            for box in boxes:
                apart = cropped(data, box, size).astype(int) - exact_crop_resize(full, box, size)
                differences.append(np.abs(apart).mean())
                assert differences[-1] < 1, (name, size, box)
                assert np.abs(apart.mean((0, 1))).max() < 0.5, (name, size, box)
    assert np.mean(differences) < 0.5


def test_a_large_photograph() -> None:
    pixels = np.asarray(Image.fromarray(photographs()["coffee"]).resize((2048, 1365), Image.Resampling.BICUBIC))
    data = coded(pixels, "420")
    full = simplejpeg.decode_jpeg(data)
    for size in (32, 112, 224, 336):
        for box in ((0, 0, 1365, 2048), (101, 333, 1000, 1200)):
            apart = cropped(data, box, size).astype(int) - exact_crop_resize(full, box, size)
            assert np.abs(apart).mean() < 1
            assert np.abs(apart.mean((0, 1))).max() < 0.5


@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from(list(BOUNDS)),
    st.integers(1, 70),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_wide_instructions_give_the_same_pixels(
    height: int, width: int, kind: str, size: int, part: tuple[float, float, float, float], whole: bool
) -> None:
    data = coded(natural(height, width), kind)
    top, left = int(part[0] * height * 8) / 9, int(part[1] * width * 8) / 9
    box = (top, left, max(0.1, (height - top) * part[2]), max(0.1, (width - left) * part[3]))
    if whole:
        box = (0.0, 0.0, float(height), float(width))
    np.testing.assert_array_equal(cropped(data, box, size), cropped(data, box, size, plain=True))


def test_views_are_read_too() -> None:
    view = memoryview(b"before" + DATA + b"after")[6 : 6 + len(DATA)]
    np.testing.assert_array_equal(cropped(view, (0, 0, 16, 16), 16), cropped(DATA, (0, 0, 16, 16), 16))


# ---- What it refuses -------------------------------------------------------------------------------------------------


def test_other_files_are_refused() -> None:
    image = Image.fromarray(PIXELS)
    assert not refuses(DATA)
    assert refuses(encoded(image, progressive=True))
    assert refuses(encoded(image.convert("CMYK")))
    assert refuses(encoded(image, keep_rgb=True))
    assert refuses(encoded(image, "PNG"))
    assert refuses(b"")
    arithmetic, twelve = (
        DATA.replace(SOF, b"\xff\xc9"),
        replaced(DATA, SOF, lambda body: segment(SOF, b"\x0c" + body[1:])),
    )
    assert refuses(arithmetic)
    assert refuses(twelve)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_cut_off_anywhere_is_refused(way: dict[str, object]) -> None:
    data = coded(PIXELS, "420", **way)
    assert not refuses(data)
    for end in range(len(data)):
        assert refuses(data[:end]), end


def test_boxes_beyond_the_image_are_refused() -> None:
    for bad in (-0.01, 100.0, float("nan"), float("inf"), float("-inf")):
        for place in range(4):
            box = [1.0, 2.0, 10.0, 11.0]
            box[place] = bad
            assert refuses(DATA, box=(box[0], box[1], box[2], box[3])), box
    for place in (2, 3):
        box = [1.0, 2.0, 10.0, 11.0]
        box[place] = 0.0
        assert refuses(DATA, box=(box[0], box[1], box[2], box[3])), box


def with_a_code_of_ones(body: bytes) -> bytes:
    """The table for the first numbers of brightness has room for a ninth code of nine bits; no data use it."""
    if body[0]:
        return segment(DHT, body)
    counts, symbols = body[1:17], body[17:]
    assert (counts[8], len(symbols)) == (1, 12)
    return segment(DHT, bytes([0, *counts[:8], 2, *counts[9:], *symbols, 0]))


def twelve_blocks() -> bytes:
    """One MCU with four blocks of each colour, all of them grey: the data of as many blocks of a grey image."""
    grey = coded(np.full((24, 32, 3), 128, np.uint8), "grey")
    colours = b"".join(bytes([number, 0x22, 0]) for number in (1, 2, 3))
    large = replaced(grey, SOF, lambda body: segment(SOF, struct.pack(">BHHB", 8, 16, 16, 3) + colours))
    return replaced(large, SOS, lambda body: segment(SOS, b"\3\1\0\2\0\3\0" + body[-3:]))


# What libjpeg refuses, or warns of, without a look at the data.
NOT_FOR_LIBJPEG = {
    "spectral selection": replaced(DATA, SOS, lambda body: segment(SOS, body[:-2] + b"\x3e\0")),
    "approximation": replaced(DATA, SOS, lambda body: segment(SOS, body[:-1] + b"\1")),
    "unknown marker": SOI + segment(b"\xff\xf0", b"what") + DATA[2:],
    "hierarchy": SOI + segment(b"\xff\xdf", b"\x11") + DATA[2:],
    "code of ones": replaced(DATA, DHT, with_a_code_of_ones),
    "twelve blocks": twelve_blocks(),
}


@pytest.mark.parametrize("data", NOT_FOR_LIBJPEG.values(), ids=NOT_FOR_LIBJPEG)
def test_what_libjpeg_refuses_by_its_headers_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        simplejpeg.decode_jpeg(data, strict=True)
    assert refuses(data, box=(0, 0, 8, 8))


def test_a_jfif_segment_that_libjpeg_does_not_heed_says_nothing_of_colours() -> None:
    """Without it, components named R, G and B are what they are called."""
    named = dict(zip((1, 2, 3), b"RGB", strict=True))
    frame = replaced(
        DATA,
        SOF,
        lambda b: segment(SOF, b[:6] + b"".join(bytes([named[b[at]]]) + b[at + 1 : at + 3] for at in (6, 9, 12))),
    )
    both = replaced(
        frame,
        SOS,
        lambda b: segment(SOS, b[:1] + b"".join(bytes([named[b[at]], b[at + 1]]) for at in (1, 3, 5)) + b[7:]),
    )
    assert not refuses(both)
    assert refuses(replaced(both, b"\xff\xe0", lambda body: segment(b"\xff\xe0", body[:9])))


def test_a_wrong_out_raises() -> None:
    with pytest.raises(ValueError, match="out has 192 bytes"):
        crop(DATA, (0, 0, 16, 16), 9, np.empty((8, 8, 3), np.uint8))
    for size in (0, -1, 1 << 15):
        with pytest.raises(ValueError, match="out has"):
            crop(DATA, (0, 0, 16, 16), size, np.empty((8, 8, 3), np.uint8))
    fixed = np.empty((8, 8, 3), np.uint8)
    fixed.flags.writeable = False
    for out in (fixed, np.empty((8, 16, 3), np.uint8)[:, ::2]):
        with pytest.raises((BufferError, TypeError, ValueError), match=r"contiguous|read-write|read-only"):
            crop(DATA, (0, 0, 16, 16), 8, out)


# ---- Broken data -----------------------------------------------------------------------------------------------------

SEEDS = (
    coded(natural(24, 24), "420", 60),
    coded(natural(31, 17), "444", optimize=True),
    coded(natural(24, 40), "422", restart_marker_blocks=1),
    coded(natural(17, 17), "grey"),
)
BREAKS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@given(st.sampled_from(SEEDS), BREAKS, st.booleans())
@settings(max_examples=1000, deadline=None)
def test_broken_bytes_end_as_pixels_or_an_error(data: bytes, breaks: list[tuple[float, int]], headers: bool) -> None:
    broken, begin = bytearray(data), 0 if headers else data.index(SOS) + 14
    for place, byte in breaks:
        broken[begin + int(place * (len(data) - begin))] = byte
    size = plain_jpeg_size(bytes(broken))
    around = np.full((3, 16, 16, 3), 171, np.uint8)
    if size and size[0] * size[1] < 1_000_000:
        done = crop(bytes(broken), (0, 0, *size), 16, around[1])
        assert (around[[0, 2]] == 171).all()
        if done and not headers:
            simplejpeg.decode_jpeg(bytes(broken), strict=True)  # no more forgiving than libjpeg
        try:
            crop_of_jpeg(bytes(broken), size, (0, 0, *size), 16)
            random_resized_crop(bytes(broken), 16, (0.4, 1.0), (3 / 4, 4 / 3), [0.5] * 22)
        except ImageError:
            assert not done


# ---- Threads, and life without it ------------------------------------------------------------------------------------


def test_threads_do_not_meet() -> None:
    jpegs = [coded(natural(200, 200, seed), kind) for seed, kind in enumerate(("420", "444", "grey"))]
    expected = [cropped(data, (3, 4, 190, 180), 64) for data in jpegs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            if not np.array_equal(cropped(jpegs[number], (3, 4, 190, 180), 64), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_interpreter_is_free_meanwhile() -> None:
    """This thread wakes again and again while another makes one long crop."""
    data = coded(np.tile(natural(256, 256), (12, 12, 1)), "444", 95)
    out, begun, done = np.empty((8, 8, 3), np.uint8), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        crop(data, (0, 0, 3072, 3072), 8, out)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    wakings = 0
    while not done.is_set():
        time.sleep(0.0005)
        wakings += 1
    thread.join()
    assert wakings > 10


def test_without_the_module_the_library_crops() -> None:
    program = """
import sys
sys.modules["clipkit.pixels.jpeg_crop"] = None
from clipkit.train.loader import crop
assert not crop.COMPILED
data = sys.stdin.buffer.read()
sys.stdout.buffer.write(crop.crop_of_jpeg(data, (200, 200), (0, 0, 200, 200), 50).tobytes())
"""
    data = coded(natural(200, 200), "420")
    run = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True, timeout=120)
    pixels = np.frombuffer(run.stdout, np.uint8).reshape(50, 50, 3)
    assert np.abs(pixels.astype(int) - cropped(data, (0, 0, 200, 200), 50)).mean() < 2.5
