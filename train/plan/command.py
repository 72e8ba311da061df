"""`clipkit plan`: a recipe, a finished run or the columns of one, priced and scored before anybody pays for it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipkit.config import from_json
from clipkit.errors import UserError
from clipkit.formats.manifest import CLIPKIT_FOLDER, manifest_path, read_manifest
from clipkit.hardware import find_chip, parse_devices, this_cpu
from clipkit.jobs.worker import cores
from clipkit.log import read_metrics
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig
from clipkit.storage.files import read_json
from clipkit.train.catalogue import DATASETS
from clipkit.train.plan.accuracy import Prediction, known_runs, predict_all
from clipkit.train.plan.columns import facts_of, pairs_of
from clipkit.train.plan.cost import PAIR_BYTES, Fleet, Pairs, recipe_plan
from clipkit.train.plan.report import Plan, differences
from clipkit.train.plan.step import Calibration, towers_of
from clipkit.train.recipes import Recipe, Stage, check_ranges, model_at

# What `published-runs.csv` calls the losses of recipes.
LOSSES = {"info_nce": "softmax", "sigmoid": "sigmoid", "global_contrastive": "fastclip"}
PUBLISHED_TIMES = "CLIPA's published times on A100-80GB (docs/plan.md)"


def fleet_of(devices: str, price: float | None) -> Fleet:
    """The devices that `--devices` names, at `price` an hour each or a usual one. Raises UserError."""
    count, chip = parse_devices(devices, cores())
    return Fleet(count, chip, chip.price if price is None else price)


def plan_recipe(
    recipe: Recipe,
    fleet: Fleet,
    *,
    data: Path | None = None,
    dataset: str | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan of a recipe. `dataset` names the published data set that the data are like; without it that of the
    recipe's published run, if there was one. Raises UserError for a recipe whose values mean nothing, or that doesn't
    fit."""
    check_ranges(recipe)
    like = dataset if dataset is not None else "" if data else DATASETS.get(recipe.name, "")
    count = pairs_of(like, known_runs()) if like else None
    pairs = Pairs(count, PAIR_BYTES, f"as {like}" if like else "unknown") if data is None else pairs_in(data)
    calibrated_on = PUBLISHED_TIMES if calibration is None else "two small models here"
    calibration = calibration or Calibration()
    stages = recipe_plan(recipe, fleet, pairs, calibration)
    accuracies = accuracies_of(recipe, like, pairs.total)
    return Plan(recipe, fleet, pairs, calibration, calibrated_on, stages, accuracies, like)


def pairs_in(data: Path) -> Pairs:
    """What a dataset of build-tfds or a finished download of either format says of its training pairs. Raises UserError
    for anything else.
    """
    from clipkit.formats.dataset import find_dataset  # with pyarrow, which a plan without data doesn't need

    folder, account = find_dataset(data), data / CLIPKIT_FOLDER / "download.json"
    if folder is not None and manifest_path(folder).exists():
        splits = read_manifest(folder)
        split = splits.get("train") or max(splits.values(), key=lambda each: each.records)
        records, size = split.records, split.bytes
    elif account.exists():
        counts = read_json(account)
        records, size = counts["downloaded"], counts["image_bytes"]
    else:
        raise UserError(f"--data {data}: no dataset of build-tfds or finished download here: give one, or leave it out")
    if not records:
        raise UserError(f"--data {data}: it has no records")
    return Pairs(records, size / records, str(data))


def loss_name(recipe: Recipe) -> str:
    """A recipe's loss as `published-runs.csv` calls it."""
    name = "DRRho" if recipe.has_teachers and recipe.loss == "global_contrastive" else LOSSES[recipe.loss]
    return name + ("+distillation" if recipe.distill.weight else "")


def columns_of(recipe: Recipe, dataset: str, pairs: float | None) -> dict[str, Any]:
    """A recipe in the columns of `published-runs.csv`."""
    bulk, last = max(recipe.stages, key=lambda stage: stage.samples), recipe.stages[-1]
    first, rest = recipe.stages[0].samples, sum(stage.samples for stage in recipe.stages[1:])
    image, text = towers_of(model_at(recipe, bulk), bulk.image_keep)
    columns: dict[str, Any] = {
        "image_width": float(image.width), "image_depth": float(image.depth), "image_tokens": float(image.tokens),
        "image_px": float(bulk.image_size), "final_px": float(last.image_size), "text_tokens": float(text.tokens),
        "text_width": float(text.width), "text_depth": float(text.depth), "embed_dim": float(recipe.model.embed_dim),
        "samples_seen": float(recipe.samples), "global_batch": float(bulk.batch_size),
        "loss": loss_name(recipe), "dataset": dataset,
    }  # fmt: skip
    if rest or bulk.image_size < 224:
        columns |= {"reduced_samples": float(first), "full_samples": float(rest)}
    if image.frozen or text.frozen:
        both, one = "image and text towers", f"{'image' if image.frozen else 'text'} tower"
        columns["init"] = f"frozen {both if image.frozen and text.frozen else one}"
    return columns | ({"dataset_pairs": float(pairs)} if pairs else {})


def accuracies_of(recipe: Recipe, dataset: str, pairs: float | None) -> tuple[Prediction, ...]:
    """The accuracy after each stage of a recipe, on data like `dataset`."""
    prefixes = [recipe.stages[: number + 1] for number in range(len(recipe.stages))]
    return tuple(predict_all([columns_of(replace(recipe, stages=prefix), dataset, pairs) for prefix in prefixes]))


# ---- Runs that others describe, and those that were made -------------------------------------------------------------


def plan_columns(columns: Mapping[str, Any], fleet: Fleet) -> dict[str, Any]:
    """The JSON of a run with the columns of `published-runs.csv`: its accuracy, and its cost where the image tower is a
    vision transformer."""
    found: Prediction = predict_all([columns])[0]
    values: dict[str, Any] = dict.fromkeys(("hours", "device_hours", "money", "samples_per_s", "mfu"))
    values |= {
        "devices": f"{fleet.number}x{fleet.chip.name}",
        "accuracy": found.to_json(),
        "stages": [],
        "assumptions": [],
    }
    try:
        recipe = recipe_of(columns, fleet.number)
        stages = recipe_plan(recipe, fleet, Pairs(None, PAIR_BYTES, "unknown"), Calibration())
    except UserError as error:
        return values | {"assumptions": [f"no cost: {error}"]}
    dataset, pairs = str(columns.get("dataset", "")), columns.get("dataset_pairs")
    accuracies = (*accuracies_of(recipe, dataset, pairs)[:-1], found)
    plan = Plan(
        recipe, fleet, Pairs(pairs, PAIR_BYTES, dataset or "unknown"), Calibration(), PUBLISHED_TIMES, stages,
        accuracies, dataset,
    )  # fmt: skip
    return plan.to_json()


def recipe_of(columns: Mapping[str, Any], devices: int) -> Recipe:
    """What such a run would be as a recipe: one stage, or a reduced and a full one, with batches that the devices can
    share. Raises UserError where the image tower isn't a vision transformer of a known shape."""
    facts = facts_of(columns, known_runs())
    if facts.shape is None:
        raise UserError("its image tower isn't a vision transformer of a known shape")
    shape, batch = facts.shape, max(1, round((facts.batch or 32_768) / devices)) * devices
    patch = int(shape.patch)

    def stage(name: str, samples: float, px: float, keep: int | None, text: float) -> Stage:
        steps = max(1, round(samples / batch))
        return Stage(
            name, steps * batch, batch, 1e-3, 0, int(px // patch) * patch, int(text), "truncate",
            "random" if keep else None, keep,
        )  # fmt: skip

    grid = (facts.image_px // shape.patch) ** 2
    if facts.image_tokens > grid + 1:
        raise UserError(
            f"{facts.image_tokens:.0f} image tokens are more than {facts.image_px:.0f} px in patches of "
            f"{shape.patch:.0f} make: mend one"
        )
    masked = int(facts.image_tokens) - 1 if facts.image_tokens < 0.9 * grid else None
    one = max(1.0, facts.samples - facts.full_samples)
    stages = [stage("reduced" if facts.is_staged else "full", one, facts.image_px, masked, facts.text_tokens)]
    if facts.full_samples:
        stages.append(stage("full", facts.full_samples, facts.final_px, None, max(32.0, facts.text_tokens)))
    image = ImageConfig(
        "vit_base_patch16_224", patch_size=patch, width=int(shape.width), depth=int(shape.depth),
        pooling="token" if facts.image_tokens != grid else "average", class_token=facts.image_tokens != grid,
    )  # fmt: skip
    text = TextConfig(width=int(shape.text_width), depth=int(shape.text_depth))
    name = str(columns.get("model", "run"))
    return Recipe(name, ModelConfig(int(shape.text_width), image, text), tuple(stages), checkpoint_activations=False)


def plan_against(run: Path) -> tuple[Plan, list[dict[str, Any]]]:
    """What would have been planned for a run on the devices that it had, and how it differs from what its log says.

    Raises UserError for a folder that isn't a run's, and for devices that aren't in the table.
    """
    path = run / "config.json"
    if not path.exists():
        raise UserError(f"--against {run}: no config.json here: give the folder of a run of clipkit train")
    config = read_json(path)
    recipe, device = from_json(Recipe, config["recipe"], f"{path}: recipe"), config["device"]
    chip = this_cpu(cores()) if device["kind"] == "cpu" else find_chip(device["hardware"])
    if chip is None:
        raise UserError(f"--against {run}: no data sheet of {device['hardware']} in clipkit's table")
    plan = plan_recipe(recipe, Fleet(int(device["devices"]), chip, chip.price))
    return plan, differences(plan, read_metrics(run))
