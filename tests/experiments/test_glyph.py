"""The table of glyphs at a small size: letters, distorted images and rows."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner
from online_meta.functional.model import model_loss
from trainers.models import conv4

from tests.experiments.common.algorithms import build_algorithm
from tests.experiments.glyphs import __main__
from tests.experiments.glyphs.embedding import (
    EmbeddedTask,
    embed_task,
    score_logistic_regression,
    score_nearest_centroid,
    train_embedding,
)
from tests.experiments.glyphs.fonts import LETTERS, find_distinct, find_fonts, list_alphabets, render_letter
from tests.experiments.glyphs.tasks import Letters, draw_letters, draw_tasks
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


@pytest.mark.parametrize("algorithm", __main__.list_algorithms(), ids=lambda algorithm: algorithm.label)
def test_every_algorithm_computes_a_finite_loss_on_images(letters, algorithm):
    module = __main__.build_network(algorithm, 0)
    inner, gradient = build_algorithm(algorithm, model_loss(module, "cross_entropy"), __main__.GLOBS)
    found = gradient(inner.init(dict(module.named_parameters())), draw_tasks(make_generator(), letters, 1, 5, 1, 1)[0])
    assert torch.isfinite(found.loss)


def test_an_embedding_learns_and_both_classifiers_use_it(letters):
    torch.manual_seed(0)
    module = conv4(1, 28, len(letters), filters=8)
    task = draw_tasks(make_generator(), letters, 1, 5, 5, 10)[0]
    before = score_nearest_centroid(embed_task(module, task))
    train_embedding(module, letters, 60, 0)
    embedded = embed_task(module, task)
    torch.testing.assert_close(embedded.support.norm(dim=1), torch.ones(25))
    assert score_nearest_centroid(embedded) > max(before, 0.4)
    assert score_logistic_regression(embedded) > 0.4
    corners = torch.eye(2).repeat(3, 1)
    known = EmbeddedTask(corners, torch.tensor([7, 3] * 3), corners, torch.tensor([7, 3] * 2 + [3, 7]))
    assert score_nearest_centroid(known) == score_logistic_regression(known) == pytest.approx(4 / 6)


def test_rows_are_evaluated_on_held_out_scripts_saved_and_rendered(tmp_path, letters, monkeypatch):
    monkeypatch.setattr(__main__, "TEST_TASKS", 4)
    split = Letters(letters[:30], letters[30:], 3, 1)
    monkeypatch.setattr(__main__, "load_letters", lambda fonts, cache: split)
    rows = [__main__.run_row("FOMAML", shots, 2, 0, tmp_path, tmp_path) for shots in (1, 5)]
    monkeypatch.setattr(__main__, "load_letters", lambda fonts, cache: 1 / 0)
    assert __main__.run_row("FOMAML", 1, 2, 0, tmp_path, tmp_path) == rows[0]
    assert dataclasses.asdict(__main__.list_algorithms()[2])["rule"] == rows[0]["asked"]["rule"]
    text = __main__.render({"command": "c", "commit": "d", "iterations": 2, "rows": rows})
    one, five = (f"{row['accuracy']:.1%} ± {row['interval']:.1%}" for row in rows)
    assert f"| FOMAML | Finn et al., 2017 | sgd, lr 0.4, 3 steps; first_order | {one} | {five} |" in text
