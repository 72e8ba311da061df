"""The numbers of a log line that come from the model and its last step.

They are computed at the log line only, and cross from the device in one piece.
"""

import torch

from clipkit.device import Device
from clipkit.model.clip import CLIP
from clipkit.model.exchange import first_row, gather_features
from clipkit.model.loss import SameCaption
from clipkit.train.optimizer import tensor_norms
from clipkit.train.recipes import Recipe
from clipkit.train.step import Step

# So many rows of each rank are looked at, against all columns: at a batch of 65,536 that makes 0.3 GB of logits.
ACCURACY_ROWS = 1024
EMBEDDINGS = ("patch_embed", "token_embedding", "pos_embed", "cls_token", "reg_token")


@torch.no_grad()
def model_metrics(model: CLIP, step: Step, caption_B: torch.Tensor, recipe: Recipe, device: Device) -> dict[str, float]:
    """Accuracy in the batch, logit scale, and the norms of the gradient and of the weights, by group.

    `step` is the last one and `caption_B` belongs to its batch. All ranks call this together.
    """
    to_text, to_image = batch_accuracy(step, caption_B, recipe.same_caption, gather=device.gathers)
    found = {
        "accuracy_image_to_text": device.mean(to_text),
        "accuracy_text_to_image": device.mean(to_image),
        "logit_scale": model.logit_scale.exp().clamp(max=100.0),
        "grad_norm": step.grad_norm,
    }
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradient_norm = dict(zip(trained, step.grad_norms_P.unbind(), strict=True))
    names, weights = zip(*model.named_parameters(), strict=True)
    weight_norm = dict(zip(names, tensor_norms(weights, device).unbind(), strict=True))
    for kind, norms in (("grad", gradient_norm), ("weight", weight_norm)):
        for group in sorted({group_of(name) for name in norms}):
            of_group = torch.stack([norm for name, norm in norms.items() if group_of(name) == group])
            found[f"{kind}_norm_{group}"] = torch.linalg.vector_norm(of_group)
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def batch_accuracy(
    step: Step, caption_B: torch.Tensor, same_caption: SameCaption, gather: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares of images that are nearest to their own text, and of texts nearest to their own image, as scalars.

    Of this rank's rows the first ACCURACY_ROWS count, against all texts (images) of the global batch but those that
    the loss doesn't take for negatives. A tie is wrong: where all features are the same, nothing is told apart.
    """
    B = len(caption_B)
    start, rows = first_row(B, gather), min(B, ACCURACY_ROWS)
    captions_N = gather_features(caption_B) if gather else caption_B
    same_RN = None if same_caption == "negative" else caption_B[:rows, None] == captions_N
    shares = []
    for queries_BE, keys_BE in ((step.image_BE, step.text_BE), (step.text_BE, step.image_BE)):
        keys_NE = gather_features(keys_BE) if gather else keys_BE
        logits_RN = queries_BE[:rows].float() @ keys_NE.float().T
        partner_R = logits_RN[:, start : start + rows].diagonal()
        own_R = partner_R.clone()
        partner_R.fill_(-torch.inf)
        if same_RN is not None:
            logits_RN.masked_fill_(same_RN, -torch.inf)
        shares.append((own_R > logits_RN.amax(dim=1)).float().mean())
    return shares[0], shares[1]


def group_of(name: str) -> str:
    """The group of a parameter: `image` and `text` are the towers' blocks and norms, `embeddings` those of patches,
    tokens and positions, `projections` what comes after the towers, scale and bias included.
    """
    if any(part in name for part in EMBEDDINGS):
        return "embeddings"
    tower = name.partition(".")[0]
    return tower if tower in ("image", "text") else "projections"
