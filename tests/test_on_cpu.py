"""What replays do in another way on a CPU gives what the model's own code gives, and is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from mambalens.hooks import HookManager
from mambalens.hooks.on_cpu import Room, one_gelu, roomy_head, tokens_alone
from mambalens.sweep import replay
from mambalens.sweep.replay import UNCUT, Replay, Row


def seen_by(model: Any, kinds: tuple[type, ...], run: Callable[[], Any]) -> tuple[Any, list[tuple[int, ...]]]:
    """What `run` gives, and the shapes of what its projections were called with, inside whatever stands around them."""
    shapes: list[tuple[int, ...]] = []
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) in kinds:
                own = module.forward

                def forward(x: Tensor, own: Any = own) -> Tensor:
                    shapes.append(tuple(x.shape))
                    return own(x)

                module.forward = forward
                stack.callback(delattr, module, "forward")
        return run(), shapes


@pytest.mark.parametrize("name", ["gpt2", "mamba1", "mamba2"])
def test_a_base_pass_projects_what_is_read_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    hooks = HookManager(model)
    ids, last = torch.randint(2, model.config.vocab_size, (3, 7)), torch.tensor([6, 3, 4])
    sources = (torch.rand(2, 3, 7) < 0.5) & (torch.arange(7) < last[:, None])
    cuts = [UNCUT, *(Row(hooks.resolve([0, 1]), ((number, 0),)) for number in (1, 2, 1, 2, 1, 2))]
    assert len(cuts) == ids.shape[1], "rows side by side look like a prompt here"

    def logits() -> Tensor:
        return torch.stack([found for _, found in sorted(Replay(hooks, ids, last, sources).logits(cuts))])

    fast, shapes = seen_by(model.base_model, (nn.Linear, Conv1D), logits)
    assert (int(last.sum()),) in {shape[:-1] for shape in shapes} or (1, int(last.sum())) in {s[:-1] for s in shapes}
    monkeypatch.setattr(replay, "tokens_alone", lambda *_, **__: ExitStack())
    slow, shapes = seen_by(model.base_model, (nn.Linear, Conv1D), logits)
    assert name != "gpt2" or {shape[:-1] for shape in shapes} == {(3, 7)}
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)
    assert (fast[0] - fast[1]).abs().max() > 1e-3


def test_tokens_alone_take_nothing_else_alone() -> None:
    layer = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    x, others = torch.randn(2, 3, 4), torch.randn(2, 4, 4)
    tokens = (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    running = [True]
    with torch.no_grad():
        expected = layer(x)
        with tokens_alone([layer], tokens, (2, 3), now=lambda: running[0]):
            found = layer(x)
            assert torch.equal(layer(others), layer[2](torch.tanh(layer[0](others))))
            running[0] = False
            whole = layer(x)
    assert torch.equal(whole, expected) and torch.equal(layer(x), expected)
    torch.testing.assert_close(found[tokens], expected[tokens])
    assert not found[0, 2].any() and not found[1, 1:].any()
    for none in ((tokens[0][:0], tokens[1][:0]), torch.ones(2, 3).nonzero(as_tuple=True)):
        with tokens_alone([layer], none, (2, 3), now=lambda: True):
            assert "forward" not in vars(layer[0])


def test_gpt2s_activation_is_one_operation_in_float32_alone() -> None:
    act, x = NewGELUActivation(), torch.linspace(-12, 12, 100_001)
    with one_gelu([nn.Sequential(act)]):
        fast = act(x)
        assert torch.equal(act(x.double()), own_gelu(x.double()))
        assert torch.equal(act(x.bfloat16()), own_gelu(x.bfloat16()))
    assert torch.equal(act(x), own_gelu(x))
    exact = own_gelu(x.double())
    assert (fast - exact).abs().max() <= max((own_gelu(x) - exact).abs().max(), 2e-6)


def own_gelu(x: Tensor) -> Tensor:
    """Transformers' own, operation by operation."""
    return NewGELUActivation().forward(x)


@pytest.mark.parametrize("vocabulary", [61, 64])
def test_the_head_writes_rows_that_lie_well(vocabulary: int) -> None:
    model = tiny("gpt2", torch.float32, vocabulary=vocabulary)
    head = model.get_output_embeddings()
    many, few = torch.randn(80, 1, model.config.n_embd), torch.randn(3, 1, model.config.n_embd)
    with torch.no_grad(), roomy_head(model):
        found = head(many)
        assert found.stride(0) == 64 and found.shape == (80, 1, vocabulary)
        assert head(few).is_contiguous() and head(many.new_zeros(0, 1, many.shape[2])).shape == (0, 1, vocabulary)
        with torch.enable_grad():
            assert head(many).requires_grad
    torch.testing.assert_close(found, head(many), rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(head)


def test_a_heads_room_is_written_anew() -> None:
    """And only where it is given: else every batch's logits are its own."""
    model = tiny("mamba1", torch.float32)
    hooks, room = HookManager(model), Room()
    sets = torch.zeros(1, 70, 3, dtype=torch.bool)

    def logits(ids: Tensor, room: Room | None, memory: int = 2**30) -> Tensor:
        replay = Replay(hooks, ids, torch.full((70,), 2), sets, memory=memory, room=room)
        return next(found for _, found in replay.logits([UNCUT]))

    with torch.no_grad():
        first, second = (torch.randint(2, model.config.vocab_size, (70, 3)) for _ in range(2))
        own = logits(first, None)
        shared = logits(first, room)
        assert torch.equal(shared, own) and own.data_ptr() != shared.data_ptr()
        kept = shared.data_ptr()
        again = logits(second, room)
        assert again.data_ptr() == kept and torch.equal(again, logits(second, None)) and torch.equal(shared, again)
        assert not torch.equal(own, again)
        small, large = room.of(2, 3), room.of(300, 50)
        assert small.data_ptr() == kept and small.shape == (2, 3) and large.shape == (300, 50)
