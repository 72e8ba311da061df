"""The model: an image tower and a text tower that share an embedding space (Radford et al., 2021).

`build` makes one whose weights are a function of only its configuration and a seed; `load_state` copies in a
checkpoint's weights. CLIPA trains on small images and short captions, then goes on with large and long ones, so the
position embeddings are resized where the image size or the context length has changed.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.errors import UserError
from clipkit.model.config import ImageConfig, ModelConfig, Projection, TextConfig, check_choices, tower_dim
from clipkit.model.heads import Head, make_head
from clipkit.model.image_tower import ConvStem, ImageTower, make_image_tower
from clipkit.model.text_tower import Buckets, Prefixes, Recompute, TextTower
from clipkit.model.timm_tower import TimmTower

LOG_SCALE_MAX = math.log(100.0)


class CLIP(nn.Module):
    """Two towers, their projections and perhaps heads, and the logit scale.

    Static shapes, no value read back from the device, nothing that depends on the values: the same code runs on CPU,
    CUDA and XLA. Under `torch.autocast` the towers run in its dtype; the projections, norms and everything that makes
    logits stay in float32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_choices(config, "model")
        self.config = config
        self.image = make_image_tower(config.image)
        self.text = TextTower(config.text)
        self.image_head = head_of("image", config.image, config.embed_dim)
        self.text_head = head_of("text", config.text, config.embed_dim)
        image_dim, text_dim = (tower_dim(each, config.embed_dim) for each in (config.image, config.text))
        self.image_projection = make_projection(config.image.projection, self.image.width, image_dim)
        self.text_projection = make_projection(config.text.projection, config.text.width, text_dim)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None if config.logit_bias_init is None else nn.Parameter(torch.empty(()))
        if not isinstance(self.image, TimmTower):
            check_frozen("image", config.image.frozen, len(self.image.trunk.blocks))
        check_frozen("text", config.text.frozen, len(self.text.blocks))

    def encode_image(self, image_BCHW: Tensor, keep_BK: Tensor | None = None, normalize: bool = True) -> Tensor:
        """float[B, 3, S, S] normalised pixels -> float32[B, E]. `keep_BK` as for `ImageTower`."""
        size = self.image.image_size
        if tuple(image_BCHW.shape[2:]) != (size, size):
            got = "x".join(str(side) for side in image_BCHW.shape[2:])
            raise UserError(f"images of {got} px, the model takes {size}: set model.image.image_size to match")
        return embed(self.image(image_BCHW, keep_BK), self.image_projection, self.image_head, normalize)

    def encode_text(self, ids_BT: Tensor, normalize: bool = True, buckets: Buckets | None = None) -> Tensor:
        """int[B, T] ids with start and end, zero padded -> float32[B, E]. `buckets` as for `TextTower`."""
        return embed(self.text(ids_BT, buckets), self.text_projection, self.text_head, normalize)

    def encode_prefixes(self, prefixes: Prefixes) -> Tensor:
        """The same vectors of texts without gradients, in less time where they begin alike."""
        return embed(self.text.by_prefixes(prefixes), self.text_projection, self.text_head)

    def forward(
        self, image_BCHW: Tensor, ids_BT: Tensor, keep_BK: Tensor | None = None, buckets: Buckets | None = None
    ) -> tuple[Tensor, ...]:
        """Unit vectors float32[B, E] of the images and of the texts, the logit scale (a scalar of at most 100), and the
        logit bias where the model has one. All that a loss needs comes out of here, as data parallelism wants it.

        In the place of pixels the image tower's vectors may come, float32[B, D], and so in the place of ids the text
        tower's.
        """
        if ids_BT.is_floating_point():
            text_BE = embed(ids_BT, None, self.text_head)
        else:
            text_BE = self.encode_text(ids_BT, buckets=buckets)
        if image_BCHW.ndim == 4:
            image_BE = self.encode_image(image_BCHW, keep_BK)
        else:
            image_BE = embed(image_BCHW, None, self.image_head)
        features = image_BE, text_BE, self.clamped_logit_scale()
        return features if self.logit_bias is None else (*features, self.logit_bias * 1)

    def clamped_logit_scale(self) -> Tensor:
        """exp(logit_scale), at most 100.

        OpenCLIP clamps the parameter after each optimizer step; here it is clamped when a training step first uses it,
        which gives the same numbers and needs nothing outside. (Clamping only the value would stop
        the gradient as soon as a step overshoots, and the scale would stay at 100 for good.)
        """
        if self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(max=LOG_SCALE_MAX)
            return self.logit_scale.exp()
        return self.logit_scale.clamp(max=LOG_SCALE_MAX).exp()

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of both towers."""
        image = [] if isinstance(self.image, TimmTower) else list(self.image.trunk.blocks)
        return [*image, *self.text.blocks]

    def compile_step(self, *, by_block: bool = False, backend: str = "inductor") -> None:
        """Make one graph of the training step's forward pass, and one of its backward pass, or those `by_block`. Where
        the text tower leaves padding out, whose shapes differ from batch to batch, of the image tower's only.
        """
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        if by_block:
            for block in self.blocks():
                block.compile(**options | {"dynamic": None})
        elif self.text.skips_padding:
            self.image.compile(**options)
        else:
            self.compile(**options)

    def recompute_activations(self, recompute: Recompute | None) -> None:
        """Trade time for memory in training: keep only each block's input, compute the rest again in the backward pass.

        `recompute` is how (`Device.recompute`); None keeps all activations. Raises UserError for towers without blocks.
        """
        if isinstance(self.image, TimmTower) and recompute is not None:
            raise UserError(
                f"checkpoint_activations isn't for {self.config.image.name}: set it to false, and a smaller micro_batch"
            )
        self.image.recompute = recompute
        self.text.recompute = recompute

    def freeze(self) -> None:
        """Keep what the configuration calls frozen from being trained. Call it before the optimizer is made.

        Raises UserError when only the temperature is left.
        """
        for part in self.frozen_parts():
            for parameter in part.parameters() if isinstance(part, nn.Module) else (part,):
                parameter.requires_grad_(False)
        scalars = (self.logit_scale, self.logit_bias)
        if not any(each.requires_grad for each in self.parameters() if all(each is not scalar for scalar in scalars)):
            raise UserError(
                "model.image.frozen and model.text.frozen leave nothing to train: set one of them to false, or give a "
                "tower a head (model.image.head=glu)"
            )

    def frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        """The parts of both towers that the configuration calls frozen."""
        parts: list[nn.Module | nn.Parameter | None] = []
        image, text = self.config.image.frozen, self.config.text.frozen
        if image is True:
            parts += [self.image, self.image_projection]
        elif image:
            trunk = self.image.trunk
            parts += [trunk.patch_embed, trunk.cls_token, trunk.reg_token, trunk.pos_embed, trunk.norm_pre]
            parts += trunk.blocks[:image]
        if text is True:
            parts += [self.text, self.text_projection]
        elif text:
            parts += [self.text.token_embedding, self.text.pos_embed, *self.text.blocks[:text]]
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> "CLIP":
        """As for any module, but frozen parts stay in evaluation mode: their norms and dropout change nothing."""
        super().train(mode)
        for part in self.frozen_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every weight, from one CPU generator: the same seed gives the same weights on every device.

        The text tower is CLIP's published initialisation. CLIP publishes none for the blocks of its image tower
        (PyTorch's defaults of 2021 act there), so they get the text tower's rule: normal, with standard deviation
        width^-0.5 for attention inputs, (2 width)^-0.5 for the first layer of the MLP, and width^-0.5 (2 depth)^-0.5
        for what is added to the residual stream. Class token, image positions, projections and attention pooling:
        normal, width^-0.5. A `TimmTower` has timm's initialisation.
        """
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.fill_(torch.nan)

        def normal(tensor: Tensor, std: float) -> None:
            tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))

        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            if isinstance(module, nn.LayerNorm | nn.Linear | nn.Conv2d) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, LayerScale):
                module.gamma.fill_(getattr(module, "init_values", 1e-5))

        towers: list[tuple[Any, int]] = [(self.text.blocks, self.config.text.width)]
        pool: Any = None
        if isinstance(self.image, TimmTower):
            self.image.reset(seed)
        else:
            init_embeddings(self.image, normal)
            towers.insert(0, (self.image.trunk.blocks, self.image.width))
            pool = self.image.trunk.attn_pool
        normal(self.text.token_embedding.weight, 0.02)
        normal(self.text.pos_embed, 0.01)

        for blocks, width in towers:
            for block in blocks:
                normal(block.attn.qkv.weight, width**-0.5)
                normal(block.attn.proj.weight, (2 * width * len(blocks)) ** -0.5)
                normal(block.mlp.fc1.weight, (2 * width) ** -0.5)
                normal(block.mlp.fc2.weight, (2 * width * len(blocks)) ** -0.5)

        pooling_layers = () if pool is None else pool.modules()
        for layer in (self.image_projection, self.text_projection, *pooling_layers):
            if isinstance(layer, nn.Linear):
                normal(layer.weight, layer.in_features**-0.5)
        if pool is not None:
            normal(pool.latent, self.image.width**-0.5)
        for head in (self.image_head, self.text_head):
            for layer in head.modules():
                if isinstance(layer, nn.Linear):
                    normal(layer.weight, layer.in_features**-0.5)
        self.logit_scale.fill_(math.log(self.config.logit_scale_init))
        if self.logit_bias is not None and self.config.logit_bias_init is not None:
            self.logit_bias.fill_(self.config.logit_bias_init)

        for name, parameter in self.named_parameters():
            if parameter.flatten()[0].isnan():
                raise UserError(f"no rule to initialise {name}: set model.image.name to a plainer vit_* model")


def check_frozen(tower: str, frozen: int | bool, depth: int) -> None:
    """UserError for what can't be frozen of a tower with `depth` blocks."""
    if not isinstance(frozen, int) or not 0 <= frozen <= (1 if isinstance(frozen, bool) else depth):
        raise UserError(f"model.{tower}.frozen {frozen!r}: take true, false, or a number of blocks from 1 to {depth}")


def head_of(tower: str, config: ImageConfig | TextConfig, embed_dim: int) -> nn.Module:
    """The head of a tower, an identity where it has none. Raises UserError for sizes without a head, or below 1."""
    if config.head != "none":
        return make_head(tower, config, embed_dim)
    if config.head_input is not None:
        raise UserError(f"model.{tower}.head_input={config.head_input} needs a head: set model.{tower}.head=glu")
    return nn.Identity()


def embed(x_BD: Tensor, projection: nn.Module | None, head: nn.Module, normalize: bool = True) -> Tensor:
    """A tower's vectors, or stored ones, which need no projection, in the shared space: float32[B, E]."""
    with float32_maths(x_BD.device):
        x_BE = into_space(x_BD if projection is None else projection(x_BD.float()), head)
        return F.normalize(x_BE, dim=-1) if normalize else x_BE


def into_space(x_BD: Tensor, head: nn.Module) -> Tensor:
    """What a tower and its projection made of something, in the shared space: its unit vector through the head."""
    if not isinstance(head, Head):
        return x_BD
    x_BE: Tensor = head(F.normalize(x_BD, dim=-1))
    return x_BE


def make_projection(kind: Projection, width: int, dim: int) -> nn.Module:
    """From a tower's vector to the shared space, or to what a head reads. Raises UserError where none is asked for and
    the sizes differ.
    """
    if kind == "none":
        if width != dim:
            raise UserError(f"projection=none needs a width of model.embed_dim, {dim}, not {width}: set either")
        return nn.Identity()
    return nn.Linear(width, dim, bias=kind == "bias")


def init_embeddings(tower: ImageTower, normal: Callable[[Tensor, float], None]) -> None:
    """Set a vision transformer's stem, tokens and positions; `normal` draws a tensor of that standard deviation."""
    trunk = tower.trunk
    if isinstance(trunk.patch_embed, ConvStem):
        for layer in trunk.patch_embed.layers:
            if isinstance(layer, nn.Conv2d):
                normal(layer.weight, math.sqrt(2 / layer.weight[0].numel()))  # He et al., 2015
    projection = trunk.patch_embed.proj.weight
    normal(projection, (3 * projection[0].numel()) ** -0.5)  # the spread of PyTorch's default, as in CLIP
    for token in (trunk.cls_token, trunk.reg_token):
        if token is not None:
            normal(token, tower.width**-0.5)
    if tower.fixed:
        trunk.pos_embed.copy_(tower.fixed_positions())
    else:
        normal(trunk.pos_embed, tower.width**-0.5)


def float32_maths(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on `device`: for what must be exact although the towers run in bfloat16."""
    return torch.autocast(device.type, enabled=False)


def build(config: ModelConfig, seed: int = 0) -> CLIP:
    """A model on the CPU in float32, its weights a function of only `config` and `seed`.

    Raises UserError for a configuration that can't be built.
    """
    model = _allocate(config)
    model.init_weights(seed)
    return model


def allocate(config: ModelConfig) -> CLIP:
    """A model whose weights aren't set yet: `load_state` sets all of them.

    Nothing is initialised twice (seconds, for ViT-L), and torch's global generator isn't touched.
    """
    model = _allocate(config)
    if isinstance(model.image, TimmTower):
        model.image.reset(seed=0)  # it may have buffers that aren't weights
    return model


def _allocate(config: ModelConfig) -> CLIP:
    with torch.device("meta"):
        model = CLIP(config)
    return model.to_empty(device="cpu")


@torch.no_grad()
def load_state(
    model: CLIP,
    tensors: Mapping[str, Tensor],
    remedy: str = "use the architecture that the checkpoint's config.json names",
) -> None:
    """Copy a checkpoint's tensors into `model`, whatever device and dtype it is in.

    Image positions of another grid are interpolated, text positions cut or interpolated; a model
    with fixed positions keeps its own. Anything else that doesn't fit is a UserError, and then nothing was copied;
    `remedy` says what to do about it.
    """
    state = model.state_dict()
    fitted = fit_positions(model, tensors)
    for name, tensor in state.items():
        if name not in fitted:
            raise UserError(f"the checkpoint has no {name}: {remedy}")
        if fitted[name].shape != tensor.shape:
            raise UserError(
                f"{name} has shape {list(fitted[name].shape)} in the checkpoint and {list(tensor.shape)} in the model: "
                f"{remedy}"
            )
    unknown = sorted(set(fitted) - set(state))
    if unknown:
        raise UserError(f"the model has no {unknown[0]}: {remedy}")
    for name, tensor in state.items():
        tensor.copy_(fitted[name])


def fit_positions(model: CLIP, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the two position embeddings as large as the model's."""
    fitted = dict(tensors)
    image_key, text_key = "image.trunk.pos_embed", "text.pos_embed"
    if isinstance(model.image, TimmTower):
        pass  # its positions, if it has any, may be of any kind
    elif model.image.fixed:
        fitted[image_key] = model.image.fixed_positions()
    elif image_key in fitted:
        fitted[image_key] = resize_image_positions(fitted[image_key], model.image.grid, model.image.position_prefix)
    if text_key in fitted:
        fitted[text_key] = resize_text_positions(fitted[text_key], len(model.text.pos_embed))
    return fitted


def resize_image_positions(position_1ND: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """[1, prefix + n, D] of a square grid to [1, prefix + h * w, D], bicubic and antialiased as in timm and OpenCLIP.

    The first `prefix` positions (the class token's) are kept as they are. What isn't of a square grid is returned as
    it is, for `load_state` to refuse.
    """
    count = position_1ND.shape[1] - prefix if position_1ND.ndim == 3 else 0
    side = math.isqrt(max(0, count))
    if (side, side) == grid or count < 1 or side * side != count:
        return position_1ND
    tokens_ND, patches_ND = position_1ND[0, :prefix], position_1ND[0, prefix:]
    image_1DHW = patches_ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image_1DHW = F.interpolate(image_1DHW, size=grid, mode="bicubic", antialias=True, align_corners=False)
    resized_ND = image_1DHW[0].flatten(1).T.to(patches_ND.dtype)
    return torch.cat([tokens_ND, resized_ND])[None]


def resize_text_positions(position_TD: Tensor, context_length: int) -> Tensor:
    """[T, D] to [context_length, D].

    Longer: linear interpolation, as OpenCLIP and CLIPA do from pre-training to fine-tuning. Shorter: the first
    positions, because token i of a truncated caption is still token i. OpenCLIP squeezes all positions together there,
    which moves every token; who needs that can do it before loading.
    """
    if context_length <= len(position_TD):
        return position_TD[:context_length].clone()
    line_1DT = F.interpolate(position_TD.float().T[None], size=context_length, mode="linear", align_corners=False)
    return line_1DT[0].T.to(position_TD.dtype).contiguous()
