"""What the options of `clipkit download` become, and what it prints."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from bad_server import bad_server
from click.testing import CliRunner
from download_site import numbered, write_numbered

from clipkit.cli.main import main
from clipkit.tfrecord_tools.download import command as stage
from clipkit.tfrecord_tools.download.finish import DownloadSummary
from clipkit.tfrecord_tools.pictures.picture import PictureSettings
from clipkit.tfrecord_tools.reasons import DEFAULT_RETRY
from clipkit.tfrecord_tools.web.settings import FetchSettings, user_agent

DEFAULTS = inspect.signature(stage.download).parameters
SUMMARY = DownloadSummary(Path("out"), "tfds", 10, 2, 5, {"dns": 2, "http-4xx": 1}, 0, {"exact": 5}, 1, 100, 200, 0)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the stage, and keeps what it was called with."""
    found: dict[str, Any] = {}

    def fake(urls: Path, out: Path, **options: Any) -> DownloadSummary:
        found.update(options, urls=urls, out=out)
        return SUMMARY

    monkeypatch.setattr(stage, "download", fake)
    return found


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(main, ["download", *arguments])
    assert result.exit_code == 0, result.output
    return result


def test_without_options_all_is_as_the_stage_has_it(called: dict[str, Any]) -> None:
    run("urls.parquet", "s3://bucket/out")
    assert str(called.pop("out")) == "s3://bucket/out" and called.pop("urls") == Path("urls.parquet")
    assert (called.pop("pictures"), called.pop("network")) == (PictureSettings(), FetchSettings())
    called.pop("tell_probe")
    assert called == {name: DEFAULTS[name].default for name in called}


def test_each_option_arrives(called: dict[str, Any]) -> None:
    run(
        *["u.csv", "out", "--preset", "coyo", "--url-column", "u", "--caption-column", "c", "--keep", 'a, "b,c"'],
        *[
            "--split",
            "test",
            "--where",
            "a > 1",
            "--hash-column",
            "h",
            "--hash-kind",
            "md5",
            "--drop-changed",
            "--image-size",
            "64",
        ],
        *[
            "--resize-mode",
            "border",
            "--quality",
            "80",
            "--min-image-size",
            "9",
            "--connections",
            "7",
            "--quoting",
            "none",
            "--per-host",
            "3",
        ],
        *["--timeout", "4", "--deadline", "5", "--max-megabytes", "6", "--retries", "2", "--resolver", "127.0.0.1"],
        *["--resolver", "[::1]:53", "--allow-private-hosts", "--contact", "https://x.org/bot", "--robots-txt"],
        *["--format", "parquet", "--name", "n", "--samples-per-shard", "11", "--probe", "12", "--probe-floor", "0.25"],
        *["--retry-failed=dns", "--processes", "13", "--engine", "ray"],
    )
    assert called.pop("pictures") == PictureSettings(64, "border", quality=80, min_image_size=9)
    assert called.pop("network") == FetchSettings(
        connections=7, per_host=3, timeout=4, deadline=5, max_bytes=6_000_000, retries=2, allow_private_hosts=True,
        resolvers=("127.0.0.1", "[::1]:53"), robots_txt=True, user_agent=user_agent("https://x.org/bot"),
    )  # fmt: skip
    called.pop("tell_probe")
    assert called == {
        "urls": Path("u.csv"), "out": Path("out"), "preset": "coyo", "url_column": "u", "caption_column": "c",
        "keep_columns": ["a", "b,c"], "quoting": "none", "split": "test", "where": "a > 1",
        "hash_column": "h", "hash_kind": "md5", "drop_changed": True,
        "format": "parquet", "name": "n", "samples_per_shard": 11, "probe_rows": 12, "probe_floor": 0.25,
        "retry_failed": "dns", "processes": 13, "engine": "ray",
    }  # fmt: skip


@pytest.mark.parametrize("place", [0, 1, 2])
def test_retry_failed_may_stand_alone_anywhere(called: dict[str, Any], place: int) -> None:
    arguments = ["urls.parquet", "out"]
    arguments.insert(place, "--retry-failed")
    run(*arguments)
    assert called["retry_failed"] == DEFAULT_RETRY and called["urls"] == Path("urls.parquet")


def test_what_is_printed(called: dict[str, Any]) -> None:
    told = json.loads(run("u.csv", "out", "--json").stdout)
    assert told["rows"] == told["left_out"] + told["downloaded"] + sum(told["failed"].values())
    text = run("u.csv", "out").stdout
    assert text.startswith("5 of 8 images (62.5%) in out\nleft out by --where: 2 of 10 rows\n")
    assert "--retry-failed fetches 2 of them again" in text and "against the table's hash: exact 5" in text


def test_the_whole_command(tmp_path: Path) -> None:
    """With a probe, in another process than this, as a user would."""
    with bad_server(numbered(4)) as server:
        urls = write_numbered(tmp_path / "urls.parquet", server.url(""), 4)
        result = run(str(urls), str(tmp_path), "--allow-private-hosts", "--probe", "2", "--json", "--processes", "1")
    told = json.loads(result.stdout)
    assert (told["downloaded"], told["probe"]["ok"], told["out"]) == (4, 2, str(tmp_path / "urls" / "1.0.0"))
