from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipkit.config import set_values
from clipkit.counter_rng import sample_keys
from clipkit.device import pick
from clipkit.model.clip import CLIP, build
from clipkit.model.config import vit_h14
from clipkit.text.tokens import reduce_text
from clipkit.train.catalogue import debug
from clipkit.train.checks import loader_config, stage_cost
from clipkit.train.loader.loader import keep_indices
from clipkit.train.optimizer import make_optimizer
from clipkit.train.recipes import Recipe, model_at
from clipkit.train.step import train_step

ROWS = 4


def batch_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    """A batch for the recipe's first stage, reduced as the loader does it, from captions of 1 to 40 tokens."""
    stage, keys_B = recipe.stages[0], sample_keys(0, np.arange(ROWS, dtype=np.uint64))
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 49000, length).tolist() for length in (1, 5, 12, 40)]
    priorities = [rng.integers(0, 4, len(row)).tolist() for row in ids]
    arrays = {
        "image_BHWC": rng.integers(0, 256, (ROWS, stage.image_size, stage.image_size, 3), np.uint8),
        "ids_BT": reduce_text(stage.text_reduction, ids, stage.context_length, keys_B, priorities),
        "keep_BK": keep_indices(loader_config(recipe, stage), keys_B),
        "caption_B": np.arange(ROWS),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
    "settings",
    [
        ["image_size=28"],
        ["image_reduction=random", "image_keep=49"],
        ["image_reduction=grid", "image_keep=49"],
        ["image_reduction=block", "image_keep=49"],
        ["text_reduction=truncate", "context_length=8"],
        ["text_reduction=random", "context_length=8"],
        ["text_reduction=block", "context_length=8"],
        ["text_reduction=syntax", "context_length=8"],
    ],
    ids=lambda settings: settings[0],
)
def test_a_step_computes_no_token_that_was_left_out(settings):
    """What PyTorch counts in a real step is what `clipkit recipes` says, with PyTorch's plain attention: the fused one
    computes its scores again in the backward pass."""
    sizes = ["image.patch_size=4", "image.width=256", "image.depth=6", "text.width=256", "text.depth=4"]
    whole = ["image_size=56", "image_reduction=none", "image_keep=none", "context_length=16"]
    whole_recipe = set_values(debug(), [f"model.{size}" for size in sizes] + [f"stages.0.{each}" for each in whole])
    recipe = set_values(whole_recipe, [f"stages.0.{setting}" for setting in settings])
    model = build(model_at(recipe, recipe.stages[0])).train()
    device = pick("cpu")
    optimizer = make_optimizer(model, recipe.optimizer, 1e-3, device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(model, optimizer, batch_of(recipe), recipe, device)
    said = stage_cost(recipe, recipe.stages[0]).flops
    assert counter.get_total_flops() / ROWS == pytest.approx(said, rel=0.01)
    assert said < 0.99 * stage_cost(whole_recipe, whole_recipe.stages[0]).flops


@pytest.mark.parametrize("frozen", ["image.frozen=true", "image.frozen=4", "text.frozen=true", "text.frozen=2"])
def test_frozen_parts_cost_their_forward_pass_alone(frozen):
    sizes = ["image.patch_size=4", "image.width=256", "image.depth=6", "text.width=256", "text.depth=4"]
    stage = ["image_size=56", "image_reduction=none", "image_keep=none", "context_length=16"]
    settings = [*(f"model.{each}" for each in (*sizes, frozen)), *(f"stages.0.{each}" for each in stage)]
    recipe, device = set_values(debug(), settings), pick("cpu")
    model = build(model_at(recipe, recipe.stages[0])).train()
    model.freeze()
    optimizer = make_optimizer(model, recipe.optimizer, 1e-3, device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(model, optimizer, batch_of(recipe), recipe, device)
    said = stage_cost(recipe, recipe.stages[0]).flops
    assert counter.get_total_flops() / ROWS == pytest.approx(said, rel=0.01)


@pytest.mark.parametrize(("size", "patches", "dropped"), [(224, 256, 0.3), (336, 576, 0.4)])
def test_patch_dropout_of_h14_costs_what_is_kept(size, patches, dropped):
    """CLIPA's fine-tuning of H/14, in sizes only."""
    keep = round(patches * (1 - dropped))
    stage = replace(debug().stages[0], image_size=size, context_length=32, image_keep=keep)
    recipe = replace(debug(), model=vit_h14(), stages=(stage,))
    with torch.device("meta"):
        model = CLIP(model_at(recipe, stage))
        image_BCHW, ids_BT = torch.empty(2, 3, size, size), torch.zeros(2, 32, dtype=torch.int32)
        keep_BK = torch.zeros(2, keep, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        (model.image(image_BCHW, keep_BK).sum() + model.text(ids_BT).sum()).backward()
    cost = stage_cost(recipe, stage)
    assert cost.image_tokens == keep + 1
    assert counter.get_total_flops() / 2 == pytest.approx(cost.flops, rel=0.01)


@pytest.mark.parametrize("micro_batch", [None, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_without_padding_is_the_step_with_it(micro_batch, recompute):
    recipe = set_values(debug(), ["stages.0.context_length=32"])
    recipe = replace(recipe, micro_batch=micro_batch, checkpoint_activations=recompute)
    device, batch = pick("cpu"), batch_of(recipe)
    lengths = {"length_B": batch["ids_BT"].argmax(dim=1) + 1}
    steps, weights, flops = [], [], []
    for given in (batch, batch | lengths):
        model = build(model_at(recipe, recipe.stages[0])).train()
        model.recompute_activations(device.recompute() if recompute else None)
        with FlopCounterMode(display=False) as counter:
            steps.append(train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), given, recipe, device))
        weights.append({name: tensor.detach() for name, tensor in model.named_parameters()})
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.9 * flops[0]
    torch.testing.assert_close(steps[1].loss, steps[0].loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-5)
