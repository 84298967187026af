"""Check a model before training: whether its meta-gradients are correct, and if not, which layer is the cause."""
