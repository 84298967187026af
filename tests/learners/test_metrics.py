"""The table of metrics is public: external dashboards and alerts depend on these names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.telemetry.prometheus import METRICS
from tests.house.sources import ROOT

PUBLIC = {
    "online_meta_tasks_ingested_total": ("source",),
    "online_meta_tasks_rejected_total": ("source", "reason"),
    "online_meta_source_lag": ("source",),
    "online_meta_source_gaps_total": ("source",),
    "online_meta_source_lost_entries_total": ("source",),
    "online_meta_rounds_total": (),
    "online_meta_rounds_pending": (),
    "online_meta_round_duration_seconds": (),
    "online_meta_meta_steps_total": (),
    "online_meta_skipped_steps_total": ("reason",),
    "online_meta_meta_gradient_norm": (),
    "online_meta_task_loss": ("stage",),
    "online_meta_task_accuracy": (),
    "online_meta_cumulative_loss": ("learner",),
    "online_meta_scored_rounds": ("learner",),
    "online_meta_charged_rounds": ("learner",),
    "online_meta_mean_loss": ("learner",),
    "online_meta_mean_loss_rounds": ("learner",),
    "online_meta_leaked_rounds": ("kind",),
    "online_meta_skipped_rounds": (),
    "online_meta_quarantined_rounds_total": ("reason",),
    "online_meta_health": ("check",),
    "online_meta_prefix_loss": ("learner", "points"),
    "online_meta_prefix_loss_rounds": ("learner", "points"),
    "online_meta_points_needed_rounds": ("learner",),
    "online_meta_proficiency_rounds": ("learner",),
    "online_meta_points_needed": ("learner",),
    "online_meta_nll_nats": ("learner",),
    "online_meta_nll_rounds": ("learner",),
    "online_meta_coverage_ratio": ("learner", "level"),
    "online_meta_calibration_error_ratio": ("learner",),
    "online_meta_sharpness": ("learner",),
    "online_meta_proficiency_reached_ratio": ("learner",),
    "online_meta_comparator_cumulative_loss": (),
    "online_meta_regret": ("against",),
    "online_meta_regret_per_round": ("against",),
    "online_meta_regret_standard_error": ("against",),
    "online_meta_regret_rounds": ("against",),
    "online_meta_regret_interval": ("against", "end"),
    "online_meta_regret_verdict": ("against", "verdict"),
    "online_meta_pool_regret": (),
    "online_meta_pool_regret_bound": (),
    "online_meta_pool_unclipped_regret": (),
    "online_meta_pool_weight": ("expert",),
    "online_meta_learner_round_seconds": ("learner",),
    "online_meta_verdict": ("state",),
    "online_meta_verdict_gain": (),
    "online_meta_comparator_settled": ("comparator",),
    "online_meta_comparator_gradient_norm": ("comparator",),
    "online_meta_comparator_timestamp_seconds": ("comparator",),
    "online_meta_ingest_duration_seconds": (),
    "online_meta_oldest_pending_task_age_seconds": (),
    "online_meta_history_bytes": (),
    "online_meta_checkpoint_last_success_timestamp_seconds": (),
    "online_meta_checkpoint_duration_seconds": (),
    "online_meta_world_size": (),
    "online_meta_restarts_total": (),
    "online_meta_rank_steps_total": ("rank",),
    "online_meta_rank_step_seconds_total": ("rank",),
    "online_meta_rank_waiting_seconds_total": ("rank",),
}
HISTOGRAMS = {
    "online_meta_round_duration_seconds",
    "online_meta_ingest_duration_seconds",
    "online_meta_checkpoint_duration_seconds",
}
OTHER_UNITS = r"_(ms|us|ns|milliseconds|minutes|hours|days|kb|mb|gb|kib|mib|kilobytes|megabytes|bits|percent)\b"

every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


def test_metric_names_and_labels_are_the_public_ones():
    found = {metric.name: metric.labels for metric in METRICS}
    info = found.pop("online_meta_info")
    assert found == PUBLIC
    assert info[0] == "version"
    assert {metric.name for metric in METRICS if metric.kind == "histogram"} == HISTOGRAMS


def test_no_metric_name_is_used_twice():
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@every_metric
def test_exactly_the_counters_end_in_total(metric):
    assert metric.name.endswith("_total") == (metric.kind == "counter")


@every_metric
def test_units_are_base_units(metric):
    assert re.fullmatch(r"online_meta(_[a-z]+)+", metric.name)
    assert not re.search(OTHER_UNITS, metric.name)
    if re.search(r"_(duration|age|timestamp)", metric.name):
        assert metric.name.endswith("_seconds")
    if metric.name.endswith("_ratio"):
        assert metric.help.endswith("0 to 1.")


@every_metric
def test_a_metric_has_a_description_and_no_label_that_identifies_a_task(metric):
    assert metric.help.endswith(".")
    assert len(set(metric.labels)) == len(metric.labels)
    assert not {"id", "task", "task_id", "round"} & set(metric.labels)


@every_metric
def test_only_histograms_have_buckets_and_they_ascend(metric):
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert all(bucket > 0 for bucket in metric.buckets)


def test_the_documentation_lists_every_metric():
    labels = ["{" + ", ".join(metric.labels) + "}" if metric.labels else "" for metric in METRICS]
    rows = [f"| `{one.name}{own}` | {one.kind} | {one.help} |" for one, own in zip(METRICS, labels, strict=True)]
    text = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `online_meta_")] == rows


def test_another_package_can_add_metrics_through_an_entry_point(tmp_path):
    (tmp_path / "weather.py").write_text(
        "from deploy.telemetry.metrics import Metric\n"
        "METRICS = (Metric('online_meta_rain', 'gauge', 'Millimetres.'),)\n"
        "def update(instruments, state): instruments['rain'].set(state.pending)\n"
    )
    (tmp_path / "weather-1.dist-info").mkdir()
    (tmp_path / "weather-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: weather\nVersion: 1\n")
    (tmp_path / "weather-1.dist-info" / "entry_points.txt").write_text("[online_meta.metrics]\nrain = weather\n")
    code = (
        "from prometheus_client import CollectorRegistry, generate_latest\n"
        "from deploy.telemetry.metrics import tasks\n"
        "from deploy.telemetry import prometheus\n"
        "prometheus.MODULES = tuple(module for module in prometheus.MODULES if module.__name__ == 'weather')\n"
        "registry = CollectorRegistry()\n"
        "prometheus.update_gauges(prometheus.make_instruments(registry), tasks.MetricState(None, 7, None, 0, 1))\n"
        "print(generate_latest(registry).decode())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "online_meta_rain 7.0" in done.stdout
    assert "online_meta_regret" in done.stdout
