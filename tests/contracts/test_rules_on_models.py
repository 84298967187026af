"""The contract of every inner rule, checked on the models of ``trainers.models``."""

import pytest

from online_meta.testing import problems
from online_meta.testing.test_rules import check_gradients, every_rule
from tests.numerics.problems import EVERY, problem


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
@pytest.mark.parametrize("name", [name for name in EVERY if name not in problems.EVERY])
@every_rule
def test_gradients_on_every_kind_of_model(make, name, estimator):
    check_gradients(name, make, estimator, problem)
