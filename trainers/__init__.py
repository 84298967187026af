"""Meta-gradients become meta-updates, on one rank or many."""
