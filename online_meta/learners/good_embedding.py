"""A good embedding: features from one classifier of all classes so far, and a new head for each task."""

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from online_meta.answers import answer_once, believe_by_heads, names_of, unpack_meta
from online_meta.batches import concat_support_query, count_samples, name_tensors, only_tensor
from online_meta.functional.autodiff import outside_inference_mode, vjp
from online_meta.functional.classes import IGNORED_CLASS
from online_meta.functional.features import compute_features
from online_meta.learners import LR, OPTIMIZER, LearnerContext, TaskShape, use_own_optimizer
from online_meta.learners._targets import CLASSES, find_outputs
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.learners.train_on_everything import Steps
from online_meta.rules.sgd import sgd
from online_meta.tree import zeros
from online_meta.types import Batch, Belief, Meta, MetaGrad, Params, State, Task, TensorFilter

SEED_OFFSET = 6
"""Added to the seed, so that this learner draws differently from others with the same seed."""

WEIGHT, BIAS = "classes.weight", "classes.bias"
"""The classifier of all classes, in the place of an inner rule's parameters."""

DIGESTS, DIGEST_CLASSES, SEEN = "labels.digests", "labels.classes", "labels.seen"
"""The names under which the known classes are saved."""

MOST_SAMPLES = 64
"""Of how many samples of a class the contents are remembered."""


class KnownClasses(NamedTuple):
    """The global classes so far.

    Attributes:
        of: the class of each remembered sample, by the digest of its content.
        seen: which of the class numbers have been seen, (classes,).
    """

    of: dict[int, int]
    seen: Tensor


class GoodEmbedding(FollowTheMetaLeader):
    """The learner of Tian et al. (Rethinking few-shot image classification, ECCV 2020, section 3.2).

    One linear classifier of all classes so far is trained on the model's features f, together with the weights w of the
    model below its head: w and (W, b) follow argmin sum_{k<=t} CE(W f_w(x_k) + b, c_k) over the support and query
    samples of past rounds, with their global classes c_k. A task freezes the features and makes the model's own head
    from its support set in closed form.

    With local labels, classes are told apart by content: a class of a task is a known one if the input of one of its
    samples was seen in that one before, bit for bit, and otherwise it is a new one.
    """

    def __init__(self, context: LearnerContext, head: str, steps: int, classes: int) -> None:
        """Start at round 0, with no class seen; see ``build``."""
        inner = replace(answer_once(context.inner), rule=sgd(), steps=0, fast=("*",))
        weights = context.start.weights
        self._head, self._prefix, self._global = head, _find_head_name(context), context.global_labels
        width = weights[f"{self._prefix}weight"]
        start = Meta(weights, {WEIGHT: width.new_zeros(classes, width.shape[1]), BIAS: width.new_zeros(classes)})
        super().__init__(
            inner,
            outside_inference_mode(self._differentiate),
            context.engine(start),
            replay=context.replay,
            batch=context.batch,
            steps_per_round=steps,
            seed=context.seed + SEED_OFFSET,
            buffer=context.buffer,
            schedule=context.schedule,
            gather=context.gather,
            failures=context.failures,
            draw=context.draw._replace(weighs=True),
        )
        # A recorded program cannot look up samples by content, so nothing may offer one for this sum.
        del self.task_sum
        self._names = names_of(Meta(weights, {}))
        self._known = KnownClasses({}, torch.zeros(classes, dtype=torch.bool))

    def state(self) -> State:
        """Return the weights of the model; the classifier of all classes is not needed to answer."""
        return self.engine.meta().weights

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Make the model's head from a support set; a pure function."""
        (start,) = self.inner.believe(unpack_meta(state, self._names), support, (0,))
        found = believe_by_heads(self.inner.loss, (self._head,), {0: start}, support)[f"@{self._head}"]
        weight = f"{self._prefix}weight"
        if count_samples(support) and found.params[weight] is start.params[weight]:
            raise ValueError(
                f"good_embedding takes {weight} for that of the model's head, but another layer is called last: make "
                "the head the last layer that the model creates"
            )
        return {"": found}

    def _remember(self, task: Task) -> None:
        batch = concat_support_query(task)
        self._known = (_see if self._global else _infer)(self._known, batch)
        super()._remember(task)

    def _differentiate(self, meta: Meta, task: Task) -> MetaGrad:
        """Return the cross-entropy of a task's samples among all known classes, and its gradient."""
        batch = concat_support_query(task)
        device = meta.rule[BIAS].device
        labels = (_read_labels if self._global else _look_up)(self._known, batch).to(device)
        weight = torch.ones_like(labels) if batch.weight is None else batch.weight.to(device)
        weight = torch.where(labels == IGNORED_CLASS, 0, weight).to(meta.rule[BIAS].dtype)
        if not weight.any():
            return MetaGrad(meta.rule[BIAS].new_zeros(()), zeros(meta))
        unknown = ~self._known.seen.to(device)

        def objective(meta: Meta) -> Tensor:
            features = compute_features(self.inner.loss, meta.weights, batch.x).values
            logits = F.linear(features, meta.rule[WEIGHT], meta.rule[BIAS]).masked_fill(unknown, -torch.inf)
            rows = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_CLASS)
            return (weight * rows).sum() / weight.sum()

        loss, pull = vjp(objective, meta)
        return MetaGrad(loss, *pull(torch.ones_like(loss)))

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the engine and of the replay policy, and the known classes."""
        known = {
            DIGESTS: torch.tensor([*self._known.of], dtype=torch.int64),
            DIGEST_CLASSES: torch.tensor([*self._known.of.values()], dtype=torch.int64),
            SEEN: self._known.seen.clone(),
        }
        return {**super().save(keep), **{name: one for name, one in known.items() if keep is None or keep(name)}}

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
        rest = dict(saved)
        digests, classes, seen = (rest.pop(name).cpu() for name in (DIGESTS, DIGEST_CLASSES, SEEN))
        self._known = KnownClasses(dict(zip(digests.tolist(), classes.tolist(), strict=True)), seen.clone())
        super().load(rest, rounds)


def _find_head_name(context: LearnerContext) -> str:
    """Return the prefix of the head's names: that of the last matrix of the model, which each answer confirms."""
    matrices = [name for name, one in context.start.weights.items() if one.ndim == 2 and name.endswith("weight")]
    if not matrices:
        raise ValueError("good_embedding needs a model with a linear layer at its end")
    return matrices[-1].removesuffix("weight")


def _see(known: KnownClasses, batch: Batch) -> KnownClasses:
    """Return the known classes after samples whose labels are global."""
    seen, labels = known.seen.clone(), _read_labels(known, batch).cpu()
    seen[labels[labels != IGNORED_CLASS]] = True
    return known._replace(seen=seen)


def _read_labels(known: KnownClasses, batch: Batch) -> Tensor:
    """Return the global classes of samples with global labels; -100 for a number beyond the classifier's."""
    y = _counted_labels(batch)
    return torch.where(y < len(known.seen), y, IGNORED_CLASS)


def _infer(known: KnownClasses, batch: Batch) -> KnownClasses:
    """Return the known classes after samples with labels of a task of its own."""
    of, seen, y = dict(known.of), known.seen.clone(), _counted_labels(batch).tolist()
    digests = _digest_rows(batch)
    counts = Counter(of.values())
    first_new = int(seen.sum())
    for label in sorted({one for one in y if one != IGNORED_CLASS}):
        own = [digest for digest, one in zip(digests, y, strict=True) if one == label]
        number = _find_class(known.of, own)
        if number is None:
            if first_new == len(seen):
                continue  # The classifier has no row left for a new class.
            number, first_new = first_new, first_new + 1
        seen[number] = True
        for digest in own:
            if digest not in of and counts[number] < MOST_SAMPLES:
                of[digest] = number
                counts[number] += 1
    return KnownClasses(of, seen)


def _look_up(known: KnownClasses, batch: Batch) -> Tensor:
    """Return the global classes of samples with labels of a task of its own; -100 for those of no known class."""
    y, digests = _counted_labels(batch).tolist(), _digest_rows(batch)
    found = {
        label: _find_class(known.of, [digest for digest, one in zip(digests, y, strict=True) if one == label])
        for label in {*y} - {IGNORED_CLASS}
    }
    return torch.tensor([IGNORED_CLASS if (one := found.get(label)) is None else one for label in y])


def _counted_labels(batch: Batch) -> Tensor:
    """Return the labels (n,) of samples; -100 for padding, whose content says nothing."""
    y = only_tensor(batch.y).long()
    return y if batch.weight is None else torch.where(batch.weight > 0, y, IGNORED_CLASS)


def _find_class(of: dict[int, int], digests: list[int]) -> int | None:
    """Return the class that most of the samples with these digests were seen in, the lower of two; None for none."""
    counts = Counter(of[digest] for digest in digests if digest in of)
    return min(counts, key=lambda number: (-counts[number], number), default=None)


def _digest_rows(batch: Batch) -> list[int]:
    """Return an integer of 64 bits for the input of each sample, by its bytes."""
    parts = [one.detach().cpu().contiguous() for _, one in sorted(name_tensors("x", batch.x).items())]
    digests = []
    for row in range(len(parts[0])):
        digest = hashlib.blake2b(digest_size=8)
        for part in parts:
            digest.update(part[row].numpy().tobytes())
        digests.append(int.from_bytes(digest.digest(), "little", signed=True))
    return digests


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks: those of classes."""
    return tasks.loss in CLASSES


def build(
    context: LearnerContext,
    optimizer: str = OPTIMIZER,
    lr: Annotated[float, Gt(0)] = LR,
    steps: Steps = None,
    head: Literal["logistic_head", "ridge_head", "nearest_centroid"] = "logistic_head",
    classes: Annotated[int, Ge(2)] = 4096,
) -> GoodEmbedding:
    """Create the baseline *a good embedding* (Tian et al., ECCV 2020): train a classifier of all classes, adapt a head.

    With ``[task] labels = "global"``, a class number means the same class in each task. Otherwise classes are inferred
    by content: a class of a task is a known one if the input of one of its samples was seen in that one before, bit
    for bit. So streams that never repeat a sample have new classes in each task. Of each class, 64 samples are
    remembered.

    Args:
        context: what all learners share.
        optimizer: the optimizer of its weights, as in [meta].
        lr: its learning rate, above 0, constant over the rounds.
        steps: steps after each round; by default as many as FTML makes.
        head: the inner rule that makes the head of a task in closed form from the features of its support set, with the
            rule's default options.
        classes: the largest number of classes, at least 2. Samples of later classes, and of larger global numbers, are
            not learned.

    Raises:
        ValueError: if the outcome is not cross_entropy or categorical, or the model has no linear layer.
    """
    find_outputs(context, "good_embedding", regression=False)  # It refuses a loss that is not of classes.
    steps = context.steps_per_round if steps is None else steps
    return GoodEmbedding(use_own_optimizer(context, optimizer, lr), head, steps, classes)
