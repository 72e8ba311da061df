"""Towers that aren't trained, wholly or up to a block."""

import copy
import dataclasses

import pytest
import torch

from clipkit.config import set_values
from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.model.clip import CLIP, build
from clipkit.model.config import ImageConfig, ModelConfig, TextConfig

TINY = ModelConfig(
    embed_dim=16,
    image=ImageConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=3, heads=2),
    text=TextConfig(context_length=6, vocab_size=50, width=32, depth=3, heads=2),
)
IMAGE = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 5, 49, 0, 0, 0], [2, 6, 49, 0, 0, 0], [3, 7, 8, 49, 0, 0], [4, 49, 0, 0, 0, 0]])


def frozen(image: int | bool = False, text: int | bool = False) -> ModelConfig:
    return dataclasses.replace(
        TINY,
        image=dataclasses.replace(TINY.image, frozen=image),
        text=dataclasses.replace(TINY.text, frozen=text),
    )


def changed_by_a_step(model: CLIP) -> set[str]:
    """The tensors that one step of training changes."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    image_BE, text_BE, scale = model(IMAGE, IDS)
    torch.nn.functional.cross_entropy(scale * image_BE @ text_BE.T, torch.arange(4)).backward()
    optimizer.step()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def is_first(name: str, tower: str, blocks: int) -> bool:
    """Whether a tensor is one of the tower's embeddings or of its first blocks."""
    embeddings = {
        "image": ("patch_embed.", "cls_token", "pos_embed", "norm_pre."), "text": ("token_embedding.", "pos_embed"),
    }[tower]  # fmt: skip
    parts = (*embeddings, *(f"blocks.{number}." for number in range(blocks)))
    return name.removeprefix(f"{tower}.").removeprefix("trunk.").startswith(parts)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("blocks", [True, 1, 2, 3])
def test_what_is_frozen_stays_and_all_else_is_trained(tower: str, blocks: int | bool, recompute: bool) -> None:
    model = build(frozen(**{tower: blocks}))
    model.recompute_activations(pick("cpu").recompute() if recompute else None)
    everything = set(model.state_dict())
    model.freeze()
    if blocks is True:
        expected = {name for name in everything if name.startswith((f"{tower}.", f"{tower}_projection."))}
    else:
        expected = {name for name in everything if name.startswith(tower) and is_first(name, tower, blocks)}
    assert expected
    assert everything - changed_by_a_step(model) == expected


def test_nothing_is_frozen_unless_asked() -> None:
    for config in (frozen(), frozen(0, 0)):
        model = build(config)
        model.freeze()
        assert changed_by_a_step(model) == set(model.state_dict())


def test_gradients_of_the_rest_are_those_of_the_whole_model() -> None:
    gradients = []
    for config in (TINY, frozen(image=2, text=1)):
        model = build(config).train()
        model.freeze()
        image_BE, text_BE, scale = model(IMAGE, IDS)
        ((image_BE * text_BE).sum() * scale).backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert 0 < len(gradients[1]) < len(gradients[0])
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name])


def test_fixed_positions_stay_fixed_in_a_tower_that_is_trained() -> None:
    model = build(dataclasses.replace(TINY, image=dataclasses.replace(TINY.image, position="sincos")))
    model.freeze()
    assert not model.image.trunk.pos_embed.requires_grad


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    """So that dropout and batch norm, where a tower has them, do there what they do at evaluation."""
    model = build(frozen(image=True, text=2)).train()
    assert model.training and model.text.training
    assert not any(module.training for module in model.image.modules())
    assert [block.training for block in model.text.blocks] == [False, False, True]
    model.eval()
    assert not any(module.training for module in model.modules())


def test_nothing_left_to_train_is_said_at_once() -> None:
    config = dataclasses.replace(frozen(True, True), logit_bias_init=-10.0)
    with pytest.raises(UserError, match="leave nothing to train: set one of them to false"):
        build(config).freeze()
    build(frozen(True, 3)).freeze()  # the text's last norm and its projection are left


@pytest.mark.parametrize("value", [-1, 4, 1.5, "all"])
def test_what_cannot_be_frozen(value: object) -> None:
    with pytest.raises(UserError, match=f"model.text.frozen {value!r}: take true, false, or a number of blocks.* to 3"):
        build(dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, frozen=value)))


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", 1), ("0", 0), ("12", 12)])
def test_a_number_is_never_taken_for_true(text: str, value: int | bool) -> None:
    parsed = set_values(TINY, [f"image.frozen={text}"]).image.frozen
    assert parsed == value and type(parsed) is type(value)
    with pytest.raises(UserError, match=r"image\.frozen=half"):
        set_values(TINY, ["image.frozen=half"])


def test_a_frozen_configuration_survives_json() -> None:
    config = frozen(True, 1)
    restored = ModelConfig.from_dict(dataclasses.asdict(config))
    assert restored.image.frozen is True
    assert restored.text.frozen == 1 and restored.text.frozen is not True
