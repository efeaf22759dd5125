"""What a person who knocks out edges of Mamba with a general hook library has to write: what the last position's scan
output loses.

Both take what modules of Hugging Face's mixer gave in the pass, `seen`, and the sources of every row, and give what to
subtract from the input of a later module at the last position. They use no T x T matrix and nothing of mambalens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Lost = Callable[[Any, Mapping[str, Tensor], Tensor], Tensor]


def lost_mamba1(mixer: Any, seen: Mapping[str, Tensor], sources: Tensor) -> Tensor:
    """What `out_proj` is to get less of, [row, channel]; sources: [row, token]."""
    states = mixer.ssm_state_size
    x = seen["x_proj.input"]  # [row, token, channel]
    step, B, C = seen["x_proj.output"].split([mixer.time_step_rank, states, states], -1)
    dt = F.softplus(F.linear(step, mixer.dt_proj.weight, mixer.dt_proj.bias))  # [row, token, channel]
    gate = seen["in_proj.output"].chunk(2, -1)[1][:, -1]
    later = dt.sum(1, keepdim=True) - dt.cumsum(1)  # of the positions behind each
    A = -mixer.A_log.exp()  # [channel, state]
    written = torch.where(sources[..., None], dt * x, 0)
    state = torch.einsum("btcn,btc,btn->bcn", (later[..., None] * A).exp(), written, B)
    return torch.einsum("bcn,bn->bc", state, C[:, -1]) * F.silu(gate)


def lost_mamba2(mixer: Any, seen: Mapping[str, Tensor], sources: Tensor) -> Tensor:
    """What the gated norm is to get less of, [row, channel]; sources: [row, token]."""
    heads, groups = mixer.num_heads, mixer.n_groups
    states = groups * mixer.ssm_state_size
    _, mixed, step = seen["in_proj.output"].split([mixer.intermediate_size, mixer.conv_dim, heads], -1)
    # No module gives what the convolution gave, so it is computed once more.
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    mixed = F.pad(mixed.transpose(1, 2), (weight.shape[-1] - 1, 0))
    mixed = F.silu(F.conv1d(mixed, weight, bias, groups=mixer.conv_dim)).transpose(1, 2)
    x, B, C = mixed.split([mixer.intermediate_size, states, states], -1)
    x = x.unflatten(-1, (heads, -1))  # [row, token, head, channel]
    dt = F.softplus(step + mixer.dt_bias).clamp(*mixer.time_step_limit)  # [row, token, head]
    later = dt.sum(1, keepdim=True) - dt.cumsum(1)
    read = torch.einsum("btgn,bgn->btg", B.unflatten(-1, (groups, -1)), C[:, -1].unflatten(-1, (groups, -1)))
    weights = (later * -mixer.A_log.exp()).exp() * dt * read.repeat_interleave(heads // groups, -1)
    return torch.einsum("bth,bthc->bhc", torch.where(sources[..., None], weights, 0), x).flatten(1)


LOST: dict[str, tuple[tuple[str, ...], str, Lost]] = {
    "mamba1": (("in_proj.output", "x_proj.input", "x_proj.output"), "out_proj", lost_mamba1),
    "mamba2": (("in_proj.output",), "norm", lost_mamba2),
}
"""What is read in the order in which it is computed, from whose input the loss is subtracted, and how it is found."""
