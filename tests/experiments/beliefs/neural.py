"""The neural processes of the tables of beliefs."""

from tests.experiments.beliefs.runs import Contestant

PROCESS = (
    "inner.rule=encode",
    "inner.steps=0",
    "inner.lr=0.001",
    "model.loss=gaussian",
    "model.loss_options={}",
)
"""What the configurations of all of them change."""


def list_processes(*changes: str) -> dict[str, Contestant]:
    """Return the learners by name, each with further ``changes`` of the configuration."""
    common = (*PROCESS, *changes)
    return {
        "cnp": Contestant(
            "conditional neural process",
            (
                *common,
                "inner.options={width=128, depth=3}",
                'inner.fast=["context"]',
                "model.args={inputs=1, outputs=2, hidden=[128, 128], context=128}",
            ),
        ),
        "np": Contestant(
            "neural process",
            (
                *common,
                "inner.options={latent=true}",
                'inner.fast=["context"]',
                "inner.posterior=samples",
                "inner.samples=10",
                "meta.gradient=variational",
                "model.args={inputs=1, outputs=2, hidden=[64, 64], context=16}",
            ),
        ),
        "attentive": Contestant(
            "attentive neural process",
            (
                *common,
                "inner.options={attention=true}",
                'inner.fast=["keys", "values"]',
                "model.build=trainers.models:attentive_decoder",
                "model.args={inputs=1, outputs=2, hidden=[64, 64], width=64}",
            ),
        ),
        "transformer": Contestant(
            "transformer neural process",
            (
                *common,
                "inner.options={in_context=true}",
                'inner.fast=["rows"]',
                "model.build=trainers.models:in_context_transformer",
                "model.args={inputs=1, outputs=2, width=32}",
            ),
        ),
    }
