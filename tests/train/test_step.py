import itertools
import math

import pytest
import torch

from clipkit.device import pick
from clipkit.train.recipes import OptimizerConfig
from clipkit.train.step import is_decayed, learning_rate_at, make_optimizer


def rates(batch, total=1000, warmup=200, peak=1.0, final=0.0):
    return [
        learning_rate_at(seen, batch, peak=peak, warmup=warmup, total=total, final=final)
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
