"""What is run and watched: command line, daemon, HTTP, dashboard."""
