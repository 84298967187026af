"""The parts of the benchmark of whole rounds are correct; JAX need not be installed."""

import json
import math
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from torch.func import functional_call

from online_meta.replay import ReplayRequest
from online_meta.replay.uniform import uniform
from tests.benchmarks.networks import sinusoid_mlp
from tests.benchmarks.rounds import __main__ as program
from tests.benchmarks.rounds.cold import SETTLED, Start, time_process
from tests.benchmarks.rounds.game import Game, draw_rounds, find_difference, load_order, save_order
from tests.benchmarks.rounds.kernels import profile_rounds
from tests.benchmarks.rounds.page import Figure, render
from tests.benchmarks.rounds.parts import ALONE, DRAWN, TOLERANCE, compare_turns, describe_losses, make_sinusoids
from tests.benchmarks.rounds.players import OurPlayer, make_order, read_settings, take_turns

SMALL = ("inner.steps=2", "meta.batch=4", "meta.steps_per_round=2", "meta.clip_norm=0.5", "engine.batching='loop'")
ROUNDS = 12


def play_plainly(order, rounds):
    """Play the game in float64 with unrolled inner steps, as the JAX program does; return the losses."""
    game, module = order.game, sinusoid_mlp().double()
    weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in order.weights.items()}
    tasks = [torch.tensor(part, dtype=torch.float64) for part in order.tasks]
    optimizer = torch.optim.Adam(weights.values(), lr=game.meta_lr)

    def query_loss(round, steps):
        support_x, support_y, query_x, query_y = (part[round] for part in tasks)
        phi = weights
        for _ in range(steps):
            loss = (functional_call(module, phi, (support_x,)) - support_y).square().mean()
            grads = torch.autograd.grad(loss, [*phi.values()], create_graph=True)
            phi = {name: value - game.inner_lr * grad for (name, value), grad in zip(phi.items(), grads, strict=True)}
        return (functional_call(module, phi, (query_x,)) - query_y).square().mean()

    for weight in weights.values():
        weight.requires_grad_()
    losses = []
    for round in range(rounds):
        losses.append((query_loss(round, 0).item(), query_loss(round, game.inner_steps).item()))
        for step in range(game.meta_steps):
            optimizer.zero_grad()
            picked, shares = draw_rounds(game, round, step)
            sum(query_loss(at, game.inner_steps) * float(share) for at, share in zip(picked, shares)).backward()  # noqa: B905
            torch.nn.utils.clip_grad_norm_(weights.values(), game.clip_norm)
            optimizer.step()
    return losses


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Return the order for JAX, and the losses of our run of the same game."""
    folder = tmp_path_factory.mktemp("rounds")
    settings, history = read_settings((*SMALL, *ALONE)), make_sinusoids(folder, ROUNDS)
    with OurPlayer(settings, history, folder / "run") as player:
        order = make_order(settings, player, history, ROUNDS)
        take_turns({"ours": player.turn}, 2, ROUNDS // 2, lambda what: None)
        return order, player.read_losses()


def test_the_order_describes_our_game(played):
    order, losses = played
    assert len(losses) == ROUNDS
    assert find_difference(losses, play_plainly(order, ROUNDS)) < TOLERANCE / 10


@pytest.mark.parametrize(
    "change",
    [
        {"inner_steps": 1},
        {"inner_lr": 0.011},
        {"batch": 3},
        {"meta_steps": 1},
        {"meta_lr": 0.0051},
        {"clip_norm": 10.0},
        {"seed": 1},
    ],
    ids=str,
)
def test_losses_of_another_game_differ(played, change):
    order, losses = played
    other = order._replace(game=order.game._replace(**change))
    assert find_difference(losses, play_plainly(other, ROUNDS)) > TOLERANCE


def test_a_time_does_not_count_if_the_losses_differ():
    batch, compared = 10, 10 + DRAWN
    ours = [(2.0, 1.0 + 0.01 * round) for round in range(compared + 5)]
    late = [*ours[:compared], *((before, 2 * after) for before, after in ours[compared:])]
    assert describe_losses(ours, late, batch)[1] == "", "rounding adds up in later rounds"
    early = [*ours[: compared - 1], (2.0, ours[compared - 1][1] * (1 + 2 * TOLERANCE)), *ours[compared:]]
    about, wrong = describe_losses(ours, early, batch)
    assert wrong == "JAX plays another game: losses differ by 2.0e-04"
    part = compare_turns("Rounds", [about], {"ours": [1.0, 3.0], "JAX": [1.0, 2.0]}, "ours / JAX", 2.0, wrong)
    (figure,) = (Figure(**figure) for figure in part["figures"])
    assert figure.verdict == f"**falls short**: {wrong}"
    assert figure.found == 1.25, "the median of the ratios within a turn"


def test_the_difference_is_infinite_if_a_loss_is_missing_or_not_finite():
    assert find_difference([(1.0, 2.0)], [(1.0, 2.0)]) == 0.0
    assert find_difference([(1.0, 2.0)], [(1.0, 2.5)]) == pytest.approx(0.2)
    for other in ([], [(1.0, 2.0), (1.0, 2.0)], [(1.0, None)], [(math.nan, 2.0)], [(math.inf, 2.0)]):
        assert find_difference([(1.0, 2.0)], other) == math.inf


@pytest.mark.parametrize("round", [0, 3, 9, 10, 11, 500])
def test_the_draws_are_those_of_uniform_replay(round):
    game = Game(1, 0.01, 10, 3, 0.005, 10.0, seed=7)
    for step in range(game.meta_steps):
        picked, shares = draw_rounds(game, round, step)
        samples = uniform().sample({}, ReplayRequest(game.seed, round, step, range(round + 1), game.batch))
        assert picked[shares > 0].tolist() == [sample.round for sample in samples]
        assert shares[shares > 0].tolist() == pytest.approx([1 / len(samples)] * len(samples))
        assert picked.shape == shares.shape == (game.batch,)


def test_an_order_is_read_as_it_was_saved(played, tmp_path):
    order, _ = played
    save_order(tmp_path / "order.npz", order)
    found = load_order(tmp_path / "order.npz")
    assert found.game == order.game
    assert found.weights.keys() == order.weights.keys() == sinusoid_mlp().state_dict().keys()
    assert all((found.weights[name] == value).all() for name, value in order.weights.items())
    assert [part.shape for part in found.tasks] == [(ROUNDS, 10, 1)] * 4
    assert all((one == other).all() for one, other in zip(found.tasks, order.tasks, strict=True))


def test_players_take_turns_and_each_begins_once():
    calls = []
    turns = {name: lambda rounds, name=name: calls.append((name, rounds)) or float(len(calls)) for name in "ab"}
    assert take_turns(turns, 2, 5, lambda what: None) == {"a": [1.0, 4.0], "b": [2.0, 3.0]}
    assert calls == [("a", 5), ("b", 5), ("b", 5), ("a", 5)]


def test_a_figure_states_whether_its_goal_holds():
    assert Figure("time", 1.0, 2.0).verdict == Figure("time", 2.0, 2.0).verdict == "holds"
    assert Figure("time", 3.0, 2.0).verdict == "**falls short**: 1.50 times the goal"
    assert Figure("rounds/s", 0.6, 0.6, at_least=True).verdict == "holds"
    assert Figure("rounds/s", 0.3, 0.6, at_least=True).verdict == "**falls short**: 2.00 times the goal"
    assert Figure("time", None, 2.0).verdict == "not measured"


def test_the_slowest_round_is_one_after_the_first_ones():
    assert Start(9.0, [5.0] * SETTLED + [1.0, 1.0, 1.0, 3.0], []).slowest == 3.0


def test_a_process_that_fails_is_named_by_its_last_line():
    seconds, printed = time_process([sys.executable, "-c", "import os; print(os.environ['WORD'])"], {"WORD": "here"})
    assert printed == "here\n"
    assert seconds > 0
    with pytest.raises(RuntimeError, match=r"^why$"):
        time_process([sys.executable, "-c", "raise SystemExit('first\\nwhy')"], {})


def test_operations_that_others_call_count_once_and_waiting_is_outside():
    one = torch.ones(300, 300)

    def compute(rounds):
        for _ in range(rounds):
            torch.einsum("ij,jk->ik", one, one)  # calls bmm, which calls others

    def wait(rounds):
        compute(rounds)
        time.sleep(0.02 * rounds)

    busy, waiting = profile_rounds(compute, 30), profile_rounds(wait, 30)
    assert 0 < busy.inside <= busy.seconds
    assert 0 < waiting.inside <= waiting.seconds - 0.02
    assert waiting.outside == 1 - waiting.inside / waiting.seconds


def test_the_page_has_all_figures_and_says_what_failed(monkeypatch, tmp_path):
    def fail(goal, setting):
        raise RuntimeError("no JAX")

    def pass_by(goal, setting):
        setting.log("half")
        seconds = {"ours": [0.002, 0.004], "JAX": [0.001, 0.001]}
        starts = {name: {"wall": 2.0, "rounds": [0.5, 0.25]} for name in seconds}
        return {**compare_turns("Rounds", ["Equal."], seconds, "ours / JAX", goal), "starts": starts, "game": "k1"}

    monkeypatch.setattr(program, "PARTS", {"first": (1.5, fail), "second": (2.0, pass_by)})
    monkeypatch.setattr(program, "bind_to_one_core", lambda: None)
    done = CliRunner().invoke(program.main, ["--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "bench_rounds.md").read_text()
    assert page in done.output
    assert "Not measured: RuntimeError: no JAX." in page
    assert "| first | - | - | at most 1.5 | not measured |" in page
    assert "| ours / JAX | 3 | 33% | at most 2 | **falls short**: 1.50 times the goal |" in page
    assert "| ours | 3 ms | 33% |" in page
    assert {line.count("|") for line in page.splitlines() if line.startswith("|")} == {4, 6}
    result = json.loads((tmp_path / "bench_rounds.json").read_text())
    assert render(result) == page
    assert (tmp_path / "bench_rounds.png").read_bytes().startswith(b"\x89PNG")
