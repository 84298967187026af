"""Small reference networks that can be differentiated twice: no running statistics, no in-place operations."""

from trainers.models.decoders import attentive_decoder, in_context_transformer
from trainers.models.images import conv4
from trainers.models.lora import lora
from trainers.models.perceptron import mlp
from trainers.models.pretrained import transformer_from
from trainers.models.recurrent import gru
from trainers.models.transformers import transformer

__all__ = [
    "attentive_decoder",
    "conv4",
    "gru",
    "in_context_transformer",
    "lora",
    "mlp",
    "transformer",
    "transformer_from",
]
