"""What can be watched of a run: its status, series and Prometheus metrics."""
