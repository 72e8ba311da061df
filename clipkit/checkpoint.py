"""Checkpoints: folders with weights, optimizer state, the position in the data, and a description of the model.

    000000128000/
      model.safetensors       weights, float32
      ema.safetensors         averages of the weights, where the recipe has an ema_decay
      normalisers.safetensors what the global contrastive loss keeps of each record, where that is the recipe's
      optimizer.safetensors   absent in a checkpoint that is only to be evaluated
      optimizer/              in its place where the weights were sharded: a file of each rank's part
      state.json              samples seen, stage, seconds of training so far
      config.json             architecture, tokenizer, preprocessing, recipe
      vocabulary              the tokenizer's file, where it has one

It is written beside and renamed, so a folder with a checkpoint's name is a whole checkpoint. No pickle is involved.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clipkit.config import from_json, to_json
from clipkit.errors import UserError, one_line
from clipkit.model.config import TokenizerName
from clipkit.storage.files import disk_errors, read_json, remove, require_dir, require_file, write_beside, write_json

if TYPE_CHECKING:
    from clipkit.jobs.ranks import Ranks
    from clipkit.model.clip import CLIP
    from clipkit.model.config import ModelConfig
    from clipkit.pixels.images import Preprocess
    from clipkit.text.tokenizer import WordTokenizer

FORMAT = 1
VOCABULARY = "vocabulary"
SHARDS = "optimizer"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds; tensors are on the CPU."""

    path: Path
    config: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    """{} where each rank wrote its part: `restore_optimizer` reads what it needs."""
    ema: dict[str, torch.Tensor]
    """The averages of the weights, read with the optimizer where the run keeps them; else {}."""
    normalisers: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the global contrastive loss keeps of each record, read with the optimizer; else {}."""

    @property
    def samples_seen(self) -> int:
        """How many samples the weights have been trained on, all stages together."""
        return int(self.state["samples_seen"])

    @property
    def model_config(self) -> "ModelConfig":
        """The architecture."""
        from clipkit.model.config import ModelConfig

        return from_json(ModelConfig, self.config["model"], f"{self.path}/config.json: model")

    @property
    def preprocess(self) -> "Preprocess":
        """How an image becomes pixels at evaluation."""
        from clipkit.pixels.images import Preprocess

        return from_json(Preprocess, self.config["preprocess"], f"{self.path}/config.json: preprocess")


def describe(
    model: "ModelConfig", preprocess: "Preprocess", recipe: Any, vocabulary: str | None = None
) -> dict[str, Any]:
    """The `config.json` of a checkpoint. `vocabulary` is the hash of the tokenizer's file, where it has one."""
    from clipkit import __version__

    return {
        "format": FORMAT,
        "clipkit": __version__,
        "model": to_json(model),
        "preprocess": to_json(preprocess),
        "tokenizer": model.text.tokenizer,
        "vocabulary": vocabulary,
        "recipe": to_json(recipe),
    }


def save(
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    optimizer: Mapping[str, torch.Tensor] | None = None,
    shards: Callable[[Path], int] | None = None,
    ema: Mapping[str, torch.Tensor] | None = None,
    normalisers: Mapping[str, torch.Tensor] | None = None,
    vocabulary: bytes | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all; one that is there already is kept and returned. `shards` writes
    the optimizer's state of all ranks into a folder, and returns the number of its files.
    """
    if folder.exists():
        return folder
    with write_beside(folder) as temporary:
        remove(temporary)
        temporary.mkdir()
        files = {"model": tensors, "optimizer": optimizer, "ema": ema, "normalisers": normalisers}
        for name, values in files.items():
            if values is not None:
                write_tensors(temporary / f"{name}.safetensors", values)
        if shards is not None:
            state = {**state, "optimizer_shards": shards(temporary / SHARDS)}
        if vocabulary is not None:
            (temporary / VOCABULARY).write_bytes(vocabulary)
        write_json(temporary / "config.json", config)
        write_json(temporary / "state.json", state)
    return folder


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file. Raises OSError as other writes do: safetensors has its number only in words."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error


def load(path: Path, *, with_optimizer: bool = False, ema: bool = False) -> Checkpoint:
    """Read a checkpoint folder, or the newest one of a run's folder; `ema` takes the averages in the weights' place.

    Raises UserError when there is none, or when a file in it is missing or damaged.
    """
    folder = find(path)
    config, state = read_json(folder / "config.json"), read_json(folder / "state.json")
    if config.get("format", 0) > FORMAT:
        raise UserError(f"checkpoint {folder} has format {config['format']}, newer than this clipkit: update clipkit")
    if config.get("tokenizer") not in get_args(TokenizerName):
        raise UserError(f"checkpoint {folder} needs the tokenizer {config.get('tokenizer')!r}: update clipkit")
    kept = kept_beside(config)
    if ema and "ema" not in kept:
        raise UserError(f"checkpoint {folder} has no averages of its weights (its recipe has no ema_decay): omit --ema")
    weights = read_tensors(folder / ("ema.safetensors" if ema else "model.safetensors"))
    is_whole = with_optimizer and not shard_files(folder, state)
    optimizer = read_tensors(folder / "optimizer.safetensors") if is_whole else {}
    beside = {name: read_tensors(folder / f"{name}.safetensors") for name in kept if with_optimizer}
    return Checkpoint(folder, config, state, weights, optimizer, beside.get("ema", {}), beside.get("normalisers", {}))


def kept_beside(config: Mapping[str, Any]) -> list[str]:
    """What a checkpoint with this `config.json` has beside its weights: their averages (`ema`), the global contrastive
    loss's `normalisers`.
    """
    recipe = config.get("recipe")
    settings = recipe if isinstance(recipe, dict) else {}
    averages = ["ema"] if settings.get("ema_decay") is not None else []
    return [*averages, "normalisers"] if settings.get("loss") == "global_contrastive" else averages


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises UserError when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"checkpoint file {path} doesn't exist: take another checkpoint of the run")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint file {path} is damaged ({error}): take another checkpoint of the run") from error


def set_damaged_aside(run: Path) -> list[str]:
    """Rename the newest checkpoints of a run to `damaged-…` until one is whole; a line for each, to be told.

    Only what is asked of a file's head is looked at: whether it is there, and as long as it says.
    Raises UserError when none of the run's checkpoints is whole.
    """
    notes: list[str] = []
    for folder in reversed(checkpoints(run)):
        problem = damage(folder)
        if problem is None:
            return notes
        aside = folder.with_name(f"damaged-{folder.name}")
        notes.append(f"{problem}: going on from the checkpoint before it; the damaged one is now {aside}")
        remove(aside)
        folder.rename(aside)
    if notes:
        raise UserError(
            f"{run}: no checkpoint is whole ({notes[-1].partition(': going on')[0]}): remove its checkpoints/"
        )
    return notes


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint that a run is to go on from, None where nothing is."""
    try:
        config, state = (read_json(folder / name) for name in ("config.json", "state.json"))
        for name, values, key in (("config.json", config, "recipe"), ("state.json", state, "samples_seen")):
            if not isinstance(values, dict) or key not in values:
                raise UserError(f"{folder / name} has no {key}")
        names = [f"{name}.safetensors" for name in ("model", *kept_beside(config))]
        if config.get("vocabulary"):
            require_file(folder / VOCABULARY, "checkpoint file")
        optimizer = shard_files(folder, state) or [folder / "optimizer.safetensors"]
        for path in (*(folder / name for name in names), *optimizer):
            with safe_open(require_file(path, "checkpoint file"), "pt"):
                pass  # it compares the length with the header's
    except (UserError, SafetensorError, OSError) as error:
        return f"checkpoint {folder} is damaged ({one_line(error)})"
    return None


def find(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run. Raises UserError when there is none."""
    require_dir(path, "checkpoint")
    if not (path / "state.json").exists() and (path / "config.json").is_file():
        described = read_json(path / "config.json")
        if isinstance(described, dict) and "model_type" in described:
            raise UserError(
                f"{path} is a model of transformers': zeroshot, embed and reinforce take it, but "
                "here a checkpoint or a run of clipkit's is wanted"
            )
    if (path / "model.safetensors").exists() or (path / "state.json").exists():
        return path
    newest = latest(path)
    if newest is None:
        raise UserError(f"no checkpoint in {path}: give a run's folder or one of its checkpoints/ folders")
    return newest


def latest(run: Path) -> Path | None:
    """The checkpoint with the most samples seen in a run's folder, or None."""
    return next(reversed(checkpoints(run)), None)


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, in order of samples seen."""
    return sorted(path for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def folder_of(run: Path, samples_seen: int) -> Path:
    """Where a run keeps the checkpoint of `samples_seen`."""
    return run / "checkpoints" / f"{samples_seen:012d}"


def prune(run: Path, keep: int, always: frozenset[int] = frozenset(), every: int | None = None) -> None:
    """Remove all but the newest `keep` (at least 1) checkpoints. Those at `always` (the ends of stages, the best) stay
    too, and the first at or after each multiple of `every` samples.
    """
    found = checkpoints(run)
    multiples = {int(path.name) // every: path for path in reversed(found)} if every else {}
    for path in found[: -max(1, keep)]:
        seen = int(path.name)
        if seen not in always and (not every or seen < every or multiples[seen // every] != path):
            remove(path)


def tokenizer_of(folder: Path) -> "WordTokenizer":
    """The tokenizer that a checkpoint was trained with. Raises UserError when its file is missing or was changed."""
    from clipkit.text.tokenizer import Tokenizer

    config = read_json(folder / "config.json")
    if config["tokenizer"] == Tokenizer.name:
        return Tokenizer()
    from clipkit.text.vocabulary import open_tokenizer, vocabulary_hash

    path = require_file(folder / VOCABULARY, "checkpoint file")
    tokenizer = open_tokenizer(config["tokenizer"], path)
    if vocabulary_hash(tokenizer) != config["vocabulary"]:
        raise UserError(f"{path} isn't the vocabulary that the model was trained with: copy the checkpoint again")
    return tokenizer


def build_model(checkpoint: Checkpoint) -> "CLIP":
    """The checkpoint's model with its weights, in evaluation mode on the CPU.

    Raises UserError that names the first tensor which doesn't fit the architecture in `config.json`.
    """
    from clipkit.model.clip import build, load_state

    model = build(checkpoint.model_config)
    load_state(model, checkpoint.tensors)
    return model.eval()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each rank has a part (FSDP2's), gathered by all ranks together; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def part_of(whole_tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, laid out as `like` is; the inverse of `whole`."""
    if not hasattr(like, "full_tensor") or whole_tensor.shape != like.shape:
        return whole_tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole_tensor, like.device_mesh, like.placements, src_data_rank=None)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: `exp_avg/text.pos_embed` and so on, where and as they are."""
    return {
        f"{slot}/{name}": value.detach()
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], where: Path
) -> None:
    """The inverse of `optimizer_tensors`. Raises UserError when a trained parameter has no state in `tensors`."""
    slots_of: dict[str, dict[str, torch.Tensor]] = {}
    if (where / SHARDS).is_dir():
        tensors = read_shards(where / SHARDS, dict(model.named_parameters()))
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        slots_of.setdefault(name, {})[slot] = value
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in slots_of:
            raise UserError(f"{where}: no optimizer state for {name}; resume from a checkpoint of the same recipe")
        # A step counter that the optimizer keeps on the CPU stays there; the fused and capturable ones want the device.
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        optimizer.state[parameter] = {
            slot: part_of(value.to(parameter.device if on_device or slot != "step" else "cpu", copy=True), parameter)
            if not hasattr(value, "full_tensor")
            else value  # this rank's part
            for slot, value in slots_of[name].items()
        }


# ---- What each rank writes of the optimizer's state ------------------------------------------------------------------
# The weights are gathered, since all that reads a checkpoint wants them whole. The state is twice as large, and only a
# run that goes on wants it, each rank its own part.


def write_shards(folder: Path | None, tensors: Mapping[str, torch.Tensor], ranks: "Ranks") -> int:
    """Write this rank's part of the tensors into `folder`, which the first rank names; returns the number of files.

    All ranks call this together, and what goes wrong on one is raised on all.
    """
    import torch.distributed.checkpoint as dcp

    place, *_ = ranks.gather(folder)
    writer = dcp.HuggingFaceStorageWriter(str(place), save_distributed=True)  # safetensors: no pickle is written
    # All is on the host already; else each rank's thread would take memory of the first GPU for streams to copy on.
    writer.per_thread_copy_ahead = 0
    with disk_errors(place.parents[1]):
        try:
            dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.control)
        except dcp.CheckpointException as error:
            (reason, _), *_ = error.failures.values()
            raise reason from error
    (files,) = ranks.total(len(list(place.glob(f"shard-{ranks.rank + 1:05d}-*"))))
    return files


def read_shards(folder: Path, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that any number of ranks wrote: this rank's part, laid out as the parameter that a tensor belongs to,
    where that is sharded; else whole and on the CPU.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader, found = dcp.HuggingFaceStorageReader(str(folder)), {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)  # safetensors hold nothing else
        parameter, dtype = parameters.get(key.partition("/")[2]), stored.properties.dtype
        if parameter is not None and hasattr(parameter, "full_tensor") and parameter.shape == stored.size:
            found[key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            found[key] = torch.empty(stored.size, dtype=dtype)
    with warnings.catch_warnings():
        # That no rank waits for another is what is wanted here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def shard_files(folder: Path, state: Mapping[str, Any]) -> list[Path]:
    """The files of what each rank wrote of the optimizer's state in a checkpoint with this `state.json`, if they did.

    Raises UserError when some are missing.
    """
    expected, found = int(state.get("optimizer_shards", 0)), sorted((folder / SHARDS).glob("*.safetensors"))
    if len(found) != expected:
        raise UserError(
            f"checkpoint {folder} has {len(found)} of {expected} files of the optimizer's state: take another "
            "checkpoint of the run"
        )
    return found
