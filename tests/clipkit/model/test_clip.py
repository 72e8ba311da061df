"""The model against OpenCLIP's, and the promises of `clipkit.model.clip`."""

import copy
import dataclasses
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from open_clip.pos_embed import get_2d_sincos_pos_embed
from openclip_twin import TINY, captions, images, load_openclip, openclip_twin

from clipkit.device import pick
from clipkit.errors import UserError
from clipkit.interop.openclip import convert
from clipkit.model.clip import CLIP, allocate, build, load_state, resize_text_positions
from clipkit.model.config import ImageConfig, ModelConfig, vit_b16, vit_b32, vit_l14, vit_l16
from clipkit.model.image_tower import prime_factors, sincos_2d
from clipkit.text.tokenizer import EOT, SOT


def with_image(config: ModelConfig = TINY, **changes: object) -> ModelConfig:
    return dataclasses.replace(config, image=dataclasses.replace(config.image, **changes))


def with_text(config: ModelConfig = TINY, **changes: object) -> ModelConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))


@torch.no_grad()
def assert_same_features(ours: CLIP, theirs: torch.nn.Module, image: torch.Tensor, ids: torch.Tensor) -> None:
    """Unnormalised, so that lengths are compared too."""
    ours_BE, theirs_BE = ours.encode_image(image, normalize=False), theirs.encode_image(image)
    torch.testing.assert_close(ours_BE, theirs_BE, atol=1e-5, rtol=0)
    ours_BE, theirs_BE = ours.encode_text(ids, normalize=False), theirs.encode_text(ids.long())
    torch.testing.assert_close(ours_BE, theirs_BE, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ViT-B-32-quickgelu", vit_b32("quick_gelu")),
        ("ViT-B-16", vit_b16()),
        ("ViT-L-14", with_image(vit_l14(), image_size=70)),  # in all its depth and width; fewer patches save seconds
    ],
)
def test_features_equal_openclip(name: str, config: ModelConfig) -> None:
    theirs = open_clip.create_model(name, pretrained=None, force_image_size=config.image.image_size).eval()
    ours = load_openclip(config, theirs.state_dict()).eval()
    assert_same_features(ours, theirs, images(1, config.image.image_size), captions(2, 77))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("changes", "vision"),
    [
        ({"pooling": "average"}, {"pool_type": "avg", "final_ln_after_pool": True}),
        ({"pre_norm": False}, {"no_ln_pre": True}),
        ({"position": "sincos"}, {"pos_embed_type": "sin_cos_2d"}),
        ({"act": "gelu_tanh"}, {"act_kwargs": {"approximate": "tanh"}}),
    ],
)
def test_variants_equal_openclip(changes: dict[str, object], vision: dict[str, object]) -> None:
    config = with_image(**changes)
    theirs = openclip_twin(config, **vision)
    assert_same_features(load_openclip(config, theirs.state_dict()).eval(), theirs, images(3, 32), captions(3, 12))


def test_custom_text_and_half_precision_state_dicts_load() -> None:
    theirs = openclip_twin(TINY)
    renamed = open_clip.model.convert_to_custom_text_state_dict(theirs.state_dict())
    renamed["input_resolution"] = torch.tensor(32)  # as in OpenAI's own files
    assert_same_features(load_openclip(TINY, renamed).eval(), theirs, images(2, 32), captions(2, 12))
    halved = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    with torch.no_grad():
        features = load_openclip(TINY, halved).eval().encode_image(images(2, 32))
        torch.testing.assert_close(features, theirs.encode_image(images(2, 32), True), atol=5e-3, rtol=0)


def test_a_larger_image_and_context_are_fitted_as_openclip_does() -> None:
    theirs = openclip_twin(TINY)
    larger = with_text(with_image(image_size=56), context_length=20)
    theirs_larger = openclip_twin(larger)
    state = copy.deepcopy(theirs.state_dict())
    resize_pos_embed(state, theirs_larger)
    resize_text_pos_embed(state, theirs_larger)
    theirs_larger.load_state_dict(state)
    ours = build(larger)
    load_state(ours, load_openclip(TINY, theirs.state_dict()).state_dict())
    assert_same_features(ours.eval(), theirs_larger, images(2, 56), captions(2, 20))


def test_a_shorter_context_keeps_the_first_positions() -> None:
    model = build(TINY).eval()
    shorter = allocate(with_text(context_length=8))
    load_state(shorter, model.state_dict())
    ids = captions(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(shorter.eval().encode_text(ids), model.encode_text(ids))
    assert resize_text_positions(torch.arange(6.0)[:, None], 3)[:, 0].tolist() == [0, 1, 2]


def test_sincos_positions() -> None:
    expected = get_2d_sincos_pos_embed(32, 5, cls_token=True)
    model = build(with_image(position="sincos", image_size=40))
    np.testing.assert_allclose(model.image.trunk.pos_embed[0].detach().numpy(), expected, atol=1e-6)
    assert not model.image.trunk.pos_embed.requires_grad
    rows_first = sincos_2d((2, 3), 8)
    assert torch.equal(rows_first[0, :4], rows_first[3, :4])  # first patches of both rows: same column
    assert torch.equal(rows_first[0, 4:], rows_first[2, 4:])  # all patches of a row: same row


def test_fixed_positions_stay_and_learnable_ones_start_from_them() -> None:
    source = build(with_image(position="sincos"), seed=1)
    fixed = build(with_image(position="sincos", image_size=48))
    before = fixed.image.trunk.pos_embed.clone()
    load_state(fixed, source.state_dict())
    assert torch.equal(fixed.image.trunk.pos_embed, before)
    learnable = allocate(TINY)
    load_state(learnable, source.state_dict())
    assert torch.equal(learnable.image.trunk.pos_embed, source.image.trunk.pos_embed)
    assert learnable.image.trunk.pos_embed.requires_grad


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = build(TINY, seed=3), build(TINY, seed=3), build(TINY, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.text.pos_embed, other.text.pos_embed)


def test_initialisation_is_clips() -> None:
    """The text tower's standard deviations equal OpenCLIP's, whose init is CLIP's; the rest is finite."""
    config = dataclasses.replace(
        with_text(with_image(width=128), width=64), logit_bias_init=-10.0, logit_scale_init=10.0
    )
    model, theirs = build(config), openclip_twin(config)
    tensors = convert(theirs.state_dict(), config)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.startswith("text") and tensor.dim() > 1:
            assert tensor.std().item() == pytest.approx(tensors[name].std().item(), rel=0.05), name
    projection = model.image.trunk.patch_embed.proj.weight
    assert projection.std().item() == pytest.approx(theirs.visual.conv1.weight.std().item(), rel=0.05)
    assert model.image.trunk.pos_embed.std().item() == pytest.approx(
        theirs.visual.positional_embedding.std().item(), rel=0.1
    )
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias is not None and model.logit_bias.item() == -10
    assert build(TINY).logit_bias is None
    assert build(TINY).logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_the_bias_comes_out_of_forward_where_there_is_one() -> None:
    """Data parallelism sees the gradient of what comes out of forward alone."""
    assert len(build(TINY)(images(1, 32), captions(1, 12))) == 3
    *_, bias = build(dataclasses.replace(TINY, logit_bias_init=-10.0))(images(1, 32), captions(1, 12))
    assert bias.item() == -10
    assert bias.requires_grad


def test_kept_patches_know_where_they_were() -> None:
    model = build(TINY).eval()
    image, keep = images(2, 32), torch.tensor([[0, 5, 15], [1, 2, 3]])
    with torch.no_grad():
        everything = model.encode_image(image, torch.arange(16).repeat(2, 1))
        torch.testing.assert_close(everything, model.encode_image(image))
        trunk = model.image.trunk
        tokens = trunk.patch_embed(image) + trunk.pos_embed[:, 1:]
        for index in range(2):
            chosen = torch.cat([trunk.cls_token[0] + trunk.pos_embed[0, :1], tokens[index][keep[index]]])[None]
            pooled = trunk.norm(trunk.blocks(trunk.norm_pre(chosen)))[:, 0]
            torch.testing.assert_close(
                model.encode_image(image, keep, normalize=False)[index], model.image_projection(pooled)[0]
            )


def test_average_pooling_leaves_the_class_token_out() -> None:
    model = build(with_image(pooling="average")).eval()
    image = images(1, 32)
    with torch.no_grad():
        trunk = model.image.trunk
        mean = trunk.forward_features(image)[:, 1:].mean(1)
        torch.testing.assert_close(
            model.encode_image(image, normalize=False), model.image_projection(trunk.fc_norm(mean))
        )
    without = build(with_image(pooling="average", class_token=False)).eval()
    assert without.image.prefix == 0
    assert without.encode_image(image, torch.tensor([[3, 4]])).shape == (1, 16)


def test_text_is_causal_and_read_at_the_end_token() -> None:
    model = build(TINY).eval()
    ids = torch.tensor([[SOT, 7, 8, EOT, 0, 0, 0]], dtype=torch.int32)
    padded, changed = ids.clone(), ids.clone()
    padded[0, 4:] = 9
    changed[0, 2] = 9
    with torch.no_grad():
        features = model.encode_text(ids)
        torch.testing.assert_close(model.encode_text(padded), features)
        torch.testing.assert_close(model.encode_text(ids[:, :4]), features)
        assert (model.encode_text(changed) - features).abs().max() > 1e-3


def test_the_temperature_moves_as_openclips_does() -> None:
    """OpenCLIP clamps the parameter after each step; ours is clamped at the next use: the same values are used."""
    model = build(TINY).train()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(99))
    theirs = model.logit_scale.detach().clone().requires_grad_()
    ours_optimizer = torch.optim.SGD([model.logit_scale], lr=0.01, momentum=0.5)
    theirs_optimizer = torch.optim.SGD([theirs], lr=0.01, momentum=0.5)
    used = []
    for direction in (-1, -1, -1, -1, 1, 1, 1, 1, 1):
        scales = model.clamped_logit_scale(), theirs.exp()
        assert scales[0].item() == scales[1].item()
        used.append(scales[0].item())
        for scale, optimizer in zip(scales, (ours_optimizer, theirs_optimizer), strict=True):
            optimizer.zero_grad()
            (direction * scale / 50).backward()
            optimizer.step()
        with torch.no_grad():
            theirs.clamp_(0, math.log(100))
    assert max(used) == pytest.approx(100, rel=1e-6)
    assert used[-1] < 95


def test_evaluation_clamps_the_temperature_and_changes_nothing() -> None:
    model = build(TINY).eval()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
        assert model.clamped_logit_scale().item() == pytest.approx(100)
    assert model.logit_scale.item() == 9.0


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model = build(TINY).train()
        model.recompute_activations(pick("cpu").recompute() if enabled else None)
        image_BE, text_BE, scale = model(images(2, 32), captions(2, 12), torch.tensor([[0, 1], [2, 3]]))
        ((image_BE * text_BE).sum() * scale).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_bfloat16_autocast_gives_float32_unit_vectors() -> None:
    model = build(TINY).train()
    exact = model(images(4, 32), captions(4, 12))
    for features in exact[:2]:
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image_BE, text_BE, scale = model(images(4, 32), captions(4, 12))
    for rounded, whole in zip((image_BE, text_BE), exact[:2], strict=True):
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)
        assert ((rounded * whole).sum(1) > 0.99).all()
    assert scale.dtype == torch.float32


@pytest.mark.parametrize(("patch_size", "image_size"), [(16, 32), (12, 36), (14, 42)])
def test_convolutional_stem(patch_size: int, image_size: int) -> None:
    model = build(with_image(stem="conv", patch_size=patch_size, image_size=image_size)).eval()
    side = image_size // patch_size
    tokens_BND = model.image.trunk.patch_embed(images(2, image_size))
    assert tokens_BND.shape == (2, side * side, 32)
    assert 0.05 < tokens_BND.std().item() < 5
    # Rows then columns, as the position embedding numbers them: the upper right pixel is in the first row's last token.
    changed = images(2, image_size)
    changed[:, :, 0, -1] += 3
    moved = (model.image.trunk.patch_embed(changed) - tokens_BND).abs().sum((0, 2))
    assert moved.nonzero().flatten().tolist() == [side - 1]
    assert math.prod(prime_factors(patch_size)) == patch_size


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "vit_base_patch32_clip_224", "vit_medium_patch16_reg4_gap_256"]
)
@pytest.mark.parametrize("position", ["learnable", "sincos"])
def test_other_timm_transformers(name: str, position: str) -> None:
    config = dataclasses.replace(TINY, image=ImageConfig(name, image_size=64, depth=1, position=position))
    model = build(config).eval()
    assert model.encode_image(images(1, 64), torch.tensor([[0, 2]])).isfinite().all()
    larger = allocate(with_image(config, image_size=128))
    load_state(larger, model.state_dict())
    assert larger.encode_image(images(1, 128)).isfinite().all()


@pytest.mark.parametrize("config", [vit_b16(), vit_l16(), with_image(stem="conv", pooling="average")])
def test_a_configuration_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_image(name="vit_bse_patch16_224"), "vit_base_patch16_224"),
        (with_image(name="resnt50"), "no model 'resnt50' for model.image.name: did you mean resnet50"),
        (with_image(image_size=30), "isn't a multiple of the patch size 8: take 24 or 32"),
        (with_image(heads=3), "timm can't build"),
        (with_image(class_token=False), "class_token=true"),
        (with_image(pooling="max"), "choose from token, average"),
        (with_image(position="sincos", width=30), "multiple of 4"),
        (with_image(name="vit_dwee_patch16_reg1_gap_256"), "no rule to initialise"),
        (with_image(name="vit_small_patch16_18x2_224"), "isn't a plain vision transformer"),
        (with_text(heads=5), "isn't a multiple of its heads"),
        (with_text(act="relu"), "choose from gelu"),
        (with_text(pooling="mean"), "choose from end, last"),
    ],
)
def test_configurations_that_cannot_be_built(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(config)


def test_unknown_fields_and_choices_in_a_stored_configuration() -> None:
    with pytest.raises(UserError, match="unknown field 'widht'"):
        ModelConfig.from_dict({"image": {"widht": 3}})
    with pytest.raises(UserError, match=r"model\.image\.stem 'linear': choose from patch, conv"):
        ModelConfig.from_dict({"image": {"stem": "linear"}})


def test_inputs_of_another_size_are_refused() -> None:
    model = build(TINY)
    with pytest.raises(UserError, match="images of 40x40 px, the model takes 32"):
        model.encode_image(images(1, 40))
    with pytest.raises(UserError, match="16 text tokens, but the model takes 12"):
        model.encode_text(captions(1, 16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_image(depth=3), "the checkpoint has no image.trunk.blocks.2"),
        (with_image(depth=1), "the model has no image.trunk.blocks.1"),
        (with_text(width=64), r"text.* has shape \[.*32.*\] in the checkpoint and \[.*64.*\] in the model"),
        (with_image(patch_size=4), r"patch_embed.proj.weight has shape \[32, 3, 8, 8\]"),
    ],
)
def test_a_checkpoint_of_another_architecture_changes_nothing(config: ModelConfig, message: str) -> None:
    model = build(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        load_state(model, build(TINY, seed=9).state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_foreign_weights_are_named() -> None:
    with pytest.raises(UserError, match=r"visual.layer1.0.conv1.weight has no place"):
        load_openclip(TINY, {"visual.layer1.0.conv1.weight": torch.zeros(1)})
