"""For how many sequences KV cache is reserved. Pure."""

from __future__ import annotations

from tidegate_lifecycle.catalog import Model

ENOUGH_TOKENS = 32_768
"""Tokens of KV cache for a model that nobody gave a number of sequences: many short requests at once."""


def reserved_seqs(model: Model, length: int) -> int:
    """Sequences of `length` tokens whose KV cache a server of the model is to have, at least 1.

    1. `kv_reservation_seqs`; a server never works on more at once than `max_num_seqs`.
    2. `max_num_seqs`.
    3. llama.cpp: its slots, 1 when not given.
    4. vLLM: as many as hold 32,768 tokens together. What it works on at once by default is a limit that
       nobody chose: full-length KV cache for each would fill every card with each model.
    """
    if model.kv_reservation_seqs is not None:  # 1
        return min(model.kv_reservation_seqs, model.max_num_seqs or model.kv_reservation_seqs)
    if model.max_num_seqs is not None:  # 2
        return model.max_num_seqs
    if model.engine == "llamacpp":  # 3
        return 1
    return max(1, min(model.seqs_at_once, -(-ENOUGH_TOKENS // max(1, length))))  # 4
