"""The HTTP server of the daemon: application, routes, limits, listener."""
