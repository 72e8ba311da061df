"""Where a run starts: at its own newest checkpoint, with another checkpoint's weights, or from scratch.

What decides what is learned must be as it was when a run goes on, or its schedule and order would not hold. The rest
may change, and so may stages that haven't begun, where that is asked for. All ranks must start at the same place.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from clipkit import __version__, checkpoint
from clipkit.config import did_you_mean, differences, from_json, set_values, to_json
from clipkit.device import Device
from clipkit.embedding.encoder import other_kind
from clipkit.errors import UserError
from clipkit.interop.init import weights_from_file, with_new_heads
from clipkit.model.config import ModelConfig
from clipkit.storage.files import read_json, require_file
from clipkit.text.tokenizer import WordTokenizer
from clipkit.text.vocabulary import vocabulary_hash
from clipkit.train.recipes import Recipe, model_at
from clipkit.train.sources.open import Data

# Settings of a recipe that don't change what is learned.
FREE = (
    "cadence",
    "checkpoint_activations",
    "max_bad",
    "compile",
    "micro_batch",
    "shard_weights",
    "on_bad_loss",
    "on_stuck_loss",
)
HASHED_BYTES = 4096


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on. `tensors` are the weights to begin with; None takes new ones."""

    samples_seen: int = 0
    tensors: dict[str, torch.Tensor] | None = None
    own: checkpoint.Checkpoint | None = None
    """The run's own checkpoint, where it goes on from one."""
    changes: list[str] = field(default_factory=list)
    """How the recipe differs from the checkpoint's."""
    vocabulary: str | None = None
    """The hash of the tokenizer's file, where it has one."""
    note: str = ""
    """What was taken from another project's file, and what wasn't; how a checkpoint's towers will run otherwise."""


def find_start(
    folder: Path,
    recipe: Recipe,
    data: Data,
    tokenizer: WordTokenizer,
    *,
    resume: bool = False,
    init: Path | None = None,
    from_stage: str | None = None,
    allow_changes: bool = False,
    branch: bool = False,
) -> Start:
    """The run's own newest checkpoint, else the weights of `init`, at the start of `from_stage`, else scratch. `branch`
    goes on from `init` as from an own checkpoint.

    Raises UserError for a run without `resume`, and for one that began with another recipe, other data or another
    tokenizer.
    """
    if allow_changes and not resume:
        raise UserError("--allow-changes is for a run that goes on: add --resume")
    latest = checkpoint.latest(folder)
    if latest is not None and not resume:
        raise UserError(f"{folder} holds a run of {int(latest.name):,} samples: add --resume, or choose another --out")
    goes_on_from = latest or (init if branch else None)
    if goes_on_from is not None:
        own = checkpoint.load(goes_on_from, with_optimizer=True)
        changes = changes_on_resume(own, recipe, data, allow_changes or latest is None)
        refuse_other_vocabulary(own, tokenizer)
        return Start(own.samples_seen, own.tensors, own, changes, vocabulary_hash(tokenizer))
    if from_stage is not None and init is None:
        raise UserError(f"--from-stage {from_stage} needs the weights of a checkpoint: name it with --init")
    number = 0 if from_stage is None else number_of_stage(recipe, from_stage)
    begin = sum(stage.samples for stage in recipe.stages[:number])
    known = vocabulary_hash(tokenizer)
    if init is None:
        refuse_random_frozen(recipe, ())
        return Start(begin, vocabulary=known)
    config = model_at(recipe, recipe.stages[number])
    if init.is_dir():
        loaded = checkpoint.load(init)
        refuse_other_vocabulary(loaded, tokenizer)
        note = compare_kinds(loaded, config, recipe)
        return Start(begin, with_new_heads(loaded.tensors, config, recipe.seed), vocabulary=known, note=note)
    require_file(init, "checkpoint")
    weights = weights_from_file(init, config, recipe.seed)
    refuse_random_frozen(recipe, weights.towers)
    return Start(begin, weights.tensors, vocabulary=known, note=weights.note)


def refuse_random_frozen(recipe: Recipe, loaded: tuple[str, ...]) -> None:
    """Raises UserError where a tower is frozen and has no weights but random ones."""
    for tower, frozen in (("image", recipe.model.image.frozen), ("text", recipe.model.text.frozen)):
        if frozen and tower not in loaded:
            raise UserError(
                f"a frozen tower with random weights: give the {tower} tower's weights with --init, or set "
                f"model.{tower}.frozen=false"
            )


def compare_kinds(start: checkpoint.Checkpoint, config: ModelConfig, recipe: Recipe) -> str:
    """A line on towers that compute otherwise with the checkpoint's weights than they were trained to, or that see
    pixels of another mean and spread; "" for none.

    Raises UserError where such a one is frozen.
    """
    found, (theirs, ours) = [], ({"mean": each.mean, "std": each.std} for each in (start.preprocess, recipe))
    pixels = differences(to_json(theirs), to_json(ours))
    for tower in ("image", "text"):
        asked = getattr(config, tower)
        other = other_kind(getattr(start.model_config, tower), asked)
        if tower == "image" and not other and pixels:
            other = pixels[0]
        if other and asked.frozen is True:
            raise UserError(
                f"{start.path} has another kind of {tower} tower ({other}): set the same, for a frozen one stays as it "
                "was trained"
            )
        found += [f"{tower} tower, {other}"] if other else []
    return f"{start.path} was trained with another kind of {'; '.join(found)}" if found else ""


def refuse_other_vocabulary(start: checkpoint.Checkpoint, tokenizer: WordTokenizer) -> None:
    """Raises UserError when the checkpoint's token ids mean other pieces of text."""
    name, known = start.config["tokenizer"], start.config.get("vocabulary")
    if name != tokenizer.name:
        raise UserError(
            f"{start.path} was trained with the tokenizer {name}, the recipe has {tokenizer.name}: "
            f"set model.text.tokenizer={name}, or begin with another checkpoint"
        )
    if known != vocabulary_hash(tokenizer):
        raise UserError(
            f"{start.path} was trained with another vocabulary: add --tokenizer {start.path / checkpoint.VOCABULARY}"
        )


def cooldown_recipe(
    samples: int,
    init: Path | None,
    folder: Path,
    named: Recipe | None,
    assignments: Sequence[str],
    *,
    resume: bool = False,
    from_stage: str | None = None,
) -> Recipe:
    """The recipe of a run in `folder` that cools down over `samples` from the checkpoint `init`, and ends then.

    It is `named`, or else the checkpoint's, with the assignments. A branch that is resumed reads its own checkpoint and
    needs `init` no more. Raises UserError where nothing can branch off.
    """
    if init is None or from_stage is not None:
        raise UserError("--cooldown goes on from a checkpoint: name it with --init, and no --from-stage")
    if folder.resolve() in (init.resolve(), *init.resolve().parents):
        raise UserError(f"--cooldown leaves the run {folder} as it is: give the branch another --out")
    latest = checkpoint.latest(folder) if resume else None
    found = latest or checkpoint.find(init)
    theirs = recipe_of(found)
    seen = int(read_json(found / "state.json")["samples_seen"])
    if latest is not None:
        if theirs.stages[-1].cooldown_samples != samples:
            raise UserError(
                f"{folder} cools down over {theirs.stages[-1].cooldown_samples} samples, not {samples}: "
                "resume with the same --cooldown, or choose another --out"
            )
        seen = theirs.samples - samples
    recipe = set_values(named or theirs, assignments)
    ends = list(itertools.accumulate(stage.samples for stage in recipe.stages))
    number = next((number for number, end in enumerate(ends) if seen <= end), None)
    if number is None:
        raise UserError(f"{found} was made by another recipe: --cooldown takes the checkpoint's, so leave --recipe out")
    stage, begin = recipe.stages[number], ends[number] - recipe.stages[number].samples
    if stage.schedule == "cosine":
        raise UserError(
            f"{found} is on a cosine, which ends at its stage's end: --cooldown branches off "
            "schedule=constant or inverse_sqrt"
        )
    if seen > ends[number] - stage.cooldown_samples:
        last = ends[number] - stage.cooldown_samples
        raise UserError(f"{found} is in a cool-down already: take a checkpoint of at most {last} samples")
    if samples % stage.batch_size:
        near = max(1, round(samples / stage.batch_size)) * stage.batch_size
        raise UserError(f"--cooldown {samples} is not a multiple of batch_size {stage.batch_size}: give {near}")
    cooled = replace(stage, samples=seen - begin + samples, cooldown_samples=samples)
    return replace(recipe, stages=(*recipe.stages[:number], cooled))


def recipe_of(path: Path) -> Recipe:
    """The recipe that made a checkpoint."""
    theirs = read_json(path / "config.json")["recipe"]
    # What an older clipkit didn't write has its default, but for the decay, of which it knew one kind.
    legacy = {**theirs, "optimizer": {"decay": "layers", **theirs["optimizer"]}}
    return from_json(Recipe, legacy, f"{path}/config.json: recipe")


def number_of_stage(recipe: Recipe, name: str) -> int:
    """The place of the stage of that name. Raises UserError when there is none."""
    names = [stage.name for stage in recipe.stages]
    if name not in names:
        raise UserError(f"--from-stage {name}: recipe {recipe.name} has no such stage; {did_you_mean(name, names)}")
    return names.index(name)


def changes_on_resume(start: checkpoint.Checkpoint, recipe: Recipe, data: Data, allow_changes: bool) -> list[str]:
    """How the recipe differs from the checkpoint's, where it may. Raises UserError where it may not, and for other
    data: the schedule and the order would not hold.
    """
    theirs = to_json(with_own_gamma(recipe_of(start.path)))
    begun = first = 0
    for stage in theirs["stages"]:
        begun += first < start.samples_seen
        first += stage["samples"]
    changed = differences(by_number(theirs), by_number(to_json(with_own_gamma(recipe))))
    later = [line for line in changed if is_later(line, begun)]
    kept = [line for line in changed if line not in later and not line.startswith(FREE)]
    refused = [line for line in kept if not is_extension(line, recipe, theirs, begun - 1, start.samples_seen)]
    if refused:
        hint = "; --allow-changes is for stages that haven't begun" if allow_changes else ""
        raise UserError(
            f"{start.path} was made by another recipe ({shown(refused)}): "
            f"resume with the same recipe and --set, or begin a new run with --init{hint}"
        )
    if later and not allow_changes:
        raise UserError(
            f"{start.path} was made by a recipe with other later stages ({shown(later)}): "
            "add --allow-changes to go on with the new ones, or resume with the same recipe and --set"
        )
    other = differences(start.state["dataset"], data.identity())
    if other:
        raise UserError(
            f"{start.path} was trained on another dataset ({other[0]}): "
            "resume with the same --data, or begin a new run with --init"
        )
    return changed


def with_own_gamma(recipe: Recipe) -> Recipe:
    """The recipe with the length of its gamma's cosine said, which else follows from that of the run."""
    if recipe.loss != "global_contrastive":
        return recipe
    return replace(recipe, global_contrastive=replace(recipe.global_contrastive, gamma_samples=recipe.gamma_samples))


def by_number(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's JSON with its stages by number, so that two of unequal length are compared stage by stage."""
    return {**recipe, "stages": {str(number): stage for number, stage in enumerate(recipe["stages"])}}


def is_extension(line: str, recipe: Recipe, theirs: Mapping[str, Any], number: int, samples_seen: int) -> bool:
    """Whether a difference makes the stage that is under way longer or shorter, or moves its cool-down.

    Only where the learning rate so far doesn't depend on the stage's end: neither on a cosine nor in a cool-down.
    """
    if line.partition(":")[0] not in (f"stages.{number}.samples", f"stages.{number}.cooldown_samples"):
        return False
    stage, before = recipe.stages[number], theirs["stages"][number]
    seen = samples_seen - sum(each["samples"] for each in theirs["stages"][:number])
    ends = stage.samples - stage.cooldown_samples, before["samples"] - before["cooldown_samples"]
    return stage.schedule == before["schedule"] != "cosine" and seen <= min(ends)


def is_later(line: str, begun: int) -> bool:
    """Whether a difference is one of a stage from number `begun` on."""
    head, _, rest = line.partition(".")
    return head == "stages" and int(rest.partition(":")[0].partition(".")[0]) >= begun


def shown(changed: list[str]) -> str:
    """The first of some differences, and how many more there are."""
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return changed[0] + more


def refuse_different_starts(start: Start, recipe: Recipe, data: Data, folder: Path, device: Device) -> None:
    """Raises UserError, on all ranks, when they don't start alike: each would take the others' gradients for its own.

    Only the first rank writes checkpoints, so the others find them only in a folder that they share with it.
    """
    if device.world == 1:
        return
    mine = {
        "versions": f"clipkit {__version__} with torch {torch.__version__}",
        "recipe": to_json(recipe),
        "data": data.identity(),
        "vocabulary": start.vocabulary,
        "seen": start.samples_seen,
        "weights": weights_digest(start.tensors),
    }
    starts = device.gather(mine)
    first = starts[0]
    for rank, theirs in enumerate(starts):
        other = {name for name in mine if theirs[name] != first[name]}
        if "versions" in other:
            raise UserError(
                f"rank {rank} has {theirs['versions']}, rank 0 has {first['versions']}: install the same versions for "
                "all ranks"
            )
        for name, noun, options in (
            ("recipe", "another recipe", "--recipe and --set"),
            ("data", "other data", "--data"),
        ):
            if name in other:
                raise UserError(
                    f"rank {rank} has {noun} than rank 0 ({shown(differences(first[name], theirs[name]))}): "
                    f"give all ranks the same {options}"
                )
        if "vocabulary" in other:
            raise UserError(f"rank {rank} has another vocabulary than rank 0: give all ranks the same --tokenizer file")
        if other:
            raise UserError(
                f"rank {rank} starts at {theirs['seen']:,} samples and rank 0 at {first['seen']:,}"
                f"{'' if 'seen' in other else ', with other weights'}: --out ({folder} here) and --init must be "
                "the same folders on all ranks, on a disk that they share, or copies of rank 0's"
            )


def weights_digest(tensors: Mapping[str, torch.Tensor] | None) -> str:
    """A hash of weights by their names, shapes, and the bytes at their beginnings and ends."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted((tensors or {}).items()):
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(flat[:HASHED_BYTES].tobytes() + flat[-HASHED_BYTES:].tobytes())
    return digest.hexdigest()
