"""The paths of a run's files."""

from dataclasses import dataclass
from pathlib import Path

MAIN = "main"
"""The name of the branch with which a run begins; each fork is another branch, under its own name."""


@dataclass(frozen=True)
class RunFiles:
    """The files under a run's folder, as one branch of the run uses them.

    The history, the dead letters and the compiled programs are those of the run. What a trainer writes is in the folder
    ``own`` of its branch.

    Attributes:
        folder: of the run.
        branch: the name of a fork, or ``MAIN``; None for the only branch of a run in which no fork was ever promoted.
    """

    folder: Path
    branch: str | None = None

    @property
    def own(self) -> Path:
        """The folder with the files of the branch: the run's folder, or that of the fork."""
        return self.folder if self.branch in (None, MAIN) else self.forks / str(self.branch)

    @property
    def forks(self) -> Path:
        """The folder that has one folder for each fork."""
        return self.folder / "forks"

    @property
    def decisions(self) -> Path:
        """The folder of the logs of decisions: next to the history, or in the folder of the fork."""
        return self.history if self.branch in (None, MAIN) else self.own

    @property
    def fork_log(self) -> Path:
        """The log of forks and promotions, next to the history."""
        return self.history / "forks.jsonl"

    @property
    def history(self) -> Path:
        """The durable history of tasks."""
        return self.folder / "history"

    @property
    def dead_letters(self) -> Path:
        """Rejected arrivals, each with the reason."""
        return self.folder / "dead-letters"

    @property
    def sources(self) -> Path:
        """The folder with what sources have learned from the rows that they read."""
        return self.folder / "sources"

    @property
    def update_log(self) -> Path:
        """The log of updates."""
        return self.decisions / "plans.jsonl"

    @property
    def execution_plan_log(self) -> Path:
        """The log of execution plans."""
        return self.decisions / "paths.jsonl"

    @property
    def rollback_log(self) -> Path:
        """The log of rollbacks after divergence."""
        return self.decisions / "rollbacks.jsonl"

    @property
    def quarantine_log(self) -> Path:
        """The log of quarantined rounds."""
        return self.decisions / "quarantine.jsonl"

    @property
    def decision_logs(self) -> tuple[Path, ...]:
        """The logs of decisions that a replay and a fork follow."""
        return self.update_log, self.execution_plan_log, self.rollback_log, self.quarantine_log, self.tuning_log

    @property
    def tuning_log(self) -> Path:
        """The log of the race between settings."""
        return self.decisions / "tuning.jsonl"

    @property
    def quarantine_requests(self) -> Path:
        """The operators' requests to quarantine rounds, one line per request, written by the daemon."""
        return self.folder / "quarantine-requests.jsonl"

    @property
    def programs(self) -> Path:
        """Compiled programs, each named by its digest."""
        return self.folder / "programs"

    @property
    def rounds(self) -> Path:
        """The round records, one line per round."""
        return self.own / "rounds.jsonl"

    @property
    def sums(self) -> Path:
        """Running sums over the round records, computed by the process that follows the run."""
        return self.own / "rounds.sums"

    @property
    def comparators(self) -> Path:
        """The results of comparators, one line per evaluation."""
        return self.own / "comparators.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.own / "checkpoints"

    @property
    def checkpoint_log(self) -> Path:
        """The log of checkpoints, one line each: round, time, duration."""
        return self.own / "checkpoints.jsonl"

    @property
    def leader(self) -> Path:
        """The published meta-parameters of the branch, which other processes adapt."""
        return self.served_leader if self.branch is None else self.forks / self.branch / "leader.safetensors"

    @property
    def served_leader(self) -> Path:
        """The published meta-parameters of the branch that is served."""
        return self.folder / "leader.safetensors"

    def comparator(self, kind: str) -> Path:
        """Return the path of a comparator's state, from which its next refresh continues."""
        return self.own / f"{kind}.safetensors"

    @property
    def ranks(self) -> Path:
        """The rank report: the ranks and their counters; written periodically, not durable."""
        return self.own / "ranks.json"

    @property
    def agent(self) -> Path:
        """The number of times that the elastic agent has restarted the ranks."""
        return self.own / "agent.json"

    def heartbeat(self, process: str) -> Path:
        """Return the path of the heartbeat of a process of the run, which is not durable."""
        return self.own / f"{process}.heartbeat"

    @property
    def rendezvous(self) -> Path:
        """The folder in which the ranks of this machine meet; only their user can open it."""
        return self.folder / "rendezvous"

    @property
    def settings(self) -> Path:
        """The complete settings of the branch, written when the daemon starts."""
        return self.own / "settings.json"
