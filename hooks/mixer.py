"""What the hook manager asks of a token mixer.

An adapter is one file `mixer_<name>.py` in this folder with one subclass of `Mixer`; nothing else has to know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mambalens.hooks.calls import bound
from mambalens.hooks.edges import Arrivals, Weakened
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut, on
from mambalens.hooks.resume import Base, Rows, Seen
from mambalens.hooks.summands import Summands
from mambalens.hooks.token_mixing import TokenMixing
from mambalens.hooks.values import Written


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass of the model under running knockouts, as far as mixers have to know it."""

    prompt: int
    """Columns of the prompt, from which negative positions count."""
    past: int
    """Columns that a cache holds from earlier passes of the same prompt."""
    length: int
    """All columns so far, those of this pass included."""
    keep_history: bool = False
    """Whether a target lies in columns that are yet to be generated."""
    cuts: Mapping[Mixer, list[Cut]] = field(default_factory=dict)
    """What is cut in each mixer that is cut."""

    def cuts_of(self, mixer: Mixer, path: Paths = Paths.BOTH) -> list[Cut]:
        """What is cut of one mixer on a path, where it changes anything in this pass."""
        found = on(path, self.cuts.get(mixer, []))
        return [cut for cut in found if bool(cut.targets[:, self.past :].any())]


class Captured(NamedTuple):
    """One call of a mixer's module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    probe: Any
    """What `Mixer.probing`, or `Mixer.writing`, gave."""

    def arguments(self, module: nn.Module) -> dict[str, Any]:
        """The call's arguments by name."""
        return bound(module, self.args, self.kwargs)


class Mixer(ABC):
    """One token mixer of a model: the adapter's view of a module.

    Attributes:
        module: the architecture's module.
        layer: number of its layer.
    """

    kind: ClassVar[str]
    """'mamba1', 'attention' and so on: what users call it, and tables and figures."""
    features_are: ClassVar[str] = "heads"
    """What its features are, in one word."""
    paths: ClassVar[Paths] = Paths.MAIN
    """The ways by which it carries information between positions."""
    has_keys: ClassVar[bool] = False
    """Whether keys can stand in with its values (`Written.keys`)."""
    decays: bool = False
    """Whether what features carry decays with time, so that they have a decay norm."""
    tested: ClassVar[frozenset[str]] = frozenset()
    """Classes of modules that the tests hold the adapter against."""

    def __init__(self, module: nn.Module, layer: int) -> None:
        self.module: Any = module  # its attributes are the architecture's, which only the adapter knows
        self.layer = layer

    def __repr__(self) -> str:
        return f"<{self.kind} mixer of layer {self.layer}: {type(self.module).__name__}, {self.n_features} features>"

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether this adapter handles `module`."""

    @property
    def familiar(self) -> bool:
        """Whether the adapter has been held against this class of modules in the tests."""
        return type(self.module).__name__ in self.tested

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Channels (Mamba-1, RG-LRU, short convolutions) or heads (Mamba-2, attention and the rest)."""

    def decay_norm(self) -> Float[Tensor, " feature"]:
        """Decay norm of every feature, see `features.decay_norm`."""
        raise MambalensError(
            f"layer {self.layer} is {type(self.module).__name__}, whose features have no decay: use features='all', a "
            "boolean mask or a list of their numbers."
        )

    @abstractmethod
    def attach(self, current: Callable[[], Pass]) -> Callable[[], None]:
        """Make the module apply the cuts of the running pass until the returned function is called.

        Args:
            current: asked at every forward pass of the module for the running pass.
        """

    @abstractmethod
    def token_mixing(self, call: Captured, cuts: Sequence[Cut]) -> TokenMixing:
        """Effective attention and its surroundings for one captured call of the module."""

    @abstractmethod
    def written(self, call: Captured) -> Written:
        """What each position hands on in one captured call of the module, and all that may stand in its place."""

    @abstractmethod
    def parity(self, call: Captured) -> float:
        """Largest difference between this adapter's arithmetic and the module's output, relative to the output."""

    @abstractmethod
    def keeping(self, base: Base) -> AbstractContextManager[list[Any]]:
        """Around the base pass; after the module's call the list has, at its end, what rows have to know of it.

        The module may run other code than its own meanwhile, as long as it gives the same left of what is replayed;
        nobody reads what it gives from there on.

        Args:
            base: which positions are replayed, the source sets, and what running knockouts cut of the pass. Prompts
                have no padding on the left.

        Returns:
            What is kept: anything with `most_cuts`, how many cuts may resume from it at once.
        """

    @abstractmethod
    def watching(self, around: Sequence[Cut] = ()) -> AbstractContextManager[list[Seen]]:
        """Around a base pass of whole prompts; after the module's call the list has, at its end, what it has seen.

        Unlike `keeping`, the module's output holds at every position, and rows may begin at any.

        Args:
            around: what running knockouts cut of the mixer in the pass.
        """

    @abstractmethod
    def resuming(self, kept: Any, base: Base, rows: Rows) -> AbstractContextManager[None]:
        """While the block runs, the module takes rows [batch, cuts x length, width] that continue the base pass.

        Arguments of the layer that belong to positions are the rows' already; masks and caches are the adapter's part.

        Args:
            kept: from `keeping`, with the same base, or one without the source sets that have no position left of what
                is replayed; or from what `watching` has seen.
            base: which positions are replayed, and the source sets.
            rows: what is cut in each.
        """

    @abstractmethod
    def kept_numbers(self, time: int, sets: int) -> int:
        """How many numbers are kept of a prompt of so many positions and so many source sets, to plan batches."""

    @abstractmethod
    def attributing(
        self,
        weakened: Weakened | None = None,
        features: Bool[Tensor, " feature"] | None = None,
        around: Sequence[Cut] = (),
    ) -> AbstractContextManager[list[Arrivals]]:
        """Around a differentiable pass; after the module's call the list has, at its end, what arrived over its edges.

        Args:
            weakened: edges that are cut in part.
            features: which features edges are cut for; None for every one.
            around: what running knockouts cut of the mixer in the pass, which stays cut.
        """

    @abstractmethod
    def summands(
        self,
        call: Captured,
        at: Int[Tensor, " batch"],
        direction: Float[Tensor, "batch hidden"],
        cuts: Sequence[Cut] = (),
    ) -> Summands:
        """What the module's output at one position of every prompt is a sum of, along a direction.

        Args:
            call: of a pass under `probing`.
            at: the positions.
            direction: in the residual stream, for every prompt.
            cuts: of that pass; a source that is cut has no share, or that of what stands in its place.
        """

    @property
    def value_path(self) -> Paths:
        """The path by which positions hand their values on: the scan or attention, or a convolution that is all."""
        return Paths.MAIN if Paths.MAIN in self.paths else Paths.CONV

    def reach(self, path: Paths) -> int | None:
        """How many positions back a path reaches; None: to the first."""
        return None

    def expect(self, rows: int) -> None:  # noqa: B027
        """Hear how many rows will resume in this mixer, to prepare for many."""

    @contextmanager
    def short(self, time: int) -> Iterator[None]:
        """Around passes of so many positions: a module that works in chunks does not fill them up to a longer one."""
        yield

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """Around a pass whose call of this module is captured for `written`; what it gives goes along."""
        yield None

    @contextmanager
    def probing(self) -> Iterator[Any]:
        """Around a pass whose call of this module is captured for `token_mixing`; what it gives goes along."""
        yield None


@contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """While the block runs, the weights of a module and its children are on their device, also offloaded ones."""
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "_hf_hook"):  # accelerate's, in models that it has spread over devices
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
        yield


def replace_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Put `wrap(forward)` in the place of a module's forward; the returned function takes it out again.

    Where accelerate has wrapped the module (`device_map`), its wrapper stays outside, so that weights are on the
    device when `forward` runs.
    """
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    own = module.__dict__.get(name)
    module.__dict__[name] = wrap(getattr(module, name))

    def restore() -> None:
        if own is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own

    return restore
