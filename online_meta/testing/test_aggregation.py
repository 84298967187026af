"""What every aggregation of ``online_meta.aggregation`` keeps, and the numbers of each against a slow computation."""

import itertools
import math
import random

import pytest
import torch

from online_meta.aggregation.squint import RATES
from online_meta.testing.experts import ENTRIES, GAMES, HIGH, LOW, hunt, make, play, sequences, with_rate

every_aggregation = pytest.mark.parametrize("name", ENTRIES)
ROUNDING = 1e-9


def rows(count, rounds=30, seed=1):
    """Return losses in [0, 1], (rounds, N)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(rounds, count, generator=draw, dtype=torch.float64)


def run(aggregation, losses, state=None):
    """Return the weights before each round, and the state after all."""
    state = aggregation.init(losses.shape[1]) if state is None else state
    weights = []
    for row in losses:
        weights.append(aggregation.weights(state))
        state = aggregation.update(state, row)
    return torch.stack([*weights, aggregation.weights(state)]), state


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_aggregation
@pytest.mark.parametrize("count", [1, 2, 7])
def test_weights_are_a_distribution_and_equal_at_first(name, count):
    weights, _ = run(make(name), rows(count))
    assert weights.dtype == torch.float64
    assert weights.shape == (31, count)
    assert (weights >= 0).all()
    assert weights.sum(1) == pytest.approx([1.0] * 31, abs=1e-14)
    assert weights[0].tolist() == pytest.approx([1 / count] * count, abs=1e-15)


@every_aggregation
def test_a_permutation_of_the_experts_permutes_the_weights_to_the_bit(name):
    losses, order = rows(7), torch.tensor([3, 6, 0, 5, 1, 4, 2])
    aggregation = make(name)
    (weights, state), (permuted, of_permuted) = run(aggregation, losses), run(aggregation, losses[:, order])
    assert torch.equal(weights[:, order], permuted)
    assert aggregation.regret(state) == aggregation.regret(of_permuted)
    assert aggregation.bound(state) == aggregation.bound(of_permuted)


@every_aggregation
def test_a_single_expert_has_all_the_weight_and_no_regret(name):
    aggregation = make(name)
    weights, state = run(aggregation, rows(1))
    assert torch.equal(weights, torch.ones_like(weights))
    assert aggregation.regret(state) == pytest.approx(0, abs=1e-14)
    assert aggregation.bound(state) >= 0


@every_aggregation
def test_regret_is_zero_and_the_bound_holds_before_the_first_round(name):
    aggregation = make(name)
    state = aggregation.init(3)
    assert aggregation.regret(state) == 0 <= aggregation.bound(state) < math.inf


@every_aggregation
def test_a_restored_state_continues_to_the_bit(name):
    aggregation, losses = make(name), rows(5)
    _, whole = run(aggregation, losses)
    _, half = run(aggregation, losses[:15])
    assert all(value.dtype in (torch.float64, torch.int64) for value in half.values())
    stored = {key: (value.dtype, value.shape, bytearray(value.numpy().tobytes())) for key, value in half.items()}
    restored = {key: torch.frombuffer(data, dtype=kind).reshape(shape) for key, (kind, shape, data) in stored.items()}
    weights, state = run(make(name), losses[15:], restored)
    assert same(state, whole)
    assert torch.equal(weights[-1], aggregation.weights(whole))


@every_aggregation
def test_weights_depend_on_earlier_losses_only_and_arguments_stay_as_they_are(name):
    aggregation, losses = make(name), rows(4)
    others = torch.cat([losses[:10], rows(4, seed=2)[10:]])
    (weights, _), (of_others, _) = run(aggregation, losses), run(aggregation, others)
    assert torch.equal(weights[:11], of_others[:11])
    assert not torch.equal(weights[11:], of_others[11:])
    _, state = run(aggregation, losses)
    before, row = {key: value.clone() for key, value in state.items()}, losses[3].clone()
    aggregation.update(state, row)
    aggregation.weights(state), aggregation.bound(state), aggregation.regret(state)
    assert same(state, before)
    assert torch.equal(row, losses[3])


@every_aggregation
def test_float32_losses_count_as_their_values(name):
    aggregation, losses = make(name), rows(4).float()
    assert same(run(aggregation, losses)[1], run(aggregation, losses.double())[1])


@every_aggregation
@pytest.mark.parametrize("wrong", [math.nan, -math.inf, 2e100])
def test_a_loss_that_is_no_number_is_refused_with_its_place(name, wrong):
    aggregation = make(name)
    state = aggregation.init(3)
    with pytest.raises(ValueError, match="the loss of expert 1 is"):
        aggregation.update(state, torch.tensor([0.5, wrong, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="the loss of the aggregate is"):
        aggregation.update(state, torch.tensor([0.5, 0.5, 0.5]), wrong)


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - {"bayes"}))
def test_an_infinite_loss_is_refused(name):
    aggregation = make(name)
    with pytest.raises(ValueError, match="the loss of expert 1 is inf"):
        aggregation.update(aggregation.init(2), torch.tensor([0.5, math.inf]))


@every_aggregation
def test_wrong_shapes_and_counts_are_refused(name):
    aggregation = make(name)
    with pytest.raises(ValueError, match=r"shape \(2,\): there are 3 experts, so it must be \(3,\)"):
        aggregation.update(aggregation.init(3), torch.zeros(2))
    with pytest.raises(ValueError, match="at least 1 expert"):
        aggregation.init(0)
    with pytest.raises(TypeError):
        make(name, pace=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bayes", {"prior": [0.5, 0.6]}),
        ("bayes", {"prior": [1.0, 0.0]}),
        ("bayes", {"prior": []}),
        ("exp_concave", {"low": 1.0, "high": 1.0}),
        ("exp_concave", {"low": 0.0, "high": math.inf}),
        ("squint", {"low": 2.0, "high": 1.0}),
        ("fixed_share", {"rates": []}),
        ("fixed_share", {"rates": [0.6]}),
        ("fixed_share", {"switches": -1}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=r"it needs|low is"):
        make(name, **options)


def test_a_loss_out_of_the_known_range_is_refused():
    for name, wrong in (("exp_concave", (HIGH - LOW) ** 2 + 0.01), ("exp_concave", -0.1), ("squint", 1.01)):
        aggregation = make(name)
        with pytest.raises(ValueError, match="the loss of expert 1 is"):
            aggregation.update(aggregation.init(2), torch.tensor([0.5, wrong]))


@every_aggregation
def test_no_sequence_of_losses_breaks_the_bound(name):
    for excess, played in hunt(name, make(name)):
        assert excess <= ROUNDING, played


@every_aggregation
@pytest.mark.parametrize("factor", [16, 1 / 16])
def test_the_hunt_finds_a_learning_rate_that_is_wrong(name, factor):
    assert any(excess > 0.1 for excess, _ in hunt(name, with_rate(make(name), factor)))


@pytest.mark.parametrize("name", ["bayes", "fixed_share", "adahedge"])
@pytest.mark.parametrize("scale", [1e-9, 1e6, 1e90])
def test_the_bound_holds_for_losses_of_any_size(name, scale):
    for title, sequence in sequences(4, 40).items():
        assert play(name, make(name), sequence, 4, scale) <= ROUNDING, title


@every_aggregation
def test_regret_is_that_of_the_sums_of_losses_and_at_most_what_the_theorem_charges(name):
    aggregation = make(name, switches=0) if name == "fixed_share" else make(name)
    state = charged = aggregation.init(4)
    total, experts = 0.0, [0.0] * 4
    for points in sequences(4, 50)["random"]:
        losses, loss = GAMES[name](aggregation.weights(state).tolist(), points, 1.0)
        total, experts = total + loss, [sum(pair) for pair in zip(experts, losses, strict=True)]
        losses = torch.tensor(losses, dtype=torch.float64)
        state, charged = aggregation.update(state, losses, loss), aggregation.update(charged, losses)
        assert aggregation.regret(state) == pytest.approx(total - min(experts), abs=1e-12)
        assert aggregation.regret(state) <= aggregation.regret(charged) + 1e-12
        assert aggregation.regret(charged) <= aggregation.bound(charged) + 1e-12
        assert aggregation.weights(state).tolist() == pytest.approx(aggregation.weights(charged).tolist(), abs=1e-12)


def softmax(values):
    parts = [math.exp(value - max(values)) for value in values]
    return [part / sum(parts) for part in parts]


@pytest.mark.parametrize(("name", "rate"), [("bayes", 1.0), ("exp_concave", 1 / (2 * (HIGH - LOW) ** 2))])
def test_weights_are_exponential_in_the_cumulative_loss(name, rate):
    losses = rows(5) * 9
    weights, state = run(make(name), losses)
    for t, found in enumerate(weights.tolist()):
        assert found == pytest.approx(softmax([-rate * math.fsum(column) for column in losses[:t].T.tolist()]))
    assert make(name).bound(state) == pytest.approx(math.log(5) / rate)


def test_bayes_follows_bayes_rule_for_a_prior_and_its_bound_is_attained():
    prior, losses = [0.7, 0.2, 0.1], rows(3)
    aggregation = make("bayes", prior=prior)
    weights, state = run(aggregation, losses)
    evidence = [p * math.exp(-math.fsum(column)) for p, column in zip(prior, losses.T.tolist(), strict=True)]
    assert weights[-1].tolist() == pytest.approx([one / sum(evidence) for one in evidence])
    best = min(math.fsum(column) for column in losses.T.tolist())
    assert aggregation.regret(state) == pytest.approx(-math.log(sum(evidence)) - best)
    _, state = run(aggregation, torch.tensor([[9.0, 9.0, 0.0]] * 9))
    assert aggregation.bound(state) == pytest.approx(-math.log(0.1))
    assert aggregation.regret(state) == pytest.approx(-math.log(0.1))
    with pytest.raises(ValueError, match="prior has 3 numbers: there are 2 experts"):
        aggregation.init(2)


def test_bayes_drops_an_expert_of_infinite_loss_for_good():
    aggregation = make("bayes")
    weights, state = run(aggregation, torch.tensor([[math.inf, 1.0, 1.0], [0.0, 5.0, 5.0], [0.0, math.inf, 5.0]]))
    assert weights.tolist()[1:] == [[0, 0.5, 0.5], [0, 0.5, 0.5], [0, 0, 1]]
    assert aggregation.regret(state) == pytest.approx(math.log(3))
    with pytest.raises(ValueError, match="each of the 3 experts has had an infinite loss"):
        aggregation.update(state, torch.tensor([0.0, 0.0, math.inf]))


def test_bayes_returns_to_an_expert_that_was_left_far_behind():
    aggregation = make("bayes")
    state = aggregation.update(aggregation.init(2), torch.tensor([0.0, 5000.0]))
    assert 0 < aggregation.weights(state)[1].item() < 1e-300
    state = aggregation.update(state, torch.tensor([math.inf, 0.0]))
    assert aggregation.weights(state).tolist() == [0, 1]
    assert aggregation.regret(state) <= aggregation.bound(state) + ROUNDING


def test_adahedge_equals_the_definitions_of_its_paper():
    for losses in (rows(3), rows(3) * 100 - 40, torch.tensor([[0.5] * 3] * 5 + [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])):
        weights, state = run(make("adahedge"), losses)
        sums, gap, total, variance, spread = [0.0] * 3, 0.0, 0.0, 0.0, 0.0
        for found, row in zip(weights.tolist(), losses.tolist(), strict=False):
            eta = math.log(3) / gap if gap else math.inf
            right = softmax([-eta * (one - min(sums)) for one in sums]) if gap else [1 / 3] * 3
            assert found == pytest.approx(right, abs=1e-12)
            mean = sum(w * one for w, one in zip(right, row, strict=True))
            if gap:
                mix = -math.log(sum(w * math.exp(-eta * one) for w, one in zip(right, row, strict=True))) / eta
            else:
                mix = min(row)
            gap += mean - mix
            sums, total = [a + b for a, b in zip(sums, row, strict=True)], total + mean
            variance += sum(w * (one - mean) ** 2 for w, one in zip(right, row, strict=True))
            spread = max(spread, max(row) - min(row))
        assert make("adahedge").bound(state) == pytest.approx(2 * gap)
        assert make("adahedge").regret(state) == pytest.approx(total - min(sums))
        assert gap <= math.sqrt(variance * math.log(3)) + (2 / 3 * math.log(3) + 1) * spread


def test_adahedge_has_the_bound_of_its_paper_for_every_sequence():
    """The live bound grows with the losses, so it must have a bound itself."""
    count, rounds = 4, 300
    aggregation = make("adahedge")
    for title, sequence in sequences(count, rounds).items():
        state = aggregation.init(count)
        for point in sequence:
            weights = aggregation.weights(state).tolist()
            losses, _ = GAMES["adahedge"](weights, point(weights) if callable(point) else point, 1.0)
            state = aggregation.update(state, torch.tensor(losses, dtype=torch.float64))
        most = math.sqrt(rounds / 4 * math.log(count)) + 2 / 3 * math.log(count) + 1
        assert state["gap"].item() <= most, title


def test_adahedge_has_a_bound_for_squared_losses_that_does_not_grow_with_the_rounds():
    """Without the loss of the mixture, the weights change so slowly that the bound grows with the rounds."""
    count, rounds, width = 4, 300, HIGH - LOW
    aggregation, without = make("adahedge"), []
    for title, sequence in sequences(count, rounds).items():
        state, alone = aggregation.init(count), aggregation.init(count)
        for point in sequence:
            weights = aggregation.weights(state).tolist()
            losses, loss = GAMES["exp_concave"](weights, point(weights) if callable(point) else point, 1.0)
            state = aggregation.update(state, torch.tensor(losses, dtype=torch.float64), loss)
            alone = aggregation.update(alone, torch.tensor(losses, dtype=torch.float64))
            assert aggregation.regret(state) <= aggregation.bound(state) + ROUNDING, title
        assert state["gap"].item() <= (2 * math.log(count) + 1) * width**2, title
        without.append(alone["gap"].item())
    assert max(without) > (2 * math.log(count) + 1) * width**2


def test_tracking_has_the_bound_of_its_docstring_for_every_sequence_of_experts():
    """A slow oracle: the shares by their definition, and the best sequence of experts by dynamic programming."""
    count, rounds, rate = 3, 60, 0.1
    aggregation = make("tracking", rate=rate)
    for title, sequence in sequences(count, rounds, seed=1).items():
        state, shares, gap, total, spent = aggregation.init(count), [1 / count] * count, 0.0, 0.0, 0.0
        sums, best, switch = [0.0] * count, None, 0.0
        for t, point in enumerate(sequence, 1):
            weights = aggregation.weights(state).tolist()
            losses, loss = GAMES["exp_concave"](weights, point(weights) if callable(point) else point, 1.0)
            state = aggregation.update(state, torch.tensor(losses, dtype=torch.float64), loss)
            before, sums = sums, [a + b for a, b in zip(sums, losses, strict=True)]
            if gap:
                eta = math.log(count) / gap
                assert weights == pytest.approx(shares, abs=1e-9), title
                least = min(losses)
                posterior = [share * math.exp(-eta * (one - least)) for share, one in zip(shares, losses, strict=True)]
                mix = least - math.log(sum(posterior)) / eta
            else:
                leaders = [one == min(before) for one in before]
                assert weights == pytest.approx([led / sum(leaders) for led in leaders]), title
                mix = min(sums) - min(before)
            charged = min(loss, math.fsum(w * one for w, one in zip(weights, losses, strict=True)))
            old, gap = gap, gap + max(charged - mix, 0.0)
            total += loss
            if gap:
                eta, part = math.log(count) / gap, rate / (t + 1)
                if old:
                    tempered = softmax([old / gap * math.log(max(one, 1e-300)) for one in posterior])
                else:
                    tempered = softmax([-eta * (one - min(sums)) for one in sums])
                shares = [(1 - part) * one + part / count for one in tempered]
                spent += math.log(1 / (1 - part)) / eta
            if best is None or not old:
                best = [*sums]
            else:
                best = [min(stay, min(best) + switch) + one for stay, one in zip(best, losses, strict=True)]
            switch = math.log(count / (rate / (t + 1))) * gap / math.log(count)
            assert total <= min(best) + 2 * gap + spent + ROUNDING, title
        assert aggregation.bound(state) == pytest.approx(2 * gap + spent)
        assert aggregation.regret(state) == pytest.approx(total - min(sums), abs=1e-9)


def test_tracking_follows_the_best_expert_when_it_changes():
    lost = {}
    for name in ("adahedge", "tracking"):
        aggregation = make(name)
        state, lost[name] = aggregation.init(3), 0.0
        for t in range(200):
            losses = torch.tensor([0.1, 0.9, 0.5] if t < 100 else [0.9, 0.1, 0.5], dtype=torch.float64)
            lost[name] += float(aggregation.weights(state) @ losses)
            state = aggregation.update(state, losses)
    assert lost["tracking"] < 200 * 0.1 + 10
    assert lost["adahedge"] > 200 * 0.1 + 50


def test_fixed_share_is_bayes_rule_over_all_sequences_of_experts():
    rates, count, rounds, switches = (0.0, 0.1, 0.5), 3, 4, 2
    aggregation, losses = make("fixed_share", rates=rates, switches=switches), (rows(count, rounds) * 4).tolist()
    weights, state = run(aggregation, torch.tensor(losses, dtype=torch.float64))
    evidence, best, right = 0.0, math.inf, [0.0] * count
    for path in itertools.product(range(count), repeat=rounds + 1):
        changes = [a != b for a, b in itertools.pairwise(path)]
        lost = sum(row[place] for row, place in zip(losses, path, strict=False))
        priors = [math.prod(rate / (count - 1) if moved else 1 - rate for moved in changes) / count for rate in rates]
        right[path[-1]] += sum(priors) / len(rates) * math.exp(-lost)
        if sum(changes[:-1]) <= switches:
            best = min(best, lost)
    evidence = sum(right)
    assert weights[-1].tolist() == pytest.approx([one / evidence for one in right])
    assert aggregation.regret(state) == pytest.approx(-math.log(evidence) - best)
    bounds = [
        math.log(9) + k * math.log(2) + min(-k * math.log(a) - (3 - k) * math.log(1 - a) for a in (1e-300, 0.1, 0.5))
        for k in range(3)
    ]
    assert aggregation.bound(state) == pytest.approx(max(bounds))


def test_fixed_share_follows_the_best_expert_as_it_changes():
    good, bad = [0.0, 3.0, 3.0], [3.0, 3.0, 0.0]
    losses = torch.tensor(([good] * 40 + [bad] * 40) * 2)
    aggregation = make("fixed_share", switches=3)
    weights, state = run(aggregation, losses)
    assert weights[-1, 2] > 0.9
    assert weights[79, 2] > 0.9
    assert weights[40, 0] > 0.9
    assert aggregation.regret(state) < 40
    assert aggregation.bound(state) < 60
    of_one = make("fixed_share", switches=0)
    assert of_one.regret(run(of_one, losses)[1]) < -150  # the best single expert loses 240


def test_squint_equals_its_definition():
    losses = rows(4)
    weights, state = run(make("squint"), losses)
    regrets, variances = [0.0] * 4, [0.0] * 4
    for found, row in zip(weights.tolist(), losses.tolist(), strict=False):
        right = [
            sum(eta * math.exp(eta * r - eta**2 * v) for eta in RATES) for r, v in zip(regrets, variances, strict=True)
        ]
        assert found == pytest.approx([one / sum(right) for one in right])
        mean = sum(w * one for w, one in zip(found, row, strict=True))
        regrets = [r + mean - one for r, one in zip(regrets, row, strict=True)]
        variances = [v + (mean - one) ** 2 for v, one in zip(variances, row, strict=True)]
    best = max(range(4), key=regrets.__getitem__)
    bound = min(math.log(4 * len(RATES)) / eta + eta * variances[best] for eta in RATES)
    assert make("squint").bound(state) == pytest.approx(bound)
    assert make("squint").regret(state) == pytest.approx(max(regrets))
    wide = make("squint", low=-10.0, high=10.0)
    of_wide, state = run(wide, losses * 20 - 10)
    assert of_wide.flatten().tolist() == pytest.approx(weights.flatten().tolist())
    assert wide.bound(state) == pytest.approx(20 * bound)
    assert wide.regret(state) == pytest.approx(20 * max(regrets))


def test_the_potential_of_squint_never_rises_above_one():
    assert all(0 < eta <= 0.5 for eta in RATES)  # as the theorem requires
    aggregation = make("squint")
    for title, sequence in sequences(3, 60).items():
        state = aggregation.init(3)
        for point in sequence:
            weights = aggregation.weights(state).tolist()
            losses = (point(weights) if callable(point) else point)[:3]
            state = aggregation.update(state, torch.tensor(losses, dtype=torch.float64))
            pairs = [*zip(state["regrets"].tolist(), state["variances"].tolist(), strict=True)]
            potential = sum(math.exp(eta * r - eta**2 * v) for r, v in pairs for eta in RATES)
            assert potential <= len(RATES) * 3 * (1 + ROUNDING), title


def test_the_mean_of_squared_errors_over_rows_and_of_log_losses_over_rows_keeps_the_bound():
    """Experts predict several rows in a round; the aggregate predicts each row by the same weights."""
    draw = random.Random(0)
    for name in ("exp_concave", "bayes", "fixed_share"):
        aggregation = make(name)
        state = aggregation.init(3)
        for _ in range(60):
            weights = aggregation.weights(state).tolist()
            games = [GAMES[name](weights, [draw.random() for _ in range(4)], 20.0) for _ in range(6)]
            losses = torch.tensor([found for found, _ in games], dtype=torch.float64).mean(0)
            state = aggregation.update(state, losses, sum(loss for _, loss in games) / len(games))
            assert aggregation.regret(state) <= aggregation.bound(state) + ROUNDING, name
