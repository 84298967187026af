"""The paths of a run's files."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFiles:
    """The files under a run's folder."""

    folder: Path

    @property
    def history(self) -> Path:
        """The durable history of tasks."""
        return self.folder / "history"

    @property
    def dead_letters(self) -> Path:
        """Rejected arrivals, each with the reason."""
        return self.folder / "dead-letters"

    @property
    def update_log(self) -> Path:
        """The log of updates, next to the history to which it belongs."""
        return self.history / "plans.jsonl"

    @property
    def execution_plan_log(self) -> Path:
        """The log of execution plans, next to the history."""
        return self.history / "paths.jsonl"

    @property
    def rollback_log(self) -> Path:
        """The log of rollbacks after divergence, next to the history."""
        return self.history / "rollbacks.jsonl"

    @property
    def quarantine_log(self) -> Path:
        """The log of quarantined rounds, next to the history."""
        return self.history / "quarantine.jsonl"

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
        return self.folder / "rounds.jsonl"

    @property
    def sums(self) -> Path:
        """Running sums over the round records, computed by the process that follows the run."""
        return self.folder / "rounds.sums"

    @property
    def comparators(self) -> Path:
        """The results of comparators, one line per evaluation."""
        return self.folder / "comparators.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def checkpoint_log(self) -> Path:
        """The log of checkpoints, one line each: round, time, duration."""
        return self.folder / "checkpoints.jsonl"

    @property
    def leader(self) -> Path:
        """The published meta-parameters, which other processes adapt."""
        return self.folder / "leader.safetensors"

    def comparator(self, kind: str) -> Path:
        """Return the path of a comparator's state, from which its next refresh continues."""
        return self.folder / f"{kind}.safetensors"

    @property
    def ranks(self) -> Path:
        """The rank report: the ranks and their counters; written periodically, not durable."""
        return self.folder / "ranks.json"

    @property
    def agent(self) -> Path:
        """The number of times that the elastic agent has restarted the ranks."""
        return self.folder / "agent.json"

    def heartbeat(self, process: str) -> Path:
        """Return the path of the heartbeat of a process of the run, which is not durable."""
        return self.folder / f"{process}.heartbeat"

    @property
    def rendezvous(self) -> Path:
        """The folder in which the ranks of this machine meet; only their user can open it."""
        return self.folder / "rendezvous"

    @property
    def settings(self) -> Path:
        """The complete settings of the run, written when the daemon starts."""
        return self.folder / "settings.json"
