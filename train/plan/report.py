"""A plan put together, as JSON values and as text: cost by stage, accuracy after each, and every assumption."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.formatting import counted, duration, print_table, share, short, short_flops, size_text
from clipkit.train.plan import step as model_of_step
from clipkit.train.plan.accuracy import Prediction
from clipkit.train.plan.cost import (
    COMPACT_BYTES,
    Fleet,
    Pairs,
    StageCost,
    advice,
    checkpoint_bytes,
    found_by_training,
    teachers_cost,
)
from clipkit.train.plan.step import Calibration
from clipkit.train.recipes import Recipe


@dataclass(frozen=True)
class Plan:
    """What a run is going to cost and to score."""

    recipe: Recipe
    fleet: Fleet
    pairs: Pairs
    calibration: Calibration
    calibrated_on: str
    stages: tuple[StageCost, ...]
    accuracies: tuple[Prediction, ...]
    """After each stage."""
    dataset: str
    """The published data set that the accuracy takes the data for; empty where it isn't known."""

    @property
    def hours(self) -> float:
        """Wall clock of all stages."""
        return sum(stage.hours for stage in self.stages)

    @property
    def money(self) -> float:
        """Of all devices."""
        return self.hours * self.fleet.number * self.fleet.price

    @property
    def teachers(self) -> tuple[float, float] | None:
        """Bytes and seconds of `clipkit reinforce` before the run, where the recipe learns from teachers."""
        if not self.recipe.has_teachers:
            return None
        return teachers_cost(self.recipe, self.fleet, self.pairs, self.calibration)

    @property
    def captions(self) -> dict[str, float]:
        """How often the captions of each source are drawn, where the recipe says."""
        total = sum(self.recipe.captions.values())
        return {source: weight / total for source, weight in self.recipe.captions.items() if weight} if total else {}

    def to_json(self) -> dict[str, Any]:
        """As JSON values; the stages have the keys of the whole."""
        seconds, count = self.hours * 3600, self.fleet.number
        towers = sum(stage.operations.image + stage.operations.text for stage in self.stages)
        return {
            "recipe": self.recipe.name,
            "devices": f"{count}x{self.fleet.chip.name}",
            "hours": self.hours,
            "device_hours": self.hours * count,
            "money": self.money,
            "samples_per_s": self.recipe.samples / seconds,
            "mfu": towers / seconds / (count * self.fleet.chip.tflops * 1e12),
            "accuracy": self.accuracies[-1].to_json(),
            "stages": [
                self.stage_json(stage, found) for stage, found in zip(self.stages, self.accuracies, strict=True)
            ],
            "data": {
                "where": self.pairs.where,
                "pairs": self.pairs.total,
                "bytes_per_pair": self.pairs.bytes_each,
                "disk_bytes": self.pairs.total and self.pairs.total * self.pairs.bytes_each,
                "compact_bytes": self.pairs.total and self.pairs.total * COMPACT_BYTES,
                "network_mbit_per_s": max(stage.data_mb_per_s for stage in self.stages) * 8,
            },
            "checkpoint_bytes": checkpoint_bytes(self.recipe, self.stages),
            "teachers": self.teachers and dict(zip(("disk_bytes", "seconds"), self.teachers, strict=True)),
            "captions": self.captions,
            "changes": advice(self.recipe, self.stages),
            "assumptions": self.assumptions(),
        }

    def stage_json(self, stage: StageCost, accuracy: Prediction) -> dict[str, Any]:
        """One stage as JSON values."""
        return {
            "stage": stage.name,
            "samples": stage.samples,
            "batch_size": stage.step.batch,
            "image_tokens": stage.step.towers[0].tokens,
            "text_tokens": stage.step.towers[1].tokens,
            "hours": stage.hours,
            "device_hours": stage.hours * self.fleet.number,
            "money": stage.hours * self.fleet.number * self.fleet.price,
            "samples_per_s": stage.samples_per_s,
            "mfu": stage.mfu,
            "accuracy": accuracy.to_json(),
            "flops": {name: value for name, value in stage.operations._asdict().items() if name != "collectives"},
            "seconds": stage.seconds._asdict(),
            "micro_batch": stage.micro_batch,
            "data_mb_per_s": stage.data_mb_per_s,
            "images_per_s": stage.samples_per_s,
            "cores": stage.cores,
            "workers_per_device": -(-stage.cores // self.fleet.number),
            "limit": stage.limit(),
        }

    def assumptions(self) -> list[str]:
        """Everything that was taken for granted."""
        chip, calibration = self.fleet.chip, self.calibration
        data = (
            f"data like {self.dataset}" if self.dataset else "data of middling quality (name its like with --dataset)"
        )
        return [
            f"{chip.name}: {chip.tflops:g} TFLOP/s dense bfloat16, {chip.float32_tflops:g} in float32, "
            f"{chip.memory_gb:.0f} GB, "
            f"{chip.bandwidth_gb:g} GB/s, {chip.link_gb:g} GB/s to its neighbours ({chip.source})",
            f"{self.fleet.price:.2f} an hour for each device (yours: --price)",
            f"calibration of {self.calibrated_on}: large products reach {calibration.matrix:.0%} of the peak, "
            f"other work {calibration.memory:.0%} of the memory's bandwidth, and {calibration.overhead:.0%} on top",
            f"hosts of {model_of_step.HOST} devices; beyond one, {model_of_step.NETWORK_GB:g} GB/s for each host; "
            "nothing is sent while something is computed",
            f"the loss in float32; {model_of_step.WEIGHT_BYTES} bytes held of each trained weight; "
            f"{model_of_step.RESERVED:.0%} of the memory kept free",
            *found_by_training(self.recipe, self.stages),
            *self.frozen_towers(),
            *self.teachers_left_out(),
            f"data: {self.pairs.where}, {size_text(self.pairs.bytes_each)} a pair",
            f"accuracy: {data}; ImageNet-1K zero-shot with the usual prompts, an 80% interval",
        ]

    def teachers_left_out(self) -> list[str]:
        """A line on teachers that nobody has priced."""
        if self.teachers or not self.recipe.has_teachers:
            return []
        return ["clipkit reinforce before the run isn't priced, as the number of pairs isn't known (--data, --dataset)"]

    def frozen_towers(self) -> list[str]:
        """A line on towers that are frozen, where the recipe has some."""
        model = self.recipe.model
        frozen = [name for name, tower in (("image", model.image), ("text", model.text)) if tower.frozen is True]
        if not frozen:
            return []
        towers = f"the frozen {' and '.join(frozen)} tower{'s run' if len(frozen) > 1 else ' runs'}"
        return [f"{towers} on every sample; from a file of clipkit embed's, what is stored there is not computed"]


def print_plan(plan: Plan) -> None:
    """The plan for people."""
    fleet, accuracy = plan.fleet, plan.accuracies[-1]
    print(
        f"{plan.recipe.name} on {fleet.number} × {fleet.chip.name}: {duration(plan.hours * 3600)}, "
        f"{plan.hours * fleet.number:,.0f} device-hours, {plan.money:,.0f} at {fleet.price:.2f} an hour; "
        f"ImageNet zero-shot {accuracy_text(accuracy)}",
    )
    rows, needs = [], []
    for stage, found in zip(plan.stages, plan.accuracies, strict=True):
        image, text = stage.step.towers
        money = stage.hours * fleet.number * fleet.price
        rate = f"{stage.samples_per_s:,.0f}"
        rows.append(
            (stage.name, short(stage.samples), f"{image.tokens}+{text.tokens}", f"{stage.micro_batch:,}", rate,
             share(stage.mfu), duration(stage.hours * 3600), f"{money:,.0f}")
        )  # fmt: skip
        needs.append((stage.name, f"{stage.data_mb_per_s:,.0f}", rate, str(stage.cores), accuracy_text(found)))
    print_table(("stage", "samples", "tokens", "micro-batch", "samples/s", "MFU", "time", "money"), rows)
    print()
    print_table(("stage", "MB/s to read", "images/s", "loader cores", "ImageNet after it"), needs)
    print("\nFLOPs and share of the time by part")
    parts = ("image", "text", "loss", "optimizer", "again", "sending")
    print_table(("stage", *parts), [(stage.name, *part_texts(stage)) for stage in plan.stages])
    print()
    for stage in plan.stages:
        print(f"stage {stage.name}: limited by {stage.limit()}")
    kept = size_text(checkpoint_bytes(plan.recipe, plan.stages))
    if plan.pairs.total:
        disk = size_text(plan.pairs.total * plan.pairs.bytes_each)
        compact = size_text(plan.pairs.total * COMPACT_BYTES)
        data = f"{disk} of data ({short(plan.pairs.total)} pairs; as a compact copy {compact})"
    else:
        data = "data of unknown size (--data)"
    network = max(stage.data_mb_per_s for stage in plan.stages) * 8 / 1000
    print(
        f"disk: {data}, {kept} of checkpoints; {network:.2g} Gbit/s if the data come from a store",
    )
    if plan.captions:
        drawn = ", ".join(f"{share(value)} {source}" for source, value in plan.captions.items())
        print(f"captions: {drawn}, of records that have all of them")
    if plan.teachers:
        size, seconds = plan.teachers
        print(
            f"teachers: clipkit reinforce of 10 views by two ViT-L/14 takes {duration(seconds)} and {size_text(size)}",
        )
    sections = (("change", advice(plan.recipe, plan.stages)), ("note", accuracy.notes), ("assumed", plan.assumptions()))
    for name, lines in sections:
        for line in lines:
            print(f"{name}: {line}")


def part_texts(stage: StageCost) -> list[str]:
    """Operations and share of the time of each part."""
    whole = sum(stage.seconds)
    pairs = zip(stage.operations, stage.seconds, strict=True)
    return [
        f"{short_flops(flops)} {seconds / whole:.0%}" if flops else f"{seconds / whole:.0%}" for flops, seconds in pairs
    ]


def accuracy_text(found: Prediction) -> str:
    """A prediction in a few words."""
    if found.value is None or found.low is None or found.high is None:
        return "not known"
    return f"{found.value:.1%} ({found.low:.1%}–{found.high:.1%})"


def differences(plan: Plan, measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each stage that a run has metrics of, what was planned and what it took."""
    rows = []
    for stage in plan.stages:
        lines = [line for line in measured if line.get("stage") == stage.name and line.get("samples_per_s")]
        if not lines:
            continue
        rates = sorted(float(line["samples_per_s"]) for line in lines)
        rate = rates[len(rates) // 2]
        memory = [float(line["peak_memory"]) for line in lines if line.get("peak_memory")]
        rows.append(
            {
                "stage": stage.name,
                "planned_samples_per_s": stage.samples_per_s,
                "samples_per_s": rate,
                "ratio": rate / stage.samples_per_s,
                "planned_hours": stage.hours,
                "hours": stage.samples / rate / 3600,
                "peak_memory_bytes": max(memory) if memory else None,
                "log_lines": counted(len(lines), "line"),
            }
        )
    return rows


def print_columns(values: Mapping[str, Any]) -> None:
    """The plan of a run's columns for people."""
    found = Prediction(**values["accuracy"])
    print(f"ImageNet zero-shot {accuracy_text(found)} (80% interval)")
    if values["hours"] is not None:
        print(
            f"on {values['devices']}: {duration(values['hours'] * 3600)}, {values['device_hours']:,.0f} device-hours, "
            f"{values['money']:,.0f}, {values['samples_per_s']:,.0f} samples/s, MFU {share(values['mfu'])}",
        )
    for line in (*found.notes, *values["assumptions"]):
        print(f"note: {line}")


def print_difference(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """What was planned beside what the run took."""
    print(f"{plan.recipe.name} on {plan.fleet.number} × {plan.fleet.chip.name}: planned, and as logged")
    columns = ("stage", "planned samples/s", "samples/s", "ratio", "planned time", "time", "peak memory")
    cells = [
        (row["stage"], f"{row['planned_samples_per_s']:,.0f}", f"{row['samples_per_s']:,.0f}", f"{row['ratio']:.2f}",
         duration(row["planned_hours"] * 3600), duration(row["hours"] * 3600),
         size_text(row["peak_memory_bytes"]) if row["peak_memory_bytes"] else "")
        for row in rows
    ]  # fmt: skip
    print_table(columns, cells)
