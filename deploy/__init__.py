"""Run and monitor the system: command line, daemon, HTTP API, dashboard, reports."""
