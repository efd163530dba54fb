"""Dimension letters and array aliases.

Dense maths carries its axes as a suffix, ``x_BLHP``; the order is always batch, position, head, feature.

======  ============================  ======  ==============================
letter  meaning                       letter  meaning
======  ============================  ======  ==============================
B       batch                         Q       positions in a chunk
L       positions (time)              S       source positions (keys)
D       ``d_model``                   K       keys admitted per query
E       ``d_inner``                   W       conv or window width
H       heads                         V       vocabulary
P       width of a head (value)       A       action width
N       ``d_state`` (key width)       Z       stochastic latent width
G       B/C groups                    T       imagined horizon
M       memory slots of a state       R       rows: batch and head folded
======  ============================  ======  ==============================
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor

State: TypeAlias = Any
"""A NamedTuple whose leaves are tensors (or tuples of states), batch first on every leaf."""

Aux: TypeAlias = dict[str, Tensor]
"""Named scalar losses that a layer wants added to the objective."""
