"""The commands that put a model to work: vectors of a dataset, labels for images, images for a query."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipkit.cli.options import (
    AnyPath,
    Count,
    Folder,
    as_json,
    assignments,
    batch_size,
    cache_folder,
    cache_gigabytes,
    data_split,
    device,
    ema,
    precision,
    print_json,
    print_summary,
    tokenizer,
)
from clipkit.errors import UserError

if TYPE_CHECKING:
    from clipkit.eval.search.pictures import Pictures

checkpoint = click.option("--ckpt", required=True, metavar="MODEL", help="The model, as zeroshot takes it.")
page = click.option("--page", type=AnyPath, metavar="PAGE.html", help="Write a page with the pictures, too.")


@click.command()
@click.argument("data")
@click.argument("out", type=AnyPath, metavar="OUT.parquet")
@checkpoint
@click.option("--split", help="Split of the data. [default: train; of labelled images as zeroshot]")
@click.option("--label", help="Column with the label: take images with labels, not with captions.")
@ema
@tokenizer
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="How numbers are stored.")
@precision
@batch_size
@device
@as_json
def embed(
    data: str,
    out: Path,
    ckpt: str,
    split: str | None,
    label: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the vectors of all images of DATA, and of their captions, into one parquet file.

    DATA is what `train` or `zeroshot` take. The same command goes on after a kill. docs/evaluation.md has the columns.
    """
    from clipkit.eval.search.embed import embed as stage

    print_summary(stage(open_pictures(data, split, label), out, ckpt, **options), as_json)


@click.command()
@click.argument("data")
@checkpoint
@click.option(
    "--out", type=AnyPath, metavar="OUT.parquet", help="The table. [default: DATA/clipkit/scores-SPLIT.parquet]"
)
@click.option("--split", default="train", help="Split of the data.")
@ema
@tokenizer
@precision
@batch_size
@device
@as_json
def score(
    data: str,
    ckpt: str,
    out: Path | None,
    split: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Write how similar each image of DATA is to its caption into a table, for build-tfds --keep-best --by TABLE.

    DATA is what `train` takes. The same command goes on after a kill.
    """
    from clipkit.eval.search.score import score as stage

    print_summary(stage(open_pictures(data, split, None), out, ckpt, split=split, **options), as_json)


@click.command()
@click.argument("data")
@click.option(
    "--teacher", "teachers", required=True, multiple=True, metavar="MODEL", help="A model, as zeroshot takes it."
)
@click.option("--views", type=click.IntRange(1, 1000), default=10, help="Augmented views of each image.")
@click.option("--recipe", "recipe_name", default="clipa-b16-dr", help="The recipe whose augmentation makes the views.")
@assignments
@click.option("--out", type=Folder, help="Where to store them. [default: DATA.reinforced, where train looks]")
@click.option("--seed", type=int, default=0, help="Of the views.")
@data_split
@cache_folder
@cache_gigabytes
@ema
@precision
@batch_size
@device
@as_json
def reinforce(
    data: str,
    teachers: tuple[str, ...],
    recipe_name: str,
    assignments: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Store what teachers say of each image and caption of DATA, for training with distill.weight (as MobileCLIP).

    DATA is what `train` takes, and stays as it is. The same command goes on after a kill; under torchrun the ranks
    share the work.
    """
    from clipkit.config import set_values
    from clipkit.train.catalogue import find_recipe
    from clipkit.train.teachers.reinforce import reinforce as stage

    recipe = set_values(find_recipe(recipe_name), assignments)
    print_summary(stage(data, out, teachers, recipe, **options), as_json)


@click.command()
@click.argument("images", nargs=-1, required=True, type=AnyPath, metavar="IMAGE...")
@click.option("--labels", required=True, help="What to choose from: 'a cat, a dog'.")
@checkpoint
@ema
@tokenizer
@click.option("--templates", "templates_name", default="openai-80", help="As zeroshot's --templates.")
@device
@page
@as_json
def classify(
    images: tuple[Path, ...],
    labels: str,
    ckpt: str,
    ema: bool,
    vocabulary: Path | None,
    templates_name: str,
    device: str,
    page: Path | None,
    as_json: bool,
) -> None:
    """Say which of some labels fits each IMAGE, with probabilities that sum to 1 over the labels."""
    import clipkit
    from clipkit.eval.search.classify import classify as stage
    from clipkit.eval.search.classify import split_labels
    from clipkit.eval.search.page import classified_tiles, write_page

    names = split_labels(labels)
    found = stage(clipkit.load(ckpt, ema=ema, tokenizer=vocabulary, device=device), images, names, templates_name)
    for each in found:
        if as_json:
            print_json({"image": str(each.image), "probabilities": each.probabilities})
        else:
            shown = "  ".join(f"{label} {share:.1%}" for label, share in list(each.probabilities.items())[:5])
            click.echo(f"{each.image}: {shown}")
    if page is not None:
        lead = f"Which of {len(names):,} labels fits best, by {ckpt}; the probabilities sum to 1 over the labels."
        write_page(page, "Images and labels", lead, classified_tiles(found))


@click.command()
@click.argument("data", metavar="DATA|VECTORS.parquet")
@click.argument("query", required=False)
@click.option("--image", type=AnyPath, help="Search by this image instead of a text.")
@click.option("--ckpt", metavar="MODEL", help="The model, as zeroshot takes it. [default: that of the vectors]")
@ema
@tokenizer
@click.option("--top", type=Count, default=12, help="How many images to find.")
@click.option("--split", help="Split of the data, as of embed.")
@click.option("--label", help="Column with the label, as of embed.")
@batch_size
@device
@page
@as_json
def search(
    data: str,
    query: str | None,
    image: Path | None,
    ckpt: str | None,
    ema: bool,
    vocabulary: Path | None,
    top: int,
    split: str | None,
    label: str | None,
    batch_size: int,
    device: str,
    page: Path | None,
    as_json: bool,
) -> None:
    """Find the images nearest to a QUERY, or to an image, in a dataset or in a file of vectors (`clipkit embed`).

    A dataset is embedded on the fly, each time.
    """
    import clipkit
    from clipkit.eval.search.find import find_in_file, find_in_pictures, query_vector, with_pictures
    from clipkit.eval.search.page import hit_tiles, write_page
    from clipkit.eval.search.vectors import open_vectors

    file = open_vectors(Path(data))
    if file is None and ckpt is None:
        raise UserError("--ckpt is needed: name the model (only a file of vectors knows its own)")
    if file is None or ckpt is not None:
        model = clipkit.load(ckpt or "", ema=ema, tokenizer=vocabulary, device=device)
    elif ema:
        raise UserError(f"--ema needs --ckpt: {data} says itself which weights made it")
    else:
        known = file.about.get("tokenizer")  # absent in older files
        vocabulary = vocabulary or (Path(known) if known else None)
        model = clipkit.load(file.about["model"], ema=file.about["ema"], tokenizer=vocabulary, device=device)
    if file is not None:
        file.require_model(model.encoder)
    query_E = query_vector(model, query, image)
    if file is not None:
        hits = find_in_file(file, query_E, top)
        if page is not None:
            pictures = open_pictures(file.about["data"], split, label)
            file.require_data(pictures)
            hits = with_pictures(hits, pictures)
    else:
        hits = find_in_pictures(model, open_pictures(data, split, label), query_E, top, batch_size)
    for hit in hits:
        if as_json:
            found = asdict(hit)
            del found["image"]
            print_json(found)
        else:
            click.echo(f"{hit.similarity:.3f}  {hit.key}{'  ' if hit.said else ''}{' · '.join(hit.said)}")
    if page is not None:
        write_page(page, query or str(image), f"The nearest images in {data}, by the cosine.", hit_tiles(hits))


def open_pictures(data: str, split: str | None, label: str | None) -> "Pictures":
    """Images with captions, as `train` reads them; else with labels, as `zeroshot` does."""
    from clipkit.eval.classification.labelled import open_labelled
    from clipkit.eval.search.pictures import captioned_pictures, labelled_pictures
    from clipkit.train.sources.open import open_source

    if Path(data).name in ("", ".."):  # its name is part of what the data is
        data = str(Path(data).resolve())
    if label is None:
        try:
            found = open_source(data, split=split or "train")
        except UserError as no_captions:
            try:
                labelled = open_labelled(Path(data), split=split)
            except UserError:
                raise no_captions from None
            click.echo(f"{labelled.path}: images with labels, for no captions are found ({no_captions})", err=True)
            return labelled_pictures(labelled)
        for note in found.notes:
            click.echo(note, err=True)
        part = found.parts[0]
        identity = found.identity() | ({"files": part.files()} if part.files else {})
        return captioned_pictures(found.source(), part.path, identity)
    return labelled_pictures(open_labelled(Path(data), label=label, split=split))
