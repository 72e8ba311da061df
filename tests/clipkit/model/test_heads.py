"""Heads on towers: what they compute, how they are trained, and which configurations are refused."""

import dataclasses

import pytest
import torch
from small_encoder import SMALL
from torch.nn import functional as F

from clipkit.config import set_values
from clipkit.errors import UserError
from clipkit.model.clip import build, load_state
from clipkit.model.config import ModelConfig
from clipkit.model.flops import sample_cost, weight_count

FROZEN = ["image.frozen=true", "text.frozen=true"]
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
IDS = torch.tensor([[49406, 5, 6, 49407, 0], [49406, 7, 49407, 0, 0]])


def config(*settings):
    return set_values(SMALL, settings)


def test_without_heads_a_model_is_what_it_was():
    assert not [name for name in build(SMALL).state_dict() if "head" in name]
    plain = dataclasses.asdict(SMALL)
    for tower in ("image", "text"):
        for name in ("head", "head_input", "head_ratio"):
            del plain[tower][name]
    assert ModelConfig.from_dict(plain) == SMALL  # a checkpoint of an older clipkit


@pytest.mark.parametrize("kind", ["linear", "mlp", "glu"])
def test_a_head_reads_the_unit_vector_of_its_tower(kind):
    model = build(
        config(f"image.head={kind}", "text.head=linear", "embed_dim=24", "image.head_input=20"), seed=1
    ).eval()
    assert model.encode_image(PIXELS).shape == model.encode_text(IDS).shape == (2, 24)
    x = F.normalize(model.image_projection(model.image(PIXELS)), dim=-1)
    assert x.shape == (2, 20)
    head = model.image_head
    x = F.layer_norm(x, (20,))
    if kind == "mlp":
        x = F.gelu(F.linear(x, head.fc1.weight, head.fc1.bias))
    if kind == "glu":
        gate = F.linear(x, head.gate.weight, head.gate.bias).relu()
        x = gate * F.linear(x, head.fc1.weight, head.fc1.bias)
    expected = F.normalize(F.linear(x, head.out.weight, head.out.bias), dim=-1)
    torch.testing.assert_close(model.encode_image(PIXELS), expected)


def test_stored_vectors_stand_in_the_place_of_what_the_towers_read():
    heads = build(config(*FROZEN, "image.head=glu", "text.head=glu"), seed=2)
    plain = build(SMALL, seed=2).eval()
    load_state(heads, heads.state_dict() | plain.state_dict())
    with torch.no_grad():
        image_BD, text_BD = plain.encode_image(PIXELS), plain.encode_text(IDS)
        live, stored = heads(PIXELS, IDS), heads(image_BD, text_BD)
    for ours, theirs in zip(stored, live, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_towers_keep_the_weights_that_their_seed_gives():
    plain, heads = (
        build(SMALL, seed=3).state_dict(),
        build(config("image.head=glu", "text.head=mlp"), seed=3).state_dict(),
    )
    assert all(torch.equal(tensor, heads[name]) for name, tensor in plain.items())


def test_only_heads_are_trained_on_frozen_towers():
    model = build(config(*FROZEN, "image.head=glu"))
    model.freeze()
    trained = {name.split(".")[0] for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {"image_head", "logit_scale"}
    with pytest.raises(UserError, match=r"leave nothing to train: .* or give a tower a head"):
        build(config(*FROZEN)).freeze()


def test_the_work_of_heads_is_counted():
    heads = config(*FROZEN, "image.head=glu", "text.head=linear")
    matrices = 3 * 32 * 128 + 32 * 32
    stored = sample_cost(heads, images=False, texts=False)
    assert stored == (0, 0, 3 * 2.0 * matrices)
    plain = config("image.frozen=true", "text.frozen=false")
    less = sample_cost(plain, texts=False).flops + sample_cost(plain, images=False).flops
    assert less == sample_cost(plain).flops
    assert weight_count(heads) == weight_count(SMALL) + matrices + (2 * 128 + 32 + 64) + (32 + 64)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["image.head_input=20"], "model.image.head_input=20 needs a head: set model.image.head=glu"),
        (["text.head=glu", "text.head_ratio=0.01"], "model.text.head_input=None and head_ratio=0.01 make a head of no"),
        (["text.head=linear", "text.head_input=0"], "model.text.head_input=0 .* make a head of no width"),
    ],
)
def test_heads_that_can_not_be(settings, problem):
    with pytest.raises(UserError, match=problem):
        build(config(*settings))
