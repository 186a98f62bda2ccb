"""Random numbers without a state: each is a function of what it is drawn for, and of nothing else.

A generator gives other numbers to the same token wherever ranks hold other parts of a batch. Here the draw of a token
is a hash of the step, its clip, its view and its place in the sequence, and what is drawn for it a hash of that and of
the one who asks: the same numbers in every layout, in a pass that is computed again for its backward pass, and on every
device, for integers do not round.

Source: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose bits pass the usual tests of randomness.
Shape suffixes: N tokens, B sequences, C columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # as int64, whose products wrap around
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_BITS = 23  # of a number: with a half added, fp32 has it exactly, and it is never 0 or 1


def draw_of(*parts: object) -> int:
    """A number from 0 below 2^63 that is a hash of names and numbers."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draws_of_tokens(draws_B: Sequence[int], lengths: Sequence[int], tokens: int) -> Tensor:
    """int64 [N], a draw of every token of sequences that lie one after another; any number for what follows them.

    Args:
        draws_B: of the sequences.
        lengths: tokens of each.
        tokens: N.
    """
    sizes_B = torch.tensor(lengths)
    starts_B = sizes_B.cumsum(0) - sizes_B
    # What a sequence draws is mixed first, so that no place of it is a place of another one.
    firsts_B = _mixed(torch.tensor(draws_B)) - starts_B
    draws_N = torch.arange(tokens)
    draws_N[: sum(lengths)] += firsts_B.repeat_interleave(sizes_B)
    return _mixed(draws_N)


def uniforms(draws_N: Tensor, purpose: int, columns: int) -> Tensor:
    """fp32 [N, C], evenly between 0 and 1 and never either, C numbers of each token.

    Args:
        draws_N: int64, of the tokens.
        purpose: who asks for what; below 2^63.
    """
    purposes_C = _mixed(torch.arange(columns, device=draws_N.device) + purpose)
    bits_NC = (_mixed(draws_N[:, None] + purposes_C) >> (64 - _BITS)) & (2**_BITS - 1)
    return (bits_NC.float() + 0.5) * 2.0**-_BITS


def gumbels(draws_N: Tensor, purpose: int, columns: int) -> Tensor:
    """fp32 [N, C] of the standard Gumbel distribution, from -2.8 to 16.7: the largest of ``logits + gumbels`` is drawn
    with the probabilities of the softmax."""
    return -(-uniforms(draws_N, purpose, columns).log()).log()


def _mixed(numbers: Tensor) -> Tensor:
    """int64 of the same shape: a one-to-one map of 64 bits, of which every one decides about every other."""
    numbers = numbers + _INCREMENT
    numbers = (numbers ^ _shifted(numbers, 30)) * _FACTORS[0]
    numbers = (numbers ^ _shifted(numbers, 27)) * _FACTORS[1]
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)
