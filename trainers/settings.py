"""The settings of a run that the trainers need: frozen data, checked when it is read.

The attribute lists of the docstrings are the reference of the configuration. A field made by ``changeable`` does not
decide the parameters that a run learns, so that a restart may change it; every other field is fixed for a run's life.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

CHANGEABLE = "changeable"


def changeable(default: Any = None, *, factory: Any = None) -> Any:
    """Return a field with a ``default``, or one that a ``factory`` makes, which a restart of the run may change."""
    metadata = {CHANGEABLE: True}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelSettings:
    """The model and its loss.

    Attributes:
        build: import path "package.module:function" of a function that returns an ``nn.Module`` for ``args``; modules
            in the folder of the configuration file are found, too.
        args: keyword arguments of ``build``.
        loss: the name of an outcome, such as "cross_entropy" or "mse", or the import path of a callable (output, y) ->
            the losses of the samples, (n,), or a scalar.
        loss_options: options of a named loss.
        random: whether the model draws random numbers while it learns; by default, dropout layers are looked for.
        precision: the dtype the model computes in. Parameters, the inner loop and meta-gradients are float32.
        recompute: globs of layer names whose activations are computed again in the backward pass instead of stored:
            less memory, more time.
        surrogate: globs of layers whose gradient is a surrogate on purpose, such as a straight-through estimator; the
            checks accept it there, and check everything around these layers.
        frozen_rows: rows that a weight holds constant on purpose, a list for its name; the checks find out whether
            their gradient is zero. The ``padding_idx`` of embedding layers is known without it.
        output: the part of what the model returns that is its output: an attribute of an object, a key of a dict or an
            index of a tuple, such as "logits", or several with dots between them, such as "heads.0". By default it is
            all that the model returns, a tensor or a dict of tensors.
        masks: for the name of an input that is a sequence, that of the input that is its mask: 1 for the entries that
            count and 0 for padding, such as ``masks = { tokens = "attention_mask" }``. Such sequences can be padded.
    """

    build: str
    args: dict[str, Any] = field(default_factory=dict)
    loss: str = "cross_entropy"
    loss_options: dict[str, Any] = field(default_factory=dict)
    random: bool | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute: tuple[str, ...] = ()
    surrogate: tuple[str, ...] = changeable(())
    frozen_rows: dict[str, tuple[int, ...]] = changeable(factory=dict)
    output: str = ""
    masks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerRuleSettings:
    """Another inner rule that learners answer by.

    Attributes:
        steps: numbers of its steps to answer after, a list or one number.
        lr: its step size.
        rule: the rule; by default, what the table is called.
        options: of the rule.
    """

    steps: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)]
    lr: Annotated[float, Gt(0)] = 0.01
    rule: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InnerSettings:
    """The inner loop.

    Attributes:
        rule: the inner update rule.
        steps: inner steps from the meta-parameters to a task's parameters; "auto" lets several numbers race, see
            [tuning].
        lr: step size of the rule; "auto" lets several ones race.
        fast: globs of the names of the weights that the inner loop adapts.
        options: options of the rule.
        answer_steps: further numbers of inner steps, a list or one number. A learner NAME that adapts by inner steps is
            also scored after each number K of them, as NAME@K, from the same trajectory. If there is a pool, the
            default is 0, 1, 2, 5, 10 and 20, and otherwise none.
        answer_heads: inner rules with a head in closed form, such as ridge_head, logistic_head or nearest_centroid. A
            learner NAME that adapts by inner steps is also scored with each RULE of them, as NAME@RULE: it takes no
            step, and the last linear layer of the model is what the rule makes of the support set.
        answer_rules: tables of other inner rules, such as ``answer_rules.adam = { steps = [10, 30], lr = 0.01 }``. A
            learner NAME that adapts by inner steps is also scored after K steps of Adam from the same weights, as
            NAME@adamK.
        posterior: what is believed of a task after adapting: "point" is the end of the inner loop, "samples" are the
            ends of several ones that draw by key, "particles" are those of a rule that adapts several models, and
            "laplace" is a normal distribution around the end.
        posterior_options: options of the posterior.
        samples: samples of a belief; an answer is their mixture.
        begin: where the weights of a task begin: at the meta-parameters' ("weights"), or at weights of its own that are
            drawn like an initialisation of the model ("fresh"), as learned optimizers need.
    """

    rule: str = "sgd"
    steps: Annotated[int, Ge(0)] = 5
    lr: Annotated[float, Gt(0)] = 0.01
    fast: Annotated[tuple[str, ...], MinLen(1)] = ("*",)
    options: dict[str, Any] = field(default_factory=dict)
    answer_steps: tuple[Annotated[int, Ge(0)], ...] = ()
    posterior: str = "point"
    posterior_options: dict[str, Any] = field(default_factory=dict)
    samples: Annotated[int, Ge(1)] = 1
    begin: Literal["weights", "fresh"] = "weights"
    answer_heads: tuple[str, ...] = ()
    answer_rules: dict[str, AnswerRuleSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class MetaSettings:
    """The outer loop.

    Attributes:
        gradient: the estimator of the meta-gradient.
        options: options of the estimator, such as ``rematerialise`` of exact.
        optimizer: the optimizer of the meta-parameters: "sgd", "adam", "adamw", or another of torch's.
        optimizer_options: options of the optimizer under torch's names, such as ``betas``, ``eps``, ``weight_decay``,
            ``momentum``, ``nesterov`` or ``amsgrad``; torch's defaults apply to the rest.
        lr: learning rate of the optimizer; "auto" lets several ones race.
        schedule: the schedule of the learning rate over the rounds.
        schedule_options: options of the schedule, such as ``warmup``.
        clip_norm: largest global norm of a meta-gradient; a longer one is scaled down to it.
        steps_per_round: meta-steps after each round.
        batch: past rounds in a meta-step, at most.
        replay: the policy that chooses the past rounds.
        replay_options: options of the policy.
        support_samples: the largest number of support samples that a meta-step draws from a task that it revisits; by
            default all. Each step draws anew. So a large task costs no more than a small one. Scores and answers use
            all samples.
        query_samples: the same for query samples. The expected meta-gradient stays the same.
        max_rounds_per_update: rounds that may be scored before one shared update, while tasks arrive faster than they
            are learned. The run's plan records each case.
        idle_updates: additional updates on past rounds after each round, while no task arrives. The run's plan records
            each one.
        max_skipped: meta-steps in a row that may be skipped because they were not finite.
        when_diverged: after ``max_skipped`` skipped steps, go back to the last good checkpoint with half the learning
            rate ("roll_back"), or end with exit code 70 ("stop").
    """

    gradient: str = "exact"
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    lr: Annotated[float, Gt(0)] = 1e-3
    schedule: str = "constant"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    clip_norm: Annotated[float, Gt(0)] | None = 10.0
    steps_per_round: Annotated[int, Ge(1)] = 1
    batch: Annotated[int, Ge(1)] = 25
    replay: str = "uniform"
    replay_options: dict[str, Any] = field(default_factory=dict)
    support_samples: Annotated[int, Ge(1)] | None = None
    query_samples: Annotated[int, Ge(1)] | None = None
    # Each run records what came of the last four, and a restart obeys the record.
    max_rounds_per_update: Annotated[int, Ge(1)] = changeable(1)
    idle_updates: Annotated[int, Ge(0)] = changeable(0)
    max_skipped: Annotated[int, Ge(1)] = changeable(50)
    when_diverged: Literal["roll_back", "stop"] = changeable("roll_back")


@dataclass(frozen=True)
class RegretSettings:
    """What the run is compared with.

    Attributes:
        comparator: the comparators. ``hindsight`` estimates the loss of the best fixed meta-parameters by training;
            ``closed_form`` computes it, for models that are linear in their weights with squared loss; ``dynamic``
            estimates the loss of each task's own best meta-parameters; ``bayes`` computes that of the exact Bayes
            predictor of a source that has one, for losses in nats.
        comparator_options: options of comparators, a table under the name of each. For ``bayes``, they are by default
            the kind and the options of the run's only source.
        comparator_budget: the compute of ``hindsight``, and that of ``dynamic``, for each round of the run. 1 is the
            compute with which the leading learner learns a round, ``steps_per_round`` meta-steps of ``batch`` tasks. A
            smaller budget gives shorter passes, fewer starts and, if need be, fewer rounds to evaluate. By default
            there is no limit.
        every_rounds: rounds between two refreshes of the comparators; they are refreshed when the stream rests, too.
        hindsight_steps: meta-steps of ``hindsight`` for each new round, a pass.
        hindsight_restarts: initialisations that ``hindsight`` is trained from.
        hindsight_max_passes: passes in a refresh, at most; another one follows only while the loss falls.
        hindsight_rounds: rounds that ``hindsight`` is evaluated on, at most.
        dynamic_steps: steps of ``dynamic`` on one task from each start, and in each of the passes that follow.
        dynamic_rounds: tasks that ``dynamic`` takes in a refresh, at most.
        loss_cap: what a loss that is not finite is charged at, at least; see the game and its regret. Set it above the
            losses that usually occur.
        level_margin: two learners count as level while the interval of their mean difference lies within this share of
            the other's mean loss.
        baselines: learners that play the same rounds, after those of the ``[[learner]]`` tables. If there are such
            tables, the default is []; otherwise it is from_scratch, and of the learners in closed form constant,
            ridge_head, logistic_head, pooled_ridge, pooled_logistic and, for at most 64 inputs, hierarchical_bayes
            those that can answer such tasks. This from_scratch makes 20 steps with lr = 0.003 for classes, and 50 with
            lr = 0.01 otherwise, unless ``options`` has a table of its own for it.
        options: options of baselines, a table under the name of each.
        baseline_optimizer: what steps the baselines: "own" is the ``optimizer`` and ``lr`` of their options, so that
            those of [meta] change none of them; "meta" is that of [meta], as in runs of 0.1.0, which continue so.
        prefixes: rising numbers n of support points; each task is also scored after its first n points.
        proficiency: the accuracy, 0 to 1 (for regression: the loss), whose cost in support points is reported as the
            learning efficiency. It needs ``prefixes``.
    """

    comparator: tuple[str, ...] = changeable(("hindsight",))
    comparator_options: dict[str, dict[str, Any]] = changeable(factory=dict)
    comparator_budget: Annotated[float, Gt(0)] | None = changeable()
    every_rounds: Annotated[int, Ge(1)] = changeable(100)
    hindsight_steps: Annotated[float, Gt(0)] = changeable(2.0)
    hindsight_restarts: Annotated[int, Ge(1), Le(100)] = changeable(2)
    hindsight_max_passes: Annotated[int, Ge(1)] = changeable(4)
    hindsight_rounds: Annotated[int, Ge(2)] = changeable(1000)
    dynamic_steps: Annotated[int, Ge(0)] = changeable(100)
    dynamic_rounds: Annotated[int, Ge(2)] = changeable(50)
    loss_cap: Annotated[float, Gt(0), Le(1e100)] = changeable(1000.0)
    level_margin: Annotated[float, Ge(0)] = changeable(0.01)
    baselines: tuple[str, ...] = ("train_on_everything", "from_scratch")
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline_optimizer: Literal["own", "meta"] = "own"
    prefixes: tuple[Annotated[int, Ge(1)], ...] = changeable(())
    proficiency: float | None = changeable()

    def __post_init__(self) -> None:
        """Refuse prefixes that do not rise, and a proficiency without prefixes."""
        if list(self.prefixes) != sorted(set(self.prefixes)):
            raise ValueError(f"prefixes = {[*self.prefixes]}: they rise, as [1, 2, 5, 10] does")
        if self.proficiency is not None and not self.prefixes:
            raise ValueError("proficiency is looked for among prefixes: give some, such as prefixes = [1, 2, 5, 10]")


@dataclass(frozen=True)
class LearnerSettings:
    """A learner of the run. The first one leads: regret is that of its losses, and a run rolls back by its meta-steps.

    Attributes:
        kind: the learner, such as "ftml" or "moml".
        name: its name in figures, files and metrics, of letters, digits, ".", "_" and "-"; by default the last part of
            its kind.
        meta: a table of keys of [meta] that have another value for this learner. A table of options in it replaces that
            of [meta] as a whole. ``max_rounds_per_update``, ``idle_updates``, ``max_skipped`` and ``when_diverged``
            count for the whole run.
        inner: a table of keys of [inner] that have another value for this learner.
        shadow: whether it plays and is scored without being an expert of the pool.
        options: options of its kind. Where a kind has ``optimizer`` and ``lr`` among them, [meta] steps the learner all
            the same if it leads and its options have neither, or if its own table ``meta`` says how to step.
    """

    kind: str
    name: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    shadow: bool = False

    def __post_init__(self) -> None:
        """Take the name from the kind where there is none."""
        if not self.name:
            object.__setattr__(self, "name", re.split(r"[.:]", self.kind)[-1])


@dataclass(frozen=True)
class PoolSettings:
    """The pool: the mixture of the answers of all learners that play, weighted by their losses in earlier rounds.

    Attributes:
        aggregation: how the answers are weighted: "auto" is Bayes' rule for losses that are negative log-likelihoods,
            "tracking" for squared losses, and AdaHedge otherwise; or the name of an aggregation, such as "fixed_share"
            for log-likelihoods on streams whose best learner changes, or "exp_concave" for squared losses in a known
            range. "none" is no pool. By default it is "auto", or "none" if ``regret.baselines`` is [] and there is no
            ``[[learner]]`` table.
        options: options of the aggregation, such as ``low`` and ``high`` of exp_concave.
        clip_quantile: AdaHedge and tracking count a loss as at most ``clip_factor`` times this quantile of the usual
            losses, which are the medians over the learners, in the latest ``clip_rounds`` rounds.
        clip_factor: see ``clip_quantile``.
        clip_rounds: see ``clip_quantile``.
    """

    aggregation: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    clip_quantile: Annotated[float, Ge(0), Le(1)] = 0.95
    clip_factor: Annotated[float, Ge(1)] = 4.0
    clip_rounds: Annotated[int, Ge(1)] = 200


@dataclass(frozen=True)
class TuningSettings:
    """What is tried where ``inner.lr``, ``inner.steps`` or ``meta.lr`` is "auto": a few settings race on the stream.

    The first candidate of a list is what the leading learner begins with. Every other learning rate is a further
    learner, and every other number of inner steps a further answer of each of them. What is behind the best is dropped,
    and what has won becomes the leading learner.

    Attributes:
        budget: the extra compute of the race, in meta-updates of the leading learner for each round: each further
            learner needs 1.
        rounds: the race ends after this many rounds at the latest; the smallest total loss then wins.
        warmup: rounds at the start that do not count.
        alpha: the chance that the race ever drops a setting that was not behind.
        inner_lr: the candidates for ``inner.lr``.
        inner_steps: the candidates for ``inner.steps``. Meta-gradients go through the first number; the others are
            answers of the same trajectory.
        meta_lr: the candidates for ``meta.lr``.
    """

    # Each run records what came of these, and a restart obeys the record; the candidates are learners.
    budget: Annotated[float, Ge(0)] = changeable(4.0)
    rounds: Annotated[int, Ge(1)] = changeable(1000)
    warmup: Annotated[int, Ge(0)] = changeable(20)
    alpha: Annotated[float, Gt(0), Lt(1)] = changeable(0.05)
    inner_lr: tuple[Annotated[float, Gt(0)], ...] = changeable((0.01, 0.03, 0.1))
    inner_steps: tuple[Annotated[int, Ge(0)], ...] = changeable((5, 1, 2, 10, 20))
    meta_lr: tuple[Annotated[float, Gt(0)], ...] = changeable((0.001, 0.003, 0.0003))

    def __post_init__(self) -> None:
        """Refuse lists of candidates that are no race."""
        for name in ("inner_lr", "inner_steps", "meta_lr"):
            found = getattr(self, name)
            if len(found) < 2 or len(set(found)) < len(found):
                raise ValueError(f"{name} = {[*found]}: a race needs two or more candidates, each once")


@dataclass(frozen=True)
class CheckpointSettings:
    """When the run's state is saved. There is always a checkpoint at the end.

    Attributes:
        every_rounds: rounds between two checkpoints.
        keep: the newest checkpoints that stay.
    """

    every_rounds: Annotated[int, Ge(1)] = changeable(25)
    keep: Annotated[int, Ge(1)] = changeable(3)


@dataclass(frozen=True)
class EngineSettings:
    """What steps the meta-parameters, and where.

    All engines give the same answer, to rounding. The bits of a result depend on the device and the threads, so these
    two belong to the run and not to the machine.

    Attributes:
        kind: the engine: "local" is one process; "deepspeed" shares the tasks of each meta-step among ranks.
        processes: ranks on this machine.
        zero_stage: what ZeRO shards: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 the stored parameters too.
        offload_optimizer: whether the optimizer's state is in the memory of the host.
        deterministic: whether ranks add up task by task. Any number of ranks then gives the same bits, at the cost of
            one gathering of all gradients for each task. Set ``batching`` to "traced" or "compiled", whose programs
            then compute one task at a time, or to "loop".
        timeout_seconds: a rank that the others have waited for this long, or much longer than rounds take, counts as
            dead; all ranks then restart at the last checkpoint. A process that neither reports nor computes for twice
            as long is restarted, too. Seconds.
        nodes: the least and the largest number of machines, this one counted, each with ``processes`` ranks.
        rendezvous: "host:port" where machines meet: an address of this machine that the others can reach.
        trusted_network: whether only machines that may run code here can reach ``rendezvous`` and the ranks. Several
            machines require it, because whoever reaches these ports controls every machine of the run.
        device: the device of torch, such as "cpu" or "cuda:0".
        threads: threads of each process.
        batching: how the meta-gradients of a batch are computed: "loop" one task after another, "vmap" stacked,
            "traced" or "compiled" as a recorded program. "auto" measures; the run records the choice and its round.
        memory_limit: bytes that stacked tasks may take at a time.
        pad_sizes: the sizes that support sets, query sets and sequences with a mask are padded to, with samples of
            weight 0, so that tasks of many sizes need few programs. [] pads nothing. By default, the first two sizes
            have programs of their own, and tasks of all others are padded to at most four further sizes. Where padding
            changes a meta-gradient by more than rounding, nothing is padded.
        programs: a folder of compiled programs that all runs of a user share, so that none is compiled twice. It must
            be private, because programs are native code: mode 0700. "" shares none. By default, the command line takes
            online-meta/programs in $XDG_CACHE_HOME, or in ~/.cache.
        frozen_folder: a folder of each machine, where frozen weights lie in one file for all its processes. Each
            process reads them layer by layer, so that it holds those of one layer of ``model.recompute`` at a time. ""
            is none: each process holds all of them.
    """

    kind: str = changeable("local")
    processes: Annotated[int, Ge(1), Le(4096)] = changeable(1)
    zero_stage: Annotated[int, Ge(0), Le(3)] = changeable(0)
    offload_optimizer: bool = changeable(False)
    deterministic: bool = changeable(False)
    timeout_seconds: Annotated[float, Gt(0)] = changeable(60.0)
    nodes: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] = changeable((1, 1))
    rendezvous: str = changeable("127.0.0.1:0")
    trusted_network: bool = changeable(False)
    device: str = "cpu"
    threads: Annotated[int, Ge(1), Le(256)] = 1
    batching: Literal["auto", "loop", "vmap", "traced", "compiled"] = changeable("auto")
    memory_limit: Annotated[int, Ge(1)] | None = changeable()
    pad_sizes: tuple[Annotated[int, Ge(1)], ...] | None = changeable()
    programs: str | None = changeable()
    frozen_folder: str = changeable("")

    @property
    def is_distributed(self) -> bool:
        """Whether there may be more than one rank, so that an agent has to supervise them."""
        return self.processes > 1 or self.nodes[1] > 1


@dataclass(frozen=True)
class TrainerSettings:
    """Everything that the trainers of a run need.

    Attributes:
        model, inner, meta, regret, engine, checkpoint, pool: the sections of the configuration.
        seed: the seed of the run.
        import_folder: the folder of the configuration file, where modules of import paths are looked for, too.
        learner: the ``[[learner]]`` tables; see ``trainers.learner_settings.list_learners``.
        global_labels: whether a class number means the same class in each task.
        answers: the name of the learner that answers, "NAME" or "NAME@STEPS"; None for the pool, or without a pool the
            learner that leads.
        defaults: the keys, as "section.key", that the configuration leaves to the program. For these, a run keeps the
            values with which it began.
        tuning: the section [tuning].
        race: the answers that race, where a setting is "auto".
    """

    model: ModelSettings
    inner: InnerSettings = InnerSettings()
    meta: MetaSettings = MetaSettings()
    regret: RegretSettings = RegretSettings()
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    seed: Annotated[int, Ge(0)] = 0
    import_folder: str | None = changeable()
    learner: tuple[LearnerSettings, ...] = ()
    answers: str | None = changeable()
    global_labels: bool = False
    pool: PoolSettings = PoolSettings()
    defaults: tuple[str, ...] = changeable(())
    tuning: TuningSettings = TuningSettings()
    race: tuple[str, ...] = changeable(())
