"""Stored embeddings held to a recipe and its data, before a run."""

from dataclasses import replace
from pathlib import Path

from clipkit.config import differences, to_json
from clipkit.errors import UserError
from clipkit.formats.manifest import reinforced_folder
from clipkit.model.distill import TeacherSpace
from clipkit.train.recipes import Recipe
from clipkit.train.sources.open import Data
from clipkit.train.teachers.stored import Stored, read_stored


def attach_teachers(data: Data, recipe: Recipe, folder: Path | None) -> Data:
    """The data with the teachers' embeddings that the recipe learns from, where it does: those in `folder`, or beside
    the dataset. Raises UserError where they are missing, or were made of other data or by another augmentation.
    """
    if not recipe.has_teachers:
        if folder is not None:
            raise UserError(
                f"--reinforced {folder} is for recipes that distill: set distill.weight above 0, or omit it"
            )
        return data
    if recipe.distill.weight and recipe.loss != "info_nce":
        raise UserError(f"distill.weight goes with loss=info_nce, not with {recipe.loss}: set it to 0")
    asked, off = ("distill.weight", "0") if recipe.distill.weight else ("global_contrastive.reference", "false")
    if len(data.parts) != 1:
        raise UserError(f"{asked} is for one --data, not for a mixture: set it to {off}")
    if data.source().feature_width:
        raise UserError(f"{asked} is for images, not for stored vectors of an image tower: set it to {off}")
    (part,) = data.parts
    folder = folder or reinforced_folder(part.path)
    stored = Stored(folder, read_stored(folder))
    stored.check_data(part.identity)
    for stage in recipe.stages:
        other = differences(to_json(stored.manifest.augmentation), to_json(stage.augmentation))
        if other:
            raise UserError(
                f"{folder} has views of another augmentation than stage {stage.name}'s ({other[0]}): "
                "run clipkit reinforce with this --recipe, into another folder"
            )
    return replace(data, stored=stored)


def teacher_spaces(data: Data, recipe: Recipe) -> list[TeacherSpace]:
    """The teachers behind a batch's embeddings; [] where there are none."""
    found = data.stored.manifest.teachers if data.stored else ()
    return [TeacherSpace(teacher.width, recipe.distill.scale or teacher.scale) for teacher in found]
