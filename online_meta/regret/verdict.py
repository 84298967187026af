"""Say in one sentence whether meta-learning pays on a stream, from intervals that hold at all times."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from online_meta.regret.differences import ALPHA, MIN_ROUNDS, Differences, Verdict, confidence_sequence, judge

VerdictState = Literal["pays", "does_not", "too_early"]

LITTLE_WEIGHT = 0.01
"""An expert with a smaller share of the pool's weight hardly changes what the pool answers."""


MOST_WEIGHT = 0.5
"""Meta-learning is what pays only if its learners have at least this share of the pool's weight."""
WITHOUT = "the best that does not learn across tasks"


class PlayingAnswer(NamedTuple):
    """An answer that plays the same rounds as the pool, or as the leader where there is no pool.

    Attributes:
        name: of the answer, such as "ftml@10".
        meta_learns: whether its learner learns across tasks how to adapt to a new one.
        differences: of the losses, "the pool's minus its own", over the rounds.
        loss: its mean loss in these rounds.
        weight: its mean share of the pool's weight over the last rounds; None if it is no expert of a pool.
    """

    name: str
    meta_learns: bool
    differences: Differences
    loss: float
    weight: float | None = None


class Dispensable(NamedTuple):
    """A learner that can be switched off without a loss.

    Attributes:
        learner: its name.
        weight: the mean share of the pool's weight that its answers have had over the last rounds; 0 without a pool.
        seconds_per_round: what it costs to score and to learn a round; None if it is not known.
    """

    learner: str
    weight: float
    seconds_per_round: float | None


class MetaLearningVerdict(NamedTuple):
    """Whether meta-learning pays.

    Attributes:
        state: "pays", "does_not" or "too_early".
        sentence: the same for people.
        reference: the answer that is compared with the others: the pool, or the leader where there is none.
        weights: the mean share of the pool's weight by expert, over the last rounds; empty without a pool.
        seconds_per_round: what each learner costs, where it is known.
        advice: one sentence on the learners that can be switched off; "" if there is none.
        best_without: the best answer that does not learn across tasks; None if nothing is compared.
        rounds: the number of rounds that are compared.
        gain: the mean loss of ``best_without`` minus that of ``reference``; None if nothing is compared.
        interval: a confidence sequence of the gain, see ``give_verdict``; None with too few rounds.
        can_be_switched_off: the learners that can be, the most expensive first.
    """

    state: VerdictState
    sentence: str
    reference: str
    weights: dict[str, float]
    seconds_per_round: dict[str, float]
    advice: str = ""
    best_without: str | None = None
    rounds: int = 0
    gain: float | None = None
    interval: tuple[float, float] | None = None
    can_be_switched_off: tuple[Dispensable, ...] = ()


class _Judged(NamedTuple):
    """An answer, the interval of the mean difference from it, and what the interval shows of the reference."""

    answer: PlayingAnswer
    interval: tuple[float, float] | None
    shows: Verdict

    def gain(self) -> float:
        return -self.answer.differences.mean()

    def width(self) -> float:
        return 0.0 if self.interval is None else (self.interval[1] - self.interval[0]) / 2


def give_verdict(
    answers: Sequence[PlayingAnswer],
    reference: str,
    level_margin: float,
    *,
    leader: str,
    leader_meta_learns: bool = True,
    seconds_per_round: Mapping[str, float] | None = None,
    alpha: float = ALPHA,
) -> MetaLearningVerdict:
    """Return whether the ``reference``, a pool or the leader, loses less than all that does not learn across tasks.

    The m answers that do not learn across tasks each get the confidence sequence of ``differences.confidence_sequence``
    at ``alpha`` / m, so that all of them hold at all rounds at once with (asymptotic) probability 1 - ``alpha``, also
    that of the one which is chosen afterwards because it has lost least (union bound). Meta-learning

    - *pays* if the reference is ahead of every one of the m, each by its own interval, and the learners that do learn
      across tasks have at least half of the pool's weight. If any of them is as good as the reference, this is said
      with probability ``alpha`` at most, at whatever round one looks;
    - *does not* pay if the reference is behind one of them or level with the best; or if it is ahead, but the weight is
      on learners that do not learn across tasks, so that mixing them explains it;
    - otherwise it is *too early* to say.

    A learner *can be switched off* if its answers together have less than ``LITTLE_WEIGHT`` of the pool's weight, and
    the reference is ahead of each of them, by intervals at ``alpha`` / (the number of all answers). It is neither the
    leader nor the best one that does not learn across tasks, which the verdict needs.

    Args:
        answers: all but the reference.
        reference: the name of the pool or the leader.
        level_margin: the share of the other's mean loss within which two count as level.
        leader: the name of the learner that leads.
        leader_meta_learns: whether it learns across tasks, which counts if it is the reference.
        seconds_per_round: by learner.
        alpha: the chance that an interval misses at any round, in (0, 1).
    """
    costs = dict(seconds_per_round or {})
    weights = {answer.name: answer.weight for answer in answers if answer.weight is not None}
    without = [answer for answer in answers if not answer.meta_learns]
    learns = leader_meta_learns if reference == leader else any(answer.meta_learns for answer in answers)
    if not (without and learns):
        who = "does not learn across tasks" if learns else "learns across tasks" + " and leads" * (reference == leader)
        sentence = f"It cannot be said whether meta-learning pays here: no learner plays that {who}."
        return MetaLearningVerdict("too_early", sentence, reference, weights, costs)
    subject = display_name(reference) if reference == leader else "the pool"
    judged = [_judge(answer, level_margin, alpha / len(without)) for answer in without]
    best = _choose_best(judged)
    spare = _list_dispensable(answers, (leader, learner_of(best.answer.name)), level_margin, alpha, costs)
    return MetaLearningVerdict(
        *_compare(judged, best, subject, answers),
        reference,
        weights,
        costs,
        _advise(spare, subject, pooled=bool(weights)),
        best.answer.name,
        best.answer.differences.rounds,
        best.gain(),
        best.interval and (-best.interval[1], -best.interval[0]),
        spare,
    )


def _judge(answer: PlayingAnswer, level_margin: float, alpha: float) -> _Judged:
    interval = confidence_sequence(answer.differences, alpha)
    return _Judged(answer, interval, judge(interval, abs(answer.loss) * level_margin))


def _choose_best(judged: Sequence[_Judged]) -> _Judged:
    """Return the answer with the smallest loss; of several that the reference is behind for sure, the best of these."""
    return min([one for one in judged if one.shows == "behind"] or judged, key=_Judged.gain)


def _compare(
    judged: Sequence[_Judged], best: _Judged, subject: str, answers: Sequence[PlayingAnswer]
) -> tuple[VerdictState, str]:
    """Return the state and its sentence."""
    if best.interval is None:
        rounds = best.answer.differences.rounds
        return _too_early(f"{rounds} rounds are scored, and an interval needs {MIN_ROUNDS}")
    who = f"{WITHOUT} ({display_name(best.answer.name)})"
    side, gain = "ahead" if best.gain() >= 0 else "behind", _format_gain(best)
    against = f"{subject} is {side}{' of' * (side == 'ahead')} {who} by {gain} a task"
    where, share = _describe_weight(answers), _share_of_learning(answers)
    if best.shows == "level":
        against = f"{subject} is level with {who}, {side} by {gain} a task"
    if best.shows in ("behind", "level"):
        return "does_not", f"Meta-learning does not pay here (yet): {against}{where}."
    unsure = [one for one in judged if one.shows != "ahead"]
    if best in unsure:
        loss = f"{subject}'s loss is {'lower' if side == 'ahead' else 'higher'} than that of {who}"
        return _too_early(f"so far, {loss} by {gain} a task over {best.answer.differences.rounds} rounds{where}")
    if unsure:
        other = min(unsure, key=_Judged.gain)
        but = f"it is not certain that it is ahead of {display_name(other.answer.name)}, by {_format_gain(other)}"
        return _too_early(f"{against}, but {but}{where}")
    if share is not None and share < MOST_WEIGHT:
        only = f"only {100 * share:.0f} % of its weight is on learners that learn across tasks"
        return "does_not", f"Meta-learning does not pay here (yet): {against}, but {only}{where}."
    return "pays", f"Meta-learning pays here: {against}{where}."


def _too_early(reason: str) -> tuple[VerdictState, str]:
    return "too_early", f"It is too early to say whether meta-learning pays here: {reason}."


def _share_of_learning(answers: Iterable[PlayingAnswer]) -> float | None:
    """Return the share of the pool's weight on learners that learn across tasks; None without weights."""
    shares = [(answer.weight, answer.meta_learns) for answer in answers if answer.weight is not None]
    total = math.fsum(weight for weight, _ in shares)
    return math.fsum(weight for weight, learns in shares if learns) / total if total else None


def _describe_weight(answers: Iterable[PlayingAnswer]) -> str:
    """Return which expert has most of the pool's weight, as the end of a sentence; "" without weights."""
    heaviest = max(answers, key=lambda answer: answer.weight or 0.0)
    if not heaviest.weight:
        return ""
    return f"; {100 * heaviest.weight:.0f} % of its weight is on {display_name(heaviest.name)}"


def _format_gain(judged: _Judged) -> str:
    """Return the size of a gain and half of its interval, with two digits of the latter: "0.030 +- 0.010"."""
    gain, width = judged.gain(), judged.width()
    size = width or abs(gain)
    digits = min(max(1 - math.floor(math.log10(size)), 0), 9) if size else 3
    return f"{abs(gain):.{digits}f} +- {width:.{digits}f}"


def _list_dispensable(
    answers: Sequence[PlayingAnswer],
    needed: Sequence[str],
    level_margin: float,
    alpha: float,
    costs: Mapping[str, float],
) -> tuple[Dispensable, ...]:
    """Return the learners that can be switched off, the most expensive first."""
    learners: dict[str, list[PlayingAnswer]] = {}
    for answer in answers:
        learners.setdefault(learner_of(answer.name), []).append(answer)
    found = []
    for name, own in learners.items():
        weight = math.fsum(answer.weight or 0.0 for answer in own)
        shown = {_judge(answer, level_margin, alpha / len(answers)).shows for answer in own}
        if name not in needed and weight < LITTLE_WEIGHT and shown == {"ahead"}:
            found.append(Dispensable(name, weight, costs.get(name)))
    return tuple(sorted(found, key=lambda one: -(one.seconds_per_round or 0.0)))


def learner_of(answer: str) -> str:
    """Return the name of the learner that gives an answer: that of "ftml@10" is "ftml"."""
    return answer.partition("@")[0]


def _advise(spare: Sequence[Dispensable], subject: str, *, pooled: bool) -> str:
    if not spare:
        return ""
    listed = [
        display_name(one.learner) + ("" if one.seconds_per_round is None else f" ({_format_cost(one)} a round)")
        for one in spare
    ]
    names = listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1]
    which, each = ("it", "it") if len(listed) == 1 else ("each of them", "each")
    little = f", and gives {each} under {LITTLE_WEIGHT * 100:.0f} % of its weight" if pooled else ""
    return f"Can be switched off: {names}. {subject[0].upper()}{subject[1:]} is ahead of {which}{little}."


def _format_cost(one: Dispensable) -> str:
    seconds = one.seconds_per_round or 0.0
    return (
        f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{seconds:.2f} s"
    )


def display_name(name: str) -> str:
    """Return the name of an answer or comparator for people.

    "ftml@10" is "FTML with 10 steps", "ftml@adam10" is "FTML with 10 steps of adam", and "ftml@ridge_head" is "FTML
    with a ridge head".
    """
    learner, _, further = name.partition("@")
    shown = "FTML" if learner == "ftml" else learner.replace("_", " ")
    rule = further.rstrip("0123456789")
    steps, words = further.removeprefix(rule), rule.replace("_", " ")
    if not steps:
        return f"{shown} with a {words}" if rule else shown
    return f"{shown} with {steps} step{'' if steps == '1' else 's'}{f' of {words}' if rule else ''}"
