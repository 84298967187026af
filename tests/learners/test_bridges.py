"""The bridges to scikit-learn and river, against the same models in closed form and in plain loops."""

import math

import numpy as np
import pytest
import torch
from river import linear_model, preprocessing

import online_meta as om
from online_meta.batches import concat_support_query, empty_like, select_samples
from online_meta.learners import _fitted, constant, logistic_head, ridge_head, river, sklearn
from online_meta.learners.pool import OwningPool, choose_aggregation
from online_meta.testing.learner_problems import task
from tests.learners import estimators
from tests.learners.closed_form import CLASSES, assert_close, learn, of_classes, of_numbers, output_of, pooled

OURS = "tests.learners.estimators"


@pytest.fixture(autouse=True)
def forget_fits():
    estimators.FITS.clear()


@pytest.mark.parametrize("scope", ["task", "pooled"])
def test_ridge_of_scikit_learn_is_ours(scope):
    context, tasks = of_numbers()
    options = {"estimator": f"{OURS}:ridge_with_constant", "estimator_options": {"alpha": 0.3}, "scope": scope}
    found = learn(sklearn.build(context, **options), tasks[:3])
    right = learn(ridge_head.build(context, strength=0.3, per=scope), tasks[:3])
    support, (x, _) = tasks[3]
    for points in (0, 1, 4):
        few = select_samples(support, slice(points))
        assert_close(output_of(found, few, x), output_of(right, few, x), 1e-9)


def test_the_scope_both_fits_past_rows_and_the_support_set():
    context, tasks = of_numbers()
    options = {"estimator": f"{OURS}:ridge_with_constant", "scope": "both"}
    found = learn(sklearn.build(context, **options), tasks[:3])
    support, (x, _) = tasks[3]
    rows, alone = (
        om.Batch(*map(torch.cat, zip(pooled(tasks[:3])[:2], support[:2], strict=True))),
        ridge_head.build(context),
    )
    assert_close(output_of(found, support, x), output_of(alone, rows, x), 1e-9)


def of_every_class(context_and_tasks):
    """Return a support set in which every class occurs."""
    _, tasks = context_and_tasks
    x = pooled(tasks).x[: 2 * CLASSES]
    return om.Batch(x, torch.arange(CLASSES).repeat(2))


def test_logistic_regression_of_scikit_learn_is_ours():
    case = of_classes()
    options = {"estimator": f"{OURS}:logistic_with_constant", "estimator_options": {"strength": 0.5}}
    found = sklearn.build(case.context, **options, smoothing=1e-12)
    right = logistic_head.build(case.context, strength=0.5)
    support, x = of_every_class(case), case.tasks[3].query.x
    assert_close(output_of(found, support, x).exp(), output_of(right, support, x).softmax(1), 1e-4)


@pytest.mark.parametrize("learner", [sklearn, river])
def test_a_class_without_rows_has_a_probability(learner):
    context, tasks = of_classes()
    x, y = tasks[0].support.x, torch.tensor([0, 2, 2, 0])
    built = learner.build(context, smoothing=0.1)
    p = output_of(built, om.Batch(x, y), x).exp()
    assert_close(p.sum(1), torch.ones(4).double(), 1e-12)
    assert_close(p[:, [1, 3]], torch.full((4, 2), 0.9 / (4 + CLASSES) + 0.1 / CLASSES, dtype=torch.float64), 1e-12)
    alone = output_of(built, om.Batch(x, torch.full((4,), 2)), x).exp()
    assert_close(alone[:, 2], torch.full((4,), (4 + 1) / (4 + CLASSES), dtype=torch.float64), 1e-12)
    nothing = output_of(built, empty_like(tasks[0].support), x).softmax(1)
    assert_close(nothing, torch.full((4, CLASSES), 1 / CLASSES).double(), 1e-12)


def test_labels_without_probabilities_count_as_often_as_there_are_rows():
    context, tasks = of_classes()
    x, y = tasks[0].support.x, torch.tensor([0, 1, 3, 3])
    built = sklearn.build(context, estimator=f"{OURS}:HalfSure", smoothing=1e-12)
    p = output_of(built, om.Batch(x, y), x).exp()[0]
    seen = torch.tensor([1, 1, 5]).double() / (4 + 3) * (1 - 1 / (4 + CLASSES))
    assert_close(p[[0, 1, 3]], seen, 1e-9)


def test_river_learns_the_rows_in_their_order():
    context, tasks = of_numbers()
    built = learn(river.build(context), tasks[:3])
    assert built.order_matters
    support, (x, _) = tasks[3]
    for output in range(2):
        model = preprocessing.StandardScaler() | linear_model.LinearRegression()
        for batch in (*map(concat_support_query, tasks[:3]), support):
            for row, y in zip(batch.x.tolist(), batch.y[:, output].tolist(), strict=True):
                model.learn_one(dict(enumerate(row)), y)
        right = torch.tensor([model.predict_one(dict(enumerate(row))) for row in x.tolist()], dtype=torch.float64)
        assert_close(output_of(built, support, x)[:, output], right, 1e-9)


def test_what_is_kept_are_rows():
    context, tasks = of_numbers()
    built = learn(sklearn.build(context, scope="both", reservoir=5), tasks)
    state = built.state()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "inputs": (5, 3),
        "targets": (5, 2),
        "weight": (5,),
        "arrived": (5,),
        "seen": (),
        "rounds": (),
    }
    past = pooled(tasks)
    assert float(state["seen"]) == len(past.x)
    assert_close(state["inputs"], past.x[state["arrived"].long()], 0)
    assert_close(state["targets"], past.y[state["arrived"].long()], 0)


def test_a_reservoir_is_a_uniform_sample_in_the_order_of_arrival():
    counts, size, seen, trials = np.zeros(30), 6, 30, 200
    for seed in range(trials):
        state = _fitted.make_reservoir(size, 1, 1, torch.float32)
        for round in range(6):
            numbers = torch.arange(5 * round, 5 * round + 5, dtype=torch.float64)[:, None]
            state = _fitted.fill_reservoir(state, (numbers, -numbers, torch.ones(5).double()), seed, round)
        inputs, targets, _ = _fitted.read_rows(state)
        assert inputs[:, 0].tolist() == sorted(inputs[:, 0].tolist())
        assert_close(targets, -inputs.double(), 0)
        counts[inputs[:, 0].long().numpy()] += 1
    share = size / seen
    error = math.sqrt(trials * share * (1 - share))
    assert np.abs(counts - trials * share).max() < 4.5 * error


def test_a_fit_has_the_seed_of_its_round_one_job_and_one_thread():
    context, tasks = of_numbers()
    for _ in range(2):
        learn(sklearn.build(context, estimator=f"{OURS}:Recorder"), tasks[:3])
    first, again = (estimators.FITS[start : start + 6] for start in (0, 6))
    assert [one[:3] for one in first] == [one[:3] for one in again]
    seeds = [one[0] for one in first]  # Two outputs a round.
    assert seeds[::2] == seeds[1::2]
    assert len({*seeds}) == 3
    assert {one[1] for one in first} == {1}
    assert {threads for one in first for threads in one[4]} == {1}


def test_the_model_of_past_rows_is_fitted_once_a_round():
    context, tasks = of_numbers()
    built = sklearn.build(context, estimator=f"{OURS}:Recorder", scope="pooled")
    for round, one in enumerate(tasks):
        built.score(one, (1, 2))
        assert len(estimators.FITS) == 2 * round, "for two outputs; before the first round there are no rows"
        built.learn(one)
    state, (support, query) = built.state(), tasks[0]
    other = sklearn.build(context, estimator=f"{OURS}:Recorder", scope="pooled")
    copied = {name: value.clone() for name, value in state.items()}
    other.prepare(copied)
    fits = len(estimators.FITS)
    first = output_of_state(other, copied, support, query.x)
    assert_close(
        first, output_of_state(other, {name: one.clone() for name, one in copied.items()}, support, query.x), 0
    )
    assert len(estimators.FITS) == fits, "what was prepared answers"
    assert_close(first, output_of(built, support, query.x), 0)


def test_a_pool_prepares_its_experts():
    context, tasks = of_numbers()

    def build():
        experts = {
            "recorder": sklearn.build(context, estimator=f"{OURS}:Recorder", scope="pooled"),
            "constant": constant.build(context),
        }
        return OwningPool(experts, choose_aggregation("mean"), "mean")

    first = build()
    for one in tasks[:2]:
        first.score(one)
        first.learn(one)
    other, state, (support, (x, _)) = build(), first.state(), tasks[3]
    other.prepare(state)
    fits = len(estimators.FITS)
    found = output_of_state(other, state, support, x)
    assert len(estimators.FITS) == fits, "what was prepared answers"
    assert_close(found, output_of(first, support, x), 0)
    alone = OwningPool({"constant": constant.build(context)}, choose_aggregation("mean"), "mean")
    assert alone.prepare is None


def output_of_state(learner, state, support, x):
    ((_, outputs, _),) = learner.answers(state, support, x)[""]
    return outputs[0]


NEIGHBOURS = {"estimator": "sklearn.neighbors:KNeighborsRegressor", "estimator_options": {"n_neighbors": 4}}


def test_what_cannot_be_fitted_answers_by_the_mean_and_says_so_once(caplog):
    context, tasks = of_numbers()
    support, x = tasks[0].support, tasks[0].query.x
    built = sklearn.build(context, **NEIGHBOURS)
    for _ in range(2):
        few = select_samples(support, slice(3))
        assert_close(output_of(built, few, x), few.y.mean(0).expand(3, -1), 1e-12)
    (line,) = caplog.messages
    assert "cannot be fitted to 3 rows" in line
    assert "n_neighbors = 4" in line
    assert_close(output_of(built, support, x), support.y.mean(0).expand(3, -1), 1e-12)  # All four are neighbours.
    infinite = sklearn.build(context, estimator=f"{OURS}:Infinite")
    assert_close(output_of(infinite, support, x), support.y.mean(0).expand(3, -1), 1e-12)


def test_weights_are_given_to_a_fit_that_takes_them():
    context, tasks = of_numbers()
    (x, y), weight = tasks[0].support[:2], torch.tensor([2.0, 1.0, 1.0, 0.0])
    tree = {"estimator": "sklearn.dummy:DummyRegressor"}
    found = output_of(sklearn.build(context, **tree), om.Batch(x, y, weight), x)
    assert_close(found[0], (2 * y[0] + y[1] + y[2]) / 4, 1e-12)
    for learner, options in ((sklearn, {"estimator": f"{OURS}:Recorder"}), (river, {})):
        with pytest.raises(TypeError, match="weights"):
            output_of(learner.build(context, **options), om.Batch(x, y, weight), x)


@pytest.mark.parametrize(
    ("learner", "options", "message"),
    [
        (sklearn, {"estimator": "tabpfn_x:TabPFNRegressor"}, "'tabpfn_x' is not installed: install the package"),
        (sklearn, {"estimator": "sklearn.linear_model:RidgeCw"}, r"no 'RidgeCw': did you mean Ridge"),
        (sklearn, {"estimator": "sklearn.linear_modl:Ridge"}, "cannot be imported: No module named"),
        (sklearn, {"estimator": "Ridge"}, "'Ridge' is no import path"),
        (sklearn, {"estimator": f"{OURS}:CONSTANT"}, "is a float: it is to be a class of estimators"),
        (sklearn, {"estimator": f"{OURS}:Unable"}, "has no method predict: choose another class"),
        (sklearn, {"estimator": "sklearn.linear_model:LogisticRegression"}, "is a classifier: .* need a regressor"),
        (sklearn, {"estimator_options": {"alpha": 1}}, "do not fit sklearn.linear_model:RidgeCV: .*alpha"),
        (sklearn, {"estimator_options": {"gcv_mode": "no"}}, "estimator_options of sklearn.*gcv_mode"),
        (sklearn, {"libraries": {"sklearn": "0.1"}}, "fitted by sklearn 0.1, and sklearn .* is here"),
        (river, {"estimator": "river.linear_model:LinearRegressor"}, "did you mean LinearRegression"),
        (river, {"estimator": "river.preprocessing:StandardScaler"}, "has no method predict_one"),
        (river, {"estimator_options": {"lr": 1}}, "do not fit river.linear_model:LinearRegression"),
        (river, {"libraries": {"river": "0.1"}}, "fitted by river 0.1"),
    ],
)
def test_a_wrong_estimator_is_refused_with_what_is_wrong(learner, options, message):
    with pytest.raises(ValueError, match=message):
        learner.build(of_numbers().context, **options)


def test_a_regressor_is_refused_for_classes():
    with pytest.raises(ValueError, match=r"is a regressor: .* need a classifier"):
        sklearn.build(of_classes().context, estimator="sklearn.linear_model:Ridge")


@pytest.mark.parametrize("learner", [sklearn, river])
def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch, learner):
    name = learner.__name__.rpartition(".")[2]

    def find_nothing(path):
        try:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        except ImportError as error:
            raise ValueError(f"{path!r} cannot be imported: {error}") from error

    monkeypatch.setattr(_fitted, "import_by_path", find_nothing)
    with pytest.raises(ValueError, match=rf"'{name}' is not installed: pip install 'online-meta\[{name}\]'"):
        learner.build(of_numbers().context)


@pytest.mark.parametrize(
    "estimator",
    [
        "sklearn.neighbors:KNeighborsRegressor",
        "sklearn.ensemble:HistGradientBoostingRegressor",
        "sklearn.ensemble:RandomForestRegressor",
        "sklearn.gaussian_process:GaussianProcessRegressor",
        "sklearn.svm:SVR",
    ],
)
def test_estimators_of_every_kind_play(estimator):
    context = of_numbers().context
    own = {"n_estimators": 3} if "Forest" in estimator else {"optimizer": None} if "Gaussian" in estimator else {}
    said = []
    for _ in range(2):
        built = sklearn.build(context, estimator=estimator, estimator_options=own, scope="both")
        learn(built, [task(seed, support=8) for seed in range(3)])
        said.append(built.score(task(9, support=8)))
    assert said[0] == said[1]
    assert math.isfinite(said[0].loss_after)
