"""First-order MAML: the inner gradients count as constants."""

from online_meta.adjoint import Move, pull_back
from online_meta.inner import Inner, support_gradient
from online_meta.inner import move as advance
from online_meta.types import Carry, Meta, MetaGrad, MetaGradient, Task


def first_order(inner: Inner) -> MetaGradient:
    """Return the estimator that holds every inner gradient g_k = grad L(phi_k) constant.

    For SGD the adjoint passes through the steps unchanged, grads = grad f(phi_K): FOMAML (Finn et
    al., ICML 2017, section 5.2). A rule's own parameters get their first-order gradient too.
    """

    def gradient(meta: Meta, task: Task) -> MetaGrad:
        def play(held: Meta, carry: Carry, k: int) -> tuple[Carry, Move]:
            constant = support_gradient(inner, held, carry.phi, task.support, k)

            def move(held: Meta, carry: Carry) -> Carry:
                return advance(inner, held, carry, constant, task.support, k)

            return move(held, carry), move

        return pull_back(inner, meta, task, play)

    return gradient
