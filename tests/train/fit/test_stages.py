import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.device import Device, pick
from clipkit.errors import UserError
from clipkit.model.clip import CLIP, build
from clipkit.train.catalogue import debug, recipes
from clipkit.train.fit import stages, trial
from clipkit.train.fit.stages import Fit, find_largest, fit_stages, to_json
from clipkit.train.fit.trial import made_up_batch
from clipkit.train.loop import train
from clipkit.train.optimizer import copy_for_average, keep_average, local_of, make_optimizer
from clipkit.train.recipes import model_at
from clipkit.train.run import parts
from clipkit.train.saving import bytes_of
from clipkit.train.step import train_step


@given(st.lists(st.integers(1, 10_000), unique=True).map(sorted), st.integers(0, 10_001))
def test_the_search_finds_the_largest_that_fits_in_few_tries(sizes, limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert find_largest(sizes, fits) == max((size for size in sizes if size <= limit), default=None)
    assert len(tried) <= len(sizes).bit_length()


class SmallGPU(Device):
    """The CPU, as if it were a GPU whose memory holds activations of so many pairs, or of four times as many where they
    are computed again. Real steps run."""

    pairs = 0
    survives_want_of_memory = True

    def has_memory_for(self, work):
        tried = work.args[0]
        if (tried.micro_batch or 10**9) > self.pairs * (4 if tried.checkpoint_activations else 1):
            return False
        work()
        return True

    def alone(self):
        return self


def small_gpu(pairs):
    device = SmallGPU("cpu", torch.device("cpu"), "")
    object.__setattr__(device, "pairs", pairs)
    return device


@pytest.mark.parametrize(
    ("pairs", "micro_batch", "recompute"),
    [(16, None, False), (100, None, False), (15, None, True), (4, None, True), (3, 2, False), (1, 1, False)],
)
def test_the_whole_batch_comes_first_then_the_largest_part(pairs, micro_batch, recompute):
    recipe = debug()
    fits = fit_stages(recipe, 0, small_gpu(pairs), {})
    assert list(fits) == ["reduced", "full"]
    for found in fits.values():
        assert (found.micro_batch, found.checkpoint_activations) == (micro_batch, recompute)
        assert f"{micro_batch} pairs at once" in found.note if micro_batch else "the whole batch" in found.note
        assert found.apply(recipe).micro_batch == micro_batch


@pytest.mark.parametrize(
    "settings",
    [["distill.weight=0.5"], ["loss=global_contrastive", "global_contrastive.reference=true"]],
    ids=["distil", "reference"],
)
def test_a_recipe_with_teachers_is_tried_with_made_up_ones(settings, monkeypatch):
    monkeypatch.setattr("clipkit.device.has_fast_bfloat16", lambda: True)
    fits = fit_stages(set_values(debug(), ["precision=auto", *settings]), 0, pick("cpu"), {})
    assert {fit.precision for fit in fits.values()} <= {"float32", "bfloat16"}
    assert all("bfloat16" in fit.note for fit in fits.values())


def test_a_device_too_small_for_one_pair_is_refused_before_the_first_step():
    with pytest.raises(UserError, match="stage reduced: not even one pair at a time fits into the memory of CPU"):
        fit_stages(debug(), 0, small_gpu(0), {})


def test_what_a_recipe_says_is_not_searched_for():
    recipe = set_values(debug(), ["micro_batch=4", "checkpoint_activations=true"])
    for found in fit_stages(recipe, 0, small_gpu(0), {}).values():
        assert (found.micro_batch, found.checkpoint_activations, found.note) == (4, True, "")


def test_a_resumed_run_goes_on_with_what_was_found_on_such_a_machine(monkeypatch):
    recipe, device = debug(), small_gpu(3)
    stored = to_json(fit_stages(recipe, 0, device, {}))
    monkeypatch.setattr(stages, "fit_stage", lambda *_: "found again")
    assert fit_stages(recipe, 0, device, stored)["full"] == Fit(**stored["full"])
    assert fit_stages(recipe, recipe.stages[0].samples, device, stored).keys() == stored.keys()
    other = stored | {"full": stored["full"] | {"hardware": "another"}}
    assert fit_stages(recipe, 0, device, other)["full"] == "found again"
    assert fit_stages(set_values(recipe, ["micro_batch=8"]), 0, device, stored)["full"] == "found again"
    assert fit_stages(set_values(recipe, ["precision=bfloat16"]), 0, device, stored)["full"] == "found again"


# ---- Arithmetic on processors with bfloat16 --------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "precision"), [(0.6, "bfloat16"), (0.95, "bfloat16"), (0.97, "float32")])
def test_a_processor_takes_bfloat16_where_its_step_is_faster(monkeypatch, ratio, precision):
    monkeypatch.setattr("clipkit.device.has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(stages, "time_bfloat16", lambda *_: ratio)
    found = fit_stages(set_values(debug(), ["precision=auto"]), 0, pick("cpu"), {})["full"]
    assert found.precision == precision
    assert precision in found.note


def test_without_bfloat16_units_or_where_the_recipe_says_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(stages, "time_bfloat16", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr("clipkit.device.has_fast_bfloat16", lambda: False)
    assert fit_stages(set_values(debug(), ["precision=auto"]), 0, pick("cpu"), {})["full"].precision == "float32"
    monkeypatch.setattr("clipkit.device.has_fast_bfloat16", lambda: True)
    assert fit_stages(set_values(debug(), ["precision=float32"]), 0, pick("cpu"), {})["full"].precision == "float32"


def test_the_trial_times_real_steps_of_both(monkeypatch):
    steps = []

    def counted(model, optimizer, batch, recipe, device, teachers):
        steps.append(recipe.precision)
        return train_step(model, optimizer, batch, recipe, device, teachers)

    monkeypatch.setattr(trial, "train_step", counted)
    recipe = debug()
    assert stages.time_bfloat16(recipe, recipe.stages[0], pick("cpu")) > 0
    assert steps.count("float32") == steps.count("bfloat16") == 2 * (stages.TRIAL_TURNS + 1)


def test_a_run_stores_what_was_found_and_resumes_with_it_bit_for_bit(pairs_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.device.has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(stages, "time_bfloat16", lambda *_: 0.5)
    recipe = set_values(debug(), ["precision=auto", "cadence.keep_checkpoints=10"])
    options = {"device_name": "cpu", "workers": 0}
    whole = train(recipe, pairs_dataset, tmp_path / "whole", **options)
    state = (tmp_path / "whole/checkpoints").glob("*128/state.json")
    assert '"precision": "bfloat16"' in next(state).read_text()
    # As if the machine were now slower at it: the run goes on as it began.
    for newer in sorted((tmp_path / "whole/checkpoints").iterdir())[2:]:
        newer.rename(tmp_path / newer.name)
    monkeypatch.setattr(stages, "time_bfloat16", lambda *_: 2.0)
    again = train(recipe, pairs_dataset, tmp_path / "whole", **options, resume=True)
    assert again.loss == whole.loss
    name = again.checkpoint.name
    weights = [(folder / name / "model.safetensors").read_bytes() for folder in (tmp_path, again.checkpoint.parent)]
    assert weights[0] == weights[1]


# ---- The paths of a GPU, without one ---------------------------------------------------------------------------------

CUDA = Device("cuda", torch.device("cuda", 0), "made up")


def with_bfloat16(monkeypatch):
    """Have torch believe that the GPU computes in bfloat16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def put_on_gpu(model):
    """Give a model of the meta device fake tensors of the GPU for weights."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(weight.shape, device=CUDA.torch_device)))


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["micro_batch=4", "checkpoint_activations=true"],
        ["loss=sigmoid", "model.logit_bias_init=-10", "ema_decay=0.9", "optimizer.grad_clip=1"],
        ["stages.0.context_length=40", "stages.0.text_reduction=truncate", "optimizer.name=lion"],
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_a_whole_step_stays_on_the_gpu(settings, monkeypatch):
    """On fake tensors, where a tensor of the CPU beside one of the GPU is an error as on a GPU. Autograd's
    engine doesn't run without a GPU: gradients are made up. The losses compute theirs in the forward pass."""
    recipe = set_values(debug(), ["precision=bfloat16", *settings])
    stage = recipe.stages[0]
    with torch.device("meta"):
        model = CLIP(model_at(recipe, stage)).train()
    with_bfloat16(monkeypatch)
    with FakeTensorMode():
        put_on_gpu(model)
        model.recompute_activations(CUDA.recompute() if recipe.checkpoint_activations is True else None)
        optimizer = make_optimizer(model, recipe.optimizer, 1e-3, CUDA)
        batch = made_up_batch(recipe, stage, 16, CUDA.torch_device)

        def backward(*_):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr(torch.autograd, "backward", backward)
        monkeypatch.setattr(torch.autograd, "grad", lambda _, leaves: [torch.zeros_like(each) for each in leaves])
        for _ in range(2):
            step = train_step(model, optimizer, batch, recipe, CUDA)
        assert {each.device.type for each in step} == {"cuda"}
        assert {each.device.type for each in model.state_dict().values()} == {"cuda"}
        batch["caption_B"] = torch.arange(16)
        with pytest.raises(RuntimeError, match="device"):
            train_step(model, optimizer, batch, recipe, CUDA)


class NoStream:
    """A stream or an event where there is no GPU, and so nothing to wait for."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        return self

    def wait_stream(self, *_):
        pass

    wait_event = record_event = wait = synchronize = wait_stream


@pytest.fixture
def two_gpus(monkeypatch):
    """The first of two ranks, each with a GPU; the other one isn't there, nor are the GPUs."""
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    mesh = torch.distributed.init_device_mesh("cuda", (2,))
    monkeypatch.setattr(torch.distributed, "init_device_mesh", lambda *_: mesh)  # it would read fake tensors
    yield replace(CUDA, world=2)
    torch.distributed.destroy_process_group()


def test_sharded_weights_stay_on_the_gpu_and_checkpoints_gather_them(two_gpus, monkeypatch):
    """FSDP2's wrapping, two updates and what a checkpoint copies, on fake tensors as above."""
    recipe = set_values(debug(), ["precision=bfloat16", "shard_weights=true", "compile=false", "ema_decay=0.9"])
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, mu_dtype="bfloat16"))
    stage = recipe.stages[0]
    with torch.device("meta"):
        model = CLIP(model_at(recipe, stage)).train()
    average, whole = copy_for_average(model), {name: each.shape for name, each in model.named_parameters()}
    with_bfloat16(monkeypatch)
    with FakeTensorMode():
        for each in (model, average):
            put_on_gpu(each)
            two_gpus.shard(each, each.blocks(), recipe.precision)
        average.requires_grad_(False)
        optimizer = make_optimizer(model, recipe.optimizer, 1e-3, two_gpus)
        keep_average(average, model, optimizer, 0.9)
        batch = made_up_batch(recipe, stage, 8, two_gpus.torch_device)

        def backward(*_):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        for _ in range(2):
            step = train_step(two_gpus.wrap(model), optimizer, batch, recipe, two_gpus)
        assert {each.device.type for each in step} == {"cuda"}
        found = parts(model, average, optimizer)
        matrices = [each for part in found.values() for each in part.values() if each.dim() > 1]
        assert matrices and all(isinstance(each, DTensor) and each.device.type == "cuda" for each in matrices)
        for part in ("tensors", "ema"):
            gathered = {name: checkpoint.whole(each) for name, each in found[part].items()}
            assert {each.device.type for each in gathered.values()} == {"cuda"}
            assert {name: each.shape for name, each in gathered.items() if name in whole} == whole
            assert bytes_of({part: found[part]}) == bytes_of({part: gathered})  # what the disk is asked for
        moments = [each for name, each in found["optimizer"].items() if name.startswith("exp_avg/")]
        assert {each.dtype for each in moments} == {torch.bfloat16}
        assert sum(local_of(each).numel() for each in moments) < 0.6 * sum(each.numel() for each in moments)


@pytest.mark.parametrize("name", ["debug", "clipa-b16-i50-t16"])
def test_a_stage_compiles_into_one_graph(name):
    """`fullgraph` refuses a second; what the graph computes is what eager mode does. The towers at reduced depth."""
    recipe = set_values(recipes()[name](), ["model.image.depth=1", "model.text.depth=1", "precision=float32"])
    stage = recipe.stages[0]
    compiled, eager = (build(model_at(recipe, stage)).train() for _ in range(2))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled.compile_step(backend=backend)
    batch = made_up_batch(recipe, stage, 2, torch.device("cpu"))
    images = batch["image_BHWC"].permute(0, 3, 1, 2) / 255
    features = [model(images, batch["ids_BT"], batch.get("keep_BK")) for model in (compiled, eager)]
    for ours, theirs in zip(*features, strict=True):
        torch.testing.assert_close(ours, theirs)
    compiled(images, batch["ids_BT"], batch.get("keep_BK"))
    assert len(graphs) == 1
