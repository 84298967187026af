"""The evidence lower bound of rules that draw a part of what they adapt: PLATIPUS and latent neural processes."""

from functools import partial

from torch import Tensor

from online_meta.batches import concat_support_query, count_samples, sum_weights
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.normals import draw_normal, kl_divergence
from online_meta.inner import Inner, drawing, fast_weights, init_carry, see_support
from online_meta.metagrads._adjoint import Beginning, differentiate_steps, pull_back
from online_meta.tree import add, scale
from online_meta.types import Batch, Carry, Inference, Meta, MetaGrad, MetaGradient, Params, Task


def variational(inner: Inner, *, kl_weight: float = 1.0, draws: int = 1) -> MetaGradient:
    """Return the estimator of the negative evidence lower bound of a task's query set, for each query sample.

    With the support set D and the query set D' of n samples it is

        E_q[f(U(theta; D))] + kl_weight / n KL(q(theta | D, D') || p(theta | D)).

    theta is the part of phi that the rule draws, and U the rest of the inner loop from there. f is the mean query loss,
    which should be a negative log-likelihood in nats. So n times the loss bounds -log p(D' | D) for ``kl_weight`` = 1.
    q has the form that the rule gives it (``InnerRule.infer``):

    - of ``platipus``, q is given the gradient of the query loss, and p that of the support loss (Finn, Xu & Levine,
      NeurIPS 2018, algorithm 1);
    - of ``encode`` with ``latent``, q encodes both sets, and p the support set (Garnelo et al., 2018, "Neural
      Processes");
    - of ``encode`` with ``prior = "standard"``, q encodes the query set, and p is N(0, I) (Edwards & Storkey, ICLR
      2017, "Towards a Neural Statistician").

    The gradient passes through theta = mean + std eps, with eps drawn by key (Kingma & Welling, ICLR 2014), and is
    exact for these draws.

    Args:
        inner: an inner loop whose rule has ``infer``.
        kl_weight: the weight of the divergence, at least 0. The bound holds for 1. If many weights are drawn and few
            samples are seen, all samples of the belief may become alike; a smaller weight prevents this.
        draws: the number of draws of theta that are averaged, at least 1. The cost is proportional to it.

    Returns:
        A function (meta, task) -> the bound and its gradient.

    Raises:
        ValueError: if an option is out of range, the rule has no ``infer`` or draws in a step that is not taken, or
            ``inner`` begins with fresh weights.
    """
    infer = inner.rule.infer
    if infer is None:
        raise ValueError(
            "variational needs an inner rule that draws a part of what adapts, and says how (infer): platipus, or "
            "encode with latent = true; other rules take another estimator, such as exact"
        )
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight is {kl_weight}: it is 0 or more, and 1 for the bound itself")
    if draws < 1:
        raise ValueError(f"draws is {draws}: it is 1 or more")
    if infer.sees == "gradient" and inner.steps < 1:
        raise ValueError(f"inner.steps is {inner.steps}: this rule draws in its first step, so it needs 1 step or more")
    if inner.begin != "weights":
        raise ValueError(f'variational learns the weights that each task starts from: begin = "{inner.begin}" has none')

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        run_step, skipped = differentiate_steps(inner, task.support), int(infer.sees == "gradient")
        total: MetaGrad | None = None
        for draw in range(draws):
            beginning = Beginning(partial(_begin, inner, infer, task, kl_weight, draw), skipped)
            found = pull_back(inner, meta, task, run_step, beginning=beginning)
            total = found if total is None else add(total, found)
        assert total is not None
        return total if draws == 1 else scale(total, 1 / draws)

    return outside_inference_mode(gradient)


def _begin(inner: Inner, infer: Inference, task: Task, kl_weight: float, draw: int, meta: Meta) -> tuple[Carry, Tensor]:
    """Return the carry with a draw of theta from q, and the weighted divergence from q to p for each query sample."""
    phi, support, query = fast_weights(inner, meta.weights), task.support, task.query
    evidence = query if infer.evidence == "query" else concat_support_query(task)

    def grads_of(batch: Batch) -> Params:
        # An empty set has no gradient; a rule takes {} for zeros.
        sees = infer.sees == "gradient" and count_samples(batch)
        return see_support(inner, meta, phi, batch, 0).grads if sees else {}

    posterior = infer.posterior(meta.rule, phi, evidence, grads_of(evidence))
    prior = infer.prior(meta.rule, phi, support, grads_of(support))
    with drawing(inner, query, draw, "posterior"):
        theta = draw_normal(posterior)
    started = init_carry(inner, meta, support)
    divergence = kl_weight * kl_divergence(posterior, prior) / sum_weights(query)
    return Carry({**started.phi, **theta}, started.state), divergence
