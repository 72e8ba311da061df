"""One shard of image-text records as it is written: by a download, a build, a purge.

All of them must agree to the byte on what a record is, which samples are taken, and what is told of a shard. A value
that doesn't fit the kind that its column has so far can't be written into the same file: `KindWidenedError` tells the
caller to write the shard from the start again, with the wider kinds.
"""

from collections import Counter
from collections.abc import Mapping
from ctypes import c_float
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.kinds import KindWidenedError, as_text, fit
from clipkit.formats.records import RecordWriter, Value, encode_example
from clipkit.tfrecord_tools.pictures.sniff import image_format, is_truncated
from clipkit.tfrecord_tools.reasons import NO_IMAGE, NOT_AN_IMAGE, TRUNCATED
from clipkit.tfrecord_tools.sample import Sample, caption_problem

# TensorFlow's decode_image gives four dimensions for WebP and GIF and knows no TIFF or AVIF, so TFDS's Image feature
# fails on them.
TFDS_FORMATS = frozenset({"jpeg", "png", "bmp"})
CONVERTED_QUALITY = 95
OTHERS = {"jpg": "table_jpg", "txt": "table_txt"}
# Up to here float32, which is all that a record has for fractions, holds every whole number.
WHOLE_NUMBERS = 1 << 24


def stored_name(name: str) -> str:
    """What a column is called in the records, in which `jpg` and `txt` are image and caption."""
    return OTHERS.get(name, name)


def has_fractions(value: Value) -> bool:
    """Whether a fitted value is written as float32."""
    return type(value) is float or (type(value) is list and bool(value) and type(value[0]) is float)


def is_rounded(value: float | list[float]) -> bool:
    """Whether float32 would make another number of an id, a time or a size: of one beyond WHOLE_NUMBERS."""
    if isinstance(value, list):
        return (max(value) > WHOLE_NUMBERS or min(value) < -WHOLE_NUMBERS) and any(map(is_rounded, value))
    return abs(value) > WHOLE_NUMBERS and c_float(value).value != value


class PairWriter(RecordWriter):
    """Writes one TFRecord file of pairs; use it as a context manager, inside `write_beside`.

    `kinds` are the columns' kinds (see `formats.kinds`), new columns among them; `present` counts each column's values,
    `formats` and `converted` the images by the format that they have and had; `offsets` are the records', in bytes.
    """

    def __init__(self, path: Path, kinds: Mapping[str, str]) -> None:
        """`kinds` are those to begin with."""
        super().__init__(path)
        self.kinds = dict(kinds)
        self.present: dict[str, int] = {}
        self.formats: Counter[str] = Counter()
        self.converted: Counter[str] = Counter()
        self.offsets: list[int] = []

    def put(self, image: bytes, caption: str, columns: Mapping[str, Any], kind: str | None = None) -> None:
        """Write a pair that was looked at already. `kind` is the format that its image had; None: it isn't counted.

        Raises KindWidenedError when a value doesn't fit its column, or would be rounded to another; the shard must then
        be written again. Raises UserError where two columns would be stored as one.
        """
        for name, stored in OTHERS.items():
            if stored in columns and columns.get(name) not in (None, caption if name == "txt" else None):
                raise UserError(f"the column {name!r} is stored as {stored!r}, which is there too: rename one of them")
        columns = {stored_name(name): v for name, v in columns.items() if name != "txt" or v != caption}
        values = fit(columns, self.kinds, self.present)
        rounded = [name for name, value in values.items() if has_fractions(value) and is_rounded(columns[name])]
        if rounded:
            raise KindWidenedError({**self.kinds, **{name: as_text(self.kinds[name]) for name in rounded}})
        values["jpg"], values["txt"] = image, caption
        self.offsets.append(self.write(encode_columns(values)))
        if kind is not None:
            count_format(kind, self.formats, self.converted)


def judge(sample: Sample) -> tuple[str, str | None]:
    """The format of a sample's image, and the reason not to take the sample (then the format means nothing)."""
    image = sample.image
    if sample.problem is not None or image is None:
        return "", sample.problem or NO_IMAGE
    reason = caption_problem(sample.caption)
    if reason is not None:
        return "", reason
    kind = image_format(image)
    if kind is None:
        return "", NOT_AN_IMAGE
    return kind, TRUNCATED if is_truncated(image) else None


def stored_image(sample: Sample, kind: str) -> bytes | None:
    """The bytes to store of a sample that may be taken; None when a format that TFDS lacks can't be decoded."""
    assert sample.image is not None
    if kind in TFDS_FORMATS:
        return sample.image
    try:
        return as_jpeg(sample.image)
    except UserError:
        return None


def count_format(kind: str, formats: Counter[str], converted: Counter[str]) -> None:
    """Count one image by the format that it had: as it is stored, and where it was converted."""
    formats[kind if kind in TFDS_FORMATS else "jpeg"] += 1
    if kind not in TFDS_FORMATS:
        converted[kind] += 1


def as_jpeg(image: bytes) -> bytes:
    """The (first) picture as a JPEG of full colour resolution."""
    # Here and not above: most shards have nothing to convert, and the decoders would cost each worker a second to load.
    import simplejpeg

    from clipkit.pixels import images

    encoded: bytes = simplejpeg.encode_jpeg(
        images.decode(image), quality=CONVERTED_QUALITY, colorspace="RGB", colorsubsampling="444"
    )
    return encoded


def encode_columns(columns: dict[str, Any]) -> bytes:
    """The record of fitted columns, text that UTF-8 can't hold included."""
    try:
        return encode_example(columns)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold and UTF-8 may not
        return encode_example(
            {name: v.encode("utf-8", "replace") if isinstance(v, str) else v for name, v in columns.items()}
        )
