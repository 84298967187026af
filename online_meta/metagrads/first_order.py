"""First-order MAML: treats the inner gradients as constants."""

from online_meta.functional.autodiff import outside_inference_mode
from online_meta.inner import Inner, apply_update, support_gradient
from online_meta.metagrads._adjoint import StepFn, pull_back
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Task


def first_order(inner: Inner) -> MetaGradient:
    """Return the estimator that treats every inner gradient g_k = grad L(phi_k) as a constant.

    For SGD the adjoint passes through the steps unchanged, so the gradient is grad f(phi_K): FOMAML (Finn et
    al., ICML 2017, section 5.2). A rule's own parameters get their first-order gradient too.

    Args:
        inner: the inner loop.

    Returns:
        A function (meta, task) -> the query loss and the first-order gradient.
    """

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        def run_step(slow: Meta, carry: Carry, k: int) -> tuple[Carry, StepFn]:
            constant = support_gradient(inner, slow, carry.phi, task.support, k)

            def step_fn(slow: Meta, carry: Carry) -> Carry:
                return apply_update(inner, slow, carry, constant, task.support, k)

            return step_fn(slow, carry), step_fn

        return pull_back(inner, meta, task, run_step)

    return outside_inference_mode(gradient)
