"""The exact second-order meta-gradient."""

from collections.abc import Sequence

from online_meta.functional.autodiff import outside_inference_mode
from online_meta.inner import Inner, step
from online_meta.metagrads._adjoint import StepFn, pull_back
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Task


def exact(
    inner: Inner, *, rematerialise: bool = False, offload: bool = False, step_weights: Sequence[float] | None = None
) -> MetaGradient:
    """Return the estimator of d f(U(w)) / dw, exact to rounding (MAML: Finn et al., ICML 2017, eq. 1).

    It differentiates all of phi_{k+1} = update(phi_k, grad L(phi_k)), so the adjoint of an SGD step is
    (I - lr H_k) lambda. The memory is one step's graph and the trajectory phi_0..phi_K. The gradient of the rule's own
    parameters is exact too.

    Args:
        inner: the inner loop of K steps.
        rematerialise: store about 2 sqrt(K) points of the trajectory instead of K, for one more pass through the loop.
        offload: store the trajectory in host memory if the task is on a GPU; the result has the same bits.
        step_weights: v_1..v_K, not negative and not all 0: the loss is then sum_k v_k f(phi_k), the multi-step loss of
            MAML++ (Antoniou et al., ICLR 2019, section 4). None for f(phi_K).

    Returns:
        A function (meta, task) -> the query loss and its gradient.

    Raises:
        ValueError: if there are not K ``step_weights``, one is negative or all are 0.
    """
    weights = None if step_weights is None else [0.0, *_fitting(step_weights, inner.steps)]

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        def run_step(slow: Meta, carry: Carry, k: int) -> tuple[Carry, StepFn]:
            def step_fn(slow: Meta, carry: Carry) -> Carry:
                return step(inner, slow, carry, task.support, k)

            return step_fn(slow, carry), step_fn

        return pull_back(inner, meta, task, run_step, rematerialise=rematerialise, offload=offload, weights=weights)

    return outside_inference_mode(gradient)


def _fitting(step_weights: Sequence[float], steps: int) -> Sequence[float]:
    if len(step_weights) == steps and all(weight >= 0 for weight in step_weights) and sum(step_weights) > 0:
        return step_weights
    raise ValueError(
        f"step_weights are {[*step_weights]}: with {steps} inner steps they are {steps} numbers of 0 or more, "
        "one for the loss after each step, and not all 0"
    )
