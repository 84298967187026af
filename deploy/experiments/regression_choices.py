"""What the learners of the regression streams are set to: the best of four tries by ``regression_tuning``."""

from deploy.experiments.regression_runs import COMPARATOR, Choice

CHOSEN = {
    "sinusoids": {
        "ftml": Choice(0.02, 0.01),
        "ftml_recent": Choice(0.02, 0.01),
        "train_on_everything": Choice(0.02, 0.002),
        "ftl_fine_tune": Choice(0.02, 0.001),
        "from_scratch": Choice(0.02, options={"steps": 30, "lr": 0.03}),
        "online_reptile": Choice(0.02, 0.01),
        "moml": Choice(0.02, 0.01, {"alpha": 0.3, "steps": 5}),
        "aruba": Choice(0.02, 0.5, {"eps": 0.05}, "sgd"),
        "c_maml": Choice(0.02, 0.01, {"gamma": 0.1}),
        "dp_mixture": Choice(0.02, 0.01, {"most": 3, "temperature": 20.0}),
    },
    "flights": {
        "ftml": Choice(0.02, 0.003),
        "ftml_recent": Choice(0.02, 0.003),
        "train_on_everything": Choice(0.02, 0.01),
        "ftl_fine_tune": Choice(0.02, 0.01 / 3),
        "from_scratch": Choice(0.02, options={"steps": 30, "lr": 0.01}),
        "online_reptile": Choice(0.02, 0.003),
        "moml": Choice(0.02, 0.003, {"alpha": 0.3, "steps": 5}),
        "aruba": Choice(0.02, 0.5, {"eps": 0.05}, "sgd"),
        "c_maml": Choice(0.02, 0.01, {"gamma": -1000.0}),
    },
    "flights_linear": {
        "ftml": Choice(0.08, 0.05),
        "ftml_recent": Choice(0.08, 0.05),
        "train_on_everything": Choice(0.08, 0.05),
        "ftl_fine_tune": Choice(0.08, 0.05 / 3),
        "from_scratch": Choice(0.08, options={"steps": 30, "lr": 0.1}),
        "online_reptile": Choice(0.08, 0.05),
        "moml": Choice(0.08, 0.05, {"alpha": 3.0, "steps": 5}),
        "aruba": Choice(0.08, 0.5, {"eps": 0.05}, "sgd"),
        "c_maml": Choice(0.08, 0.05, {"gamma": 0.1}),
    },
    "schools_linear": {
        "ftml": Choice(0.08, 0.05),
        "ftml_recent": Choice(0.08, 0.05),
        "train_on_everything": Choice(0.08, 0.05),
        "ftl_fine_tune": Choice(0.08, 0.05 / 3),
        "from_scratch": Choice(0.08, options={"steps": 30, "lr": 0.03}),
        "online_reptile": Choice(0.08, 0.05),
        "moml": Choice(0.08, 0.05, {"alpha": 3.0, "steps": 5}),
        "aruba": Choice(0.08, 0.5, {"eps": 0.05}, "sgd"),
        "c_maml": Choice(0.08, 0.05, {"gamma": 0.1}),
    },
}


def choice_of(stream: str, label: str) -> Choice:
    """Return what a learner is set to on a stream; the comparators adapt as FTML does."""
    return CHOSEN[stream]["ftml" if label == COMPARATOR else label]
