import itertools
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from openclip_twin import TINY
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from clipkit import checkpoint
from clipkit.config import set_values
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.model.clip import build
from clipkit.train.catalogue import debug
from clipkit.train.loop import train
from clipkit.train.optimizer import is_decayed, learning_rate_at, local_of, make_optimizer
from clipkit.train.recipes import OptimizerConfig, model_at


def rates(batch, total=1000, warmup=200, peak=1.0, **schedule):
    return [
        learning_rate_at(seen, batch, peak=peak, warmup=warmup, total=total, **schedule)
        for seen in range(0, total, batch)
    ]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(50)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_is_half_way_in_the_middle_and_nears_the_end():
    found = rates(10)
    assert found[20] == pytest.approx(1.0)
    assert found[60] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 790 / 800)))
    assert all(earlier >= later for earlier, later in itertools.pairwise(found[20:]))


def test_the_schedule_stays_where_it_was_when_the_batch_changes():
    small, large = rates(10), rates(100)
    assert large[5] == pytest.approx(small[50])


def test_no_warm_up_begins_at_the_peak():
    assert rates(10, warmup=0)[0] == 1.0


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_what_was_learned_so_far_does_not_depend_on_the_end(schedule):
    short, long = rates(10, schedule=schedule), rates(10, total=4000, schedule=schedule)
    assert short == long[: len(short)]
    cooled = rates(10, schedule=schedule, cooldown=300)
    assert cooled[:70] == short[:70]  # a branch off the same run


def test_a_constant_rate_stays_and_cools_down_in_a_straight_line():
    found = rates(10, schedule="constant", cooldown=100)
    assert found[:20] == rates(10)[:20]
    assert set(found[20:90]) == {1.0}
    assert found[90:] == pytest.approx([1 - step / 10 for step in range(10)])
    assert set(rates(10, schedule="constant")[20:]) == {1.0}


def test_inverse_square_root_halves_at_four_times_the_samples():
    found = rates(10, schedule="inverse_sqrt")
    assert found[20] == pytest.approx(1.0)
    assert found[80] == pytest.approx(0.5)
    cooled = rates(10, schedule="inverse_sqrt", cooldown=200)
    assert cooled[80] == pytest.approx(0.5)
    assert cooled[90] == pytest.approx(0.25)
    assert rates(10, warmup=0, schedule="inverse_sqrt")[0] == 1.0


@pytest.mark.parametrize("decay", ["matrices", "layers"])
def test_weight_decay_is_for_matrices_and_for_embeddings_if_the_recipe_says_so(decay):
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    stacked = torch.nn.Parameter(torch.ones(1, 2, 2))
    assert is_decayed("text.blocks.0.mlp.fc1.weight", matrix, decay)
    assert not is_decayed("text.blocks.0.mlp.fc1.bias", vector, decay)
    assert is_decayed("text.token_embedding.weight", matrix, decay) == (decay == "matrices")
    assert is_decayed("image.trunk.pos_embed", stacked, decay) == (decay == "matrices")
    assert not is_decayed("image.trunk.cls_token", stacked, decay)  # a vector in OpenCLIP


def test_a_frozen_parameter_is_not_in_the_optimizer():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerConfig(), 1e-3, pick("cpu"))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    assert optimizer.param_groups[0]["weight_decay"] == 0.2


def plain_stable_adamw(weight, gradients, rates, decay, config):
    """Algorithm 2 of Wortsman et al., 2023."""
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        beta1, beta2 = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in (config.beta1, config.beta2))
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        rms = (gradient**2 / second.clamp(min=config.eps**2)).mean().sqrt().item()
        eta = rate / max(1, rms)
        weight = weight - eta * decay * weight - eta * first / (second.sqrt() + config.eps)
    return weight


def plain_rounded_adamw(weight, gradients, rates, decay, config):
    """Loshchilov and Hutter, 2019, with the first moment rounded from float32 between the steps."""
    kept, second = torch.zeros_like(weight).bfloat16(), torch.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = torch.lerp(kept.float(), gradient.float(), 1 - config.beta1)
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        root = (second / (1 - config.beta2**step)).sqrt() + config.eps
        weight = weight - rate * decay * weight - rate * first / (1 - config.beta1**step) / root
        kept = first.bfloat16()
    return weight


def plain_lion(weight, gradients, rates, decay, config):
    """Algorithm 2 of Chen et al., 2023."""
    first = torch.zeros_like(weight)
    for gradient, rate in zip(gradients, rates, strict=True):
        update = torch.sign(config.beta1 * first + (1 - config.beta1) * gradient)
        first = config.beta2 * first + (1 - config.beta2) * gradient
        weight = weight - rate * (update + decay * weight)
    return weight


def twenty_steps(config):
    """A tiny model's weights before and after, the gradients of each step (one of them a spike) and the rates."""
    model, device = build(TINY), pick("cpu")
    model.image.trunk.blocks[0].requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, config, 1e-3, device)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(0)
    gradients = {
        name: [torch.randn(each.shape, generator=generator) * (50 if step == 7 else 1) for step in range(20)]
        for name, each in trained.items()
    }
    steps = [1e-3 * (20 - step) / 20 for step in range(20)]
    for step, rate in enumerate(steps):
        for name, parameter in trained.items():
            parameter.grad = gradients[name][step].clone()
        device.set_learning_rate(optimizer, rate)
        optimizer.step()
    return before, dict(model.named_parameters()), gradients, steps


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({"name": "stable_adamw"}, plain_stable_adamw),
        ({"name": "lion"}, plain_lion),
        ({"mu_dtype": "bfloat16"}, plain_rounded_adamw),
    ],
)
def test_twenty_steps_equal_the_papers_formula(settings, plain):
    config = OptimizerConfig(**settings, decay="layers")
    before, after, gradients, steps = twenty_steps(config)
    for parameter_name, parameter in after.items():
        expected = before[parameter_name].double()
        if parameter_name in gradients:  # else frozen
            decay = config.weight_decay if is_decayed(parameter_name, parameter, "layers") else 0.0
            double = [gradient.double() for gradient in gradients[parameter_name]]
            expected = plain(expected, double, steps, decay, config)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=0)


def test_a_rounded_moment_of_a_part_is_that_of_the_whole():
    """Of weights that are sharded over two ranks, here the first of them."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        part = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)], src_data_rank=None)
        whole = torch.nn.Parameter(torch.randn(5, 3))
        weights = [whole, torch.nn.Parameter(part(whole.detach()))]
        optimizers = [
            make_optimizer(torch.nn.ParameterList([each]), OptimizerConfig(mu_dtype="bfloat16"), 1e-2, pick("cpu"))
            for each in weights
        ]
        for _ in range(3):
            gradient = torch.randn(5, 3)
            for each, optimizer, found in zip(weights, optimizers, (gradient, part(gradient)), strict=True):
                each.grad = found
                optimizer.step()
        assert torch.equal(local_of(weights[1]), whole[:3])
        moment = optimizers[1].state[weights[1]]["exp_avg"]
        assert isinstance(moment, DTensor) and moment.dtype == torch.bfloat16
    finally:
        torch.distributed.destroy_process_group()


def test_muon_is_for_the_matrices_in_blocks_and_adamw_for_the_rest():
    config = OptimizerConfig(name="muon", momentum=0.9)
    before, after, gradients, steps = twenty_steps(config)
    by_muon = set()
    for name, each in gradients.items():
        weight = torch.nn.Parameter(before[name])
        decay = config.weight_decay if is_decayed(name, weight, "matrices") else 0.0
        if ".blocks." in name and weight.ndim == 2:
            by_muon.add(name)
            theirs = torch.optim.Muon([weight], momentum=0.9, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        else:
            theirs = torch.optim.AdamW([weight], betas=(0.9, 0.95), eps=config.eps, weight_decay=decay)
        for gradient, rate in zip(each, steps, strict=True):
            weight.grad = gradient
            theirs.param_groups[0]["lr"] = rate
            theirs.step()
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    assert {"text.blocks.0.mlp.fc1.weight", "image.trunk.blocks.1.attn.qkv.weight"} <= by_muon


def test_muon_with_nothing_for_it_is_refused():
    with pytest.raises(UserError, match="the recipe's optimizer has invalid settings"):
        make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(name="muon"), 1e-3, pick("cpu"))


@pytest.mark.parametrize("optimizer", ["name=stable_adamw", "name=lion", "name=muon", "mu_dtype=bfloat16"])
def test_a_run_of_micro_batches_and_a_frozen_tower_resumes_bit_for_bit(pairs_dataset, tmp_path, optimizer):
    settings = [
        f"optimizer.{optimizer}",
        "optimizer.eps=1e-6",
        "micro_batch=8",
        "model.image.frozen=true",
        "precision=bfloat16",
    ]
    settings += ["stages.0.samples=48", "stages.0.warmup_samples=16", "cadence.checkpoint_samples=16"]
    recipe = set_values(debug(), [*settings, "cadence.keep_checkpoints=9"])
    recipe = replace(recipe, stages=recipe.stages[:1])
    run = tmp_path / "run"
    init = tmp_path / "init.safetensors"
    save_file(build(model_at(recipe, recipe.stages[0])).state_dict(), init)
    train(recipe, pairs_dataset, run, device_name="cpu", workers=0, init=init)
    whole = checkpoint.load(run, with_optimizer=True)
    shutil.rmtree(whole.path)
    assert train(recipe, pairs_dataset, run, device_name="cpu", workers=0, resume=True).finished
    again = checkpoint.load(run, with_optimizer=True)
    for ours, theirs in ((again.tensors, whole.tensors), (again.optimizer, whole.optimizer)):
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
