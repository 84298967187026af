"""Telemetry of a run: status, time series, Prometheus metrics."""
