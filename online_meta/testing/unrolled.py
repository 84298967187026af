"""Exact meta-gradients of any inner rule by brute force: one graph of the whole unrolled loop, no ``torch.func``."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from online_meta.functional.keyed import Role, keyed
from online_meta.functional.randomness import INIT_STEP, seeded
from online_meta.testing.oracle import CRITERIA
from online_meta.types import Batch, Carry, HeadSamples, InnerRule, LinearHead, Meta, MetaGrad, Params, Seen, Task


class Loop:
    """A module, the name of its loss and a rule, run by plain autograd."""

    def __init__(self, module: nn.Module, loss: str, rule: InnerRule, steps: int, fast: tuple[str, ...]) -> None:
        self.module, self.criterion, self.rule, self.steps, self.fast = module, CRITERIA[loss], rule, steps, fast

    def gradient(
        self,
        meta: Meta,
        task: Task,
        *,
        constant_gradients: bool = False,
        step_weights: Sequence[float] | None = None,
        cut: int | None = None,
    ) -> MetaGrad:
        """Return the query loss and its gradient; ``constant_gradients`` detaches the inner ones (first order).

        With ``step_weights`` the loss is their sum with the query losses after each step. With ``cut`` = n, the carry
        is detached before steps n, 2n, ....
        """
        leaves = Meta(
            *({name: value.detach().clone().requires_grad_() for name, value in part.items()} for part in meta)
        )
        _, *after = losses = [
            self._loss(leaves, carry.phi, task.query, INIT_STEP, "query")
            for carry in self._carries(leaves, task.support, constant_gradients, cut)
        ]
        loss = losses[-1]
        if step_weights is not None:
            loss = torch.stack([weight * one for weight, one in zip(step_weights, after, strict=True)]).sum()
        given = [*leaves.weights.values(), *leaves.rule.values()]
        grads = iter(torch.autograd.grad(loss, given, materialize_grads=True))
        return MetaGrad(loss.detach(), Meta(*({name: next(grads) for name in part} for part in leaves)))

    def _carries(self, meta: Meta, support: Batch, constant_gradients: bool, cut: int | None) -> Iterator[Carry]:
        phi = {name: w for name, w in meta.weights.items() if any(fnmatchcase(name, glob) for glob in self.fast)}
        with (
            seeded(support, INIT_STEP),
            keyed(support, INIT_STEP, "begin"),
        ):  # what a random rule draws is part of what it is given
            carry = self.rule.start(meta.rule, self._replace_head(meta, phi, support), support)
        # A rule may start from weights that are no function of the given ones; gradients are taken there all the same.
        # A weight of phi may depend on others of the given ones, which are then others than those of phi.
        started = {
            n: value.clone() if value.requires_grad else value.detach().requires_grad_()
            for n, value in carry.phi.items()
        }
        carry = Carry(started, carry.state)
        yield carry
        for k in range(self.steps):
            if cut and k and k % cut == 0:
                carry = Carry(
                    {name: value.detach().requires_grad_() for name, value in carry.phi.items()},
                    {name: value.detach() for name, value in carry.state.items()},
                )
            loss = self._loss(meta, carry.phi, support, k + 1, "step")
            grads = {}
            if self.rule.sees == "gradient":
                found = torch.autograd.grad(loss, list(carry.phi.values()), create_graph=True, materialize_grads=True)
                grads = dict(zip(carry.phi, found, strict=True))
            if constant_gradients:
                grads = {name: grad.detach() for name, grad in grads.items()}
            with keyed(support, k + 1, "update"):
                carry = self.rule.update(meta.rule, carry, Seen(loss, grads, len(support.y)), k)
            yield carry

    def _replace_head(self, meta: Meta, phi: Params, support: Batch) -> Params:
        """Return phi with the rule's head, whose features the last linear layer of the module shows."""
        if self.rule.head is None:
            return phi
        name = [name for name, layer in self.module.named_modules() if type(layer) is nn.Linear][-1]
        shown: list[Tensor] = []
        hook = self.module.get_submodule(name).register_forward_pre_hook(lambda layer, given: shown.append(given[0]))
        modes = {layer: layer.training for layer in self.module.modules()}
        self.module.eval()
        try:
            with sdpa_kernel(SDPBackend.MATH):
                functional_call(self.module, self.rule.view(meta.rule, {**meta.weights, **phi}), (support.x,))
        finally:
            hook.remove()
            for layer, mode in modes.items():
                layer.training = mode
        assert isinstance(support.y, Tensor)
        given = LinearHead(meta.weights[f"{name}.weight"], meta.weights[f"{name}.bias"])
        of_classes = not support.y.is_floating_point()
        targets = torch.eye(len(given.weight)).to(shown[0])[support.y] if of_classes else support.y
        samples = HeadSamples(
            shown[0], targets, shown[0].new_ones(len(targets)), "classes" if of_classes else "numbers"
        )
        found = self.rule.head.solve(meta.rule, samples, given)
        assert found.bias is not None
        return {**phi, f"{name}.weight": found.weight, f"{name}.bias": found.bias}

    def _loss(self, meta: Meta, phi: Params, batch: Batch, draw: int, role: Role) -> Tensor:
        # The masks of dropout are what the package says that they are: a function of the batch and the step.
        with seeded(batch, draw), keyed(batch, draw, role), sdpa_kernel(SDPBackend.MATH):
            weights = {**meta.weights, **phi}
            particles = self.rule.particles or (lambda rule, weights: [self.rule.view(rule, weights)])
            outputs = [functional_call(self.module, each, (batch.x,)) for each in particles(meta.rule, weights)]
            if role == "query":
                outputs = [mix_outputs(self.criterion, outputs)]
            return torch.stack([self.criterion(output, batch.y) for output in outputs]).sum()


def mix_outputs(criterion: object, outputs: Sequence[Tensor]) -> Tensor:
    """Return the output that says what several ones say together: their mean, or the logits of their mean."""
    if len(outputs) == 1:
        return outputs[0]
    if criterion is CRITERIA["cross_entropy"]:
        return torch.stack([one.softmax(1) for one in outputs]).mean(0).log()
    return torch.stack([*outputs]).mean(0)
