"""The pool of a run: made of its learners, weighted by the rows of the ledger, and the same after kills and replays."""

import dataclasses
import json
from threading import Event

import pytest
import torch

from online_meta.learners.pool import choose_aggregation
from online_meta.regret.ledger import is_finite_loss
from tests.support.runs import SETTINGS, bits, changed, kill, lines, opened, play
from trainers.journal.leader_file import read_published_leader
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import find_player, list_players
from trainers.loop.rounds import play_rounds
from trainers.settings import LearnerSettings, ModelSettings, TrainerSettings
from trainers.settings_fingerprint import (
    SettingsChanged,
    adopt_defaults,
    check_same_settings,
    fingerprint,
    reproducibility_key,
)

ROUNDS = 8
POOLED = changed(SETTINGS, pool={"aggregation": "auto"}, inner={"answer_steps": (0, 3)})
EXPERTS = [f"{name}{suffix}" for name in ("ftml",) for suffix in ("", "@0", "@3")]


def expert_names(line):
    return [name for name in line["learners"] if name != "pool"]


def recompute(rows, aggregation):
    """Return the figures of the pool from the rows of the ledger alone, one update a round."""
    names = expert_names(rows[0])
    state, own, best, found = aggregation.init(len(names)), 0.0, dict.fromkeys(names, 0.0), []
    for line in rows:
        weights = dict(zip(names, aggregation.weights(state).tolist(), strict=True))
        losses = {name: one["loss_after"] for name, one in line["learners"].items()}
        losses = {name: line["learners"][name].get("charged") if one is None else one for name, one in losses.items()}
        assert all(map(is_finite_loss, losses.values()))
        charged = torch.tensor([losses[name] for name in names], dtype=torch.float64)
        state = aggregation.update(state, charged, losses["pool"])
        own += losses["pool"]
        best = {name: best[name] + losses[name] for name in names}
        found.append((weights, aggregation.regret(state), aggregation.bound(state), own - min(best.values())))
    return found


def test_weights_regret_and_bound_follow_from_the_rows_of_the_ledger(tmp_path, history):
    play(tmp_path, history, ROUNDS, POOLED)
    rows = lines(tmp_path)
    assert [*rows[0]["learners"]][:3] == EXPERTS
    for line, (weights, regret, bound, unclipped) in zip(
        rows, recompute(rows, choose_aggregation("density")), strict=True
    ):
        assert line["pool"]["weights"] == weights
        assert (line["pool"]["regret"], line["pool"]["bound"]) == (regret, bound)
        assert line["pool"]["unclipped_regret"] == pytest.approx(unclipped, abs=1e-12)
        assert regret <= bound


def test_the_pool_changes_no_other_learner(tmp_path, history):
    with_pool = play(tmp_path / "with", history, ROUNDS, POOLED)
    without = play(tmp_path / "without", history, ROUNDS, changed(POOLED, pool={"aggregation": "none"}))
    assert {name: one for name, one in with_pool.items() if name != "pool"} == without
    for one, other in zip(lines(tmp_path / "with"), lines(tmp_path / "without"), strict=True):
        assert {name: found for name, found in one["learners"].items() if name != "pool"} == other["learners"]


def test_a_run_that_is_killed_weights_as_one_that_is_not(tmp_path, history):
    right = play(tmp_path / "whole", history, ROUNDS, POOLED)
    killed = tmp_path / "killed"
    for updates in (2, 1, 4):
        kill(killed, history, updates, POOLED)
    assert play(killed, history, ROUNDS, POOLED) == right
    assert lines(killed) == lines(tmp_path / "whole")


def test_rounds_of_a_shared_update_have_the_weights_from_before_it(tmp_path, history):
    play(tmp_path, history, ROUNDS, changed(POOLED, meta={"max_rounds_per_update": 4}))
    weights = [json.dumps(line["pool"]["weights"]) for line in lines(tmp_path)]
    assert len(set(weights)) == 2
    assert weights[:4] == weights[:1] * 4


def test_a_shadow_plays_and_has_no_weight(tmp_path, history):
    learners = (LearnerSettings("ftml"), LearnerSettings("from_scratch", shadow=True))
    settings = dataclasses.replace(changed(POOLED, regret={"baselines": ()}), learner=learners)
    play(tmp_path, history, ROUNDS, settings)
    for line in lines(tmp_path):
        assert "from_scratch" in line["learners"]
        assert [*line["pool"]["weights"]] == EXPERTS
    with opened(tmp_path, history, settings) as run:
        assert not any(name.startswith("from_scratch") for name in run.answering.learner.state())
    first = dataclasses.replace(settings, learner=(LearnerSettings("ftml", shadow=True), LearnerSettings("moml")))
    with pytest.raises(ValueError, match="cannot be a shadow"), opened(tmp_path / "first", history, first):
        pass


def test_the_pool_answers_and_the_learner_that_leads_steps(tmp_path, history):
    assert list_players(POOLED) == ("ftml", "train_on_everything", "from_scratch", "pool")
    assert (find_player(POOLED, None), find_player(POOLED, "ftml@3")) == ("pool", "ftml")
    assert find_player(SETTINGS, None) == "ftml"
    with opened(tmp_path, history, POOLED) as run:
        play_rounds(run, Event(), ROUNDS)
        assert (run.leader_name, run.answering.name) == ("ftml", "pool")
        state = run.answering.learner.state()
        assert bits(run).keys() == {"ftml", "train_on_everything", "from_scratch", "pool"}
    assert "/weight/ftml@3" in state
    assert {name.partition("/")[0] for name in state} == {"", "ftml", "train_on_everything"}
    assert read_published_leader(RunFiles(tmp_path).leader, "pool").rounds == ROUNDS


def test_one_learner_called_pool_is_refused(tmp_path, history):
    with pytest.raises(ValueError, match="two learners are called 'pool'"):
        play(tmp_path, history, 1, dataclasses.replace(POOLED, learner=(LearnerSettings("ftml", "pool"),)))


def test_a_run_keeps_what_it_began_with_where_the_configuration_leaves_it_open():
    open_keys = ("inner.answer_steps", "pool.aggregation", "regret.baselines", "regret.options.from_scratch")
    chosen = changed(POOLED, regret={"options": {"from_scratch": {"steps": 20}}})
    old, new = reproducibility_key(SETTINGS), dataclasses.replace(chosen, defaults=open_keys)
    assert adopt_defaults(new, old) == dataclasses.replace(SETTINGS, defaults=open_keys)
    check_same_settings(old, new)
    before_the_pool = {section: keys for section, keys in old.items() if section != "pool"}
    assert adopt_defaults(new, before_the_pool) == dataclasses.replace(SETTINGS, defaults=open_keys)
    check_same_settings(before_the_pool, new)
    with pytest.raises(SettingsChanged, match=r"pool.aggregation was 'none' and is 'auto'"):
        check_same_settings(before_the_pool, POOLED)


def test_a_section_at_its_defaults_keeps_the_fingerprint_of_versions_before_it():
    assert fingerprint(TrainerSettings(ModelSettings("trainers.models:mlp"))) == "399608a408ae45e3"
    assert fingerprint(POOLED) != fingerprint(changed(POOLED, pool={"aggregation": "none"}))


def test_the_pool_of_a_run_is_made_of_the_learners_that_play(tmp_path, history):
    with opened(tmp_path, history, POOLED) as run:
        assert run.pool.experts == {name: one for name, one in run.learners.items() if name != "pool"}
