"""The metrics as prometheus_client, promtool and a real Prometheus read them."""

import subprocess
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.reports.report import make_report, write_report
from deploy.telemetry.prometheus import METRICS
from deploy.telemetry.run_view import RunView
from tests.support.daemon import Daemon, free_port, wait_for
from trainers.journal.run_files import RunFiles

KINDS = {"counter": "counter", "gauge": "gauge", "histogram": "histogram"}


def metrics(daemon: Daemon) -> str:
    """Return the metrics as text, once all rounds are learned and compared."""
    ingested = daemon.status()["rounds"]["ingested"]
    daemon.wait_until_learned(ingested)
    daemon.wait_until_compared(ingested)
    return daemon.client.get("/metrics").text


def value(text: str, sample: str) -> float:
    """Return the value of one sample, written as in the text."""
    found = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.rsplit(" ", 1)[0] == sample]
    assert len(found) == 1, f"{sample}: {found}"
    return float(found[0])


def test_every_metric_of_the_table_is_exported(daemon: Daemon) -> None:
    answer = daemon.client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        assert labels <= set(metric.labels)
    ours = {name for name in families if name.startswith("online_meta_") and not name.endswith("_created")}
    assert ours == {metric.name.removesuffix("_total") for metric in METRICS}


def test_the_metrics_agree_with_the_status(daemon: Daemon) -> None:
    rounds = daemon.status()["rounds"]["ingested"]
    wait_for("the ranks report", lambda: [rank["steps"] for rank in daemon.status()["trainer"]["ranks"]] == [rounds])
    text, status = metrics(daemon), daemon.status()
    assert value(text, 'online_meta_tasks_ingested_total{source="http"}') == rounds
    assert value(text, "online_meta_rounds_total") == rounds
    assert value(text, "online_meta_rounds_pending") == 0
    assert value(text, "online_meta_oldest_pending_task_age_seconds") == 0
    assert value(text, "online_meta_meta_steps_total") == rounds
    assert value(text, "online_meta_round_duration_seconds_count") == rounds
    assert value(text, "online_meta_ingest_duration_seconds_count") == rounds
    assert value(text, "online_meta_world_size") == 1
    assert value(text, "online_meta_restarts_total") == 0
    assert value(text, 'online_meta_rank_steps_total{rank="0"}') == rounds
    assert value(text, 'online_meta_rank_step_seconds_total{rank="0"}') > 0
    assert value(text, 'online_meta_rank_waiting_seconds_total{rank="0"}') == 0, "a single rank never waits"
    assert value(text, 'online_meta_task_loss{stage="before"}') == status["last"]["loss_before"]
    assert value(text, 'online_meta_task_loss{stage="after"}') == status["last"]["loss_after"]
    assert value(text, "online_meta_meta_gradient_norm") > 0
    assert value(text, "online_meta_history_bytes") > 10_000
    last_checkpoint = value(text, "online_meta_checkpoint_last_success_timestamp_seconds")
    assert last_checkpoint == pytest.approx(status["checkpoint"]["timestamp"])
    for name, learner in status["learners"].items():
        assert value(text, f'online_meta_cumulative_loss{{learner="{name}"}}') == learner["cumulative_loss"]
    for against, regret in status["regret"].items():
        assert value(text, f'online_meta_regret{{against="{against}"}}') == regret["value"]
        per_round = value(text, f'online_meta_regret_per_round{{against="{against}"}}')
        assert per_round == pytest.approx(regret["value"] / regret["as_of_round"])
    for learner, seconds in status["verdict"]["seconds_per_round"].items():
        assert value(text, f'online_meta_learner_round_seconds{{learner="{learner}"}}') == seconds
    states = {
        state: value(text, f'online_meta_verdict{{state="{state}"}}') for state in ("pays", "does_not", "too_early")
    }
    assert states == {"pays": 0, "does_not": 0, "too_early": 1}
    assert value(text, "online_meta_verdict_gain") == status["verdict"]["gain"]
    assert "nan" in str(value(text, "online_meta_task_accuracy")), (
        "a regression has no accuracy, so the value must be NaN"
    )


RULES_TEST = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'online_meta_health{check="calibration", instance="a"}'
        values: '0 0 1x30'
      - series: 'online_meta_health{check="calibration", instance="b"}'
        values: '0x40'
    alert_rule_test:
      - eval_time: 10m
        alertname: OnlineMetaNeedsAttention
        exp_alerts: []
      - eval_time: 20m
        alertname: OnlineMetaNeedsAttention
        exp_alerts:
          - exp_labels: { check: calibration, instance: a }
            exp_annotations: { summary: "calibration of a needs attention; see /v1/health" }
"""


def test_the_documented_rule_alerts_of_a_check_that_stays_turned(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/health.md").read_text()
    rules = page.split('```yaml title="alerts.yml"\n')[1].split("```")[0]
    (tmp_path / "alerts.yml").write_text(rules)
    (tmp_path / "test.yml").write_text(RULES_TEST)
    command = ["promtool", "test", "rules", "test.yml"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_promtool_finds_no_problem(daemon: Daemon) -> None:
    checked = subprocess.run(["promtool", "check", "metrics"], input=metrics(daemon), capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_real_prometheus_scrapes_the_regret(daemon: Daemon, tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    target = daemon.url.removeprefix("http://")
    config.write_text(
        "global: { scrape_interval: 1s, scrape_timeout: 1s }\n"
        f'scrape_configs: [{{ job_name: online-meta, static_configs: [{{ targets: ["{target}"] }}] }}]\n'
    )
    expected = metrics(daemon)
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    with open(tmp_path / "log", "wb") as log:
        listen = f"--web.listen-address={url.removeprefix('http://')}"
        prometheus = subprocess.Popen([*command, listen], stdout=log, stderr=log)
    try:
        scraped = wait_for("Prometheus scrapes", lambda: prometheus.poll() is None and ask(url, "online_meta_regret"))
    finally:
        prometheus.terminate()
        prometheus.wait(30)
    assert set(scraped) >= {"hindsight", "from_scratch", "pool"}
    for against, regret in scraped.items():
        assert regret == pytest.approx(value(expected, f'online_meta_regret{{against="{against}"}}'))


def ask(url: str, query: str) -> dict[str, float]:
    """Return the regret that Prometheus has scraped, by comparator or baseline; {} while Prometheus starts."""
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, trust_env=False)
    except httpx.TransportError:
        return {}
    if not answer.is_success:
        return {}
    return {one["metric"]["against"]: float(one["value"][1]) for one in answer.json()["data"]["result"]}


def test_a_run_without_rounds_has_a_report(config: Path, tmp_path: Path) -> None:
    from deploy.config.config import read_config

    view = RunView(RunFiles(tmp_path / "none"), ("ftml", "from_scratch"))
    view.refresh()
    report = write_report(tmp_path, view, read_config(config))
    assert report == make_report(view, read_config(config))
    assert (report["rounds"], report["regret"]) == (0, {})
    assert report["learners"]["ftml"]["mean_loss_last_100"] is None
    assert (tmp_path / "regret.png").read_bytes().startswith(b"\x89PNG")
    assert "0 rounds" in (tmp_path / "report.html").read_text()
