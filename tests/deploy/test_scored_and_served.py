"""What the daemon answers over HTTP is what a round is scored by, for every learner and every outcome."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

import online_meta.learners
import online_meta.outcomes
from deploy.config.config import read_config
from deploy.leader import Adapter
from online_meta import registry
from tests.deploy.conftest import Cli
from tests.support.daemon import SECTIONS as DAEMON_SECTIONS
from tests.support.daemon import Daemon, free_port, running_daemon, sinusoid_config, wait_for
from tests.support.finished import leader_hash, lines
from trainers.journal.leader_file import encode_leader

Array = NDArray[np.float64]
MODELS = "tests.deploy.user_models"
LEARNERS = registry.names(online_meta.learners)
ROUNDS = 4


def log_mean_exp(log_likelihoods: Array, weights: Array) -> Array:
    """Return the log-likelihood of the mixture for each row, of (S, n) and weights (S,)."""
    highest = log_likelihoods.max(0)
    return np.asarray(np.log(weights @ np.exp(log_likelihoods - highest)) + highest)


def mixture_of_rows(nll: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], float]:
    """Return the loss of a mixture: the mean over the rows of -log sum_s w_s exp(-nll_s)."""

    def loss(outputs: Array, weights: Array, y: Array) -> float:
        rows = np.stack([nll(output, y) for output in outputs])
        return float(-log_mean_exp(-rows, weights).mean())

    return loss


def squared_error_of_mean(outputs: Array, weights: Array, y: Array) -> float:
    return float(((np.tensordot(weights, outputs, 1) - y) ** 2).mean())


def mean_of_losses(outputs: Array, weights: Array, y: Array) -> float:
    return float(weights @ [((output - y) ** 2).mean() for output in outputs])


def nll_of_classes(output: Array, y: Array) -> Array:
    logits = output - output.max(1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return np.asarray(-log_probabilities[np.arange(len(y)), y.astype(int)])


def nll_of_ordered(output: Array, y: Array) -> Array:
    ends = np.stack([output[:, 0], output[:, 0] + np.log1p(np.exp(output[:, 1]))], 1)
    at_most = np.concatenate([1 / (1 + np.exp(-ends)), np.ones((len(y), 1))], 1)
    probabilities = np.diff(at_most, axis=1, prepend=0.0)
    return np.asarray(-np.log(probabilities[np.arange(len(y)), y.astype(int)]))


def nll_of_labels(output: Array, y: Array) -> Array:
    probability = 1 / (1 + np.exp(-output))
    return np.asarray(-np.log(np.where(y == 1, probability, 1 - probability)).sum(1))


def nll_of_counts(output: Array, y: Array) -> Array:
    factorials = np.array([[np.prod(np.arange(1, count + 1)) for count in row] for row in y])
    return np.asarray((np.exp(output) - y * output + np.log(factorials)).sum(1))


def nll_of_normal(mean: Array, std: Array | float, y: Array) -> Array:
    density = np.exp(-(((y - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    return np.asarray(-np.log(density).sum(1))


def nll_of_gaussian(output: Array, y: Array) -> Array:
    return nll_of_normal(output[:, :2], 0.01 + np.log1p(np.exp(output[:, 2:])), y)


def split_mixture(output: Array) -> tuple[Array, Array, Array]:
    """Return the means, deviations and weights (..., K) of an output (..., K, 3)."""
    mean, scale, logit = np.moveaxis(output, -1, 0)
    return mean, 1e-3 + np.log1p(np.exp(scale)), np.exp(logit) / np.exp(logit).sum(-1, keepdims=True)


def nll_of_mixture(output: Array, y: Array) -> Array:
    mean, std, weights = split_mixture(output)
    density = weights * np.exp(-(((y[..., None] - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    return np.asarray(-np.log(density.sum(-1)).sum(1))


class Case(NamedTuple):
    """An outcome: the configuration of the loss, the size of the output, the targets of x, and its loss."""

    model: str
    outputs: int
    targets: Callable[[Array], Array]
    loss: Callable[[Array, Array, Array], float]
    task: str = 'y = "real"\ny_shape = [2]'
    build: str = "trainers.models:mlp"


def waves(x: Array) -> Array:
    return np.concatenate([np.sin(x), np.cos(x)], 1)


def counts(x: Array) -> Array:
    return np.asarray(np.floor(3 * np.abs(waves(x))))


def labels(x: Array) -> Array:
    return np.asarray(waves(x) > 0).astype(float)


def classes(x: Array) -> Array:
    return np.asarray(np.digitize(np.sin(x[:, 0]), [-0.3, 0.3]))


OF_CLASSES = 'y = "class"\nways = 3'
OUTCOMES = {
    "mse": Case('loss = "mse"', 2, waves, squared_error_of_mean),
    "cross_entropy": Case('loss = "cross_entropy"', 3, classes, mixture_of_rows(nll_of_classes), OF_CLASSES),
    "categorical": Case('loss = "categorical"', 3, classes, mixture_of_rows(nll_of_classes), OF_CLASSES),
    "ordinal": Case('loss = "ordinal"', 2, classes, mixture_of_rows(nll_of_ordered), OF_CLASSES),
    "bernoulli": Case('loss = "bernoulli"', 2, labels, mixture_of_rows(nll_of_labels)),
    "gaussian_of_noise": Case(
        'loss = "gaussian_of_noise"\nloss_options = { sigma = 0.5 }',
        2,
        waves,
        mixture_of_rows(lambda output, y: nll_of_normal(output, 0.5, y)),
    ),
    "gaussian": Case('loss = "gaussian"\nloss_options = { least = 0.01 }', 4, waves, mixture_of_rows(nll_of_gaussian)),
    "gaussian_mixture": Case(
        'loss = "gaussian_mixture"',
        2,
        waves,
        mixture_of_rows(nll_of_mixture),
        build=f"{MODELS}:MixtureDensity",
    ),
    "poisson": Case('loss = "poisson"', 2, counts, mixture_of_rows(nll_of_counts)),
    "objective": Case(
        'loss = "objective"', 2, waves, lambda outputs, weights, y: float((weights @ outputs.sum(2)).mean())
    ),
    "return": Case('loss = "return"', 2, waves, lambda outputs, weights, y: -float((weights @ outputs.sum(2)).mean())),
    "losses of the rows": Case(
        f'loss = "{MODELS}:absolute_of_rows"', 2, waves, mixture_of_rows(lambda output, y: np.abs(output - y).sum(1))
    ),
    "a scalar loss": Case(f'loss = "{MODELS}:squared"', 2, waves, mean_of_losses),
}

ALL_LEARNERS = ("mse", "cross_entropy", "gaussian")
CLOSED_FORM = {
    "constant": ("mse", "gaussian_of_noise", "cross_entropy", "categorical"),
    "nearest_centroid": ("mse", "gaussian_of_noise", "cross_entropy", "categorical"),
    "ridge_head": ("mse", "gaussian_of_noise", "cross_entropy", "categorical"),
    "pooled_ridge": ("mse", "gaussian_of_noise", "cross_entropy", "categorical"),
    "last_value": ("mse", "gaussian_of_noise", "cross_entropy", "categorical"),
    "hierarchical_bayes": ("mse", "cross_entropy", "categorical"),
    "good_embedding": ("cross_entropy", "categorical"),
    "sklearn": ("mse", "cross_entropy", "categorical"),
    "river": ("mse", "cross_entropy", "categorical"),
    "logistic_head": ("cross_entropy", "categorical"),
    "pooled_logistic": ("cross_entropy", "categorical"),
}
"""The outcomes of the learners that do not answer every one."""


def learners_of(outcome: str) -> list[str]:
    """Return the learners that answer an outcome."""
    return [name for name in LEARNERS if outcome in CLOSED_FORM.get(name, OUTCOMES)]


PAIRS = [
    (outcome, learner)
    for outcome in OUTCOMES
    for learner in ((*learners_of(outcome), "ftml@1") if outcome in ALL_LEARNERS else ("ftml", "dp_mixture"))
]
HEADS = ("mse", "cross_entropy")
"""The outcomes that FTML also answers with another head on its leader's features."""
PAIRS += [(outcome, "ftml@ridge_head") for outcome in HEADS]
PAIRS += [("objective", "pool"), ("losses of the rows", "pool"), ("gaussian_mixture", "pool")]
SECTIONS = """
[inner]
steps = 2
answer_steps = [1]
answer_heads = [{heads}]
[meta]
batch = 2
[regret]
comparator = []
baselines = [{baselines}]
options.from_scratch = {{ steps = 2 }}
options.moml = {{ steps = 2 }}
options.dp_mixture = {{ concentration = 4.0 }}
[checkpoint]
every_rounds = 5
"""


def write_config(folder: Path, outcome: str) -> Path:
    """Write the configuration of a run with every learner, and with their pool."""
    baselines = ", ".join(f'"{name}"' for name in learners_of(outcome) if name not in ("ftml", "pool"))
    heads = '"ridge_head"' if outcome in HEADS else ""
    return write_sections(folder, OUTCOMES[outcome], SECTIONS.format(baselines=baselines, heads=heads))


def write_sections(folder: Path, case: Case, sections: str) -> Path:
    path, text = folder / "config.toml", sinusoid_config(folder / "run", free_port(), sections=sections)
    text = text.replace('y = "real"\ny_shape = [1]', case.task).replace("outputs = 1", f"outputs = {case.outputs}")
    path.write_text(text.replace('loss = "mse"', case.model).replace("trainers.models:mlp", case.build))
    return path


def make_task(case: Case, seed: int) -> dict[str, NDArray[np.generic]]:
    """Return the tensors of a task of 5 and 6 samples."""
    random, tensors = np.random.default_rng(seed), dict[str, NDArray[np.generic]]()
    phase = random.uniform(0, np.pi)
    for part, size in (("support", 5), ("query", 6)):
        x = random.uniform(-2, 2, (size, 1))
        y = case.targets(x + phase)
        tensors |= {f"{part}_x": x.astype("f4"), f"{part}_y": y.astype("i8" if case.task == OF_CLASSES else "f4")}
    return tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the function that gives the configuration of the run of an outcome, which several tests continue."""
    known: dict[str, Path] = {}

    def find(outcome: str) -> Path:
        if outcome not in known:
            known[outcome] = write_config(tmp_path_factory.mktemp("served"), outcome)
        return known[outcome]

    return find


def post(daemon: Daemon, case: Case, *rounds: int) -> None:
    """Post the tasks of some rounds, and wait until they are learned."""
    for round in rounds:
        assert daemon.post(save(make_task(case, round)), f"task-{round}").status_code in (200, 201)
    daemon.wait_until_learned(rounds[-1] + 1)


def ask(daemon: Daemon, case: Case, round: int, **parts: object) -> dict[str, NDArray[np.generic]]:
    """Return what the daemon answers to the task of a round, from all rounds before it."""
    tensors = make_task(case, round)
    body = save({name: tensors[name] for name in ("support_x", "support_y", "query_x")})

    def look() -> dict[str, NDArray[np.generic]] | None:
        answer = daemon.client.post("/v1/adapt", content=body, params=parts)  # type: ignore[arg-type]
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 503 or answer.headers["X-Online-Meta-Round"] != str(round):
            return None
        found: dict[str, NDArray[np.generic]] = load(answer.content)
        return found

    found: dict[str, NDArray[np.generic]] = wait_for("the last round is published", look)
    return found


def find_outputs(answer: dict[str, NDArray[np.generic]]) -> tuple[Array, Array]:
    """Return the outputs (S, n, ...) of an answer, those of a dict as (S, n, ..., parts), and their weights (S,)."""

    def read(name: str) -> Array:
        found = [answer[name]] if name in answer else [answer[f"{name}.{part}"] for part in ("mean", "scale", "logit")]
        return (np.stack(found, -1) if name not in answer else found[0]).astype(float)

    parts = sum(name.endswith(".log_weights") for name in answer)
    outputs = [read(f"component.{k}.outputs") for k in range(parts)] or [read("predictions")[None]]
    weights = [np.exp(answer[f"component.{k}.log_weights"]) for k in range(parts)] or [np.ones(1)]
    return np.concatenate(outputs), np.concatenate(weights).astype(float)


def loss_of_answer(case: Case, answer: dict[str, NDArray[np.generic]], y: NDArray[np.generic]) -> float:
    """Return the loss of an answer's tensors alone."""
    outputs, weights = find_outputs(answer)
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-6)
    return case.loss(outputs, weights, y.astype(float))


@pytest.mark.parametrize(("outcome", "learner"), PAIRS)
def test_the_recorded_loss_is_that_of_the_answer_that_was_served(
    outcome: str, learner: str, runs: Callable[[str], Path]
) -> None:
    config, case = runs(outcome), OUTCOMES[outcome]
    recorded = config.parent / "run" / "rounds.jsonl"
    round = len(recorded.read_text().splitlines()) if recorded.exists() else ROUNDS
    with running_daemon(config, f"serve.answers={learner}") as daemon:
        if round == ROUNDS:
            post(daemon, case, *range(ROUNDS))  # Those that the run has already are duplicates.
        answer = ask(daemon, case, round)
        post(daemon, case, round)
        assert daemon.drain() == 0
    line = json.loads(recorded.read_text().splitlines()[round])
    scored = line["learners"][learner]["loss_after"]
    assert scored == pytest.approx(loss_of_answer(case, answer, make_task(case, round)["query_y"]), rel=1e-6)
    if learner == "dp_mixture":
        assert len(answer["component.0.log_weights"]) > 1, "the mixture has several outputs"


def test_every_outcome_is_served() -> None:
    assert {*registry.names(online_meta.outcomes)} <= OUTCOMES.keys()


def test_a_mixture_of_normal_distributions_says_how_sure_it_is_and_keeps_its_bits(cli: Cli, tmp_path: Path) -> None:
    """The output of the model is a dict of tensors. The run stops once, and is replayed without a stop."""
    case = OUTCOMES["gaussian_mixture"]
    config, levels = write_sections(tmp_path, case, DAEMON_SECTIONS), [0.1, 0.9]
    for rounds in (range(3), range(3, 5)):
        with running_daemon(config) as daemon:
            post(daemon, case, *rounds)
            answer = ask(daemon, case, rounds.stop, part=["mean", "std"], level=levels)
            compared = daemon.wait_until_compared(5) if rounds.stop == 5 else {}
            regret = daemon.client.get("/v1/regret").json()
            assert daemon.drain() == 0
            assert "Traceback" not in daemon.log.read_text()
    outputs, shares = find_outputs(answer)
    mean, std, weights = (np.concatenate([*part], -1) for part in split_mixture(outputs))
    weights = weights * np.repeat(shares, 3)
    expected = (weights * mean).sum(-1)
    np.testing.assert_allclose(answer["mean"], expected, rtol=1e-5, atol=1e-5)
    variance = (weights * (std**2 + mean**2)).sum(-1) - expected**2
    np.testing.assert_allclose(answer["std"].astype(float) ** 2, variance, rtol=1e-4, atol=1e-5)
    for level, quantile in zip(levels, answer["quantiles"], strict=True):
        below = (1 + np.vectorize(math.erf)((quantile[..., None] - mean) / (std * 2**0.5))) / 2
        np.testing.assert_allclose((weights * below).sum(-1), level, rtol=0, atol=1e-5)

    played = lines(tmp_path / "run/rounds.jsonl")
    for name in ("ftml", "from_scratch"):
        total = math.fsum(line["learners"][name]["loss_after"] for line in played)
        assert regret["learners"][name]["cumulative_loss"][-1] == pytest.approx(total, rel=1e-12)
    assert math.isfinite(compared["regret"]["hindsight"]["value"])
    ended = cli("replay", config, "--history", tmp_path / "run/history", "--out", tmp_path / "again")
    assert ended.code == 0, ended.err
    assert leader_hash(tmp_path / "again") == leader_hash(tmp_path / "run")
    assert [line["learners"] for line in lines(tmp_path / "again/rounds.jsonl")] == [
        line["learners"] for line in played
    ]


def test_what_another_learner_has_published_is_not_served(tmp_path: Path) -> None:
    config, published = read_config(write_config(tmp_path, "mse"), ("serve.answers=online_reptile",)), tmp_path / "file"
    adapter = Adapter(config.trainer(), published)
    state = adapter.answering.learner.state()
    published.write_bytes(encode_leader(state, 3, learner="ftml"))
    with pytest.raises(FileNotFoundError, match="is published by ftml, not by online_reptile"):
        adapter.leader()
    published.write_bytes(encode_leader(state, 3, learner="online_reptile"))
    assert adapter.leader().round == 3
