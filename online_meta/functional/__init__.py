"""A PyTorch module as a pure function of its parameters that is safe to differentiate twice."""
