"""The training loop, from a recipe and a dataset to a run's folder.

It reads from top to bottom: check, find where to start, then for each stage build the model at the stage's sizes and
take steps until its samples are seen. All that a resumed run needs is in the newest checkpoint: weights, optimizer
state, samples seen. The order of the data and every random choice follow from (seed, samples seen), so a run that was
killed ends with the weights of the unbroken one.
"""

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from clipkit import checkpoint
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.eval.evaluation import EvaluationTask
from clipkit.formatting import share
from clipkit.log import Writer, warn_on_stderr
from clipkit.model.clip import CLIP, build, load_state
from clipkit.storage.files import clear_leftovers, lock, write_json
from clipkit.text.vocabulary import open_tokenizer
from clipkit.train.checks import (
    captions_left_out,
    check_features,
    check_recipe,
    check_tokenizer,
    loader_config,
    preprocess_at,
    stage_cost,
    take_texts,
    takes_precomputed,
)
from clipkit.train.fit.setup import set_up
from clipkit.train.fit.stages import fit_stages
from clipkit.train.loader.loader import Batch, batches
from clipkit.train.optimizer import copy_for_average, keep_average, learning_rate_at, make_optimizer
from clipkit.train.recipes import Recipe, Stage, model_at
from clipkit.train.run import (
    Run,
    Summary,
    describe_run,
    evaluate_at_start,
    evaluate_now,
    expect_checkpoints,
    is_checkpoint_due,
    is_due,
    is_evaluation_missing,
    on_cpu,
    open_normalisers,
    progress_line,
    save,
)
from clipkit.train.saving import CheckpointWriter
from clipkit.train.sources.open import CACHE_GB, open_source
from clipkit.train.start import Start, find_start, refuse_different_starts
from clipkit.train.step import train_step
from clipkit.train.stopping import Stop, stop_on_signal, stop_with_launcher, until_stopped
from clipkit.train.teachers.attach import attach_teachers, teacher_spaces
from clipkit.train.watch.captions import FirstCaptions
from clipkit.train.watch.diagnosis import (
    RollBackError,
    StuckLoss,
    Window,
    check_steps,
    is_skipped,
    log_roll_back,
    meet_stuck_loss,
)
from clipkit.train.watch.metrics import model_metrics
from clipkit.train.watch.static_shapes import StaticShapes
from clipkit.train.watch.stopwatch import Stopwatch
from clipkit.train.watch.trackers import Tracker, open_writers


def train(
    recipe: Recipe,
    data: str | Path | Sequence[str | Path],
    folder: Path,
    *,
    device_name: str = "auto",
    resume: bool = False,
    init: Path | None = None,
    from_stage: str | None = None,
    allow_changes: bool = False,
    branch: bool = False,
    workers: int | None = None,
    task: EvaluationTask | None = None,
    cache: Path | None = None,
    cache_gb: float = CACHE_GB,
    split: str = "train",
    log_to: Sequence[Tracker] = (),
    vocabulary: Path | None = None,
    reinforced: Path | None = None,
) -> Summary:
    """Train `recipe` on `data`, into the run's folder. `data`, `split`, `cache` and `cache_gb` are as in `open_source`.

    `resume` goes on from the newest checkpoint in `folder`, where there is one; `allow_changes` lets the recipe's later
    stages differ then. `init` takes the weights of another checkpoint to begin with, at the start of the stage
    `from_stage`; with `branch` it gives the rest of its state too, and the run goes on from there. `task` is evaluated
    at the recipe's cadence and at the end of each stage; where that fails, the run says so and goes on. The metrics
    also go where `log_to` says. `vocabulary` is the file of the model's tokenizer, as in `open_tokenizer`;
    `reinforced` is the folder of the teachers' embeddings, where it isn't the usual one. The signals of `stopping` save
    a checkpoint and return. Raises UserError for whatever stands in the way before the first step, and when the loss
    goes wrong (`watch.diagnosis`).
    """
    stop_with_launcher()
    # ---- Check what can be checked before any work ------------------------------------------------------------------
    found = open_source(data, cache=cache, cache_gb=cache_gb, block_size=recipe.block_size, split=split)
    found = take_texts(attach_teachers(found, recipe, reinforced), recipe)
    device = pick(device_name)
    for note in (*found.notes, *captions_left_out(recipe, found.source())) if device.is_first else ():
        print(note, file=sys.stderr)
    check_recipe(recipe, found.source(), device)
    tokenizer = open_tokenizer(recipe.model.text.tokenizer, vocabulary)
    check_tokenizer(recipe, tokenizer)
    if recipe.cadence.keep_best is not None and task is None:
        raise UserError("cadence.keep_best is by the evaluations in training: add --eval-data, or set it to none")

    with contextlib.ExitStack() as stack:
        if device.is_first:
            stack.enter_context(lock(folder))
            clear_leftovers(folder / "checkpoints")
            for line in checkpoint.set_damaged_aside(folder) if resume else ():
                print(line, file=sys.stderr)
        # After an error the other ranks may wait in a collective: leaving in good order would wait with them.
        stack.push(lambda kind, *_: device.close() if kind is None else None)

        # ---- Where to start: the run's checkpoint, another checkpoint's weights, scratch --------------------------
        device.barrier()
        begin = partial(find_start, folder, recipe, found, tokenizer, init=init, from_stage=from_stage, branch=branch)
        start = begin(resume=resume, allow_changes=allow_changes)
        check_features(recipe, found, start.tensors)
        refuse_different_starts(start, recipe, found, folder, device)
        fits = fit_stages(recipe, start.samples_seen, device, start.own.state.get("fits", {}) if start.own else {})

        # ---- Open the run's files ----------------------------------------------------------------------------------
        if device.is_first:
            for note in filter(None, (start.note, *(fit.note for fit in fits.values()))):
                print(note, file=sys.stderr)
            for change in start.changes:
                print(f"going on from {start.samples_seen:,} samples with {change}", file=sys.stderr)
            write_json(folder / "config.json", describe_run(folder, recipe, found, device, start, init))
        writer = open_writers(folder, recipe, start, log_to) if device.is_first else Writer()
        stack.callback(writer.close)
        stop = Stop(only_process=device.world == 1)
        captions, saver = FirstCaptions(found.source()), stack.enter_context(CheckpointWriter(device))
        seen = start.samples_seen
        run = Run(recipe, fits, folder, found, tokenizer, device, writer, task, workers, stop, captions, saver, seen)
        stack.enter_context(stop_on_signal(stop))
        if start.own:
            state = start.own.state
            run.seconds, run.bad_samples = float(state["seconds"]), int(state["bad_samples"])
            run.skipped = [(first, last) for first, last in state.get("skipped", ())]
            if run.task and device.on_first(partial(is_evaluation_missing, run, start.own)):
                evaluate_at_start(run, start.own)
            (run.stop.agreed,) = device.agree(stop.asked)

        # ---- The stages, until none has to go back -----------------------------------------------------------------
        loss = None
        while loss is None:
            try:
                loss = run_stages(run, start)
            except RollBackError as error:
                start = begin(resume=True, allow_changes=allow_changes)
                refuse_different_starts(start, recipe, found, folder, device)
                run.samples_seen = start.samples_seen
                run.bad_samples = int(start.own.state["bad_samples"]) if start.own else 0
                if device.is_first:
                    log_roll_back(run, str(error))
    finished = run.samples_seen >= recipe.samples and not run.evaluation_missing
    newest = checkpoint.latest(folder)
    return Summary(
        folder, newest, run.samples_seen, run.seconds, loss, finished, device.is_first, stop.signal, run.bad_samples
    )


def run_stages(run: Run, start: Start) -> float:
    """Take the run from its start to its end, or until a stop is asked for; returns the last loss.

    Each stage begins with the weights of the one before, and a fresh optimizer.
    """
    recipe, device = run.recipe, run.device
    run.normalisers = open_normalisers(run, start)
    loss, stage_start, tensors, averages_before = math.nan, 0, start.tensors, start.own.ema if start.own else {}
    for stage in recipe.stages:
        stage_end = stage_start + stage.samples
        if run.samples_seen < stage_end and not run.stop.agreed:
            model = build(model_at(recipe, stage), seed=recipe.seed)
            if tensors is not None:
                load_state(model, tensors)
            model.freeze()
            average = copy_for_average(model) if recipe.ema_decay is not None else None
            if average and averages_before:
                load_state(average, averages_before)
            for each in (model, average) if average else (model,):
                set_up(each, run.fits[stage.name].apply(recipe), stage, device)
            optimizer = make_optimizer(model, recipe.optimizer, stage.learning_rate, device)
            if start.own and run.samples_seen > stage_start:
                checkpoint.restore_optimizer(model, optimizer, start.own.optimizer, start.own.path)
                device.divide_state(optimizer)
            if average and recipe.ema_decay is not None:
                keep_average(average, model, optimizer, recipe.ema_decay)
            expect_checkpoints(run, stage, model, average, optimizer)
            loss = run_stage(run, stage, stage_start, model, optimizer, average)
            tensors, averages_before = on_cpu(model), on_cpu(average) if average else {}
        stage_start = stage_end
    return loss


def run_stage(
    run: Run, stage: Stage, stage_start: int, model: CLIP, optimizer: torch.optim.Optimizer, average: CLIP | None
) -> float:
    """Take a stage's steps from `run.samples_seen` to its end, or until a stop is asked for; returns the last loss.
    `average` follows the model, and is evaluated and saved with it.
    """
    recipe, device, cadence = run.fits[stage.name].apply(run.recipe), run.device, run.recipe.cadence
    stage_end, wrapped = stage_start + stage.samples, device.wrap(model)
    model.train()
    flops, peak = stage_cost(recipe, stage, run.data.has_images, not run.data.stored_texts).flops, device.peak_flops()
    workers = device.loader_workers() if run.workers is None else run.workers
    loader = batches(
        run.data.source(takes_precomputed(recipe, stage)),
        loader_config(recipe, stage),
        run.samples_seen,
        stage_end,
        rank=device.rank,
        world=device.world,
        workers=workers,
        bad_reasons=run.bad_reasons,
        tokenizer=run.tokenizer,
    )
    teachers, loss, window, stuck = teacher_spaces(run.data, recipe), math.nan, Window(), StuckLoss(recipe, stage)
    run.saved_at = time.monotonic()
    watch, shapes = Stopwatch(), StaticShapes(device)
    start = run.samples_seen - stage_start
    with contextlib.closing(loader), progress_line(run, f"train {stage.name}", stage.samples, start) as progress:
        for batch in watch.time_waiting(until_stopped(run.stop, loader)):
            before, run.samples_seen = run.samples_seen, run.samples_seen + stage.batch_size
            run.captions.take(batch)
            is_end = run.samples_seen >= stage_end

            # ---- One step, but on no data that broke the run ---------------------------------------------------------
            if not is_skipped(run, before):
                learning_rate = learning_rate_at(
                    before - stage_start,
                    stage.batch_size,
                    peak=stage.learning_rate,
                    warmup=stage.warmup_samples,
                    total=stage.samples,
                    schedule=stage.schedule,
                    cooldown=stage.cooldown_samples,
                )
                device.set_learning_rate(optimizer, learning_rate)
                tensors = tensors_of(run, model, batch, before)
                with shapes.step(before):
                    step = train_step(wrapped, optimizer, tensors, recipe, device, teachers)
                if run.normalisers:
                    run.normalisers.keep(tensors)
                window.take(before, learning_rate, step)
            stops, saves, bad = device.total(run.stop.asked, is_checkpoint_due(run, before), batch.bad)
            run.stop.agreed, must_save, run.bad_samples = stops > 0, saves > 0, run.bad_samples + bad

            # ---- Log: the only place where the loop waits for the device ---------------------------------------------
            must_log = is_end or run.stop.agreed or is_due(cadence.log_samples, before, run.samples_seen)
            must_evaluate = is_end or is_due(cadence.evaluate_samples, before, run.samples_seen)
            if must_log or must_save or must_evaluate:
                readings = check_steps(run, stage, model, window)
            if must_log and readings:
                loss = sum(reading.loss for reading in readings) / len(readings)
                run.seconds += (seconds := watch.seconds)
                rate = len(readings) * stage.batch_size / seconds  # skipped samples cost no steps
                metrics = {
                    "loss": loss,
                    "lr": learning_rate,
                    **model_metrics(model, step, tensors["caption_B"], recipe, device),
                    "samples_per_s": rate,
                    "flops_per_s": rate * flops,
                    **({"mfu": rate * flops / peak} if peak else {}),
                    **watch.waiting_shares(device),
                    "bad_samples": run.bad_samples,
                    "seconds": run.seconds,
                    "peak_memory": device.peak_memory(),
                }
                note = describe_captions(run, metrics)
                run.writer.write({"samples_seen": run.samples_seen, "stage": stage.name, **metrics})
                tagged = takes_precomputed(recipe, stage)
                waits = watch.note(metrics["data_wait_max"], workers, device.loader_workers(), tagged)
                progress.update(run.samples_seen - stage_start, f"loss {loss:.3f} · {waits}{note}")
                if stuck.look(loss, len(readings), run.samples_seen - stage_start):
                    meet_stuck_loss(run, stage, model, window, readings, stuck)
                window.restart(readings)
                watch.restart()

            # ---- Save, then evaluate: nothing that happens in an evaluation costs what was learned -------------------
            with watch.paused():
                if is_end or must_save or (run.task and must_evaluate):
                    save(run, stage, model, average, optimizer)
                if must_evaluate:
                    evaluate_now(run, stage.name, model, preprocess_at(recipe, stage), average)
                if is_end or must_save or must_evaluate:
                    (run.stop.agreed,) = device.agree(run.stop.asked)
            if run.stop.agreed:
                break
    if run.stop.agreed and run.samples_seen > stage_start + start:
        check_steps(run, stage, model, window)
        save(run, stage, model, average, optimizer)
    run.checkpoints.wait()
    device.barrier()
    return loss


def tensors_of(run: Run, model: CLIP, batch: Batch, before: int) -> dict[str, torch.Tensor]:
    """A batch on the device, as `train_step` takes it."""
    kept = run.normalisers.rows(batch.records_B, before) if run.normalisers else {}
    tensors = run.device.batch(batch.arrays() | kept)
    if model.text.skips_padding and "ids_BT" in tensors and not run.device.static_shapes:
        tensors["length_B"] = torch.from_numpy(batch.length_B)
    return tensors


def describe_captions(run: Run, metrics: dict[str, float]) -> str:
    """At the first log line: the share of equal captions for the line and into its metrics, and warnings. Else ""."""
    found = run.captions.report() if run.device.is_first else None
    if found is None:
        return ""
    metrics["equal_captions"], warnings = found
    for warning in warnings:
        warn_on_stderr(warning)
    return f" · {share(found[0])} equal captions"
