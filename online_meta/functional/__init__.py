"""PyTorch modules as pure functions of their parameters that are safe to differentiate twice."""
