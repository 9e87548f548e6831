"""Tiny models of every kind, for the contract that `test_models.py` holds them to."""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from zoo_hf.models import (
    DNCConfig,
    DNCForCausalLM,
    RNNConfig,
    RNNForCausalLM,
    RWKV7Config,
    RWKV7ForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
)


def rnn(**config) -> PreTrainedModel:
    sizes = {"vocab_size": 11, "embedding_size": 6, "hidden_size": 8, "num_layers": 2}
    return RNNForCausalLM(RNNConfig(**(sizes | config)))


def mamba2(**config) -> PreTrainedModel:
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_heads": 4, "head_dim": 4, "state_size": 5, "chunk_size": 4}
    return ZooMamba2ForCausalLM(ZooMamba2Config(**(sizes | config)))


def dnc(**config) -> PreTrainedModel:
    sizes = {"vocab_size": 11, "embedding_size": 6, "hidden_size": 8, "memory_slots": 5, "memory_width": 7}
    return DNCForCausalLM(DNCConfig(**(sizes | {"initial_memory": 0.3} | config)))


def rwkv7(**config) -> PreTrainedModel:
    ranks = {"decay_low_rank_dim": 3, "a_low_rank_dim": 2, "v_low_rank_dim": 2, "gate_low_rank_dim": 3}
    sizes = {"vocab_size": 11, "hidden_size": 8, "head_dim": 4, "intermediate_size": 12}
    return RWKV7ForCausalLM(RWKV7Config(**(ranks | sizes | config)))


# `SMALL[name](**config)`: at most 11 tokens unless `vocab_size` is given, and any other field of the configuration
SMALL: dict[str, Callable[..., PreTrainedModel]] = {
    "lstm": partial(rnn, cell_type="lstm"),
    "lstm, tied head": partial(rnn, embedding_size=8, tie_word_embeddings=True),
    "lstm, two heads": partial(rnn, cell_type="lstm", num_heads=2),
    "gru": partial(rnn, cell_type="gru"),
    "gru, two heads": partial(rnn, cell_type="gru", num_heads=2),
    "slstm": partial(rnn, cell_type="slstm"),
    "slstm, two heads, learned state": partial(rnn, cell_type="slstm", num_heads=2, learn_initial_state=True),
    "elman": partial(rnn, cell_type="elman"),
    "elman, two heads": partial(rnn, cell_type="elman", num_heads=2),
    "lstm, as presets": partial(rnn, num_layers=1, num_heads=4, learn_initial_state=True, initialization="paper"),
    "lstm, residual": partial(rnn, embedding_size=8, residual=True, intermediate_size=12),
    "lstm, pooled": partial(rnn, pooling="attention", learn_initial_state=True),
    "gru, pooled with decay": partial(rnn, cell_type="gru", pooling="attention", pooling_decay=0.5),
    "mamba2": mamba2,
    "mamba2, two groups, tied head": partial(mamba2, n_groups=2, use_bias=True, tie_word_embeddings=True),
    "dnc": dnc,
    "dnc, tied head": partial(dnc, embedding_size=15, tie_word_embeddings=True),
    "rwkv7": rwkv7,
    "rwkv7, one head, tied head": partial(rwkv7, head_dim=8, tie_word_embeddings=True),
}
