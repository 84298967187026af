"""Read streams of tasks and store them in a durable history."""
