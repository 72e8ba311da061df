"""What an image is: every stage takes the same formats, and stores or refuses the same bytes."""

import io

import pytest
from image_shards import pair, write_tar
from PIL import Image

from clipkit.formats.dataset import open_dataset
from clipkit.formats.tables import IMAGE_SUFFIXES
from clipkit.pixels import images
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.pictures.picture import PictureError, PictureMaker, PictureSettings
from clipkit.tfrecord_tools.pictures.sniff import FORMATS, image_format
from clipkit.train.sources.open import open_source


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 90, 50)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def with_brand(brand: bytes) -> bytes:
    data = encoded("AVIF")
    return data[:8] + brand + data[12:]


IMAGES = {
    "jpeg": encoded("JPEG"),
    "jpeg, cmyk": encoded("JPEG", "CMYK"),
    "png": encoded("PNG"),
    "png, 16 bits": encoded("PNG", "I;16"),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "bigtiff": encoded("TIFF", big_tiff=True),
    "avif": encoded("AVIF"),
    "avif, mif1": with_brand(b"mif1"),
    "avif, msf1": with_brand(b"msf1"),
    "jp2": encoded("JPEG2000"),
    "j2k": encoded("JPEG2000", no_jp2=True),
    "ppm": encoded("PPM"),
    "pgm": encoded("PPM", "L"),
    "pbm": encoded("PPM", "1"),
    "ppm, text": b"P3 2 1 255\n200 90 50 1 2 3\n",
    "pfm": encoded("PPM", "F"),
    "ico": encoded("ICO"),
}
NOT_IMAGES = {
    "html": b"<html>" * 20,
    "pdf": b"%PDF-1.7\n" * 20,
    "eps": encoded("EPS"),
    "text": b"P5 is a processor" * 9,
    "heif": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_stage_takes_it(name, tmp_path):
    data = IMAGES[name]
    assert image_format(data) in FORMATS
    assert images.decode(data).shape in {(48, 64, 3), (1, 2, 3), (36, 48, 3)}
    write_tar(tmp_path / "in" / "0.tar", [pair(0, jpg=data)])
    summary = build_tfds(tmp_path / "in", tmp_path / "out", "pairs", progress=lambda _: None)
    stored = open_dataset(summary.path).example(0)["jpg"]
    assert image_format(stored) in ("jpeg", "png", "bmp")  # what TensorFlow decodes
    assert images.decode(stored).shape == images.decode(data).shape
    picture = PictureMaker(PictureSettings(image_size=32))(data)  # what a download stores
    assert images.decode(picture.jpg).shape[2] == 3
    (trained,) = open_source(tmp_path / "in").source().pairs([0])
    assert bytes(trained.image) == data


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_no_stage_takes_it(name, tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [pair(0, jpg=NOT_IMAGES[name]), pair(1)])
    summary = build_tfds(tmp_path / "in", tmp_path / "out", "pairs", progress=lambda _: None)
    assert summary.skipped == {"not-an-image": 1}
    with pytest.raises(images.ImageError):
        images.decode(NOT_IMAGES[name])
    with pytest.raises(PictureError):
        PictureMaker(PictureSettings(image_size=32))(NOT_IMAGES[name])


def test_the_suffixes_are_those_of_the_formats():
    Image.init()
    known = {suffix[1:] for suffix, kind in Image.registered_extensions().items() if kind in images.FORMATS}
    assert known == IMAGE_SUFFIXES
