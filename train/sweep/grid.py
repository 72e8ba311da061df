"""What a sweep is: a TOML file, read into configurations of size, image tokens, text tokens and seed.

Lengths are varied one tower at a time: the image's with all text tokens, the text's with all image tokens. Each length
below the longest may be reached in several ways; the first one named is that of the law, the others are its study.
Nothing here imports torch, so that a sweep can be priced in a moment.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from clipkit.choices import ImageMethod, TextMethod
from clipkit.config import did_you_mean, parse, set_values
from clipkit.errors import UserError
from clipkit.storage.files import read_toml
from clipkit.text.tokens import image_keep_indices
from clipkit.train.catalogue import assignments, find_recipe
from clipkit.train.plan.step import towers_of
from clipkit.train.recipes import Recipe, Stage, model_at
from clipkit.train.sweep.branches import Branch, branches_of

KEYS = ("base", "data", "eval", "budgets", "cooldown", "seeds", "set", "sizes", "image", "text", "studies", "held_out")
EVAL_KEYS = ("data", "task", "metric", "templates", "classes", "label", "split")
LENGTH_KEYS = ("tokens", "ways")
WAYS: dict[str, tuple[str, ...]] = {"image": ("resize", *get_args(ImageMethod)), "text": get_args(TextMethod)}
ALL = "all"
"""The way of the longest length, which reduces nothing."""
COOLDOWN = 0.15


@dataclass(frozen=True)
class Length:
    """So many tokens of a tower, class token or start and end included, and the way to them."""

    tokens: int
    way: str = ALL

    def __str__(self) -> str:
        return str(self.tokens) if self.way == ALL else f"{self.tokens}-{self.way}"


@dataclass(frozen=True)
class Configuration:
    """What is trained as one trunk with its branches."""

    size: str
    image: Length
    text: Length
    seed: int
    recipe: Recipe
    """Its one stage is the trunk's, at a constant rate; its length is that of the longest budget."""
    branches: tuple[Branch, ...]

    @property
    def name(self) -> str:
        """Without the seed: `large-i4-resize-t16`."""
        return f"{self.size}-i{self.image}-t{self.text}"

    @property
    def weights(self) -> int:
        """Of the blocks of both towers, without embeddings and projections."""
        towers = towers_of(model_at(self.recipe, self.recipe.stages[0]), None)
        return sum(tower.depth * (4 * tower.width**2 + 2 * tower.width * tower.hidden) for tower in towers)


@dataclass(frozen=True)
class Sweep:
    """All configurations, on the same data."""

    name: str
    data: tuple[str, ...]
    evaluation: Mapping[str, str]
    """What is measured: `data`, and options of `zeroshot` by their names."""
    configurations: tuple[Configuration, ...]
    held_out: str | None
    """The name of the configuration that is predicted before it is trained."""
    ways: Mapping[str, str]
    """The way to fewer tokens of each tower that the law is of: the first one named."""

    @property
    def metric(self) -> str:
        """What the accuracy is, as `cadence.keep_best` names it."""
        return self.evaluation.get("metric", "top1")


def read_sweep(path: Path) -> Sweep:
    """The sweep of a TOML file. Raises UserError, naming the file and the nearest keys, for what it can't mean."""
    values = read_toml(path, "sweep")
    try:
        return sweep_of(values, path.stem)
    except UserError as error:
        raise UserError(f"sweep {path}: {str(error).replace('--set ', '')}") from error


def sweep_of(values: Mapping[str, Any], name: str) -> Sweep:
    """The sweep of a file's values. Raises UserError."""
    know(values, KEYS)
    evaluation = table(values, "eval")
    know(evaluation, EVAL_KEYS, "eval.")
    if not evaluation.get("data") or not isinstance(evaluation["data"], str):
        raise UserError("it measures nothing: set data under [eval], to what zeroshot --data takes")
    data = [values["data"]] if isinstance(values.get("data"), str) else values.get("data", [])
    if not data or not isinstance(data, list) or not all(isinstance(each, str) for each in data):
        raise UserError("it has no data: set data to what train --data takes, one or a list")
    configurations = tuple(configurations_of(values))
    held_out, names = values.get("held_out"), {each.name for each in configurations}
    if held_out is not None and held_out not in names:
        raise UserError(f"held_out {held_out!r} is none of its configurations: {did_you_mean(str(held_out), names)}")
    ways = {tower: ways_of(values, tower)[0] for tower in WAYS}
    evaluation = {key: str(value) for key, value in evaluation.items()}
    return Sweep(name, tuple(data), evaluation, configurations, held_out, ways)


def know(values: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> None:
    """Raise UserError for the first key that isn't among `keys`."""
    for key in values:
        if key not in keys:
            raise UserError(f"unknown key {prefix}{key}; {did_you_mean(key, keys)}")


def table(values: Mapping[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    """The table of that name, {} where there is none. Raises UserError for anything else."""
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise UserError(f"{prefix}{key} is {found!r}: make it a table, [{prefix}{key}]")
    return found


def listed(values: Mapping[str, Any], key: str, where: str, kind: type = str) -> list[Any]:
    """A list of names, or of whole numbers, suffixes allowed; each once. Raises UserError."""
    found, is_text = values.get(key), kind is str
    if not isinstance(found, list) or not found or (is_text and not all(isinstance(each, str) for each in found)):
        raise UserError(f"{where} is {found!r}: set a list of {'names' if is_text else 'numbers'}")
    parsed = [parse(str(each), kind, where) for each in found]
    if len(set(parsed)) < len(parsed):
        raise UserError(f"{where} names {'one' if is_text else 'a number'} twice: name each once")
    return parsed


def configurations_of(values: Mapping[str, Any]) -> Iterator[Configuration]:
    """All configurations, the seeds of each together. Raises UserError."""
    base = set_values(find_recipe(str(values.get("base", ""))), assignments(table(values, "set")))
    sizes, studies = table(values, "sizes") or {"base": {}}, values.get("studies")
    if studies not in (None, []):
        studies = listed(values, "studies", "studies")
    budgets, cooldown = sorted(listed(values, "budgets", "budgets", int)), values.get("cooldown", COOLDOWN)
    if not isinstance(cooldown, float) or not 0 < cooldown < 1:
        raise UserError(f"cooldown is {cooldown!r}: set the share of each budget that cools down, above 0 and below 1")
    for size in studies or ():
        if size not in sizes:
            raise UserError(f"studies: unknown size {size!r}; {did_you_mean(size, sizes)}")
    seeds = listed(values, "seeds", "seeds", int) if "seeds" in values else [base.seed]
    for size in sizes:
        if not re.fullmatch(r"\w[\w.+-]*", size):
            raise UserError(f"sizes: {size!r} can't be the name of a folder: use letters, numbers, dots and hyphens")
        changes = table(sizes, size, "sizes.")
        recipe = set_values(base, assignments(changes))
        is_studied = studies is None or size in studies
        for image, text in lengths_of(values, is_studied):
            name = f"{size}-i{image}-t{text}"
            stage = at_lengths(recipe, image, text, name)
            branches = branches_of(stage, budgets, cooldown)
            stage = replace(stage, schedule="constant", samples=branches[-1].samples)
            for seed in seeds:
                made = replace(
                    recipe, name=name, stages=(stage,), seed=seed, ema_decay=None,
                    on_stuck_loss="warn",
                )  # fmt: skip
                yield Configuration(size, image, text, seed, made, branches)


def ways_of(values: Mapping[str, Any], tower: str) -> Sequence[str]:
    """The ways to fewer tokens of a tower, that of the law first. Raises UserError."""
    known, found = WAYS[tower], table(values, tower)
    if "ways" not in found:
        return known[:1]
    for way in (ways := listed(found, "ways", f"{tower}.ways")):
        if way not in known:
            raise UserError(f"{tower}.ways: unknown way {way!r}; {did_you_mean(way, known)}")
    return ways


def lengths_of(values: Mapping[str, Any], is_studied: bool) -> Iterator[tuple[Length, Length]]:
    """The pairs of lengths: all tokens, then fewer of the image, then fewer of the text. Raises UserError."""
    reduced: dict[str, list[Length]] = {}
    longest: dict[str, Length] = {}
    for tower in WAYS:
        found = table(values, tower)
        know(found, LENGTH_KEYS, f"{tower}.")
        tokens = sorted(listed(found, "tokens", f"{tower}.tokens", int), reverse=True)
        ways = ways_of(values, tower)
        chosen = ways if is_studied else ways[:1]
        longest[tower] = Length(tokens[0])
        reduced[tower] = [Length(each, way) for each in tokens[1:] for way in chosen]
    yield longest["image"], longest["text"]
    yield from ((each, longest["text"]) for each in reduced["image"])
    yield from ((longest["image"], each) for each in reduced["text"])


def at_lengths(recipe: Recipe, image: Length, text: Length, name: str) -> Stage:
    """The recipe's first stage with so many tokens. Raises UserError where patches can't make that many, with the name
    of the configuration where the way can't.

    Resizing changes the side of the image; other ways keep some patches of the stage's own side.
    """
    stage, tower = recipe.stages[0], recipe.model.image
    extra = int(tower.class_token)
    patches, own = image.tokens - extra, towers_of(model_at(recipe, replace(stage, image_keep=None)), None)[0].tokens
    method = "truncate" if text.way == ALL else cast(TextMethod, text.way)
    stage = replace(stage, context_length=text.tokens, text_reduction=method, image_reduction=None, image_keep=None)
    if image.way in (ALL, "resize"):
        side = isqrt(max(0, patches))
        if side**2 != patches or not side:
            near = sorted({max(1, side) ** 2 + extra, (side + 1) ** 2 + extra})
            raise UserError(
                f"image.tokens {image.tokens}: no square of patches{' and a class token' if extra else ''}: "
                f"set {' or '.join(map(str, near))}"
            )
        return replace(stage, image_size=side * (stage.image_size // isqrt(own - extra)))
    way, side = cast(ImageMethod, image.way), isqrt(own - extra)
    try:
        image_keep_indices(way, (side, side), patches, np.zeros(1, np.uint64))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return replace(stage, image_reduction=way, image_keep=patches)
