"""The command `clipkit download`: its options, and how they become the settings of the stage."""

import csv
from pathlib import Path
from typing import Any

import click

from clipkit.cli.options import (
    QUOTING_HELP,
    Count,
    CountOrZero,
    PathOrUrl,
    Quoting,
    SectionedCommand,
    as_json,
    engine,
    option,
    print_json,
    print_summary,
)
from clipkit.tfrecord_tools.reasons import DEFAULT_RETRY

RETRY = "--retry-failed"


class DownloadCommand(SectionedCommand):
    """Takes `--retry-failed` without a value or with `=REASONS`; click would take the next word as its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give the option its default value where it has none."""
        return super().parse_args(ctx, [f"{RETRY}={DEFAULT_RETRY}" if word == RETRY else word for word in args])


@click.command(cls=DownloadCommand)
@click.argument("urls", type=PathOrUrl)
@click.argument("out", type=PathOrUrl)
@option("Table", "--preset", metavar="NAME", help="Columns of a published table, such as laion400m or datacomp.")
@option("Table", "--url-column", metavar="NAME", help="Column with the image's URL.")
@option("Table", "--caption-column", metavar="NAME", help="Column with the caption.")
@option("Table", "--keep", metavar="NAMES", help="Columns to keep, with commas between. [default: the preset's]")
@option("Table", "--split", default="train", help="Which tables, where their names say several splits; all: all.")
@option("Table", "--quoting", type=Quoting, help=f"{QUOTING_HELP} [default: auto]")
@option(
    "Table", "--where", metavar="SQL", help="Condition for a row, such as \"similarity > 0.3 AND NSFW = 'UNLIKELY'\"."
)
@option(
    "Table", "--hash-column", metavar="NAME", help="Column with a hash of the image to compare. [default: the preset's]"
)
@option("Table", "--hash-kind", metavar="KIND", help="What it holds: md5, sha1, sha256, sha512 or phash.")
@option(
    "Table", "--drop-changed", is_flag=True, help="Leave out images that differ from their hash, not only report them."
)
@option("Images", "--image-size", type=Count, default=256, help="Size of the stored images, in pixels.")
@option(
    "Images",
    "--resize-mode",
    type=click.Choice(["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"]),
    default="keep_ratio",
    help="What gets that size: the shorter side, the longer side, both by a crop or a border, or nothing.",
)
@option("Images", "--quality", default=95, help="JPEG quality of images that are encoded again.")
@option("Images", "--min-image-size", type=CountOrZero, default=0, help="Least size of the shorter side, in pixels.")
@option("Network", "--connections", type=Count, default=256, help="Most requests at a time in each process.")
@option("Network", "--per-host", type=Count, default=8, help="Most requests at a time to one host, from a machine.")
@option("Network", "--timeout", default=10.0, help="Seconds to wait for a server's next byte.")
@option("Network", "--deadline", default=30.0, help="Seconds for the whole of one URL.")
@option("Network", "--max-megabytes", type=Count, default=50, help="Largest body to take, in MB.")
@option("Network", "--retries", type=CountOrZero, default=0, help="How often to try temporary failures again.")
@option("Network", "--resolver", multiple=True, metavar="ADDRESS", help="DNS server, such as 1.1.1.1; may be repeated.")
@option(
    "Network", "--allow-private-hosts", is_flag=True, help="Fetch from private addresses too: for servers of your own."
)
@option("Permissions", "--contact", metavar="URL", help="Page or e-mail address that tells hosts who downloads.")
@option("Permissions", "--robots-txt", is_flag=True, help="Ask each host for its robots.txt first, and obey it.")
@option(
    "Output",
    "--format",
    type=click.Choice(["tfds", "webdataset", "parquet"]),
    default="tfds",
    help="A dataset ready for training, or img2dataset's tars or parquet files.",
)
@option("Output", "--name", help="Name of the dataset, OUT/NAME/1.0.0. [default: the preset's or the table's]")
@option("Output", "--samples-per-shard", type=Count, default=10_000, help="URLs in a shard.")
@option(
    "Work",
    "--probe",
    "probe_rows",
    type=Count,
    metavar="ROWS",
    help="First fetch this many rows from all over the table, and say how the whole download will go.",
)
@option(
    "Work",
    "--probe-floor",
    type=click.FloatRange(0, 1),
    default=0.5,
    help="Stop when a smaller share of the probe succeeds.",
)
@option("Work", RETRY, metavar="[=REASONS]", help=f"Fetch again what failed for these REASONS (else {DEFAULT_RETRY}).")
@option(
    "Work", "--processes", type=Count, help="Processes that fetch. [default: one a core, or as many as a cluster takes]"
)
@engine
@as_json
def download(urls: Path, out: Path, as_json: bool, keep: str | None, **options: Any) -> None:
    """Fetch the images of a table of URLS (parquet, CSV, TSV, or a folder of them) into a dataset in OUT.

    URLS and OUT may be in an object store, such as s3://BUCKET/FOLDER. Running the same command again goes on where it
    was stopped. Hosts that forbid the use of their images (X-Robots-Tag, TDM reservation) are obeyed. What failed is
    listed with its reason in clipkit/failures.parquet of the output.
    """
    from clipkit.tfrecord_tools.download.command import download as stage
    from clipkit.tfrecord_tools.download.probe import ProbeResult
    from clipkit.tfrecord_tools.pictures.picture import PictureSettings
    from clipkit.tfrecord_tools.web.settings import FetchSettings, user_agent

    def take(*names: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in names}

    pictures = PictureSettings(**take("image_size", "resize_mode", "quality", "min_image_size"))
    network = FetchSettings(
        **take("connections", "per_host", "timeout", "deadline", "retries", "allow_private_hosts", "robots_txt"),
        max_bytes=options.pop("max_megabytes") * 1_000_000,
        resolvers=options.pop("resolver"),
        user_agent=user_agent(options.pop("contact")),
    )

    def tell_probe(found: ProbeResult) -> None:
        if not as_json:
            click.echo(found.text(), err=True)
        elif found.refusal(options["probe_floor"]) is not None:
            print_json({"probe": found.to_json()})

    names = [] if keep is None else next(csv.reader([keep], skipinitialspace=True), [])
    keep_columns = None if keep is None else [name.strip() for name in names if name.strip()]
    summary = stage(
        urls, out, keep_columns=keep_columns, pictures=pictures, network=network, tell_probe=tell_probe, **options
    )
    print_summary(summary, as_json)
