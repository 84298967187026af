"""What a run is configured with, as the trainers need it: frozen data, checked where it is read in."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen


@dataclass(frozen=True)
class ModelSettings:
    """``build`` names a function "package.module:function" that returns an ``nn.Module`` for ``args``.

    ``loss`` is "cross_entropy", "mse" or the import path of a callable (output, y) -> scalar. ``random`` says whether
    the model draws random numbers as it learns; left out, layers of dropout are looked for. The layers that the globs
    ``recompute`` match are computed again going back instead of being kept: less memory, more time. ``precision`` is
    what the model computes in; parameters, the inner loop and meta-gradients are of single precision whatever it is.
    """

    build: str
    args: dict[str, Any] = field(default_factory=dict)
    loss: str = "cross_entropy"
    random: bool | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute: tuple[str, ...] = ()


@dataclass(frozen=True)
class InnerSettings:
    """The inner loop: a rule of ``online_meta.rules`` with its step size and further ``options``."""

    rule: str = "sgd"
    steps: Annotated[int, Ge(0)] = 5
    lr: Annotated[float, Gt(0)] = 0.01
    fast: Annotated[tuple[str, ...], MinLen(1)] = ("*",)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MetaSettings:
    """The outer loop: ``steps_per_round`` meta-steps a round, each on at most ``batch`` past rounds.

    While tasks arrive faster than they are learned, up to ``max_rounds_per_update`` rounds are scored
    before one shared update; while none arrives, as many as ``idle_updates`` more updates follow each round, on past
    rounds alone. Both are written into the run's plan before they are made. ``options`` are those of the estimator
    ``gradient``, such as ``rematerialise`` of exact, ``replay_options`` those of the policy ``replay``. The learning
    rate follows a ``schedule`` over the rounds, with ``schedule_options`` such as ``warmup``. After ``max_skipped``
    meta-steps in a row that were not finite the run goes back to the last good checkpoint with half the learning rate,
    or stops, as ``when_diverged`` says.
    """

    gradient: str = "exact"
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    lr: Annotated[float, Gt(0)] = 1e-3
    schedule: str = "constant"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    clip_norm: Annotated[float, Gt(0)] | None = 10.0
    steps_per_round: Annotated[int, Ge(1)] = 1
    batch: Annotated[int, Ge(1)] = 25
    replay: str = "uniform"
    replay_options: dict[str, Any] = field(default_factory=dict)
    max_rounds_per_update: Annotated[int, Ge(1)] = 1
    idle_updates: Annotated[int, Ge(0)] = 0
    max_skipped: Annotated[int, Ge(1)] = 50
    when_diverged: Literal["roll_back", "stop"] = "roll_back"


@dataclass(frozen=True)
class RegretSettings:
    """What the run is compared with.

    Comparators are refreshed when ``every_rounds`` more rounds have been learned (and when the stream rests).
    ``hindsight`` is trained from ``hindsight_restarts`` starts, ``hindsight_steps`` meta-steps a new round, and
    by as many again, up to ``hindsight_max_passes`` times, while that lowers its loss; it is evaluated on at most
    ``hindsight_rounds`` rounds. ``closed_form`` is exact, for models that are linear in their weights with squared
    loss. ``dynamic`` makes at most ``dynamic_steps`` meta-steps for a task alone, on at most ``dynamic_rounds`` tasks a
    refresh. ``options`` holds a table of settings for a baseline, under its name.
    Each task is scored after the first ``prefixes`` points of its support set, too; how many points it takes to reach a
    ``proficiency`` (an accuracy; for regression a loss to come down to) is its learning efficiency.
    """

    comparator: tuple[Literal["hindsight", "closed_form", "dynamic"], ...] = ("hindsight",)
    every_rounds: Annotated[int, Ge(1)] = 100
    hindsight_steps: Annotated[float, Gt(0)] = 2.0
    hindsight_restarts: Annotated[int, Ge(1), Le(100)] = 2
    hindsight_max_passes: Annotated[int, Ge(1)] = 4
    hindsight_rounds: Annotated[int, Ge(2)] = 1000
    dynamic_steps: Annotated[int, Ge(0)] = 100
    dynamic_rounds: Annotated[int, Ge(2)] = 50
    baselines: tuple[str, ...] = ("train_on_everything", "from_scratch")
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    prefixes: tuple[Annotated[int, Ge(1)], ...] = ()
    proficiency: float | None = None

    def __post_init__(self) -> None:
        """Refuse prefixes that do not rise, and a proficiency that nothing is asked of."""
        if list(self.prefixes) != sorted(set(self.prefixes)):
            raise ValueError(f"prefixes = {[*self.prefixes]}: they rise, as [1, 2, 5, 10] does")
        if self.proficiency is not None and not self.prefixes:
            raise ValueError("proficiency is looked for among prefixes: give some, such as prefixes = [1, 2, 5, 10]")


@dataclass(frozen=True)
class CheckpointSettings:
    """A checkpoint after every so many rounds and at the end; the newest ``keep`` stay."""

    every_rounds: Annotated[int, Ge(1)] = 25
    keep: Annotated[int, Ge(1)] = 3


@dataclass(frozen=True)
class EngineSettings:
    """Who steps the meta-parameters, on which ``device``, with how many ``threads`` a process.

    The kind "deepspeed" shares the tasks of each meta-step among ``processes`` ranks, and shards what it steps by
    ZeRO: nothing at ``zero_stage`` 0, the optimizer's state at 1, gradients at 2, the stored parameters at 3;
    ``offload_optimizer`` keeps that state in the memory of the host. ``deterministic`` ranks add up task by task: the
    same bits by any number of them, for one gathering of all gradients a task. A rank that the others have waited for
    ``timeout_seconds``, or much longer than rounds take, is taken for dead; all begin again at the last checkpoint.
    Other machines may bring as many ranks each: the run is played while at least as many machines as the first of
    ``nodes`` are there, this one counted, and by at most as many as the second; they meet at ``rendezvous``,
    "host:port", an address of this machine that they can reach.
    The bits of a result depend on the threads, so their number is part of the run and not of the machine.
    ``batching`` is how a batch's meta-gradients are summed: ``auto`` measures, and records the round it takes effect;
    tasks that are stacked for it take at most ``memory_limit`` bytes at a time.
    """

    kind: str = "local"
    processes: Annotated[int, Ge(1), Le(4096)] = 1
    zero_stage: Annotated[int, Ge(0), Le(3)] = 0
    offload_optimizer: bool = False
    deterministic: bool = False
    timeout_seconds: Annotated[float, Gt(0)] = 60.0
    nodes: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] = (1, 1)
    rendezvous: str = "127.0.0.1:0"
    device: str = "cpu"
    threads: Annotated[int, Ge(1), Le(256)] = 1
    batching: Literal["auto", "loop", "vmap", "traced", "compiled"] = "auto"
    memory_limit: Annotated[int, Ge(1)] | None = None

    @property
    def is_distributed(self) -> bool:
        """Whether there may be more than one rank, so that an agent has to keep them."""
        return self.processes > 1 or self.nodes[1] > 1


@dataclass(frozen=True)
class TrainerSettings:
    """All that decides what is learned from a history."""

    model: ModelSettings
    inner: InnerSettings = InnerSettings()
    meta: MetaSettings = MetaSettings()
    regret: RegretSettings = RegretSettings()
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    seed: Annotated[int, Ge(0)] = 0
