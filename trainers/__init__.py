"""Train on a history of tasks: turn meta-gradients into meta-updates, on one rank or many."""
