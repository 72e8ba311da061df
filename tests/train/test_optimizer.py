import itertools
import math

import pytest
import torch

from clipkit.device import pick
from clipkit.train.optimizer import is_decayed, learning_rate_at, make_optimizer
from clipkit.train.recipes import OptimizerConfig


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
