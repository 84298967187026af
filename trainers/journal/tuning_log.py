"""The log of a run's race: which settings were dropped, from which round on; restarts and replays follow it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from online_meta.regret.racing import Loser, Race, drop, find_best, find_losers, observe, start_race
from trainers.journal.jsonl import Line, LineReader, LineWriter
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import Decision, obey_decisions
from trainers.settings import TrainerSettings, TuningSettings
from trainers.settings_fingerprint import fingerprint


class TuningLog:
    """The log of the decisions of a race, in a file next to the history; each is durable before it takes effect.

    It also has the state of the race, which follows from the records of the rounds and the decisions.

    Args:
        path: of the file, which is created if it does not exist.
        settings: fingerprint of the settings; decisions under other settings are ignored.
        race: the names of the answers that race.
        planned: number of rounds that the update log contains.
        rounds: number of rounds that the run has learned; it obeys all decisions up to there.
    """

    def __init__(self, path: Path, settings: str, race: Sequence[str], planned: int, rounds: int = 0) -> None:
        """Open the file and read its decisions; the race is before its first round."""
        self._writer, self._settings, self._considered = LineWriter(path), settings, -1
        lines = [line for line in LineReader(path).refresh() if line["settings"] == settings]
        self.decisions = [read_decision(line) for line in lines if line["event"] == "decision"]
        self.obeyed = [decision for decision in self.decisions if decision.round <= rounds]
        self.race: Race | None = start_race(race)
        # Updates that were logged before the first line under these settings were made under other settings.
        self._bound_rounds = range(lines[0]["free"] if lines else planned, planned)
        if not lines:
            self._write({"event": "start", "race": [*race], "free": planned})

    def is_over(self) -> bool:
        """Return whether the race has a winner that leads already."""
        return any(decision.winner is not None for decision in self.obeyed)

    def is_due(self, round: int, tuning: TuningSettings) -> bool:
        """Return whether a decision is made before ``round`` that the run does not obey yet; see ``decide``."""
        if self._considered < round:
            self._considered = round
            self.decide(round, tuning)
        return any(decision.round <= round for decision in self.decisions[len(self.obeyed) :])

    def observe(self, line: Line, warmup: int) -> None:
        """Follow the race by the record of the next round; rounds before ``warmup`` do not count."""
        self._obey(line["round"])
        if self.race is None or line["skipped"] is not None or line["round"] < warmup:
            return
        found = line["learners"]
        charge = max((one["charged"] for one in found.values() if "charged" in one), default=0.0)
        losses = {name: found[name]["loss_after"] for name in self.race.racing}
        self.race = observe(self.race, {name: charge if one is None else one for name, one in losses.items()})

    def _obey(self, round: int) -> None:
        """Drop what the decisions up to ``round`` have dropped."""
        for decision in self.decisions:
            if self.race is not None and decision.round <= round:
                dropped = [name for name in decision.dropped if name in self.race.racing]
                self.race = drop(self.race, dropped) if decision.winner is None else None

    def decide(self, round: int, tuning: TuningSettings) -> Decision | None:
        """Return the decision before ``round``: the logged one, or a new one, which is then logged; None for none.

        Args:
            round: the next round to play.
            tuning: when contestants are dropped, and when the race ends.
        """
        logged = next((one for one in self.decisions if one.round == round), None)
        if logged is not None or round in self._bound_rounds:
            return logged
        self._obey(round)
        race = self.race
        if race is None or not race.rounds:
            return None
        losers = find_losers(race, tuning.alpha)
        left = [name for name in race.racing if name not in {loser.name for loser in losers}]
        winner = left[0] if len(left) == 1 else find_best(race) if race.rounds >= tuning.rounds else None
        dropped = tuple(name for name in race.racing if name not in left or (winner and name != winner))
        if not dropped:
            return None
        decision = Decision(round, dropped, winner)
        self._record(decision, race, losers)
        return decision

    def _record(self, decision: Decision, race: Race, losers: Sequence[Loser]) -> None:
        means = {name: total / race.rounds for name, total in race.totals.items()}
        known = {"raced": race.rounds, "mean_losses": means, "losers": [loser._asdict() for loser in losers]}
        self._write({"event": "decision", **decision._asdict(), **known})
        self.decisions.append(decision)

    def _write(self, line: Line) -> None:
        self._writer.append({**line, "settings": self._settings})
        self._writer.sync()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def read_decision(line: Line) -> Decision:
    """Return the decision that a line of the log, or its JSON, contains."""
    return Decision(line["round"], tuple(line["dropped"]), line["winner"])


def read_decisions(path: Path, settings: TrainerSettings) -> list[Decision]:
    """Return the decisions in the log of a run that began with these settings; none without a race."""
    if not settings.race:
        return []
    own = fingerprint(settings)
    lines = (line for line in LineReader(path).lines() if line["event"] == "decision" and line["settings"] == own)
    return [read_decision(line) for line in lines]


def settings_of_checkpoint(settings: TrainerSettings, files: RunFiles, rounds: int) -> TrainerSettings:
    """Return the settings with which a checkpoint was made, of a run that began with ``settings``.

    It is written before the decision that is made at its round.
    """
    decisions = [decision for decision in read_decisions(files.tuning_log, settings) if decision.round < rounds]
    return obey_decisions(settings, decisions)


def settle_race(settings: TrainerSettings, files: RunFiles, round: int) -> TrainerSettings:
    """Return the settings of a run as they are at a round: without what its race has dropped before."""
    decisions = [decision for decision in read_decisions(files.tuning_log, settings) if decision.round < round]
    dropped = {name for decision in decisions for name in decision.dropped}
    over = any(decision.winner is not None for decision in decisions)
    left = () if over else tuple(name for name in settings.race if name not in dropped)
    return replace(obey_decisions(settings, decisions), race=left)


def find_won(decisions: Sequence[Decision]) -> str | None:
    """Return the name of the learner that has won the race; None while it goes on."""
    winner = decisions[-1].winner if decisions else None
    return None if winner is None else winner.partition("@")[0]


def describe_decision(decision: Decision) -> str:
    """Return a decision in words."""
    if decision.winner is not None:
        return f"{decision.winner} has won the race between settings, and leads from now on"
    return f"{', '.join(decision.dropped)} dropped from the race between settings"
