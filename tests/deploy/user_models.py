"""Models as a user might write them, most of them wrong."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def running_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def batch_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))


class MaskedMean(nn.Module):
    """The mean over a sequence, which is right only if it leaves out what the mask leaves out."""

    def __init__(self, masks: bool = True) -> None:
        super().__init__()
        self.layer, self.masks = nn.Linear(1, 1), masks

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        made = torch.tanh(self.layer(values[..., None]))[..., 0]
        mean = (made * mask).sum(1) / mask.sum(1).clamp(min=1e-3) if self.masks else made.mean(1)
        return mean[:, None]


def frozen_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 1))


class Squeezed(nn.Module):
    """Its output has shape (n,), where y has shape (n, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, 0]


def squared(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def absolute_of_rows(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).abs().sum(1)


class Copied(nn.Module):
    """Each copy of it computes something else."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(1, 1), scale

    def __deepcopy__(self, memo: dict[int, object]) -> "Copied":
        return Copied(self.scale + 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


class CopiedForPositives(Copied):
    """Its copies are right for the inputs between 0 and 1 that a check makes up, and wrong for negative ones."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Copied":
        return CopiedForPositives(self.scale + 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.where(x < 0, self.scale * x, x))


class Rounded(nn.Module):
    """A straight-through estimator between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.head = nn.Linear(1, 8), Rounding(), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.layer(x)))


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()


def own_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))


class Unseeded(nn.Module):
    """Its noise comes from no layer, so preflight cannot see that it is random."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(1, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.layer(x), 0.5))


def raises() -> nn.Module:
    raise KeyError("no such layer")


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(1, 8)), nn.Tanh(), nn.Linear(8, 1))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(1, 8), nn.Linear(8, 1)


class Idle(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)))


class Detached(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return self.head(y / y.detach().norm())


class InPlace(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(self.layer(x))
        y *= 2
        return self.head(y)


class Checkpointed(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: torch.tanh(self.layer(x)), x, use_reentrant=False))


class Deaf(nn.Module):
    """Its output does not depend on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.weight


class Masked(nn.Module):
    """The mean of the embeddings of the tokens whose mask is 1, then a linear layer: a model with two inputs."""

    def __init__(self, tokens: int = 12, width: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(tokens, width), nn.Linear(width, outputs)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        each = torch.tanh(self.embedding(tokens)) * mask[..., None]
        return self.head(each.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


class Endless(nn.Module):
    """Its output is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight / (0 * x)


def pixels() -> nn.Module:
    """Return logits of three classes at each pixel."""
    return nn.Conv2d(1, 3, 3, padding=1)


class Finder(nn.Module):
    """Logits of three classes and a box, from two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.box = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, image: Tensor, hint: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.body(torch.cat([image, hint], 1)))
        return {"kind": self.kind(features), "box": self.box(features)}


def found(output: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
    """Return the loss of each row of a ``Finder``."""
    return F.cross_entropy(output["kind"], y["kind"], reduction="none") + (output["box"] - y["box"]).square().sum(1)


class MixtureDensity(nn.Module):
    """Three normal distributions for each target: a mean, a scale and a logit of each, (n, outputs, 3)."""

    def __init__(self, inputs: int, outputs: int, hidden: list[int]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(inputs, *hidden), nn.Linear(*hidden, outputs * 9)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.head(torch.tanh(self.body(x))).unflatten(1, (3, -1, 3))
        return dict(zip(("mean", "scale", "logit"), found.unbind(1), strict=True))


def three() -> nn.Module:
    """Return three numbers for two."""
    return nn.Linear(2, 3)


class Tagger(nn.Module):
    """Logits of three classes for each token, (n, 3, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x))).mT


class TextAndNumbers(nn.Module):
    """The mean over the tokens of a text that are no padding, next to numbers, then a linear layer."""

    def __init__(self, ways: int = 2, width: int = 4) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(31_000, width), nn.Linear(width + 2, ways)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        known = (tokens != 0)[..., None]
        mean = (self.embedding(tokens) * known).sum(1) / known.sum(1).clamp(min=1)
        return self.head(torch.cat([mean, features], 1))
