"""A shard that is read in ranges gives each sample once, in order, wherever it is cut; and the kinds of shards."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_shards import img2dataset_writer, pair, picture, write_tar

from clipkit.errors import UserError
from clipkit.formats.features import Feature
from clipkit.formats.records import RecordWriter, encode_example
from clipkit.formats.tables import PairColumns
from clipkit.tfrecord_tools.build.plan import cut, parts_between
from clipkit.tfrecord_tools.readers.shards import InputShard, find_shards, open_shard, places_in, read_shard
from clipkit.tfrecord_tools.writing.metadata import features_json

COUNTS = (3, 0, 1, 7)


def tars(folder):
    number = 0
    for shard, count in enumerate(COUNTS):
        write_tar(folder / f"{shard}.tar", [pair(number + i) for i in range(count)])
        number += count


def pax_tars(folder):
    """Names that need headers of their own, folders between, and members of a sample in two kinds of order."""
    folder.mkdir()
    number = 0
    for shard, count in enumerate(COUNTS):
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for _ in range(count):
                for suffix, data in sorted(pair(number, json=None).items(), reverse=number % 2 == 0):
                    if suffix == "__key__":
                        continue
                    name = f"{'long' * 40}/{number:09d}.{suffix}"
                    data = data.encode() if isinstance(data, str) else data
                    info = tarfile.TarInfo(name if number % 3 else f"é{name}")
                    info.size, info.mtime = len(data), 1.5
                    tar.addfile(info, io.BytesIO(data))
                number += 1
                between = tarfile.TarInfo("some folder")
                between.type = tarfile.DIRTYPE
                tar.addfile(between)


def tfrecords(folder):
    folder.mkdir()
    number = 0
    for shard, count in enumerate(COUNTS):
        with RecordWriter(folder / f"{shard}.tfrecord") as writer:
            for _ in range(count):
                writer.write(encode_example({"jpg": picture(number), "txt": "words", "key": f"{number:09d}"}))
                number += 1


def dataset(folder):
    folder.mkdir()
    number = 0
    for shard, count in enumerate(COUNTS):
        with RecordWriter(folder / f"x-train.tfrecord-{shard:05d}-of-00004") as writer:
            for _ in range(count):
                writer.write(encode_example({"jpg": picture(number), "txt": "words", "key": f"{number:09d}"}))
                number += 1
    features = {"jpg": Feature("image"), "txt": Feature("text"), "key": Feature("text")}
    (folder / "features.json").write_text(json.dumps(features_json(features)))
    lengths = [str(count) for count in COUNTS]
    splits = [{"name": "train", "shardLengths": lengths, "filepathTemplate": ""}]
    (folder / "dataset_info.json").write_text(json.dumps({"name": "x", "splits": splits, "fileFormat": "tfrecord"}))


def parquets(folder):
    folder.mkdir()
    number = 0
    schema = pa.schema({"jpg": pa.binary(), "txt": pa.string(), "key": pa.string()})
    for shard, count in enumerate(COUNTS):
        rows = [{"jpg": picture(i), "txt": "words", "key": f"{i:09d}"} for i in range(number, number + count)]
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{shard}.parquet", row_group_size=3)
        number += count


def images(folder):
    folder.mkdir()
    lines = ["file_name,caption,key"]
    for number in range(sum(COUNTS)):
        (folder / f"{number}.jpg").write_bytes(picture(number, size=16 + 8 * number))
        lines.append(f"{number}.jpg,words,{number:09d}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


MAKERS = {
    "tars": tars,
    "pax tars": pax_tars,
    "tfrecords": tfrecords,
    "dataset": dataset,
    "parquet": parquets,
    "images": images,
}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def shards(request, tmp_path_factory) -> list[InputShard]:
    """Image shards of one kind with eleven samples, numbered through."""
    folder = tmp_path_factory.mktemp("ranges")
    MAKERS[request.param](folder / "shards")
    return [open_shard(path, work=folder / "work") for path in find_shards(folder / "shards")]


def keys_of(parts) -> list[str]:
    return [sample.key[-9:] for part in parts for sample in read_shard(part.shard, part.start, part.stop)]


EXPECTED = [f"{number:09d}" for number in range(sum(COUNTS))]


@settings(max_examples=30)
@given(data=st.data())
def test_no_sample_is_lost_or_doubled_at_any_cut(shards, data):
    total = sum(shard.size for shard in shards)
    cuts = [(0, 0)]
    for position in sorted(data.draw(st.lists(st.integers(0, total - 1), max_size=5))):
        i = 0
        while position >= shards[i].size:
            position -= shards[i].size
            i += 1
        cuts.append((i, *places_in(shards[i], [position])))
    found = [keys_of(parts_between(shards, start, stop)) for start, stop in zip(cuts, [*cuts[1:], None], strict=True)]
    assert [key for part in found for key in part] == EXPECTED


def test_any_byte_is_a_good_place_to_cut_a_tar(tmp_path):
    path = write_tar(tmp_path / "0.tar", [pair(0), pair(1)])
    for place in [*range(0, path.stat().st_size, 97), *range(0, path.stat().st_size, 512)]:
        first = [sample.key for sample in read_shard(path, 0, place)]
        assert first + [sample.key for sample in read_shard(path, place)] == ["000000000", "000000001"]
        assert (len(first) == 0) == (place == 0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 50])
def test_stretches_are_of_one_size(shards, count):
    total = sum(shard.size for shard in shards)
    cuts = cut(shards, total / count)
    assert len(cuts) == count
    stretches = [list(parts_between(shards, start, stop)) for start, stop in zip(cuts, [*cuts[1:], None], strict=True)]
    assert [key for parts in stretches for key in keys_of(parts)] == EXPECTED


def test_stretches_of_files_are_of_one_size_to_the_byte(tmp_path):
    shards = [InputShard(tmp_path / f"{i}.tar", size) for i, size in enumerate((100, 0, 1, 1, 0, 100, 0))]
    assert cut(shards, 1000) == [(0, 0)]
    assert cut(shards, 101) == [(0, 0), (3, 0)]
    assert cut(shards, 67) == [(0, 0), (0, 67), (5, 32)]
    stretches = [list(parts_between(shards, start, stop)) for start, stop in [((0, 0), (3, 0)), ((3, 0), None)]]
    assert [[int(part.shard.path.stem) for part in parts] for parts in stretches] == [[0, 1, 2], [3, 4, 5, 6]]


def test_parquet_of_img2datasets_own_writer(tmp_path):
    schema = pa.schema([(name, pa.string()) for name in ("url", "caption", "key", "status", "error_message")])
    schema = schema.append(pa.field("width", pa.int32()))
    row = {"url": "u", "caption": "a cat", "key": "000000001", "status": "success", "error_message": None, "width": 16}
    writer = img2dataset_writer().ParquetSampleWriter(0, str(tmp_path), True, 5, schema, "jpg")
    writer.write(picture(1), "000000001", "a cat", dict(row))
    writer.write(None, "000000002", None, {**row, "key": "000000002", "status": "failed_to_download", "width": None})
    writer.close()
    one, two = read_shard(find_shards(tmp_path)[0])
    assert one == ("000000001", picture(1), "a cat", {"url": "u", "key": "000000001", "width": 16}, None)
    assert (two.key, two.problem) == ("000000002", "no-image")


def test_the_place_of_a_byte_in_a_parquet_file_is_in_its_row_group(tmp_path):
    path = tmp_path / "0.parquet"
    schema = pa.schema({"jpg": pa.binary(), "txt": pa.string()})
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for size in (1_000, 100_000, 10_000):
            writer.write_table(pa.Table.from_pylist([{"jpg": bytes(size), "txt": "x"}] * 10, schema))
    shard = open_shard(path)
    assert shard.size > 1_110_000
    places = [(0, 0), (11_000, 10), (500_000, 14), (1_005_000, 19), (1_060_000, 24), (shard.size, 30)]
    for position, row in places:
        assert abs(places_in(shard, [position])[0] - row) <= 1, position


def test_hugging_faces_parquet_and_columns_by_name(tmp_path):
    image = pa.array([{"bytes": picture(1), "path": "1.jpg"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    days = pa.array([0], pa.date32())
    pq.write_table(pa.table({"image": image, "text": ["a cat"], "day": days}), tmp_path / "0.parquet")
    (sample,) = read_shard(tmp_path / "0.parquet")
    assert (sample.image, sample.caption, sample.columns) == (picture(1), "a cat", {"key": "0-0", "day": "1970-01-01"})
    pq.write_table(pa.table({"a": [picture(2)], "b": [b"x"], "words": ["a dog"]}), tmp_path / "1.parquet")
    with pytest.raises(UserError, match="--image-column"):
        open_shard(tmp_path / "1.parquet")
    shard = open_shard(tmp_path / "1.parquet", PairColumns("a", "words"))
    assert [(s.image, s.caption) for s in read_shard(shard)] == [(picture(2), "a dog")]
    for columns, message in [
        (PairColumns("a"), "--caption-column"),
        (PairColumns("none"), "no column 'none'.*choose among a"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_shard(open_shard(tmp_path / "1.parquet", columns)))
    (tmp_path / "2.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="can't be read as parquet"):
        open_shard(tmp_path / "2.parquet")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_a_folder_of_images(tmp_path, suffix):
    (tmp_path / "images" / "below").mkdir(parents=True)
    (tmp_path / "images" / "below" / "1.png").write_bytes(picture(1, "PNG"))
    rows = [{"filepath": "below/1.png", "title": "a, cat", "n": 1}, {"filepath": "gone.jpg", "title": "a dog", "n": 2}]
    path = tmp_path / "images" / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        comma = "," if suffix == ".csv" else "\t"
        quote = '"' if suffix == ".csv" else ""
        lines = [f"{row['filepath']}{comma}{quote}{row['title']}{quote}{comma}{row['n']}" for row in rows]
        path.write_text("\n".join([comma.join(rows[0]), *lines]) + "\n")
    shard = open_shard(find_shards(tmp_path / "images")[0], work=tmp_path / "work")
    assert shard.size == len(picture(1, "PNG"))
    one, two = read_shard(shard)
    assert (one.image, one.caption) == (picture(1, "PNG"), "a, cat")
    assert one.columns == {"filepath": "below/1.png", "n": 1, "key": "below/1.png"}
    assert (two.problem, two.caption) == ("no-image", "a dog")


def test_tables_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("name,words\n1.jpg,x\n")
    with pytest.raises(UserError, match=r"no column with names of image files .*: call it file_name.*--image-column"):
        open_shard(find_shards(tmp_path)[0], work=tmp_path / "work")
    with pytest.raises(UserError, match=r"no column with captions .*: call it txt or caption.*--caption-column"):
        open_shard(find_shards(tmp_path)[0], PairColumns("name"), tmp_path / "work")
    assert open_shard(tmp_path / "a.csv", PairColumns("name", "words"), tmp_path / "work").size == 0
    (tmp_path / "b.tsv").write_text("")
    with pytest.raises(UserError, match=r"several tables .a\.csv, b\.tsv."):
        find_shards(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.jpg"}\n[]\n')
    with pytest.raises(UserError, match="line 2 isn't a JSON object"):
        open_shard(find_shards(tmp_path)[0], work=tmp_path / "work")


def test_a_dataset_of_several_splits_wants_the_name_of_one(tmp_path):
    dataset(tmp_path / "d")
    info = json.loads((tmp_path / "d" / "dataset_info.json").read_text())
    info["splits"].append({"name": "test", "shardLengths": []})
    (tmp_path / "d" / "dataset_info.json").write_text(json.dumps(info))
    assert len(find_shards(tmp_path / "d")) == 4
    with pytest.raises(UserError, match="has the splits train, test: name the one to read by --split"):
        find_shards(tmp_path / "d", split="other")
