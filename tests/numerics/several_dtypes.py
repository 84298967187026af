"""Models, (n, 4) -> (n, 2), whose tensors have several dtypes, and what tests do with them."""

import torch
from torch import nn

import online_meta as om


def with_buffer(value, use):
    """Return a model 4 -> 2 that computes ``use(x, value)`` first."""

    class WithBuffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("value", value)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(use(x, self.value))

    return WithBuffer()


class FrozenBackbone(nn.Module):
    """A frozen body in low precision, as large pretrained models are loaded, and a float32 head."""

    def __init__(self, dtype):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8).to(dtype).requires_grad_(False), nn.Linear(8, 2)
        self.dtype = dtype

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.to(self.dtype))).float())


class LearnedInHalf(nn.Module):
    """A learned bfloat16 embedding before a float32 buffer and head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(4, 8).bfloat16())
        self.register_buffer("mean", torch.tensor([1000.1]))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head((x.bfloat16() @ self.embed).float() + (self.mean - 1000))


def batch(rows=6, seed=0, outputs=2):
    random = torch.Generator().manual_seed(seed)
    return om.Batch(torch.randn(rows, 4, generator=random), torch.randn(rows, outputs, generator=random))


def learned(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}


def setting(module, **options):
    inner = om.Inner(om.model_loss(module, "mse", **options), om.rules.sgd(lr=0.1), 2)
    return inner, inner.init(dict(module.named_parameters()))


class Tokens(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.add_module("2", embedding)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.get_submodule("2")(x))


class InHalf(nn.Module):
    """Runs a layer in bfloat16 between float32 layers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.bfloat16()).float()
