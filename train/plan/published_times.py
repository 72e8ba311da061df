"""The times that the calibration is held to: CLIPA's three runs on eight A100s, and CLIPA-v2's table of A100-hours."""

from dataclasses import replace
from typing import NamedTuple

from clipkit.hardware import CHIPS
from clipkit.model.config import vit_bigg14_clipa
from clipkit.train.catalogue import clipa_v2, find_recipe
from clipkit.train.plan.cost import PAIR_BYTES, Fleet, Pairs, recipe_plan
from clipkit.train.plan.step import Calibration
from clipkit.train.recipes import Recipe


class PublishedTime(NamedTuple):
    """A published run, its device-hours, and those of the plan on eight A100-80GB."""

    name: str
    published: float
    planned: float

    @property
    def ratio(self) -> float:
        """Planned to published."""
        return self.planned / self.published


def published_recipes() -> list[tuple[str, Recipe, float]]:
    """The eleven runs with their A100-hours (Li, Wang & Xie, 2023, and the tables of CLIPA's repository)."""
    large, huge, laion = (find_recipe(f"clipa-{name}") for name in ("l14-datacomp", "h14-datacomp", "h14-laion2b"))
    giant = clipa_v2("clipa-bigg14-datacomp", vit_bigg14_clipa())
    smaller = replace(huge, stages=(replace(huge.stages[0], image_size=70), *huge.stages[1:]))
    rows = [
        ("B/16, 112 px, LAION-400M", find_recipe("clipa-b16-i50-t16"), 2, 384.0),
        ("L/16, 64 px, LAION-400M", find_recipe("clipa-l16-i17-t16"), 2, 576.0),
        ("L/16, 96 px, LAION-400M", find_recipe("clipa-l16-i37-t8"), 2, 768.0),
        ("H/14, 84 + 224 + 336 px, LAION-2B", laion, 3, 8640.0),
        ("L/14, 84 + 224 px", large, 2, 4008.0),
        ("L/14, 84 + 224 + 336 px", large, 3, 4520.0),
        ("H/14, 70 + 224 px", smaller, 2, 5920.0),
        ("H/14, 84 + 224 px", huge, 2, 7776.0),
        ("H/14, 84 + 224 + 336 px", huge, 3, 8640.0),
        ("bigG/14, 84 + 224 px", giant, 2, 21998.0),
        ("bigG/14, 84 + 224 + 336 px", giant, 3, 23742.0),
    ]
    # CLIPA's code computes all activations again.
    return [
        (name, replace(recipe, stages=recipe.stages[:count], checkpoint_activations=True), hours)
        for name, recipe, count, hours in rows
    ]


def published_times(calibration: Calibration) -> list[PublishedTime]:
    """Each of them as `calibration` plans it."""
    chip = next(chip for chip in CHIPS if chip.name == "A100-80GB")
    fleet, pairs = Fleet(8, chip, chip.price), Pairs(None, PAIR_BYTES, "")
    return [
        PublishedTime(name, hours, 8 * sum(stage.hours for stage in recipe_plan(recipe, fleet, pairs, calibration)))
        for name, recipe, hours in published_recipes()
    ]
