import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_shards import img2dataset_writer, pair, picture, tar_of_odd_names, write_tar, write_tars
from img2dataset_columns import META, SCHEMA
from tensorflow_process import with_tensorflow

from clipkit.errors import UserError
from clipkit.formats.records import RecordError, RecordWriter, encode_example
from clipkit.formats.tables import PairColumns
from clipkit.formats.tar import header_number
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.pictures.sniff import image_format
from clipkit.tfrecord_tools.readers.shards import find_shards, open_shard, read_shard
from clipkit.tfrecord_tools.readers.tar import read_members

# img2dataset's own tfrecord writer. It imports tensorflow_io, which no longer loads, and uses nothing of it.
IMG2DATASET_TFRECORDS = """
import json, sys, types
sys.modules.setdefault("tensorflow_io", types.ModuleType("tensorflow_io"))
from img2dataset_columns import META, SCHEMA
from image_shards import img2dataset_writer, picture
writer = img2dataset_writer().TFRecordSampleWriter(0, arguments[0], True, 5, SCHEMA, "jpg")
writer.write(picture(1), "000000001", META["caption"], dict(META))
writer.write(None, "000000002", "failed", {**META, "status": "failed_to_download"})
writer.write(picture(3), "000000003", META["caption"], {**META, "width": None, "NSFW": "UNLIKELY"})
writer.close()
"""


def test_a_tar_of_img2datasets_own_writer(tmp_path):
    writer = img2dataset_writer().WebDatasetSampleWriter(0, str(tmp_path), True, 5, SCHEMA, "jpg")
    writer.write(picture(1), "000000001", META["caption"], dict(META))
    writer.write(None, "000000002", "failed", {**META, "status": "failed_to_download"})
    writer.close()
    (sample,) = read_shard(tmp_path / "00000.tar")
    assert (sample.key, sample.image, sample.caption, sample.problem) == (
        "000000001",
        picture(1),
        META["caption"],
        None,
    )
    kept = {name: value for name, value in META.items() if name not in ("caption", "status", "error_message")}
    assert sample.columns == kept


def test_tfrecords_of_img2datasets_own_writer(tmp_path):
    with_tensorflow(IMG2DATASET_TFRECORDS, tmp_path)
    one, three = read_shard(tmp_path / "00000.tfrecord")
    assert (one.key, one.image, one.caption, one.problem) == ("000000001", picture(1), META["caption"], None)
    kept = {name: value for name, value in META.items() if name not in ("caption", "status", "error_message")}
    assert one.columns == kept
    # The writer's null is "" in the same column that holds ints elsewhere.
    assert (three.columns["width"], three.columns["height"], three.columns["NSFW"]) == (None, 18, "UNLIKELY")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_contents_are_those_of_tarfile(tmp_path, tar_format):
    path = tar_of_odd_names(tmp_path / "some.tar", tar_format)
    with tarfile.open(path) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers() if m.isreg()]
    assert [(name, data) for _, name, data in read_members(path)] == expected
    assert len(expected) == (4 if tar_format == tarfile.USTAR_FORMAT else 6)


def test_a_size_over_eight_gigabytes_is_read_as_such():
    header = tarfile.TarInfo("large.jpg")
    header.size = 9 << 30
    assert header_number(header.tobuf(tarfile.GNU_FORMAT)[124:136], 0, Path()) == 9 << 30


def test_a_tar_cut_at_any_place_is_refused_with_its_name_and_byte(tmp_path):
    path = write_tar(tmp_path / "00000.tar", [pair(0), pair(1)])
    contents = path.read_bytes()
    end = len(contents.rstrip(b"\0"))
    end += -end % 512
    for size in [*range(0, end, 173), *range(0, end + 1, 512)]:
        path.write_bytes(contents[:size])
        with pytest.raises(UserError, match=r"00000\.tar: damaged tar at byte \d+, .*download again"):
            list(read_shard(path))


def test_a_damaged_header_is_refused(tmp_path):
    path = write_tar(tmp_path / "00000.tar", [pair(0)])
    contents = bytearray(path.read_bytes())
    for byte in range(0, 512, 7):
        flipped = contents.copy()
        flipped[byte] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="damaged tar at byte 0"):
            list(read_members(path))


@pytest.mark.parametrize(
    "record", [b" path=a\n", b"x9 path=a\n", b"999 path=a\n", b"0 path=a\n", b"11 size=1x\n", b"11 size=-1\n"]
)
def test_a_damaged_pax_header_is_refused(tmp_path, record):
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    with tarfile.open(tmp_path / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        tar.addfile(extended, io.BytesIO(record))
        tar.addfile(tarfile.TarInfo("b.txt"))
    with pytest.raises(UserError, match=r"00000\.tar: damaged tar at byte 512, a pax header"):
        list(read_members(tmp_path / "00000.tar"))


def samples_of(tmp_path, *members):
    return list(read_shard(write_tar(tmp_path / "00000.tar", members)))


def test_what_is_missing_or_senseless_is_told_and_not_lost(tmp_path):
    samples = samples_of(
        tmp_path,
        pair(0),
        pair(1, jpg=None),
        pair(2, txt=None, json=None),
        pair(3, json=None),
        pair(4, json=b"{broken"),
        pair(5, json=b"[1]"),
        pair(6, txt=b"\xff\xfe"),
        pair(7, txt=None),
        {"__key__": "000000008", "png": picture(8, "PNG"), "txt": "a png"},
    )
    assert [(int(sample.key), sample.problem, sample.caption) for sample in samples] == [
        (0, None, "picture number 0"),
        (1, "no-image", "picture number 1"),
        (2, None, None),
        (3, None, "picture number 3"),
        (4, "metadata-not-json", None),
        (5, "metadata-not-json", None),
        (6, "not-utf-8", None),
        (7, None, "picture number 7"),
        (8, None, "a png"),
    ]
    assert samples[3].columns == {"key": "000000003"}
    assert samples[8].image == picture(8, "PNG")


@pytest.mark.parametrize("caption", [None, float("nan")])
def test_a_null_caption_is_empty_whatever_the_text_says(tmp_path, caption):
    (sample,) = samples_of(tmp_path, pair(0, txt="nan", json={"caption": caption}))
    assert sample.caption == ""


def test_two_samples_of_one_key_are_two(tmp_path):
    assert [sample.key for sample in samples_of(tmp_path, pair(1), pair(1))] == ["000000001"] * 2


def test_a_damaged_tfrecord_names_the_byte(tmp_path):
    path = tmp_path / "00000.tfrecord"
    with RecordWriter(path) as writer:
        writer.write(encode_example({"jpg": picture(), "txt": "words", "key": "0"}))
        second = writer.write(b"\xff\xff\xff")
    with pytest.raises(RecordError, match=rf"00000\.tfrecord: not a tf\.train\.Example.*byte {second}"):
        list(read_shard(path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecordError, match=f"byte {second}"):
        list(read_shard(path))


def test_tfrecords_without_image_caption_or_text(tmp_path):
    path = tmp_path / "00000.tfrecord"
    with RecordWriter(path) as writer:
        writer.write(encode_example({"txt": "words", "key": "0"}))
        writer.write(encode_example({"webp": b"RIFF", "key": "1"}))
        writer.write(encode_example({"jpg": b"x", "txt": "", "caption": ""}))
        writer.write(encode_example({"jpg": b"x", "txt": b"\xff"}))
    found = [(sample.problem, sample.caption) for sample in read_shard(path)]
    assert found == [("no-image", "words"), (None, None), (None, ""), ("not-utf-8", None)]


def test_finding_shards(tmp_path):
    tars = write_tars(tmp_path / "shards", [1, 1])
    for extra in ("00000.parquet", "00000_stats.json", ".00002.tar", "download.json"):
        (tmp_path / "shards" / extra).write_bytes(b"")
    assert find_shards(tmp_path / "shards") == tars
    assert find_shards(tars[1]) == [tars[1]]
    (tmp_path / "shards" / "00003.tfrecord").write_bytes(b"")
    (tmp_path / "none").mkdir()
    for path, message in [
        (tmp_path / "shards", "both .tar and .tfrecord"),
        (tmp_path / "none", "no image shards"),
        (tmp_path / "absent", "don't exist"),
        (tmp_path / "shards" / "download.json", "isn't an image shard"),
    ]:
        with pytest.raises(UserError, match=message):
            find_shards(path)


@pytest.mark.parametrize("suffix", ["tar", "tfrecord", "parquet"])
def test_shards_are_meant_and_not_what_was_built_of_them_below(tmp_path, suffix):
    rows = [{"jpg": picture(i), "txt": "words", "key": str(i)} for i in range(2)]
    if suffix == "tar":
        write_tar(tmp_path / "0.tar", [pair(0), pair(1)])
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    else:
        with RecordWriter(tmp_path / "0.tfrecord") as writer:
            for row in rows:
                writer.write(encode_example(row))
    for name in ("small", "large"):
        build_tfds(tmp_path, tmp_path, name, progress=lambda _: None)
        assert find_shards(tmp_path) == [tmp_path / f"0.{suffix}"]
    assert find_shards(tmp_path / "small")[0].parent == tmp_path / "small" / "1.0.0"


@pytest.mark.parametrize("columns", [PairColumns(image="jpg"), PairColumns(caption="alt")])
def test_columns_of_tars_are_not_chosen(tmp_path, columns):
    """Neither is the choice forgotten: all captions would be others than was asked for."""
    for name in ("0.tar", "0.tfrecord"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"have fixed names, .*: leave out --image-column and --caption-column"):
            open_shard(tmp_path / name, columns)


def test_a_download_that_is_not_finished_is_no_input(tmp_path):
    tars = write_tars(tmp_path / "shards", [1])
    (tmp_path / "shards" / "clipkit").mkdir()
    (tmp_path / "shards" / "clipkit" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"the download into .* isn't finished"):
        find_shards(tmp_path / "shards")
    (tmp_path / "shards" / "clipkit" / "download.json").write_text("{}")
    assert find_shards(tmp_path / "shards") == tars


def test_a_shard_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match=r"00007\.tar is gone"):
        list(read_shard(tmp_path / "00007.tar"))


def test_formats_are_told_by_their_first_bytes():
    for pillow_format, expected in [("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")]:
        assert image_format(picture(0, pillow_format)) == expected
    assert image_format(picture(0, "TIFF")) == "tiff"
    assert image_format(picture(0, "AVIF")) == "avif"
    for junk in (b"", b"<html><body>not found</body></html>", b"BM not a bitmap at all", json.dumps({}).encode()):
        assert image_format(junk) is None
