"""A training run as the columns of `published-runs.csv` describe it, made into numbers: what is missing is derived
from what is there, from runs of the same model or data, or assumed, and every assumption is said.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.config import SUFFIXES, did_you_mean
from clipkit.errors import UserError
from clipkit.formatting import short

NUMBERS = (
    "image_width", "image_depth", "patch", "text_width", "text_depth", "embed_dim", "image_px", "image_tokens",
    "text_tokens", "final_px", "dataset_pairs", "samples_seen", "reduced_samples", "full_samples", "global_batch",
    "gmacs_image", "gmacs_text", "gmacs_total", "hours", "device_count", "imagenet_top1",
)  # fmt: skip
FRACTIONS = ("gmacs_image", "gmacs_text", "gmacs_total", "hours", "imagenet_top1")  # may be below 1
WORDS = ("id", "model", "dataset", "schedule", "loss", "device", "init", "notes", "source")
# Width and depth of the image and the text tower by the letters in models' names.
SIZES = {
    "ti": (192, 12, 192, 12), "tiny": (192, 12, 192, 12), "s": (384, 12, 384, 12), "small": (384, 12, 384, 12),
    "m": (512, 12, 512, 12), "b": (768, 12, 512, 12), "base": (768, 12, 512, 12), "l": (1024, 24, 768, 12),
    "large": (1024, 24, 768, 12), "so400m": (1152, 27, 1152, 27), "h": (1280, 32, 1024, 24),
    "huge": (1280, 32, 1024, 24),
    "g": (1408, 40, 1024, 24), "giant": (1408, 40, 1024, 24), "gopt": (1536, 40, 1152, 27),
    "bigg": (1664, 48, 1280, 32), "gigantic": (1664, 48, 1280, 32),
}  # fmt: skip
LETTERS = f"({'|'.join(sorted(SIZES, key=len, reverse=True))})"
FAMILIES = ("convnext", "coatnet", "vitamin", "mobileclip", "eva", "siglip", "openvision")
# Image GMACs of models whose towers aren't vision transformers, by their text width, where nothing better is known.
OTHER_GMACS = {384: 5.0, 512: 6.0, 640: 21.0, 768: 60.0, 1024: 100.0, 1152: 125.0, 1280: 250.0}
STOP = {"of", "and", "the", "subset", "openai"}
NOT_SAID = {"", "none", "null", "nan", "n/a", "unknown"}


class Shape(NamedTuple):
    """A vision transformer and its text tower."""

    patch: float
    width: float
    depth: float
    text_width: float
    text_depth: float


@dataclass(frozen=True)
class RunFacts:
    """A run as numbers and as words that other runs may share."""

    samples: float
    pairs: float
    image_weights: float
    """In the blocks of the image tower; for other towers as many as their operations suggest."""
    image_tokens: float
    text_tokens: float
    text_gmacs: float
    full_samples: float
    """Of a second stage at full length; 0 where there was one stage."""
    is_size_said: bool
    """Whether anything tells the size of the image tower."""
    is_length_said: bool
    is_staged: bool
    image_px: float
    final_px: float
    batch: float | None
    dataset: str
    dataset_words: frozenset[str]
    model_words: frozenset[str]
    family: str
    losses: frozenset[str]
    init: str
    source: str
    assumed: tuple[str, ...]
    shape: Shape | None
    """Of vision transformers."""

    @property
    def epochs(self) -> float:
        """How often each pair was seen; at least 1."""
        return max(1.0, self.samples / self.pairs)


def read_run(path: Path) -> dict[str, Any]:
    """A JSON file with the columns of a run. Raises UserError for a column that isn't known, or of the wrong type."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} doesn't exist: give a JSON file with the columns of published-runs.csv") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder: --run takes a JSON file of columns, and --against a run") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}): mend it") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: give one object with the columns of published-runs.csv, not a {type(values).__name__}"
        )
    return check_columns(values, str(path))


def check_columns(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The columns that say something: numbers as floats, the rest as text. Raises UserError as `read_run`."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in NUMBERS and name not in WORDS:
            raise UserError(f"{where}: unknown column {name!r}: {did_you_mean(name, (*NUMBERS, *WORDS))}")
        if value is None or (isinstance(value, str) and value.strip().lower() in NOT_SAID):
            continue
        if name in WORDS:
            if not isinstance(value, str):
                raise UserError(f"{where}: {name} is {json.dumps(value)}: give text")
            checked[name] = value.strip()
            continue
        try:
            number = as_number(value) if isinstance(value, str) else float(value)
            least = 0 if name in ("reduced_samples", "full_samples") else 1
            is_enough = number > 0 if name in FRACTIONS else number >= least
            fits = not isinstance(value, bool) and math.isfinite(number) and is_enough
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise UserError(f"{where}: {name} is {json.dumps(value)[:40]}: give a positive number")
        checked[name] = number
    return checked


def as_number(text: str) -> float:
    """A number as people write it: 12.8B, 1,280,000. Raises ValueError for other text, 12,8B among it."""
    plain = text.strip()
    if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", plain):
        plain = plain.replace(",", "")
    scale = SUFFIXES.get(plain[-1].upper(), 1)
    return float(plain[:-1] if scale > 1 else plain) * scale


def facts_of(run: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> RunFacts:
    """A run of `check_columns` as facts; `known` are the published runs, to fill in what it doesn't say.

    Raises UserError where neither the model's shape nor a name that gives it is there.
    """
    assumed: list[str] = []
    model = re.sub(r"(?<![A-Za-z])G(?=[-_/ ]?\d)", "bigG", str(run.get("model", "")))
    if model != run.get("model", ""):
        assumed.append(f"that {run['model']} is the gigantic one, 1664 wide, and not {run['model'].replace('G', 'g')}")
    if not {"image_width", "image_depth", "patch", "text_width", "text_depth"} <= set(run) and "gmacs_image" not in run:
        run = {**same_model(model, run, known), **run}
    shape = shape_of(model)
    width, depth = run.get("image_width") or shape[0], run.get("image_depth") or shape[1]
    text_width = run.get("text_width") or shape[2] or 512.0
    text_depth = run.get("text_depth") or shape[3] or 12.0
    patch = run.get("patch") or patch_of(model)
    px = run.get("image_px") or run.get("final_px") or px_of(model)
    px = px or max(224.0, math.isqrt(int(run.get("image_tokens", 1))) * (patch or 1.0))
    tokens = run.get("image_tokens") or ((px // patch) ** 2 + 1 if patch else None)
    is_vit = bool(width and depth and tokens and not is_resnet(model))
    if not is_vit and not ({"gmacs_image", "gmacs_total"} & set(run)):
        if width and depth and family_of(model) == "vit":
            raise UserError("nothing tells the number of image tokens: give patch or image_tokens")
        if not model:
            raise UserError("the run names no model: give model, or image_width, image_depth and patch")
    text_tokens = run.get("text_tokens") or 77.0
    text_gmacs = run.get("gmacs_text") or text_tokens * 12 * text_width**2 * text_depth / 1e9
    is_size_said = True
    if width and depth and tokens and not is_resnet(model):
        weights = 12 * width**2 * depth
    else:
        gmacs = run.get("gmacs_image") or max(0.0, run.get("gmacs_total", 0.0) - text_gmacs)
        if not gmacs:
            gmacs = OTHER_GMACS[min(OTHER_GMACS, key=lambda each: abs(each - text_width))]
            is_size_said = family_of(model) != "vit" or "text_width" in run
            if is_size_said:
                assumed.append(f"the image tower's size: {gmacs:.0f} GMACs, as is usual beside this text tower")
        weights, tokens = gmacs * 1e9 / 197, run.get("image_tokens") or 197.0
    dataset = published_name(str(run.get("dataset", "")), known)
    if split_words(dataset) != split_words(str(run.get("dataset", ""))):
        assumed.append(f"that {run['dataset']} is {dataset}")
    pairs = run.get("dataset_pairs") or pairs_of(dataset, known)
    said, reduced, full = lengths_of(run)
    if not (samples := said):
        samples = min(32 * (pairs or 4e8), 12.8e9)
        assumed.append(f"the length: {samples / 1e9:.3g} billion samples, 32 passes or 12.8 billion")
    if not pairs:
        pairs = min(samples, 1e10)
        assumed.append("no repetition of data: the number of pairs isn't known")
    if not dataset:
        assumed.append("data of middling quality: the data set isn't named")
    return RunFacts(
        samples=samples, pairs=pairs, image_weights=weights, image_tokens=tokens, text_tokens=text_tokens,
        text_gmacs=text_gmacs, full_samples=full if reduced else 0.0,
        is_size_said=is_size_said, is_length_said=bool(said),
        is_staged=bool(reduced) and (full > 0 or tokens < 90), image_px=px, final_px=run.get("final_px") or px,
        batch=run.get("global_batch"), dataset=dataset, dataset_words=dataset_words(dataset),
        model_words=frozenset(split_words(model)), family=family_of(model), losses=losses_of(str(run.get("loss", ""))),
        init=init_of(str(run.get("init", ""))), source=str(run.get("source", ""))[:40], assumed=tuple(assumed),
        shape=Shape(patch, width, depth, text_width, text_depth) if is_vit and patch and width and depth else None,
    )  # fmt: skip


def lengths_of(run: Mapping[str, Any]) -> tuple[float, float, float]:
    """Samples in all, at reduced and at full length: of two stages that of which the run doesn't say is the rest.

    Raises UserError where they don't add up.
    """
    seen, reduced, full = (run.get(name, 0.0) for name in ("samples_seen", "reduced_samples", "full_samples"))
    both = reduced + full
    least = 0.9 * seen if {"reduced_samples", "full_samples"} <= set(run) else 0.0
    if seen and not least <= both <= 1.1 * seen:
        raise UserError(
            f"samples_seen is {short(seen)}, but reduced_samples and full_samples make {short(both)}: mend one"
        )
    rest = max(0.0, seen - both) if both else 0.0
    if "full_samples" not in run:
        full = rest
    elif "reduced_samples" not in run:
        reduced = rest
    return seen or both, reduced, full


def same_model(model: str, run: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The shape of a published model of that name, however spelled; at the same resolution where GMACs come with it."""
    names = ("image_width", "image_depth", "patch", "text_width", "text_depth")
    for other in known:
        if model and split_words(other.get("model", "")) == split_words(model):
            same_px = run.get("image_px", other.get("image_px")) == other.get("image_px") and "image_tokens" not in run
            costs = ("gmacs_image", "gmacs_text", "gmacs_total") if same_px else ()
            if not is_resnet(model) and any(name in run for name in names[:3]):
                costs = ()
            found = {name: other[name] for name in (*names, *costs) if name in other}
            if found:
                return found
    return {}


def shape_of(model: str) -> tuple[float | None, float | None, float | None, float | None]:
    """Width and depth of the towers by a name such as ViT-B-16, CLIPA-H/14 or vit_base_patch16_224; Nones where it
    doesn't say.
    """
    if family_of(model) in ("convnext", "coatnet", "vitamin", "rn") or re.search(r"mobileclip2?-s\d", model.lower()):
        return (None, None, None, None)
    match = re.search(rf"(?:^|vit|[-_/ ]){LETTERS}(?=[-_/ ]*(?:patch)?\d)|vit[-_/ ]?{LETTERS}$", model.lower())
    return SIZES[match[1] or match[2]] if match else (None, None, None, None)


def patch_of(model: str) -> float | None:
    """The patch size in a name such as ViT-B-16."""
    match = re.search(rf"{LETTERS}[-_/ ]*(?:patch)?(8|\d\d)(?![a-z0-9])", model.lower())
    return float(match[2]) if match else None


def px_of(model: str) -> float | None:
    """The resolution in a name such as ViT-L/14@336px or ViT-B-16-SigLIP-384."""
    match = None if is_resnet(model) else re.search(r"[-_@( ](\d{3})(?:px)?(?![a-z0-9])", model.lower())
    return float(match[1]) if match else None


def is_resnet(model: str) -> bool:
    """Whether the image tower is one of CLIP's ResNets, whose width and depth are those of convolutions."""
    return family_of(model) == "rn"


def family_of(model: str) -> str:
    """The kind of image tower or training that a model's name tells."""
    name = model.lower()
    if re.search(r"\brn\d|resnet", name):
        return "rn"
    return next((family for family in FAMILIES if family in name), "vit")


def losses_of(loss: str) -> frozenset[str]:
    """What a loss has that plain softmax hasn't."""
    parts = {
        "distillation": "distil", "captioning": "caption", "sigmoid": "sigmoid|siglip", "jest": "jest",
        "global": "fastclip|drrho|rgcl|sogclr",
    }  # fmt: skip
    return frozenset(name for name, pattern in parts.items() if re.search(pattern, loss.lower()))


def init_of(init: str) -> str:
    """What the towers begin as: `scratch`, or what is said of those that others have trained."""
    return "scratch" if re.fullmatch(r"|(trained )?(from )?scratch|random( init\w*)?", init.lower()) else init


def split_words(text: str) -> list[str]:
    """Words and numbers: LAION-2B-en as laion, 2b, en."""
    return re.findall(r"[a-z]+|\d+(?:\.\d+)?[bmk]?", text.lower().replace("%", " pct"))


def dataset_words(dataset: str) -> frozenset[str]:
    """The words by which data sets are alike; the sizes S to XL of DataComp's pools are not among them."""
    name = re.sub(r"\b(commonpool|datacomp)-(s|m|l|xl)\b", r"\1", dataset.lower())
    return frozenset(word for word in split_words(name) if word not in STOP)


def published_name(dataset: str, known: Sequence[Mapping[str, Any]]) -> str:
    """The published data set that a name means, however spelled: LAION400M is LAION-400M, LAION-2B is LAION-2B-en.

    The name itself where no published one begins with its words, or several do.
    """
    names = dict.fromkeys(run["dataset"] for run in known if "dataset" in run)
    if dataset in names or not (words := split_words(dataset)):
        return dataset
    meant = [name for name in names if split_words(name) == words]
    meant = meant or [name for name in names if split_words(name)[: len(words)] == words]
    return meant[0] if len(meant) == 1 else dataset


def pairs_of(dataset: str, known: Sequence[Mapping[str, Any]]) -> float | None:
    """The size of a data set by its name, or by the numbers in it: CC3M+CC12M has 15 million."""
    name = published_name(dataset, known)
    sizes = {run["dataset"]: run["dataset_pairs"] for run in known if "dataset" in run and "dataset_pairs" in run}
    if name in sizes:
        return float(sizes[name])
    parts = [re.findall(r"(\d+(?:\.\d+)?)\s*([bmk])(?![a-z0-9])", part) for part in re.split("[+&]", name.lower())]
    if not all(len(found) == 1 for found in parts):
        return None
    return sum(float(number) * {"b": 1e9, "m": 1e6, "k": 1e3}[unit] for ((number, unit),) in parts)
