"""One output shard of labelled images: what a worker of `imagenet` does.

Records are those of TFDS's `imagenet2012`: `image`, `label`, `file_name`, and the few images that aren't what the rest
are become the very bytes that TFDS makes of them. All else is copied as it is.

A shard's images come from all over the source, so they are read in the order in which they lie there and written in
that of the shard: a shard is held in memory, the data never are.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.folders import printable
from clipkit.formats.manifest import ShardEntry, SourceEntry
from clipkit.formats.records import RecordWriter, encode_example
from clipkit.storage.files import read_json, save_array, write_beside, write_json
from clipkit.tfrecord_tools.labelled.listing import WHOLE_FILE, Image
from clipkit.tfrecord_tools.pictures.sniff import image_format, is_truncated
from clipkit.tfrecord_tools.reasons import NOT_AN_IMAGE, TRUNCATED
from clipkit.tfrecord_tools.writing.pair_writer import TFDS_FORMATS, as_jpeg

CMYK = "cmyk jpeg"
# TFDS's `jpeg_cmyk_to_rgb` and `png_to_jpeg`: TensorFlow's encoder at this quality.
_TFDS_QUALITY = 100
# Its JFIF header says 300 dots per inch where libjpeg's own says nothing: units, x and y density.
_JFIF_DENSITY, _TFDS_DENSITY = slice(13, 18), bytes((1, 1, 44, 1, 44))


@dataclass(frozen=True)
class LabelledJob:
    """What one worker is to make: `images` in the order of the shard, with their labels and file names.

    `jpeg_only`: the dataset holds JPEG only, as ImageNet does; else what TFDS can decode stays as it is.
    """

    path: Path
    state: Path
    source: str
    images: tuple[Image, ...]
    labels: tuple[int, ...]
    file_names: tuple[str, ...]
    jpeg_only: bool

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(image.size for image in self.images)

    @property
    def offsets(self) -> Path:
        """Where the byte offsets of the records wait for the index of the whole split."""
        return self.state.with_suffix(".npy")

    def digest(self) -> str:
        """What must be the same for a finished shard to be taken as this one."""
        images = zip(self.images, self.labels, self.file_names, strict=True)
        values = [(image.size, label, name) for image, label, name in images]
        return hashlib.blake2b(repr((self.source, self.jpeg_only, values)).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class LabelledState:
    """What is known of a finished shard. `skipped` is (name, reason) of the images that are broken."""

    shard: ShardEntry
    digest: str
    skipped: tuple[tuple[str, str], ...]


def build_labelled_shard(job: LabelledJob) -> LabelledState:
    """Write the shard, its record offsets and its state. Raises UserError when an image is gone."""
    contents = _read_all(job.images)
    skipped: list[tuple[str, str]] = []
    formats: Counter[str] = Counter()
    converted: Counter[str] = Counter()
    offsets: list[int] = []
    with write_beside(job.path) as temporary, RecordWriter(temporary) as writer:
        for number, (image, label, name) in enumerate(zip(job.images, job.labels, job.file_names, strict=True)):
            data, contents[number] = contents[number], b""
            stored, kind = stored_as(data, job.jpeg_only)
            if stored is None:
                skipped.append((printable(image.name), kind))
                continue
            offsets.append(writer.write(encode_example({"image": stored, "label": label, "file_name": name})))
            formats["jpeg" if stored is not data else kind] += 1
            if stored is not data:
                converted[kind] += 1
    save_array(job.offsets, np.array(offsets, dtype=np.uint64))
    reasons = Counter(reason for _, reason in skipped)
    source = SourceEntry(job.source, job.size, len(job.images), writer.records, dict(sorted(reasons.items())))
    shard = ShardEntry.of(job.path.name, writer, (source,), formats, converted)
    state = LabelledState(shard, job.digest(), tuple(skipped))
    write_json(job.state, asdict(state))
    return state


def read_state(job: LabelledJob) -> LabelledState | None:
    """The state of a finished shard, or None when it must be written (again).

    A shard that left broken images out is written again: they may have been mended since.
    """
    if not (job.state.exists() and job.path.exists() and job.offsets.exists()):
        return None
    values: dict[str, Any] = read_json(job.state)
    shard = ShardEntry.from_dict(values["shard"])
    if values["digest"] != job.digest() or values["skipped"] or job.path.stat().st_size != shard.bytes:
        return None
    return LabelledState(shard, values["digest"], ())


def stored_as(data: bytes, jpeg_only: bool) -> tuple[bytes | None, str]:
    """The image to store and the format that it came in; or None and the reason why it is broken."""
    kind = image_format(data)
    if kind is None:
        return None, NOT_AN_IMAGE
    if is_truncated(data) and not _decodes(data):
        return None, TRUNCATED
    try:
        if kind == "jpeg":
            return (data, kind) if jpeg_components(data) != 4 else (cmyk_to_rgb(data), CMYK)
        if jpeg_only:
            return to_jpeg(data), kind
        return (data if kind in TFDS_FORMATS else as_jpeg(data)), kind
    except (UserError, ValueError, OSError):
        return None, NOT_AN_IMAGE


def jpeg_components(data: bytes) -> int:
    """How many colour components the frame header of a JPEG names (ITU-T T.81, B.2.2); 0 when there is none."""
    for marker, start in _segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[start + 5] if start + 5 < len(data) else 0
    return 0


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of the contents of each segment of a JPEG before the picture begins (B.1.1.4)."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        if data[position + 1] == 0xFF:  # a fill byte
            position += 1
            continue
        yield data[position + 1], position + 4
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def cmyk_to_rgb(data: bytes) -> bytes:
    """A JPEG of four components as TFDS stores it: TensorFlow's conversion, to the byte.

    Raises ValueError when it can't be decoded.
    """
    import simplejpeg

    # TensorFlow decodes with the fast DCT unless told otherwise.
    ink_HW4 = simplejpeg.decode_jpeg(data, colorspace="CMYK", fastdct=True, fastupsample=False).astype(np.int32)
    # With a segment APP14 of Adobe's, the values are stored inverted.
    if not any(marker == 0xEE and data.startswith(b"Adobe", start) for marker, start in _segments(data)):
        ink_HW4 = 255 - ink_HW4
    return encode_as_tfds((ink_HW4[..., 3:] * ink_HW4[..., :3] // 255).astype(np.uint8))


def to_jpeg(data: bytes) -> bytes:
    """A PNG, or any other picture, as the JPEG that TFDS stores. Raises OSError or ValueError for a broken one."""
    from PIL import Image as Picture

    with Picture.open(io.BytesIO(data)) as picture:
        return encode_as_tfds(np.asarray(picture.convert("RGB")))


def encode_as_tfds(pixels_HWC: np.ndarray) -> bytes:
    """The JPEG that `tf.image.encode_jpeg(…, format="rgb", quality=100)` makes of uint8 RGB, to the byte."""
    import simplejpeg

    encoded = bytearray(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels_HWC), quality=_TFDS_QUALITY, colorspace="RGB", colorsubsampling="420"
        )
    )
    encoded[_JFIF_DENSITY] = _TFDS_DENSITY
    return bytes(encoded)


def _decodes(data: bytes) -> bool:
    """A second opinion, so that one odd file in ImageNet, which every decoder reads, doesn't make it a subset."""
    from PIL import Image as Picture

    try:
        with Picture.open(io.BytesIO(data)) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _read_all(images: Sequence[Image]) -> list[bytes]:
    """The contents of all images, read in the order in which they lie in the source."""
    contents = [b""] * len(images)
    order = sorted(range(len(images)), key=lambda i: (images[i].container, images[i].offset, images[i].name))
    in_order = _read(images[i] for i in order)
    for place, data in zip(order, in_order, strict=True):
        contents[place] = data
    return contents


def _read(images: Iterator[Image]) -> Iterator[bytes]:
    """The contents of images; a tar stays open as long as the next image lies in it too."""
    descriptor, opened = -1, ""
    image: Image | None = None
    try:
        for image in images:
            if image.offset == WHOLE_FILE:
                yield (Path(image.container) / image.name).read_bytes()
                continue
            if image.container != opened:
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor, opened = os.open(image.container, os.O_RDONLY), image.container
            data = os.pread(descriptor, image.size, image.offset)
            if len(data) < image.size:
                raise UserError(f"{image.container} ends inside {image.name}: fetch it again")
            yield data
    except FileNotFoundError as error:
        assert image is not None
        raise UserError(
            f"{error.filename} (image {image.name}) is gone: put it back and run the same command again"
        ) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
