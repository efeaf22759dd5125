"""Every verb on a device that is not the CPU, on one that is only pretended: the CPU's numbers, and little traffic.

`pretend_device` says what such a device is. A tensor that is left on the CPU, or on another of several devices, is an
error there, as it is on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import in_double
from pretend_device import Traffic, counted
from torch import Tensor
from verbs import FACTS, FEW, KINDS, LONG, ON_TWO, QUIET, VERBS, WORDS, difference, lens_of

from mambalens import Fact, Lens, load_facts

pytestmark = pytest.mark.filterwarnings("error:.*replay", "error:.*memory")
"""Where a replay breaks off, a sweep goes on by hooks, and says so: that would hide a tensor on a wrong device."""
TOLERANCE = 1e-9
CASES = [
    *((name, verb) for verb in VERBS for name in KINDS),
    *((name, verb) for verb in LONG for name in FEW),
]


@functools.cache
def on_the_cpu(name: str, verb: str) -> Any:
    with in_double(lens_of(name).model):
        return (VERBS | LONG)[verb](lens_of(name))


@pytest.mark.parametrize(("name", "verb"), CASES)
def test_a_device_gives_the_numbers_of_the_cpu(name: str, verb: str) -> None:
    lens = lens_of(name, "pretend:1")
    with in_double(lens.model), counted() as traffic:
        found = (VERBS | LONG)[verb](lens)
    assert difference(found, on_the_cpu(name, verb)) < TOLERANCE
    assert sum(traffic.launches.values()) > 100  # it was computed there


@pytest.mark.parametrize(("name", "verb"), [(name, verb) for verb in ON_TWO for name in KINDS])
def test_a_model_on_two_devices_gives_the_numbers_of_the_cpu(name: str, verb: str) -> None:
    lens = lens_of(name, "pretend:0", "pretend:1")
    assert {str(parameter.device) for parameter in lens.model.parameters()} == {"pretend:0", "pretend:1"}
    with in_double(lens.model), counted() as traffic:
        found = VERBS[verb](lens)
    assert difference(found, on_the_cpu(name, verb)) < TOLERANCE
    assert traffic.between > 0


@pytest.mark.parametrize("devices", [("pretend:1",), ("pretend:0", "pretend:1")], ids=["one", "two"])
@pytest.mark.parametrize("name", FEW)
def test_what_is_checked_at_loading_runs_on_devices(name: str, devices: tuple[str, ...]) -> None:
    """Architectures that are in the tests are loaded without."""
    lens = lens_of(name, *devices)
    with in_double(lens.model), counted() as traffic:
        lens.hooks.check()
    assert sum(traffic.launches.values()) > 100


@pytest.mark.parametrize("name", FEW)
def test_what_is_kept_on_the_cpu_may_be_asked_for_on_a_device(name: str) -> None:
    """Values that stand in, lengths of prompts."""

    def asked(lens: Lens) -> list[Tensor]:
        ids = torch.tensor([[1, 2, 3, 4, 6, 7], [9, 2, 3, 10, 11, 4]], device=lens.device)
        values = lens.hooks.values(ids.flip(0)).each(lambda part: part.cpu())
        with torch.no_grad(), lens.hooks.knockout([1], [4, 5], path=lens.hooks.paths.choices[0], instead=values):
            found = [lens.model(ids, use_cache=False).logits]
        length = torch.tensor([6, 4])
        lens.hooks.watch(ids, lambda mixer, mixing: found.append(mixing.half_life(length).nan_to_num(-1.0)))
        return found

    lens, on_cpu = lens_of(name, "pretend:1"), lens_of(name)
    with in_double(lens.model):
        assert difference(asked(lens), asked(on_cpu)) < TOLERANCE


def of_sweep(name: str, sources: tuple[str, ...], windows: list[list[int]]) -> Traffic:
    """What a sweep of one batch moves and waits for."""
    lens = lens_of(name, "pretend:0")
    asked: dict[str, Any] = {"paths": lens.hooks.paths.choices[-1:], "features": ("all",), **QUIET}
    lens.sweep(FACTS, sources, window=windows, **asked)
    with counted(places=True) as traffic:
        found = lens.sweep(FACTS, sources, window=windows, **asked)
    assert len(found.table) == len(FACTS) * len(sources) * len(windows)
    return traffic


def own_waits(traffic: Traffic) -> int:
    """How often the host waits on behalf of this package, without what a model's own code waits for (experts do)."""
    assert traffic.places is not None
    return sum(
        count
        for place, count in traffic.places.items()
        if not place.startswith("copy: ") and "/transformers/" not in place
    )


@pytest.mark.parametrize("name", KINDS)
def test_traffic_of_a_batch_does_not_grow_with_its_knockouts(name: str) -> None:
    """The host waits no more often, and copies a few indices a layer beside it."""
    layers = lens_of(name, "pretend:0").n_layers
    windows = [[*range(start, end)] for start in range(layers) for end in range(start + 1, layers + 1)]
    few = of_sweep(name, ("subject",), windows[:1])
    many = of_sweep(name, ("subject", "relation", "subject_last", "last"), windows)
    assert own_waits(many) <= own_waits(few), many.places
    assert many.to_host == few.to_host, many.places
    mixers = len(lens_of(name, "pretend:0").hooks.mixers)
    # A layer's rows are few different ones: their numbers, and for each of the five states which rows resume from it.
    assert many.to_device - few.to_device <= 6 * mixers, many.places


@pytest.mark.parametrize("name", FEW)
def test_the_host_waits_a_fixed_number_of_times_a_batch(name: str) -> None:
    """Whatever the layers. The check of the replay waits most: it looks at single numbers."""
    traffic = of_sweep(name, ("subject",), [[0], [1]])
    assert own_waits(traffic) <= 8, traffic.places


@pytest.mark.parametrize("name", ["mamba", "mamba2", "recurrent_gemma"])
def test_operations_of_a_flow_do_not_grow_with_the_prompt(name: str) -> None:
    """Forwards and backwards nothing loops over positions: a few operations more a layer for a prompt four times as long."""
    lens, counts = lens_of(name, "pretend:0"), []
    for time in (16, 64):
        words = [WORDS[number % len(WORDS)] for number in range(time - 2)]
        fact = Fact(f"Peru {' '.join(words)} is", "Peru", "Lima", "capital", "long")
        with counted() as traffic:
            assert len(lens.flow([fact], points=1, **QUIET).table)
        counts.append(sum(traffic.launches.values()) / lens.n_layers)
    assert counts[1] - counts[0] < 24, counts


def test_a_lens_is_loaded_onto_a_device() -> None:
    facts = load_facts("atlas").sample(3)
    lens = Lens.load("atlas-mamba2", device="pretend:1")
    assert lens.device == torch.device("pretend:1")
    expected = Lens.load("atlas-mamba2").sweep(facts, "subject", window=6, **QUIET).table
    found = lens.sweep(facts, "subject", window=6, **QUIET).table
    np.testing.assert_allclose(found.prob, expected.prob, rtol=1e-4)
    assert "pretend:1" in lens._repr_html_()


class TestPretending:
    """What the pretended device does as CUDA does; otherwise the tests above would see nothing."""

    here = torch.arange(6.0).view(2, 3)

    @property
    def there(self) -> Tensor:
        return self.here.to("pretend:0")

    @pytest.mark.parametrize(
        "operation",
        [
            lambda here, there: here + there,
            lambda here, there: there * here[0],
            lambda here, there: torch.where(there > 1, there, here),
            lambda here, there: torch.cat([here, there]),
            lambda here, there: there @ here.T,
            lambda here, there: here @ there.T,
            lambda here, there: there.gather(1, here.long() % 3),
            lambda here, there: here[there[0].long() % 2],
            lambda here, there: here + there.sum(),
            lambda here, there: torch.nn.functional.embedding(here.long(), there),
            lambda here, there: there.masked_fill(here > 1, 0.0),
            lambda here, there: there + there.to("pretend:1"),
            lambda here, there: there.add_(here),
            lambda here, there: torch.isin(there, here),
        ],
    )
    def test_tensors_of_two_devices_do_not_mix(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        with pytest.raises((RuntimeError, TypeError), match="same device"):
            operation(self.here, self.there)

    def test_numbers_and_indices_of_the_cpu_may_stand_beside_a_device(self) -> None:
        index = torch.tensor([1, 0])
        for found, expected in (
            (self.there + torch.tensor(2.0), self.here + 2),
            (torch.where(self.there > 1, torch.tensor(0.0), self.there), self.here.where(self.here <= 1, 0)),
            (self.there[index], self.here[index]),
            (self.there[:, [2, 0]], self.here[:, [2, 0]]),
        ):
            assert found.device == torch.device("pretend:0") and torch.equal(found.cpu(), expected)

    def test_a_device_has_to_be_left_to_become_an_array(self) -> None:
        with pytest.raises((TypeError, RuntimeError), match="numpy"):
            self.there.numpy()
        assert self.there.tolist() == self.here.tolist()

    def test_copies_and_waits_are_counted(self) -> None:
        there, other = self.there, self.there.to("pretend:1")
        for operation, copies, waits in (
            (lambda: self.here.to("pretend:0"), 1, 1),
            (lambda: self.here.to("pretend:0", non_blocking=True), 1, 0),
            (lambda: there.cpu(), 1, 1),
            (lambda: there.sum().item(), 0, 1),
            (lambda: bool((there > 1).any()), 0, 1),
            (lambda: there.nonzero(), 0, 1),
            (lambda: there[there > 1], 0, 1),
            (lambda: there[torch.tensor([0])], 1, 1),
            (lambda: there.unique(), 0, 1),
            (lambda: torch.tensor([1.0], device="pretend:0"), 1, 1),
            (lambda: torch.zeros(3, device="pretend:0"), 0, 0),
            (lambda: there.to("pretend:0") * 2 + there.new_ones(3), 0, 0),
            (lambda: other[1:].sum(0), 0, 0),
        ):
            with counted() as traffic:
                operation()
            assert (traffic.transfers, traffic.synchronisations) == (copies, waits)

    def test_gradients_come_back_to_where_tensors_are(self) -> None:
        leaf, expected = (value.clone().requires_grad_() for value in (self.there, self.here))
        for one, far in ((leaf, "pretend:1"), (expected, "cpu")):
            ((one * 2).to(far).sin().sum().cpu() + one.sum().cpu()).backward()
        assert leaf.grad is not None and leaf.grad.device == torch.device("pretend:0")
        assert torch.equal(leaf.grad.cpu(), expected.grad)
