"""Tables of several splits in one folder are kept apart."""

import pytest
from bad_server import bad_server
from download_site import examples, fetch, numbered, write_urls

from clipkit.errors import UserError

NAMES = ["Train_GCC-training.parquet", "Train_GCC-training-2.parquet", "Validation_GCC-1.1.0-Validation.parquet"]


def test_the_tables_of_one_split_are_read(tmp_path, capsys):
    with bad_server(numbered(3)) as server:
        (tmp_path / "in").mkdir()
        for number, name in enumerate(NAMES):
            write_urls(tmp_path / "in" / name, url=[server.url(f"/{number}.jpg")], caption=[name])

        def captions(out, **options):
            fetch(tmp_path / "in", tmp_path / out, name="x", **options)
            return sorted(example["txt"] for example in examples(tmp_path / out / "x" / "1.0.0"))

        assert captions("train") == sorted(NAMES[:2])
        assert "reading the split train; left aside: validation 1 file" in capsys.readouterr().err
        assert captions("validation", split="validation") == NAMES[2:]
        assert captions("all", split="all") == sorted(NAMES)
        with pytest.raises(UserError, match="of which none is 'test': name one with --split"):
            captions("test", split="test")
