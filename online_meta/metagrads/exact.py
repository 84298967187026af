"""The exact second-order meta-gradient."""

from online_meta.adjoint import Move, pull_back
from online_meta.inner import Inner, step
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Task


def exact(inner: Inner) -> MetaGradient:
    """Return the estimator of d f(U(w)) / dw, exact to rounding (MAML: Finn et al., ICML 2017, eq. 1).

    phi_{k+1} = update(phi_k, grad L(phi_k)) is differentiated whole, so the adjoint of a step holds
    (I - lr H_k) lambda for SGD; the memory is that of one step's graph and the trajectory phi_0..phi_K.
    A rule that ``torch.func`` can differentiate gets exact gradients for its own parameters too.
    """

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        def play(held: Meta, carry: Carry, k: int) -> tuple[Carry, Move]:
            def move(held: Meta, carry: Carry) -> Carry:
                return step(inner, held, carry, task.support, k)

            return move(held, carry), move

        return pull_back(inner, meta, task, play)

    return gradient
