"""Heads: small networks that bring the vectors of frozen towers into a shared space (Zhang et al., 2024, "SAIL").

A head reads a tower's unit vector, which is what `clipkit embed` stores. Its layer norm gives the numbers of that
vector a spread of 1, whatever the width.
"""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.errors import UserError
from clipkit.model.config import ImageConfig, TextConfig, tower_dim

PREFIXES = ("image_head.", "text_head.")
"""What the names of heads' weights begin with."""


class Head(nn.Module):
    """float32[B, D] -> float32[B, E]. `linear`: a matrix. `mlp`: two, with GELU between them. `glu`: what two matrices
    make, one of them behind a ReLU, is multiplied number by number, and a third matrix follows.
    """

    def __init__(self, kind: str, width: int, hidden: int, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, hidden) if kind == "glu" else None
        self.fc1 = nn.Linear(width, hidden) if kind != "linear" else None
        self.out = nn.Linear(width if kind == "linear" else hidden, embed_dim)

    def forward(self, x_BD: Tensor) -> Tensor:
        x = self.norm(x_BD)
        if self.fc1 is not None:
            x = F.gelu(self.fc1(x)) if self.gate is None else F.relu(self.gate(x)) * self.fc1(x)
        return cast(Tensor, self.out(x))


def make_head(tower: str, config: ImageConfig | TextConfig, embed_dim: int) -> Head:
    """The head of a tower that has one. Raises UserError for sizes below 1."""
    width = tower_dim(config, embed_dim)
    hidden = int(width * config.head_ratio)
    if width < 1 or hidden < 1:
        raise UserError(
            f"model.{tower}.head_input={config.head_input} and head_ratio={config.head_ratio} make a head of no width: "
            "set larger ones"
        )
    return Head(config.head, width, hidden, embed_dim)
