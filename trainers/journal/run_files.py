"""Where a run keeps its files; every name that is scripted against is written here once."""

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
        """What timing decided, beside the history that it belongs to."""
        return self.history / "plans.jsonl"

    @property
    def execution_plan_log(self) -> Path:
        """From which round on which path summed the meta-gradients; beside the plans."""
        return self.history / "paths.jsonl"

    @property
    def rollback_log(self) -> Path:
        """Where the leader went back after it had diverged; beside the plans."""
        return self.history / "rollbacks.jsonl"

    @property
    def programs(self) -> Path:
        """Compiled programs, each named by its digest."""
        return self.folder / "programs"

    @property
    def rounds(self) -> Path:
        """One line for each round."""
        return self.folder / "rounds.jsonl"

    @property
    def sums(self) -> Path:
        """Sums over the rounds, made from their lines by whoever follows the run; beside it, how far they go."""
        return self.folder / "rounds.sums"

    @property
    def comparators(self) -> Path:
        """One line for each evaluation of a comparator."""
        return self.folder / "comparators.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints."""
        return self.folder / "checkpoints"

    @property
    def checkpoint_log(self) -> Path:
        """One line for each checkpoint: its round, when, how long it took."""
        return self.folder / "checkpoints.jsonl"

    @property
    def leader(self) -> Path:
        """The current meta-parameters, for those who adapt with them."""
        return self.folder / "leader.safetensors"

    def comparator(self, kind: str) -> Path:
        """The state of a comparator, from which its next refresh goes on."""
        return self.folder / f"{kind}.safetensors"

    @property
    def ranks(self) -> Path:
        """The ranks that play, and what each has done; written now and then, and nothing to rely on after a crash."""
        return self.folder / "ranks.json"

    @property
    def agent(self) -> Path:
        """How often the agent, which keeps the ranks, has started them again."""
        return self.folder / "agent.json"

    @property
    def settings(self) -> Path:
        """The configuration as it was resolved when the run began."""
        return self.folder / "settings.json"
