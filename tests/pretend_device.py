"""A pretended accelerator: tensors that compute on the CPU, refuse to mix with the CPU's, and count what would be slow.

`torch.device("pretend:0")`, `"pretend:1"` ... are devices as CUDA's are, to whoever uses them: a tensor of one of them
and a tensor of the CPU, or of another of them, do not meet in an operation, but for what CUDA lets through (a single
number of the CPU in arithmetic, indices that lie on the CPU). Copies from and to the host, synchronisations (whatever
has the host wait for a number) and operations (on a GPU: launches) are counted in `counted`.

What it computes is the CPU's, by the CPU's code, but where PyTorch takes other ways for tensors that are not on the CPU
(attention, products with a bias): there numbers differ by rounding.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
CPU = torch.device("cpu")
UNKNOWN = torch.device("meta")
"""In the place of a device, for what is `ANYWHERE`."""
aten = torch.ops.aten


@dataclass
class Traffic:
    """What was counted."""

    to_device: int = 0
    """Copies from the host."""
    awaited: int = 0
    """Those of them that the host waits for: all that are not asked for with `non_blocking`."""
    to_host: int = 0
    """Copies to the host; each has it wait."""
    between: int = 0
    """Copies from one device to another."""
    waits: Counter[str] = field(default_factory=Counter)
    """Operations, by name, that have the host wait for what a device computes: how many numbers are not zero, say."""
    launches: Counter[str] = field(default_factory=Counter)
    """Operations on a device, by name, without those that only look at a tensor otherwise."""
    places: Counter[str] | None = None
    """Where in the code copies and waits came from, if that is asked for."""

    @property
    def transfers(self) -> int:
        """Copies from and to the host."""
        return self.to_device + self.to_host

    @property
    def synchronisations(self) -> int:
        """How often the host waits for a device."""
        return self.to_host + self.awaited + sum(self.waits.values())

    def note(self, what: str) -> None:
        """Note the line that a copy or a wait came from: the innermost one that is neither PyTorch's nor of this file."""
        if self.places is not None:
            frame = sys._getframe(1)
            while frame.f_back is not None and (
                "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
            ):
                frame = frame.f_back
            self.places[f"{what}: {frame.f_code.co_filename}:{frame.f_lineno}"] += 1


_counting: list[Traffic] = []
_calls: list[int] = []
"""Of every call from Python that runs, the number of the device that it is about: what C++ makes meanwhile lies there."""
ANYWHERE = -1
"""Number of what C++ makes where nobody says for which device: it goes with any."""


@contextmanager
def counted(places: bool = False) -> Iterator[Traffic]:
    """Count while the block runs; with `places`, also where in the code."""
    traffic = Traffic(places=Counter() if places else None)
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


class PretendTensor(Tensor):
    """A tensor of a pretended device.

    To PyTorch's own code in C++, which knows of one such device only, all of them are the first; to Python, `device`
    says which one it is.
    """

    _inner: Tensor
    _index: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            index: int | None = ANYWHERE
            if kwargs.get("device") is not None:
                index = torch.device(kwargs["device"]).index
            elif func not in (torch.autograd.grad, Tensor.backward):  # in which C++ makes what belongs to any device
                index = next((t._index for t in _tensors([*args, *kwargs.values()]) if isinstance(t, cls)), None)
            _calls.append(index or 0)
            try:
                return func(*args, **kwargs)
            finally:
                _calls.pop()

    @staticmethod
    def __new__(cls, inner: Tensor, index: int) -> PretendTensor:
        outer = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        outer._inner, outer._index = inner, index
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, max(0, self._index))

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self._inner!r}, device='{self.device}')"

    def get_device(self) -> int:
        return self._index

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """As every tensor's; C++ would take all pretended devices for one."""
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, quickly, _ = torch._C._nn._parse_to(*args, **kwargs)
        here = self if dtype is None else super().to(dtype)
        device = here.device if device is None else torch.device(device.type, device.index or 0)
        device = CPU if device.type == "cpu" else device
        return here if device == here.device and not copy else _Move.apply(here, device, quickly)

    def cpu(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return self.to(CPU)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, requires_grad=requires_grad)


class _Move(torch.autograd.Function):
    """A copy of a pretended tensor elsewhere, whose gradient comes back to where it came from."""

    @staticmethod
    def forward(ctx: Any, tensor: PretendTensor, device: torch.device, quickly: bool) -> Tensor:  # type: ignore[override]
        ctx.device = tensor.device
        return _moved(tensor, device, non_blocking=quickly)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient.to(ctx.device), None, None


def _named(device: Any) -> torch.device:
    """A device with its number."""
    device = torch.device(device)
    if device.type != NAME:
        return device
    index = device.index or (_calls[-1] if _calls else 0)
    return UNKNOWN if index == ANYWHERE else torch.device(NAME, index)


def _place(tensor: Any) -> torch.device | None:
    """Where a tensor lies, to those who use it; None for what is no tensor."""
    if not isinstance(tensor, Tensor):
        return None
    return tensor.device if not isinstance(tensor, PretendTensor) or tensor._index != ANYWHERE else UNKNOWN


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Arguments, or a result, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_each(change, part) for part in value])
    return value


def _inner(value: Tensor) -> Tensor:
    return value._inner if isinstance(value, PretendTensor) else value


def _count_copy(source: torch.device, target: torch.device, waiting: bool = True) -> None:
    for traffic in _counting:
        if source == target or UNKNOWN in (source, target):
            continue
        traffic.note("copy, awaited" if waiting else "copy")
        traffic.to_device += source == CPU
        traffic.awaited += source == CPU and waiting
        traffic.to_host += target == CPU
        traffic.between += CPU not in (source, target)


def _moved(tensor: Tensor, device: torch.device, **options: Any) -> Tensor:
    """A copy elsewhere."""
    source = _place(tensor)
    assert source is not None
    _count_copy(source, device, not options.get("non_blocking"))
    copy = aten._to_copy.default(_inner(tensor), **options)
    return copy if device == CPU else PretendTensor(copy, ANYWHERE if device == UNKNOWN else device.index)


WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "count_nonzero", "bincount", "linalg_inv_ex", "_assert_async",
}  # fmt: skip
"""What has the host wait for a result, or for the size of one, on CUDA."""
WAITING -= {"count_nonzero", "linalg_inv_ex", "_assert_async"}  # whose results stay there
SCALARS = {"where", "masked_fill", "masked_fill_", "index_put", "index_put_", "fill_", "lerp", "clamp", "pow"}
"""Where, beside arithmetic, a single number of the CPU may stand."""
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_", "_unsafe_index_put"}


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors among arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One operation, of which some tensor or the result is a pretended device's."""
    name = func._schema.name.removeprefix("aten::")
    if name == "_to_copy":
        options = {key: value for key, value in kwargs.items() if key != "device"}
        device = kwargs.get("device")
        same = device is None or (_place(args[0]).type == NAME and torch.device(device).type == NAME)
        return _moved(args[0], _place(args[0]) if same else _named(device), **options)
    if name in ("copy_", "_copy_from"):
        target, source = (args[0], args[1]) if name == "copy_" else (args[1], args[0])
        _count_copy(_place(source), _place(target), not (args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        aten.copy_.default(_inner(target), _inner(source))
        if isinstance(target, PretendTensor) and target._index == ANYWHERE and isinstance(source, PretendTensor):
            target._index = source._index
        return target
    if name == "_fused_sdp_choice":
        return 0  # the plain arithmetic
    place = _common_place(func, name, args, kwargs)
    index = ANYWHERE if place == UNKNOWN else place.index
    _count_operation(func, name, args)
    given = dict(kwargs)
    if given.get("device") is not None:
        given["device"] = CPU
    outers = {id(_inner(tensor)): tensor for tensor in _tensors([*args, *kwargs.values()])}
    found = func(*_each(_inner, args), **{key: _each(_inner, value) for key, value in given.items()})

    def outer(value: Tensor) -> Tensor:
        known = outers.get(id(value))
        if known is not None:  # changed in place
            if known.shape != value.shape:
                known.data = PretendTensor(value, index)
            if isinstance(known, PretendTensor):
                known._index = index
            return known
        return value if place == CPU else PretendTensor(value, index)

    return _each(outer, found)


def _common_place(func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """The one device that an operation's tensors are on, and its result.

    Raises:
        RuntimeError: if they are on several, as CUDA's would.
    """
    asked = kwargs.get("device")
    like = next((tensor for tensor in _tensors(args) if isinstance(tensor, PretendTensor)), None)
    if asked is not None and (like is None or torch.device(asked).type != NAME or torch.device(asked).index):
        return _named(asked)  # made there, whatever the shape is taken from
    places = []
    for number, value in enumerate([*args, *kwargs.values()]):
        for tensor in _tensors([value]):
            place = _place(tensor)
            if place == CPU and name in INDEXED and number == 1:
                _count_copy(CPU, torch.device(NAME))
                continue  # indices are copied over
            if place == CPU and tensor.ndim == 0 and (torch.Tag.pointwise in func.tags or name in SCALARS):
                continue
            places.append(place)
    places = [place for place in places if place != UNKNOWN] or places
    different = sorted({str(place) for place in places})
    if len(different) != 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {' and '.join(different)} in {func._schema.name}."
        )
    return places[0]


def _count_operation(func: Any, name: str, args: tuple[Any, ...]) -> None:
    waits = name in WAITING
    if name in INDEXED:
        waits = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors([args[1]]))
    if name == "repeat_interleave" and any(isinstance(arg, Tensor) for arg in args):
        waits = True
    launches = not func.is_view and name not in (
        "detach",
        "_local_scalar_dense",
        "empty",
        "empty_strided",
        "empty_like",
    )
    for traffic in _counting:
        if waits:
            traffic.waits[name] += 1
            traffic.note(name)
        if launches:
            traffic.launches[name] += 1


def _without_wrapping(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What C++ asks of the device itself: tensors that are made there."""
    return _run(func, args, kwargs)


class _Module:
    """`torch.pretend`, of which PyTorch asks this much."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return False  # so that nothing takes it for the machine's accelerator unasked

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 2

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hook(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc]
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def _makers() -> Iterator[Any]:
    """Operations that make a tensor from numbers alone, where a device is told them."""
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        if space == "aten" and not name.endswith("_out") and torch._C._dispatch_has_kernel(full):
            base, _, overload = name.partition(".")
            operation = getattr(getattr(aten, base, None), overload or "default", None)
            arguments = operation._schema.arguments if operation is not None else []
            told = any(argument.name == "device" for argument in arguments)
            if told and not any("Tensor" in str(argument.type) for argument in arguments):
                yield operation


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
    torch.autograd.set_multithreading_enabled(False)  # an error in a device's own thread would end the process
    rest, made = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(_without_wrapping, "PrivateUse1")
    for operation in [*_makers(), aten._copy_from.default]:
        made.impl(operation, functools.partial(_without_wrapping, operation), "PrivateUse1")
    return [rest, made]


_libraries = _register()  # as long as they live, the device is known
