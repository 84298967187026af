"""A small HTTP server with the dashboard's files and a daemon's responses, whose figures a test sets."""

import json
import math
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deploy.telemetry.facts import Facts, ProcessFacts
from deploy.telemetry.health import date_checks, judge, worst_level
from deploy.telemetry.pool import verdict_to_json
from online_meta.regret import differences
from online_meta.regret.differences import Differences
from online_meta.regret.verdict import PlayingAnswer, give_verdict
from tests.support.dashboard_states import EfficiencySettings, bucket_means, mean_of_known

DASHBOARD = Path(__file__).parents[2] / "deploy" / "dashboard"
CONTENT_SECURITY_POLICY = "default-src 'self'"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NOW = 1_750_000_000.0
LEVELS = {
    "ftml": (2.2, 0.32, 70.0),
    "train_on_everything": (2.3, 0.95, 60.0),
    "from_scratch": (1.45, 1.4, 1.0),
    "ftml@10": (2.0, 0.26, 60.0),
    "pooled_ridge": (2.0, 0.6, 30.0),
    "pool": (1.6, 0.25, 50.0),
}
BASELINES = ("ftml", "train_on_everything", "from_scratch")
WITHOUT = ("train_on_everything", "from_scratch", "constant", "pooled_ridge", "ridge_head", "logistic_head")
MANY = (
    "ftml",
    *(f"ftml@{steps}" for steps in (0, 1, 5, 10, 20, 50)),
    *WITHOUT,
    *(
        "moml",
        "aruba",
        "online_reptile",
        "good_embedding",
        "hierarchical_bayes",
        "nearest_centroid_of_features",
        "dp_mixture",
    ),
    "pool",
)
"""Some 20 answers, as a run with a pool has by default."""


@dataclass
class Daemon:
    """The figures that the server responds with, and the requests that it received."""

    rounds: int = 0
    pending: int = 7
    state: str = "running"
    token: str | None = None
    accuracy: bool = True
    learners: tuple[str, ...] = BASELINES
    comparators: tuple[str, ...] = ("hindsight",)
    prefixes: tuple[int, ...] = ()
    proficiency: float | None = None
    pool: str | None = None
    clipped: float = 0.0
    facts: Facts = field(default_factory=Facts)
    extra: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def losses(self, name: str) -> list[float]:
        """Return the losses after adaptation of ``name``: noisy, and decreasing to its level."""
        first, last, pace = LEVELS.get(name, (2.0, 1.0, 100.0))
        noise = random.Random(name)
        return [
            (last + (first - last) * 2.718 ** (-t / pace)) * noise.lognormvariate(0, 0.3) for t in range(self.rounds)
        ]

    def before(self) -> list[float]:
        noise = random.Random("before")
        return [(1.5 + 0.9 * 2.718 ** (-t / 90)) * noise.lognormvariate(0, 0.12) for t in range(self.rounds)]

    def accuracies(self, name: str = "ftml") -> list[float]:
        noise = random.Random("accuracy")
        return [min(1.0, max(0.2, 1 - 0.3 * loss + noise.gauss(0, 0.03))) for loss in self.losses(name)]

    def efficiency_settings(self) -> EfficiencySettings:
        return EfficiencySettings(self.prefixes, self.proficiency, self.accuracy)

    def status(self) -> dict[str, Any]:
        last = self.rounds - 1
        answer = {
            "state": self.state,
            "version": "0.1.0",
            "run": "runs/demo",
            "started": NOW - 11_520,
            "now": NOW,
            "rounds": {
                "ingested": self.rounds + self.pending,
                "learned": self.rounds,
                "skipped": 0,
                "pending": self.pending,
                "learned_per_second": 2.4 if self.rounds else 0.0,
                "ingested_per_second": 2.6 if self.rounds else 0.0,
                "oldest_pending_age_seconds": 3.1 if self.pending else None,
            },
            "last": None if self.rounds == 0 else self.last(last),
            "learners": {name: self.learner(name) for name in self.learners} if self.rounds else {},
            "regret": self.regrets(),
            "leader": self.learners[0],
            "verdict": self.verdict(),
            "leaks": {"duplicates": 0, "overlaps": 0, "rounds": 0},
            "checkpoint": {"round": self.rounds - self.rounds % 50, "timestamp": NOW - 42}
            if self.rounds > 50
            else None,
            "trainer": {"alive": self.state != "trainer_down", "restarts": 2 if self.state == "trainer_down" else 0},
            "backlog_limit": 1000,
            "health": self.health(),
        }
        return answer | self.extra

    def verdict(self) -> dict[str, Any]:
        """Return the verdict that the daemon computes from the losses; names of ``WITHOUT`` do not meta-learn."""
        reference = self.pool or self.learners[0]
        own, weights = self.losses(reference), self.weights()
        answers = [
            PlayingAnswer(
                name,
                name not in WITHOUT,
                Differences(self.rounds, math.fsum(gaps), math.fsum(gap * gap for gap in gaps)),
                1.0,
                mean_of_known(weights[name][-100:]) if self.pool and self.rounds else None,
            )
            for name in self.learners
            if name != reference
            for gaps in ([mine - theirs for mine, theirs in zip(own, self.losses(name), strict=True)],)
        ]
        costs = {name.partition("@")[0]: 0.003 * (at + 1) for at, name in enumerate(self.learners)}
        found = give_verdict(answers, reference, 0.01, leader=self.learners[0], seconds_per_round=costs)
        return verdict_to_json(found)

    def weights(self) -> dict[str, list[float | None]]:
        """Return each expert's weight by round: more and more of it is on the ones that lose least."""
        experts = [name for name in self.learners if name != self.pool] if self.pool else []
        totals = dict.fromkeys(experts, 0.0)
        found: dict[str, list[float | None]] = {name: [] for name in experts}
        for losses in zip(*(self.losses(name) for name in experts), strict=True):
            shares = {name: math.exp(-0.3 * (total - min(totals.values()))) for name, total in totals.items()}
            for name, loss in zip(experts, losses, strict=True):
                found[name].append(shares[name] / sum(shares.values()))
                totals[name] += loss
        return found

    def health(self) -> dict[str, Any]:
        """Return the health that the daemon computes from ``facts``, the backlog and the state."""
        down = ProcessFacts(alive=False, reported=False, seconds=3.0, restarts=2)
        trainer = down if self.state == "trainer_down" else self.facts.trainer
        facts = replace(self.facts, pending=self.pending, draining=self.state == "draining", trainer=trainer)
        checks = date_checks((), judge(facts), NOW - 200)
        return {"level": worst_level(checks), "checks": [asdict(check) for check in checks]}

    def last(self, index: int) -> dict[str, Any]:
        return {
            "round": index,
            "id": f"rainbow-{index}",
            "source": "http",
            "loss_before": self.before()[index],
            "loss_after": self.losses("ftml")[index],
            "accuracy": self.accuracies()[index] if self.accuracy else None,
            "seconds": 0.41,
        }

    def learner(self, name: str) -> dict[str, Any]:
        losses = self.losses(name)
        accuracy = mean(self.accuracies(name)[-100:]) if self.accuracy else None
        return {
            "cumulative_loss": sum(losses),
            "rounds": self.rounds,
            "charged_rounds": 0,
            "mean_loss_last_100": mean(losses[-100:]),
            "rounds_last_100": min(self.rounds, 100),
            "charged_rounds_last_100": 0,
            "mean_accuracy_last_100": accuracy,
            "accuracy_rounds_last_100": min(self.rounds, 100) if self.accuracy else 0,
            "without_leaks": {"mean_loss_last_100": mean(losses[-90:]), "rounds_last_100": min(self.rounds, 90)},
            **self.efficiency(losses[-100:]),
        }

    def efficiency(self, losses: list[float]) -> dict[str, Any]:
        if not self.prefixes:
            return {}
        requested = {} if self.proficiency is None else {"proficiency": self.proficiency}
        return {"learning_efficiency_last_100": {**self.efficiency_settings().part(losses, mean_of_known), **requested}}

    def regrets(self) -> dict[str, Any]:
        points = self.points()
        own = sum(self.losses("ftml"))
        found: dict[str, Any] = {
            point["kind"]: {
                "value": point["regret"],
                "standard_error": point["standard_error"],
                "as_of_round": point["as_of_round"],
                "kind": point["kind"],
                "rounds": point["as_of_round"],
                "exact": point["exact"],
                "lower_bound": point["lower_bound"],
                "settled": point["settled"],
                "first_round": 0,
            }
            for point in points
        }
        for name in self.learners[1:] if self.rounds else ():
            value = own - sum(self.losses(name))
            found[name] = {
                "value": value,
                "standard_error": 5.0,
                "as_of_round": self.rounds,
                "kind": "baseline",
                "rounds": self.rounds,
                "interval": [value - 20, value + 20] if self.rounds >= 50 else None,
                "verdict": differences.judge((value - 20, value + 20) if self.rounds >= 50 else None, 0.0),
            }
        return found

    def points(self) -> list[dict[str, Any]]:
        losses = self.losses("ftml")
        return [
            {
                "kind": kind,
                "as_of_round": at,
                "cumulative_loss": sum(losses[:at]) - 0.9 * at**0.72,
                "standard_error": 0.0 if kind == "hindsight" else 2.5,
                "regret": 0.9 * at**0.72 * (1 + place / 4),
                "exact": kind == "closed_form",
                "lower_bound": kind == "hindsight",
                "settled": True,
            }
            for place, kind in enumerate(self.comparators)
            for at in range(50, self.rounds + 1, 50)
        ]

    def ledger(self, first: int, points: int) -> dict[str, Any]:
        each = max(1, -(-(self.rounds - first) // points))
        ends = sorted({min(self.rounds, end) for end in range(first + each, self.rounds + each, each)})
        cut = partial(bucket_means, ends=ends, first=first)
        blank: list[float | None] = [None] * len(ends)
        efficiency_part = (
            {"efficiency": {"prefixes": self.prefixes, "proficiency": self.proficiency}} if self.prefixes else {}
        )
        learners = {
            name: {
                "loss": cut(losses),
                "accuracy": cut(self.accuracies(name)) if self.accuracy else blank,
                "rounds": [each] * len(ends),
                "cumulative_loss": [sum(losses[:end]) for end in ends],
                **({"efficiency": self.efficiency_settings().part(losses, cut)} if self.prefixes else {}),
            }
            for name, losses in ((name, self.losses(name)) for name in self.learners)
        }
        return {
            "from": first,
            "to": self.rounds,
            "rounds": [end - 1 for end in ends],
            "loss_before": cut(self.before()),
            "loss_after": cut(self.losses("ftml")),
            "accuracy": cut(self.accuracies()) if self.accuracy else blank,
            "learners": learners if self.rounds else {},
            **efficiency_part,
            **({"pool": self.pool_series(ends, cut)} if self.pool else {}),
            "comparators": self.points(),
        }

    def pool_series(self, ends: list[int], cut: Callable[[list[float | None]], list[float | None]]) -> dict[str, Any]:
        return {
            "name": self.pool,
            "regret": [0.4 * end**0.3 for end in ends],
            "bound": [3.0] * len(ends),
            "unclipped_regret": [0.4 * end**0.3 + self.clipped for end in ends],
            "weights": {name: cut([*weights]) for name, weights in self.weights().items()},
        }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, daemon: Daemon, *rest: Any) -> None:
        self.daemon = daemon
        super().__init__(*rest)

    def do_GET(self) -> None:
        self.daemon.seen.append(self.path)
        url = urlsplit(self.path)
        if url.path.startswith("/v1/"):
            self.answer_json(url.path, parse_qs(url.query))
            return
        name = "index.html" if url.path == "/" else url.path.removeprefix("/static/")
        file = (DASHBOARD / name).resolve()
        if (url.path != "/" and not url.path.startswith("/static/")) or not file.is_file():
            self.send(404, "text/plain", b"no such page")
        else:
            self.send(200, KINDS.get(file.suffix, "text/plain"), file.read_bytes())

    def answer_json(self, path: str, query: dict[str, list[str]]) -> None:
        wanted = self.daemon.token
        if wanted is not None and self.headers.get("Authorization") != f"Bearer {wanted}":
            self.send(401, "application/json", b"{}")
        elif path == "/v1/status":
            now = copy(self.daemon)  # A test may set the figures meanwhile.
            self.send(200, "application/json", json.dumps(now.status()).encode())
        else:
            ledger = copy(self.daemon).ledger(int(query["from"][0]), int(query["points"][0]))
            self.send(200, "application/json", json.dumps(ledger).encode())

    def send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(daemon: Daemon, port: int = 0) -> Iterator[int]:
    """Serve the page on 127.0.0.1 during the block; yield the port."""
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, daemon))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
