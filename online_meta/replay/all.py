"""Full replay: every past round, at every meta-step."""

from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample
from online_meta.types import Params


def all() -> ReplayPolicy:
    """Return the policy that revisits every round once, at a cost that grows with the stream.

    It is the objective sum_{k<=t} f_k(U_k(w)) of Finn et al., ICML 2019, eq. 3, without sampling; ``batch`` is ignored.

    Returns:
        The policy.
    """

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        return [ReplaySample(int(round)) for round in request.rounds]

    return ReplayPolicy(sample)
