"""Play the rounds of a history: score, learn, report, checkpoint; from wherever the last process stopped."""

import time
from threading import Event
from typing import Any

import torch

from online_meta.path_finder import PATIENCE_SECONDS
from online_meta.regret import LEARNER
from online_meta.types import Task
from streams.history import History
from trainers.aside import Aside
from trainers.build import LOCAL, build_learners, build_setup
from trainers.crew import ALONE, Crew
from trainers.desk import Desk, close_desk, open_desk, publish, report
from trainers.divergence import Diverged
from trainers.past import HistoryPast
from trainers.paths import Steering, read_paths, told_paths
from trainers.patience import Patience
from trainers.roll import must_tell, tell_ranks
from trainers.round_lines import Support, round_lines
from trainers.run import Run
from trainers.run_files import RunFiles
from trainers.settings import TrainerSettings
from trainers.states import find_way_back, go_back, resume, write_checkpoint
from trainers.timing import Timing, timed

POLL_SECONDS = 0.02
PUBLISH_SECONDS = 0.5
END, WAIT, SAVE, TELL, MORE = "end", "wait", "save", "tell", "more"


def open_run(
    settings: TrainerSettings,
    files: RunFiles,
    history: History | None,
    patience: float = PATIENCE_SECONDS,
    crew: Crew | None = None,
) -> Run:
    """Open a run at its last whole checkpoint, or at its beginning; all ranks of a ``crew`` at the same one.

    Without a crew this process is alone, and steps by the local engine whatever the settings say. Ranks of a crew that
    are on other machines than the run's files have no ``history``.

    Faster paths for its meta-gradients are looked for once these have taken ``patience`` seconds.
    Raises ``SettingsChanged`` when the run was begun with settings that give other parameters,
    ``CheckpointError`` when there are checkpoints and none is whole, or rounds before it have lost their lines.
    """
    torch.set_num_threads(settings.engine.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # It only costs time.
    kind, crew = settings.engine.kind if crew else LOCAL, crew or ALONE
    timing = Timing()
    playing = timed(crew, timing)  # That ranks begin one after the other is not counted.
    past = HistoryPast(history, torch.device(settings.engine.device), playing)
    learners = build_learners(settings, build_setup(settings, past, files.programs, kind, timing, playing.gather))
    rounds = resume(settings, files, learners, crew)
    desk = open_desk(settings, files, rounds) if crew.leads else None
    rollbacks = crew.share(len(desk.rollbacks.before(rounds)) if desk else None)
    learners[LEARNER].lr_scale = 0.5**rollbacks  # type: ignore[attr-defined]  # FTML has one
    share = -(-settings.meta.batch // crew.world)
    return Run(
        settings=settings,
        files=files,
        history=history,
        learners=learners,
        leader=learners[LEARNER].engine.meta,  # type: ignore[attr-defined]  # FTML has an engine
        past=past,
        steering=Steering(learners, settings.engine, share, files.programs, patience),
        crew=playing,
        timing=timing,
        writing=Aside("checkpoint"),
        patience=Patience(settings.engine.timeout_seconds),
        desk=desk,
        round=rounds,
        checkpointed=rounds,
    )


def play_rounds(run: Run, stop: Event, until: int | None = None) -> int:
    """Play rounds as they are committed, until ``stop`` is set or ``until`` rounds are learned; checkpoint.

    Returns how many are learned. What is being played when ``stop`` is set is finished first. Of several ranks
    the leading one says what they do next; ``stop`` and ``until`` of the others do not count.
    Raises ``OSError`` when the disk takes no more, ``Diverged`` when the run is to stop because its meta-steps are not
    finite any more.
    """
    while (order := _order(run, stop, until)) != END:
        if order == SAVE:
            write_checkpoint(run)
        elif order == TELL:
            tell_ranks(run)
        elif order == WAIT:
            _publish(run)
            stop.wait(POLL_SECONDS)
        else:
            if isinstance(order, int):
                play_update(run, order)
            else:
                learn_more(run)
            if run.desk and time.monotonic() - run.desk.published.at > PUBLISH_SECONDS:
                _publish(run)
    run.writing.finish()
    _publish(run)
    return run.round


def _order(run: Run, stop: Event, until: int | None) -> int | str:
    """Return how many rounds can be played now, or that it is time to save, to wait or to end: as the leader says."""
    run.writing.idle()  # What went wrong beside training is raised here.
    order: int | str
    order, problem = WAIT, None
    if run.desk and run.history is not None:
        try:
            find_way_back(run, run.desk)
            order = _decide(run, run.desk, len(run.history), stop, until)
        except Diverged as error:
            problem = str(error)
    waited = run.timing.waiting_seconds
    order, problem = run.crew.share([order, problem])
    if order == WAIT:  # Each rank has its own pause between two looks for a task; what is longer is a slow rank.
        run.timing.waiting_seconds = max(waited, run.timing.waiting_seconds - POLL_SECONDS)
    if problem:
        raise Diverged(problem)
    return order


def _decide(run: Run, desk: Desk, committed: int, stop: Event, until: int | None) -> int | str:
    """While one checkpoint is written beside training no other is begun, except where a rollback needs it."""
    # A checkpoint is of a round as it was learned: it does not tell how much was learned more since.
    new = 0 if run.updates else run.round - run.checkpointed
    if new and run.round in desk.rollbacks.wanted(run.round + 1):
        return SAVE
    if new >= run.settings.checkpoint.every_rounds and run.writing.idle():
        return SAVE
    if must_tell(run, desk):
        return TELL
    stops, ends = stop.is_set(), until is not None and run.round >= until
    if new and (ends or stops):
        return SAVE
    if stops:
        return END
    if run.updates < desk.plans.more(run.round):
        return MORE
    if ends:
        return END
    available = committed - run.round
    if available:
        return available if until is None else min(available, until - run.round)
    return _decide_at_rest(run, desk, new)


def _decide_at_rest(run: Run, desk: Desk, new: int) -> str:
    """No task waits: learn more of past rounds, as far as the budget goes, from a checkpoint on."""
    settled = desk.plans.knows(run.round) or desk.rollbacks.at(run.round) is not None
    if settled or not run.round or run.updates >= run.settings.meta.idle_updates:
        return WAIT
    if new:
        return SAVE if run.writing.idle() else WAIT
    desk.plans.decide_more(run.round)
    return MORE


def play_update(run: Run, available: int) -> None:
    """Play one plan: score its rounds with every learner, let each learn them, report."""
    # What timing decides is written down before it is played, and shared.
    rounds, back_to = run.crew.share(_plan(run, available, run.desk) if run.desk else None)
    if back_to is not None:
        go_back(run, back_to)
    fresh = range(run.round, run.round + rounds)
    run.past.hand_out([fresh] * run.crew.world)
    tasks: list[Task] = [run.past[round] for round in fresh]
    run.steering.follow(read_paths(run.crew.share(_find_paths(run, tasks, run.desk) if run.desk else None)))
    began, regret = time.monotonic(), run.settings.regret
    with run.timing.working():
        scores = {
            name: [learner.score(task, regret.prefixes) for task in tasks] for name, learner in run.learners.items()
        }
        learned = {name: learner.learn(*tasks) for name, learner in run.learners.items()}
    run.timing.steps += len(learned[LEARNER].steps)
    seconds = time.monotonic() - began
    run.patience.note(seconds)
    if run.patience.due():
        run.crew.wait_at_most(run.patience.seconds())
    if run.desk and run.history is not None:
        entries = [run.history.entry(round) for round in fresh]
        support = Support([len(task.support.x) for task in tasks], regret.proficiency) if regret.prefixes else None
        for line in round_lines(entries, scores, learned[LEARNER], seconds, support, run.more):
            report(run.desk, line)
    run.round += rounds
    run.updates, run.more = 0, []


def learn_more(run: Run) -> None:
    """Let each learner make one more update on past rounds, which is planned."""
    paths = told_paths(run.desk.paths.at(run.round - 1)) if run.desk else None
    run.steering.follow(read_paths(run.crew.share(paths)))  # As the last round was: a restart may begin here.
    with run.timing.working():
        reports = {name: learner.learn_more(run.updates) for name, learner in run.learners.items()}
    run.timing.steps += len(reports[LEARNER])
    run.more += reports[LEARNER]
    run.updates += 1


def _plan(run: Run, available: int, desk: Desk) -> tuple[int, int | None]:
    """Return how many rounds share the next update, and what the leader goes back to before."""
    plan = desk.plans.decide(run.round, available, run.settings.meta.max_rounds_per_update)
    back_to = desk.rollbacks.at(run.round)
    if back_to is not None:
        run.writing.finish()  # The checkpoint that it goes back to may be the one that is being written.
    return plan.rounds, back_to


def _find_paths(run: Run, tasks: list[Task], desk: Desk) -> dict[str, Any]:
    """Return the paths by which the next update is computed, as JSON has them."""
    if not (desk.known or desk.paths.binds(run.round)):  # What was played before goes by the same paths.
        desk.paths.change(run.round, run.steering.find(desk.paths.at(run.round), tasks))
    return told_paths(desk.paths.at(run.round))


def _publish(run: Run) -> None:
    if run.desk:
        publish(run.desk, run.leader(), run.round, run.updates)


def close_run(run: Run) -> None:
    """Stop what is being compiled or read ahead, finish what is being written, and close the run's files."""
    run.steering.close()
    run.writing.close()
    run.past.close()
    if run.desk:
        close_desk(run.desk)
