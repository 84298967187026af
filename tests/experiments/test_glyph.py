"""The table of glyphs at a small size: letters, distorted images and rows."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from online_meta.functional.model import model_loss
from online_meta.meta_optimizer import MetaOptimizer
from trainers.models import conv4

from tests.experiments.common.algorithms import build_algorithm
from tests.experiments.glyphs import __main__, tuning
from tests.experiments.glyphs.embedding import (
    EmbeddedTask,
    embed_task,
    score_logistic_regression,
    score_nearest_centroid,
)
from tests.experiments.glyphs.fonts import LETTERS, find_distinct, find_fonts, list_alphabets, render_letter
from tests.experiments.glyphs.jobs import plan_jobs, run_job
from tests.experiments.glyphs.page import render
from tests.experiments.glyphs.rows import EMBEDDING, Plan, Training, change, list_plans
from tests.experiments.glyphs.tasks import Letters, draw_letters, draw_tasks, split_scripts, turn_letters
from tests.experiments.glyphs.training import (
    GLOBS,
    Budget,
    Job,
    build_task_network,
    meta_train,
    score_meta,
    spend,
    train_embedding,
)
from tests.house.sources import ROOT


@pytest.fixture(scope="module")
def letters():
    """Synthetic letters made of crossing bars at random positions."""
    random = torch.Generator().manual_seed(0)
    masters = torch.zeros(40, 56, 56)
    for master in masters:
        for row, column in torch.randint(8, 44, (3, 2), generator=random):
            master[row : row + 4, 8:48] = 1.0
            master[8:48, column : column + 4] = 1.0
    return masters


def make_generator():
    return torch.Generator().manual_seed(3)


def test_the_fonts_contain_alphabets_whose_letters_have_ink():
    fonts = find_fonts(ROOT / ".venv/debian/usr/share/fonts/truetype/noto")
    alphabets = list_alphabets(fonts)
    assert len(alphabets) > 100
    assert {"Thai", "Cher", "Ethi"} - alphabets.keys() <= {"Ethi"}  # Ethiopic has more letters than LETTERS allows.
    assert all(len(alphabet.code_points) in LETTERS for alphabet in alphabets.values())
    thai = alphabets["Thai"]
    pictures = [render_letter(thai.font, chr(code_point)) for code_point in thai.code_points[:8]]
    assert all(picture.shape == (56, 56) and 100 < (picture > 128).sum() < 1500 for picture in pictures)


def test_similar_letters_are_merged(letters):
    masters = (torch.cat([letters[:5], letters[2:4], letters[5:7]]) * 255).byte().numpy()
    assert list(find_distinct(masters)) == [0, 1, 2, 3, 4, 7, 8]


def test_missing_fonts_are_reported(tmp_path):
    ended = CliRunner().invoke(__main__.main, ["--fonts", str(tmp_path)])
    assert ended.exit_code == 2
    assert "there are no Noto fonts in" in ended.output
    assert "fonts-noto-core" in ended.output


def test_tasks_are_labelled_and_every_image_is_new(letters):
    first, second = draw_tasks(make_generator(), letters, 2, 5, 2, 3)
    assert first.support.x.shape == (10, 1, 28, 28)
    assert first.query.x.shape == (15, 1, 28, 28)
    assert first.support.y.tolist() == [0, 1, 2, 3, 4] * 2
    assert float(first.support.x.min()) >= 0
    assert float(first.support.x.max()) <= 1
    drawings = torch.cat([*first.support.x, *first.query.x, *second.support.x]).flatten(1)
    assert len(torch.unique(drawings, dim=0)) == 35
    again, _ = draw_tasks(make_generator(), letters, 2, 5, 2, 3)
    assert torch.equal(first.query.x, again.query.x)


def test_images_of_a_letter_resemble_it_more_than_others(letters):
    drawn = draw_letters(make_generator(), letters[:10].repeat(20, 1, 1)).flatten(1)
    plain = torch.nn.functional.avg_pool2d(letters[:10].unsqueeze(1), 2).flatten(1)
    nearest = torch.cdist(drawn, plain).argmin(1)
    assert float((nearest == torch.arange(10).repeat(20)).double().mean()) > 0.5


def test_scripts_are_split_the_same_way_every_time_and_validation_scripts_are_training_scripts():
    scripts = np.arange(100, 228)
    train, test = split_scripts(scripts, validation=False)
    fewer, validation = split_scripts(scripts, validation=True)
    assert [len(part) for part in (train, test, fewer, validation)] == [96, 32, 72, 24]
    assert sorted([*train, *test]) == [*scripts]
    assert sorted([*fewer, *validation]) == sorted(train)
    assert [part[:3].tolist() for part in (test, validation)] == [[209, 183, 132], [182, 214, 115]]
    assert np.array_equal(split_scripts(scripts, validation=True)[1], validation)


def test_turned_letters_are_further_letters(letters):
    turned = turn_letters(letters[:3], 4)
    assert turned.shape == (12, 56, 56)
    assert torch.equal(turned[:3], letters[:3])
    torch.testing.assert_close(turned[4], letters[1].flip(1).T)  # A quarter turn, counter-clockwise.


def test_a_budget_in_minutes_ends_with_the_clock_and_one_in_steps_with_their_number():
    seconds = iter([100.0, 100.0, 110.0, 130.0, 155.0, 161.0])
    shares = []
    assert spend(Budget(1.0, 7), shares.append, lambda: next(seconds)) == 4
    assert shares == pytest.approx([0, 1 / 6, 1 / 2, 11 / 12])
    shares.clear()
    assert spend(Budget(None, 4), shares.append) == 4
    assert shares == [0, 0.25, 0.5, 0.75]
    assert spend(Budget(None, 0), shares.append) == 0


def test_settings_change_the_algorithm_or_its_training():
    plan = list_plans()["ridge regression"]
    changed = change(plan, {"meta_lr": 0.5, "ways": 20})
    assert changed.algorithm == dataclasses.replace(plan.algorithm, meta_lr=0.5)
    assert changed.training == dataclasses.replace(plan.training, ways=20)
    with pytest.raises(TypeError, match="the embedding has no meta_lr"):
        change(list_plans()[EMBEDDING], {"meta_lr": 0.5})
    for name, candidates in tuning.CANDIDATES.items():
        assert all(change(list_plans()[name], settings) for settings in candidates)


@pytest.mark.parametrize("name", [name for name, plan in list_plans().items() if plan.algorithm])
def test_every_algorithm_computes_a_finite_loss_on_images(letters, name):
    algorithm, training = list_plans()[name]
    ways = min(training.ways, 5)
    module = build_task_network(algorithm, training, ways, 0)
    inner, gradient = build_algorithm(algorithm, model_loss(module, "cross_entropy"), GLOBS)
    task = draw_tasks(make_generator(), letters, 1, ways, 1, 1)[0]
    found = gradient(inner.init(dict(module.named_parameters())), task)
    assert torch.isfinite(found.loss)


def test_features_that_are_learned_for_a_head_serve_tasks_of_other_sizes(letters):
    algorithm = dataclasses.replace(list_plans()["nearest centroid"].algorithm, meta_lr=1e-2)
    training = Training(filters=8, ways=10, shots=1, queries=2, anneal=True, learned={"log_scale": -2.0})
    tasks = draw_tasks(make_generator(), letters, 8, 5, 5, 10)
    before = meta_train(algorithm, training, letters, 5, Budget(None, 0), 0)
    assert before.steps == 0
    assert float(before.meta.rule["log_scale"]) == -2.0
    after = meta_train(algorithm, training, letters, 5, Budget(None, 60), 0)
    first, last = (np.mean(score_meta(algorithm, training, found.meta, tasks)) for found in (before, after))
    assert last > first + 0.05


def test_an_annealed_rate_falls_to_nothing(letters, monkeypatch):
    rates = []
    monkeypatch.setattr(MetaOptimizer, "apply", lambda engine, sums, weight: rates.append(engine.lr_scale))
    algorithm = list_plans()["nearest centroid"].algorithm
    for anneal in (True, False):
        meta_train(algorithm, Training(filters=8, anneal=anneal), letters, 1, Budget(None, 3), 0)
    assert rates == pytest.approx([1.0, 0.75, 0.25, 1.0, 1.0, 1.0])


def test_an_embedding_learns_and_both_classifiers_use_it(letters):
    torch.manual_seed(0)
    module = conv4(1, 28, len(letters), filters=8)
    task = draw_tasks(make_generator(), letters, 1, 5, 5, 10)[0]
    before = score_nearest_centroid(embed_task(module, task))
    assert train_embedding(module, Training(), letters, Budget(None, 60), 0) == 60
    embedded = embed_task(module, task)
    torch.testing.assert_close(embedded.support.norm(dim=1), torch.ones(25))
    assert score_nearest_centroid(embedded) > max(before, 0.4)
    assert score_logistic_regression(embedded) > 0.4
    corners = torch.eye(2).repeat(3, 1)
    known = EmbeddedTask(corners, torch.tensor([7, 3] * 3), corners, torch.tensor([7, 3] * 2 + [3, 7]))
    assert score_nearest_centroid(known) == score_logistic_regression(known) == pytest.approx(4 / 6)


@pytest.fixture
def split(letters, monkeypatch):
    """The letters in place of those of the fonts, of which a quarter are held out."""
    read = {}
    made = Letters(letters[:30], letters[30:], 3, 1)
    monkeypatch.setattr("tests.experiments.glyphs.jobs.load_letters", lambda *asked: read.setdefault(asked[2:], made))
    return read


def test_jobs_that_share_a_training_are_one():
    budget = Budget(2.0, 10)
    planned = plan_jobs([EMBEDDING, "MAML"], (1, 5), budget, 0)
    assert [(job.name, job.shots, job.tasks) for job in planned] == [
        (EMBEDDING, (1, 5), 600),
        ("MAML", (1,), 600),
        ("MAML", (5,), 600),
    ]
    assert [job.budget for job in planned] == [Budget(2.0, 80), budget, budget]


def test_other_processes_can_import_what_they_run(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(__main__, "require_fonts", lambda fonts: tmp_path)
    monkeypatch.setattr(__main__, "load_letters", lambda *asked: None)
    monkeypatch.setattr(__main__, "run_rows", lambda jobs, run, asked, write: ran.append((run, asked)))
    CliRunner().invoke(__main__.main, ["--minutes", "0.5", "--only", EMBEDDING, "--work", str(tmp_path)])
    ((run, ((job, work, _),)),) = ran
    assert not run.__module__.endswith("__main__")  # A new process does not import the main module of a package.
    assert (job.name, job.budget.minutes, work) == (EMBEDDING, 0.5, tmp_path)


def test_rows_are_evaluated_on_held_out_scripts_saved_and_rendered(tmp_path, split, monkeypatch):
    plan = list_plans()["FOMAML"]
    jobs = [Job("FOMAML", plan, (shots,), Budget(None, 2), 0, 4) for shots in (1, 5)]
    rows = [row for job in jobs for row in run_job(job, tmp_path, tmp_path)["rows"]]
    assert [(row["label"], row["shots"], row["steps"]) for row in rows] == [("FOMAML", 1, 2), ("FOMAML", 5, 2)]
    assert split.keys() == {(False,)}
    monkeypatch.setattr("tests.experiments.glyphs.jobs.load_letters", lambda *asked: 1 / 0)
    assert run_job(jobs[0], tmp_path, tmp_path)["rows"] == rows[:1]
    with pytest.raises(ZeroDivisionError):  # Validation scripts make another row.
        run_job(jobs[0], tmp_path, tmp_path, validation=True)
    assert plan.algorithm.rule == rows[0]["asked"]["rule"]
    text = render({"command": "c", "rows": rows})
    one, five = (f"{row['accuracy']:.1%} ± {row['interval']:.1%}" for row in rows)
    assert (
        "| FOMAML | Finn et al., 2017 | sgd, lr 0.4, 3 steps; first_order | 4 x 5 letters, 5 queries; adam, lr 0.003 | "
        in text
    )
    assert f" | by the authors | 2 steps | {one} | {five} | {rows[0]['commit']} |" in text


def test_new_rows_replace_those_of_the_table_and_the_others_stay(tmp_path, split):
    plan = Plan(list_plans()["nearest centroid"].algorithm, Training(filters=8, shots=1, tuned=True))
    jobs = [
        Job("nearest centroid", plan, (1, 5), Budget(0.001, 0), 0, 4),
        Job(EMBEDDING, Plan(None, Training(filters=8)), (1,), Budget(None, 1), 0, 4),
    ]
    trained, embedded = (run_job(job, tmp_path, tmp_path)["rows"] for job in jobs)
    assert trained[0]["steps"] == trained[1]["steps"] >= 1  # One training serves both.
    older = [{**row, "accuracy": 0.125} for row in trained]
    __main__.write_rows(tmp_path, older)
    __main__.write_rows(tmp_path, [trained[1], *embedded])
    found = json.loads((tmp_path / "glyph_table.json").read_text(encoding="utf-8"))["rows"]
    assert found == [*embedded, older[0], trained[1]]
    text = (tmp_path / "glyph_table.md").read_text(encoding="utf-8")
    assert f" | validation | 0.001 min: {trained[0]['steps']:,} steps | 12.5% ± " in text


def test_candidates_are_scored_on_validation_scripts(tmp_path, split, monkeypatch):
    monkeypatch.setattr(tuning, "CANDIDATES", {"ridge regression": ({"filters": 8, "shots": 1}, {"filters": 16})})
    (job, other) = tuning.plan_trials(["ridge regression"], (1,), 0.001, 0)
    assert (job.plan.training.filters, other.plan.training.filters) == (8, 16)
    rows = run_job(job._replace(tasks=4), tmp_path, tmp_path, validation=True)["rows"]
    assert split.keys() == {(True,)}
    older = {**rows[0], "asked": {**rows[0]["asked"], "minutes": 7.0}, "accuracy": 0.125, "interval": None}
    tuning.write_rows(tmp_path, [older])
    tuning.write_rows(tmp_path, rows)
    text = (tmp_path / "glyph_tuning.md").read_text(encoding="utf-8")
    assert " | 7 | " in text
    assert " | 12.5% |  |" in text
    accuracy = f"{rows[0]['accuracy']:.1%} ± {rows[0]['interval']:.1%}"
    assert "| ridge regression | ridge_head, no step; exact | 8 filters; 1 x 5 letters, 1 + 5 images; adam, " in text
    assert f" | 0.001 | {rows[0]['steps']:,} | {accuracy} |  |" in text
