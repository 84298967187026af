"""The exact second-order meta-gradient."""

from collections.abc import Sequence

from online_meta.inner import Inner, step
from online_meta.metagrads._adjoint import StepFn, pull_back
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Task


def exact(
    inner: Inner, *, rematerialise: bool = False, offload: bool = False, step_weights: Sequence[float] | None = None
) -> MetaGradient:
    """Return the estimator of d f(U(w)) / dw, exact to rounding (MAML: Finn et al., ICML 2017, eq. 1).

    phi_{k+1} = update(phi_k, grad L(phi_k)) is differentiated whole, so the adjoint of a step holds
    (I - lr H_k) lambda for SGD; the memory is that of one step's graph and the trajectory phi_0..phi_K.
    With ``rematerialise`` only some 2 sqrt(K) points of the trajectory are kept, for one more pass through the loop.
    With ``offload`` they lie in the memory of the host while a GPU works, to the same bits; on a CPU nothing changes.
    With ``step_weights`` v_1..v_K the loss is sum_k v_k f(phi_k), the multi-step loss of MAML++ (Antoniou et al.,
    ICLR 2019, section 4); numbers of 0 or more, one a step. The gradient of the rule's own parameters is exact too.
    Raises ``ValueError`` when ``step_weights`` do not fit the steps.
    """
    weights = None if step_weights is None else [0.0, *_fitting(step_weights, inner.steps)]

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        def run_step(slow: Meta, carry: Carry, k: int) -> tuple[Carry, StepFn]:
            def step_fn(slow: Meta, carry: Carry) -> Carry:
                return step(inner, slow, carry, task.support, k)

            return step_fn(slow, carry), step_fn

        return pull_back(inner, meta, task, run_step, rematerialise=rematerialise, offload=offload, weights=weights)

    return gradient


def _fitting(step_weights: Sequence[float], steps: int) -> Sequence[float]:
    if len(step_weights) == steps and all(weight >= 0 for weight in step_weights) and sum(step_weights) > 0:
        return step_weights
    raise ValueError(
        f"step_weights are {[*step_weights]}: with {steps} inner steps they are {steps} numbers of 0 or more, "
        "one for the loss after each step, and not all 0"
    )
