"""What is answered beside the predictions: the spread, quantiles, probabilities and the information of labels."""

import json

import pytest
import torch
from safetensors.torch import load

from deploy.predictions import PLAIN, AnswerFormat, encode_predictions
from deploy.processes.answers import Frame, pack_request, unpack_request
from online_meta.outcomes import categorical, gaussian, mse
from online_meta.prediction import cdf_of, mix, point
from online_meta.types import Outcome, Prediction
from streams.client.protocol import adapt_call
from streams.types import Rejected

LEVELS = (0.05, 0.95)


def make_mixture(outcome: Outcome, *shape: int) -> Prediction:
    outputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    return mix([point(outcome, output) for output in outputs], [0.0, -1.0, -2.0])


def test_a_regression_has_a_mean_a_spread_and_quantiles() -> None:
    prediction = make_mixture(gaussian.build(), 4, 2)
    found = load(encode_predictions(prediction, AnswerFormat(False, ("mean", "std", "information"), LEVELS)))
    plain = load(encode_predictions(prediction))
    assert plain.keys() == found.keys() - {"mean", "std", "information", "quantiles", "levels"}
    assert all(torch.equal(found[name], one) for name, one in plain.items())
    assert {found[name].dtype for name in ("mean", "std", "information", "quantiles", "levels")} == {torch.float32}
    assert found["std"].shape == (4, 1)
    assert found["information"].shape == (4,)
    for level, quantile in zip(found["levels"], found["quantiles"], strict=True):
        share = cdf_of(prediction, quantile)
        assert share is not None
        torch.testing.assert_close(share, level.expand(4, 1), rtol=0, atol=1e-5)


def test_a_classifier_has_probabilities_and_no_spread() -> None:
    prediction = make_mixture(categorical.build(), 4, 3)
    found = load(encode_predictions(prediction, AnswerFormat(False, ("probabilities", "information"))))
    torch.testing.assert_close(found["probabilities"].sum(1), torch.ones(4))
    assert torch.equal(found["probabilities"].argmax(1), found["labels"])
    assert bool((found["information"] > 0).all())
    with pytest.raises(Rejected, match="have no std: its loss does not say"):
        encode_predictions(prediction, AnswerFormat(False, ("std",)))


def test_a_squared_error_has_a_mean_alone() -> None:
    prediction = point(mse.build(), torch.zeros(4, 1))
    assert "mean" in load(encode_predictions(prediction, AnswerFormat(False, ("mean",))))
    wanted = (
        AnswerFormat(False, ("probabilities",)),
        AnswerFormat(False, ("information",)),
        AnswerFormat(levels=LEVELS),
    )
    for format in wanted:
        with pytest.raises(Rejected, match="no_distribution"):
            encode_predictions(prediction, format)


@pytest.mark.parametrize(
    "format", [PLAIN, AnswerFormat(True), AnswerFormat(True, ("std",), LEVELS), AnswerFormat(samples=3)]
)
def test_a_format_is_passed_on_with_its_request(format: AnswerFormat) -> None:
    kind, body = pack_request(format, b"request")
    assert unpack_request(Frame(0, kind, 0, body)) == (format, b"request")


def test_the_client_asks_for_what_it_is_given() -> None:
    call = adapt_call({"support_x": [[0.5]]}, parts=["std"], levels=LEVELS, samples=20)
    assert call.params == {"part": ["std"], "level": [0.05, 0.95], "samples": 20}
    assert json.loads(call.content or b"") == {"support_x": [[0.5]]}
    assert adapt_call({}).params == {}
