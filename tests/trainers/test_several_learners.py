"""Learners with settings of their own play side by side, and any of them leads."""

import dataclasses
import json
from threading import Event

import pytest
import torch
from pydantic import TypeAdapter

from online_meta.learners import MemoryReplayBuffer, _fitted
from streams.history.history import History
from tests.support.runs import SETTINGS, bits, changed, fill, kill, lines, opened, play, task
from trainers.build import build_context, build_learners
from trainers.checkpoint import load_latest
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import lead_settings, list_learners, override_settings
from trainers.loop.rounds import play_rounds
from trainers.settings import LearnerSettings, TrainerSettings
from trainers.settings_fingerprint import SettingsChanged, check_same_settings, fingerprint, reproducibility_key

ROUNDS = 6
OWN = {
    "rate": {"meta": {"lr": 0.1, "steps_per_round": 2, "batch": 3}},
    "rule": {"inner": {"rule": "meta_sgd", "steps": 3}},
    "estimator": {"meta": {"gradient": "reptile", "optimizer": "sgd"}, "inner": {"fast": ["1.*"]}},
    "replay": {"meta": {"replay": "recent", "replay_options": {"window": 2}, "schedule": "inverse_square_root"}},
}
ALONE = changed(SETTINGS, regret={"baselines": ()})


def with_learners(*learners: LearnerSettings, **more):
    return dataclasses.replace(ALONE, learner=learners, **more)


@pytest.mark.parametrize("name", OWN)
def test_two_ftmls_play_side_by_side_as_in_two_runs(tmp_path, history, name):
    own = LearnerSettings("ftml", "own", **OWN[name])
    together = with_learners(LearnerSettings("ftml"), own)
    plain = play(tmp_path / "plain", history, ROUNDS, ALONE)
    apart = play(tmp_path / "apart", history, ROUNDS, override_settings(ALONE, own))
    assert apart["ftml"] != plain["ftml"]
    assert play(tmp_path / "together", history, ROUNDS, together) == {"ftml": plain["ftml"], "own": apart["ftml"]}
    found, first, second = (lines(tmp_path / run) for run in ("together", "plain", "apart"))
    for line, one, two in zip(found, first, second, strict=True):
        assert line["learners"] == {"ftml": one["learners"]["ftml"], "own": two["learners"]["ftml"]}
        assert (line["loss_after"], line["steps"]) == (one["loss_after"], one["steps"])


def test_the_first_learner_leads_the_records(tmp_path, history):
    swapped = with_learners(LearnerSettings("ftml", "own", meta={"lr": 0.1}), LearnerSettings("ftml", "slow"))
    play(tmp_path, history, ROUNDS, swapped)
    for line in lines(tmp_path):
        assert line["loss_after"] == line["learners"]["own"]["loss_after"]
        assert [*line["learners"]] == ["own", "slow"]
    assert load_latest(RunFiles(tmp_path).checkpoints).leader == "own"


def test_from_scratch_leads(tmp_path, history):
    settings = with_learners(LearnerSettings("from_scratch", options={"steps": 2}), LearnerSettings("ftml"))
    for _ in range(2 * ROUNDS):
        kill(tmp_path, history, 2, settings)
        if len(lines(tmp_path)) == ROUNDS + 3:
            break
    play(tmp_path, history, ROUNDS + 3, settings)
    for line in lines(tmp_path):
        assert line["loss_after"] == line["learners"]["from_scratch"]["loss_after"]
        assert line["steps"] == []
    assert bits_of(tmp_path, history, settings)["ftml"] == play(tmp_path / "one", history, ROUNDS + 3, ALONE)["ftml"]


def bits_of(folder, history, settings):
    with opened(folder, history, settings) as run:
        return bits(run)


@pytest.mark.parametrize("kind", ["moml", "aruba", "c_maml", "dp_mixture"])
def test_any_learner_that_leads_rolls_back_and_halves_its_rate(tmp_path, kind):
    settings = dataclasses.replace(
        changed(
            ALONE,
            model={"loss": "tests.support.edge:loss"},
            meta={"lr": 1.5, "max_skipped": 3},
            checkpoint={"every_rounds": 1, "keep": 2},
        ),
        learner=(LearnerSettings(kind),),
    )
    with History.open(tmp_path / "history", write=True) as history:
        fill(history, [task(t) for t in range(30)])
        with opened(tmp_path / "run", history, settings) as run:
            play_rounds(run, Event(), 30)
            count = len(run.journal.rollback_log.rollbacks)
            assert count >= 1
            assert run.learners[kind].lr_scale == 0.5**count
            ended = bits(run)
        with opened(tmp_path / "run", history, settings) as run:
            assert run.learners[kind].lr_scale == 0.5**count
            assert bits(run) == ended


def test_a_rollback_to_the_beginning_restores_every_kind_of_learner(tmp_path, history):
    from trainers.loop.recovery import rollback

    for kind in ("ftml", "moml", "aruba", "c_maml", "dp_mixture", "from_scratch"):
        settings = with_learners(LearnerSettings(kind))
        with opened(tmp_path / kind, history, settings) as run:
            start = bits(run)
            play_rounds(run, Event(), 3)
            rollback(run, 0)
            assert bits(run) == start, kind


def test_the_chosen_learner_is_published(tmp_path, history):
    from deploy.leader import read_leader

    settings = with_learners(LearnerSettings("ftml"), LearnerSettings("ftml", "own", meta={"lr": 0.1}))
    for answers, name in ((None, "ftml"), ("own", "own"), ("ftml", "ftml")):
        chosen = dataclasses.replace(settings, answers=answers)
        with opened(tmp_path / str(answers), history, chosen) as run:
            play_rounds(run, Event(), 2)
            wanted = run.learners[name].engine.meta().weights
        found = read_leader(RunFiles(tmp_path / str(answers)).leader).meta.weights
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_meta_steps_the_leader_and_baselines_keep_their_own_optimizer():
    def lr_of(*learners):
        settings = with_learners(*learners)
        made = build_learners(settings, build_context(settings, MemoryReplayBuffer()))
        return [learner.engine._lr for learner in made.values()]

    plain, slow = LearnerSettings("online_reptile"), LearnerSettings("online_reptile", "slow", meta={"lr": 0.25})
    own = LearnerSettings("online_reptile", "own", options={"lr": 0.5})
    assert lr_of(plain, own, slow) == [0.01, 0.5, 0.25]
    assert lr_of(own, plain) == [0.5, 0.001]
    assert lr_of(LearnerSettings("ftml"), plain) == [0.01, 0.001]


def test_further_numbers_of_steps_are_scored_as_answers_of_their_own(tmp_path, history):
    inner = {"steps": 2, "answer_steps": (0, 1, 2)}
    settings = changed(ALONE, inner=inner)
    played = play(tmp_path / "several", history, ROUNDS, settings)
    assert played == play(tmp_path / "one", history, ROUNDS, changed(ALONE, inner={"steps": 2}))
    for line, plain in zip(lines(tmp_path / "several"), lines(tmp_path / "one"), strict=True):
        assert [*line["learners"]] == ["ftml", "ftml@0", "ftml@1"]
        assert line["learners"]["ftml"] == plain["learners"]["ftml"]
        assert line["learners"]["ftml@0"]["loss_after"] == line["loss_before"]
        assert len({one["loss_after"] for one in line["learners"].values()}) == 3


def test_other_heads_are_scored_as_answers_of_their_own(tmp_path, history):
    settings = changed(ALONE, inner={"steps": 2, "answer_heads": ("ridge_head",)})
    played = play(tmp_path / "several", history, ROUNDS, settings)
    assert played == play(tmp_path / "one", history, ROUNDS, changed(ALONE, inner={"steps": 2}))
    for line, plain in zip(lines(tmp_path / "several"), lines(tmp_path / "one"), strict=True):
        assert [*line["learners"]] == ["ftml", "ftml@ridge_head"]
        assert line["learners"]["ftml"] == plain["learners"]["ftml"]
        assert line["learners"]["ftml@ridge_head"]["loss_after"] != plain["learners"]["ftml"]["loss_after"]


def test_another_rule_comes_without_the_options_of_the_run():
    run = changed(SETTINGS, inner={"rule": "momentum", "options": {"momentum": 0.5}})
    assert override_settings(run, LearnerSettings("ftml", inner={"rule": "sgd"})).inner.options == {}
    assert override_settings(run, LearnerSettings("ftml", inner={"steps": 2})).inner.options == {"momentum": 0.5}
    assert lead_settings(run) is run
    with pytest.raises(ValueError, match=r"learner 'ftml': max_skipped counts for the whole run: set it in \[meta\]"):
        override_settings(run, LearnerSettings("ftml", meta={"max_skipped": 2}))


def test_learners_need_different_names():
    settings = with_learners(LearnerSettings("ftml"), LearnerSettings("ftml"))
    with pytest.raises(ValueError, match="two learners are called 'ftml': give one another name"):
        build_learners(settings, build_context(settings, MemoryReplayBuffer()))


def test_tables_and_baselines_name_the_same_run():
    plain = changed(SETTINGS, regret={"baselines": ("moml",), "options": {"moml": {"alpha": 2.0}}})
    tables = with_learners(LearnerSettings("ftml"), LearnerSettings("moml", options={"alpha": 2.0}))
    tables = changed(tables, regret={"options": {}})
    assert fingerprint(tables) == fingerprint(plain)
    check_same_settings(json.loads(json.dumps(reproducibility_key(plain))), tables)
    check_same_settings(json.loads(json.dumps(reproducibility_key(tables))), plain)
    assert [one.name for one in list_learners(tables)] == ["ftml", "moml"]


CHANGES = {
    "the learners were ftml, own and are ftml, own, moml": lambda own: (LearnerSettings("ftml"), own, MOML),
    "the learners were ftml, own and are own, ftml": lambda own: (own, LearnerSettings("ftml")),
    "meta of the learner 'own' was {'lr': 0.1} and is {'lr': 0.2}": lambda own: (
        LearnerSettings("ftml"),
        dataclasses.replace(own, meta={"lr": 0.2}),
    ),
    "the learners were ftml, own and are ftml. ": lambda own: (LearnerSettings("ftml"),),
}
MOML = LearnerSettings("moml")


@pytest.mark.parametrize("message", CHANGES)
def test_a_restart_with_other_learners_is_refused(tmp_path, history, message):
    own = LearnerSettings("ftml", "own", meta={"lr": 0.1})
    play(tmp_path, history, 3, with_learners(LearnerSettings("ftml"), own))
    with pytest.raises(SettingsChanged) as refused, opened(tmp_path, history, with_learners(*CHANGES[message](own))):
        pass
    assert message.strip(". ") in str(refused.value)
    with opened(tmp_path, history, with_learners(LearnerSettings("ftml"), own, answers="own")) as run:
        assert run.round == 3


@pytest.mark.parametrize("tables", [True, False], ids=["tables", "baselines"])
@pytest.mark.parametrize("name", ["sklearn", "river"])
def test_a_restart_with_another_version_of_a_library_is_refused(tmp_path, history, monkeypatch, name, tables):
    settings = changed(SETTINGS, regret={"baselines": () if tables else (name,)})
    if tables:
        settings = with_learners(LearnerSettings("ftml"), LearnerSettings(name, "own"))
    play(tmp_path, history, 3, settings)
    play(tmp_path, history, 6, settings)
    now = fingerprint(settings)
    monkeypatch.setattr(_fitted, "version", lambda distribution: "0.1")
    assert fingerprint(settings) != now
    with pytest.raises(SettingsChanged, match=rf"libraries.*and is .*'{name}': '0\.1'"):
        play(tmp_path, history, 7, settings)
    recorded = load_latest(RunFiles(tmp_path).checkpoints).settings
    run = TypeAdapter(TrainerSettings).validate_python(recorded)
    with pytest.raises(ValueError, match=rf"fitted by {name} .*, and {name} 0\.1 is here"):
        build_learners(run, build_context(run, MemoryReplayBuffer()))


def test_a_run_without_such_learners_records_no_versions():
    assert "libraries" not in json.dumps(reproducibility_key(changed(SETTINGS, regret={"baselines": ("constant",)})))


def test_a_name_may_contain_dots(tmp_path, history):
    settings = with_learners(LearnerSettings("ftml", "v1.2"), LearnerSettings("ftml", "v1.3", meta={"lr": 0.1}))
    played = play(tmp_path, history, 3, settings)
    assert bits_of(tmp_path, history, settings) == played
