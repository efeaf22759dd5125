"""What a GPU gives and how fast: `make gpu`, or `python tests/benchmarks/gpu.py` (random models; minutes).

Five parts, printed as Markdown, ready for the benchmark page, and written to `--out`. What cannot be run here is listed
with its reason in its place. The command fails if any number differs from the CPU's by more than is said.

machine: what it ran on, and which kernels are installed.
parity: small models with every kind of mixer, asked by every verb on the GPU and on the CPU: in float64, and in float32
    beside what the CPU's own float32 and float64 differ by. With several GPUs also with layers in turns on all of them.
kernels: mamba-ssm's scans against the ones in torch, and how fast both are.
replay: sweeps of the shapes of benchmarks/sweep.py against the same knockouts by one hooked pass each.
sizes: sweeps of Mamba-1, Mamba-2 and transformers from 130M to 2.8B parameters, in float32 and bfloat16.

Without a GPU it stops. `--device cpu --small` takes the whole path on the processor, with models a hundredth as large.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' models and verbs

import numpy as np
import torch
import transformers
from common import SHAPES, facts_of, gpt2, load, mamba1, mamba2, tokenizer
from models import in_double, in_torch
from transformers.utils import logging
from verbs import FEW, KINDS, LONG, VERBS, difference, lens_of

from mambalens import Facts, Lens
from mambalens.hooks import kernels, scan
from mambalens.sweep.plan import Plan
from mambalens.sweep.run import run as run_sweep
from mambalens.system.memory import free

KERNELS = ("mamba-ssm", "causal-conv1d", "flash-linear-attention", "triton")
EXACT = 1e-9
"""Difference |a - b| / (1 + |b|) that float64 may have: sums are added up in another order."""
ROUNDED = 10.0
"""How many times what float32 and float64 differ by on the CPU, they may differ by between devices."""
KERNEL_TOLERANCE = {"selective_scan": 1e-3, "ssd_scan": 1e-2}
"""Relative to the largest output; the second multiplies in TF32."""
SAME = 1e-2
"""Nats by which an answer's log-probability may differ between replay and hooked passes in float32."""
WINDOW, SOURCES = 9, ("subject", "relation", "first", "last")
SMALL = (128, 4, 500)
"""Width, layers and vocabulary of models that only try the path."""
HOOKED = 3
"""Windows whose knockouts are answered by hooked passes too; their time is scaled to all windows."""


class Size(NamedTuple):
    """A model's shape."""

    name: str
    config: Callable[[], Any]
    parameters: float


def sizes_of(small: bool) -> list[Size]:
    """The shapes that people have; of a hundredth of the size where they only try the path."""
    if small:
        tiny = {"mamba1": mamba1, "mamba2": mamba2, "gpt2": gpt2}
        return [Size(f"{name}, tiny", functools.partial(make, *SMALL), 1e6) for name, make in tiny.items()]
    of_mamba = [("130m", 768, 24, 0.13e9), ("370m", 1024, 48, 0.37e9), ("790m", 1536, 48, 0.79e9),
                ("1.4b", 2048, 48, 1.4e9), ("2.8b", 2560, 64, 2.8e9)]  # fmt: skip
    of_gpt2 = [("124m", 768, 12, 0.12e9), ("medium", 1024, 24, 0.35e9), ("large", 1280, 36, 0.77e9),
               ("xl", 1600, 48, 1.6e9)]  # fmt: skip
    return [
        *(Size(f"mamba-{name}", functools.partial(mamba1, width, layers), n) for name, width, layers, n in of_mamba),
        *(Size(f"mamba2-{name}", functools.partial(mamba2, width, layers), n) for name, width, layers, n in of_mamba
          if name != "790m"),
        *(Size(f"gpt2-{name}", functools.partial(gpt2, width, layers), n) for name, width, layers, n in of_gpt2),
    ]  # fmt: skip


class Bench:
    """One run of the benchmark.

    Args:
        devices: what is measured; the first alone, but for models that are spread over all.
        small: take models a hundredth as large.
    """

    def __init__(self, devices: Sequence[str], small: bool) -> None:
        self.devices, self.small = list(devices), small
        self.device = torch.device(devices[0])
        self.failures: list[str] = []
        self.lines: list[str] = []

    def say(self, text: str = "") -> None:
        """A line of the report."""
        print(text, flush=True)
        self.lines.append(text)

    def table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows as a table."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        self.say("| " + " | ".join(names) + " |")
        self.say("|" + "---|" * len(names))
        for row in rows:
            self.say("| " + " | ".join(shown(row.get(name, "")) for name in names) + " |")
        self.say()

    def expect(self, holds: bool, what: str) -> str:
        """Note what does not hold; 'yes' or 'NO'."""
        if not holds:
            self.failures.append(what)
        return "yes" if holds else "NO"

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            for device in self.devices:
                torch.cuda.synchronize(device)

    def seconds(self, work: Callable[[], Any], runs: int = 3) -> float:
        """Median of a few runs after one that is not counted."""
        work()
        times = []
        for _ in range(1 if self.small else runs):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    def machine(self) -> None:
        """What it ran on."""
        self.say("## machine\n")
        rows = [
            {"what": "mambalens", "is": version_of("mambalens") or "not installed"},
            {"what": "Python", "is": platform.python_version()},
        ]
        rows += [{"what": "torch", "is": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"}]
        rows += [{"what": "transformers", "is": transformers.__version__}]
        rows += [{"what": name, "is": version_of(name) or "not installed"} for name in KERNELS]
        for device in self.devices:
            if torch.device(device).type == "cuda":
                about = torch.cuda.get_device_properties(device)
                rows.append({"what": device, "is": f"{about.name}, {about.total_memory / 1e9:.0f} GB, "
                                                   f"compute capability {about.major}.{about.minor}"})  # fmt: skip
            else:
                rows.append({"what": device, "is": f"{platform.processor() or platform.machine()}, no GPU"})
        self.table(rows)

    def parity(self) -> None:
        """Every verb on every kind of mixer, on the device and on the CPU."""
        self.say("## parity\n")
        self.say(
            f"Largest difference |a - b| / (1 + |b|) of all numbers of {', '.join([*VERBS, *LONG])} between {self.device} and "
            f"the CPU. float64 may differ by {EXACT:g}, float32 by {ROUNDED:g} times what the CPU's own "
            "float32 differs from its float64 by, prompt lengths 5 and 8.\n"
        )
        spread = self.devices if len(self.devices) > 1 else []
        if not spread:
            self.say(
                f"One device: layers spread over several were not run ({self.devices[0]} alone was found or named).\n"
            )
        rows = []
        for name in FEW[:1] if self.small else KINDS:
            verbs = VERBS | (LONG if name in FEW and not self.small else {})
            row: dict[str, Any] = {"model": name, "mixers": KINDS[name]}
            # Made before transformers is made to compute in float64, which would draw other weights.
            double, places = lens_of(name), {"float64": lens_of(name, str(self.device))}
            if spread:
                places["float64, spread"] = lens_of(name, *spread)
            with in_double(double.model):
                exact = {verb: ask(double) for verb, ask in verbs.items()}
                for column, lens in places.items():
                    apart = {verb: difference(ask(lens), exact[verb]) for verb, ask in verbs.items()}
                    self.note(row, column, name, apart, dict.fromkeys(verbs, EXACT))
            single, ours = lens_of(name, dtype=torch.float32), lens_of(name, str(self.device), dtype=torch.float32)
            with in_torch(single.model):  # whose kernels the CPU does not have
                found = {verb: VERBS[verb](single) for verb in ("sweep", "evaluate")}
            # Beyond single precision in the exact answers there is the float32 of transformers' own scans and norms.
            noise = {verb: difference(answer, exact[verb]) for verb, answer in found.items()}
            apart = {verb: difference(VERBS[verb](ours), found[verb]) for verb in found}
            row["the CPU's float32 from its float64"] = max(noise.values())
            self.note(row, "float32", name, apart, {verb: ROUNDED * noise[verb] for verb in found})
            rows.append(row)
            lens_of.cache_clear()
        self.table(rows)

    def note(
        self, row: dict[str, Any], column: str, name: str, apart: dict[str, float], allowed: dict[str, float]
    ) -> None:
        """The largest difference into a row, and what is more than is allowed among the failures."""
        worst = max(apart, key=apart.__getitem__)
        row[column] = apart[worst]
        wrong = [verb for verb in apart if apart[verb] > allowed[verb]]
        row[f"{column} holds"] = self.expect(
            not wrong, f"{name}, {column}: " + ", ".join(f"{verb} differs by {apart[verb]:.1e}" for verb in wrong)
        )

    @torch.no_grad()
    def kernels(self) -> None:
        """The official scans against those in torch."""
        self.say("## kernels\n")
        installed = kernels.installed()
        if not installed:
            version = version_of("mamba-ssm")
            why = "it is not installed (`pip install 'mambalens[cuda]'` builds it)" if version is None else (
                f"version {version} cannot be imported here" if self.device.type == "cuda" else "there is no CUDA GPU")  # fmt: skip
            self.say(f"mamba-ssm's kernels were not run: {why}. The scans in torch alone:\n")
        batch, time_, width = (2, 64, 64) if self.small else (16, 512, 1536)
        heads = width // 64
        draw = functools.partial(torch.randn, device=self.device)
        x, dt, B, C = draw(batch, time_, width), draw(batch, time_, width).exp() / 10, draw(batch, time_, 16), draw(
            batch, time_, 16)  # fmt: skip
        A = -draw(width, 16).exp()
        x2, dt2 = draw(batch, time_, heads, 64), draw(batch, time_, heads).exp() / 10
        A2, B2, C2 = -draw(heads).exp(), draw(batch, time_, 1, 128), draw(batch, time_, 1, 128)
        rows = []
        for name, given in (("selective_scan", (x, dt, A, B, C)), ("ssd_scan", (x2, dt2, A2, B2, C2))):
            ours, theirs = getattr(scan, name), getattr(kernels, name)
            row = {"scan": name, "numbers": " x ".join(map(str, given[0].shape)),
                   "in torch, s": self.seconds(functools.partial(ours, *given))}  # fmt: skip
            if installed:
                expected, found = ours(*given)[0], theirs(*given)[0]
                apart = float((found - expected).abs().max() / expected.abs().max())
                row["mamba-ssm, s"] = self.seconds(functools.partial(theirs, *given))
                row["difference"] = apart
                row["holds"] = self.expect(apart < KERNEL_TOLERANCE[name], f"{name}: mamba-ssm differs by {apart:.1e}")
            rows.append(row)
        self.table(rows)
        if version_of("flash-linear-attention") is None:
            self.say("flash-linear-attention is not installed: models with delta rules run transformers' torch code.\n")

    @torch.no_grad()
    def replay(self) -> None:
        """Sweeps by replay and by hooks."""
        self.say("## replay\n")
        facts = self.facts()
        self.say(
            f"{len(facts)} prompts of 12 to 18 tokens, sources {', '.join(SOURCES)}, every window of {WINDOW} layers, target "
            f"last, float32. Hooked passes are timed on {HOOKED} windows and scaled to all.\n"
        )
        rows = []
        for name, make in SHAPES.items():
            config = make(*SMALL) if self.small else make()
            try:
                rows.append({"model": name} | self.swept(config, torch.float32, facts, hooked=True))
            except (MemoryError, RuntimeError) as error:
                self.unfit(name, "float32", error)
            self.forget()
        self.table(rows)

    @torch.no_grad()
    def sizes(self) -> None:
        """Sweeps by the model's size."""
        self.say("## sizes\n")
        facts = self.facts()
        self.say(f"The same {len(facts)} prompts and knockouts, by `lens.sweep`; random weights.\n")
        rows, left_out = [], []
        for size in sizes_of(self.small):
            for dtype in (torch.float32, torch.bfloat16):
                named = str(dtype).removeprefix("torch.")
                needed, has = 1.3 * size.parameters * dtype.itemsize + 1e9, free(self.device)
                if needed > has and not self.small:
                    left_out.append(
                        f"- {size.name} in {named}: needs about {needed / 1e9:.0f} GB, {has / 1e9:.0f} GB are free"
                    )
                    continue
                try:
                    rows.append({"model": size.name, "dtype": named} | self.swept(size.config(), dtype, facts))
                except (MemoryError, RuntimeError) as error:
                    self.unfit(size.name, named, error)
                self.forget()
        self.table(rows)
        if left_out:
            self.say("Not run:\n\n" + "\n".join(left_out) + "\n")

    def facts(self) -> Facts:
        """Prompts of random words."""
        count = 3 if self.small else 16
        return facts_of(np.random.default_rng(0).integers(12, 19, count).tolist(), 500 if self.small else 50257)

    def swept(self, config: Any, dtype: torch.dtype, facts: Facts, hooked: bool = False) -> dict[str, Any]:
        """One model's sweep: how long it takes, and how far it is from the hooks."""
        words = tokenizer(config.vocab_size)
        lens = Lens(load(config, dtype).to(self.device), words, "model")
        window = min(WINDOW, lens.n_layers - 1)
        batch = next(lens.batches([lens.prompt(fact) for fact in facts]))
        ids = batch.ids.to(self.device)
        asked: dict[str, Any] = {"sources": SOURCES, "window": window, "progress": False}
        plain = self.seconds(lambda: lens.model(ids, use_cache=False))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = lens.sweep(facts, **asked)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else float("nan")
        replay = self.seconds(lambda: lens.sweep(facts, **asked))
        knockouts = len(result.table) / len(facts)
        row = {
            "knockouts": int(knockouts), "plain pass, s": plain, "sweep, s": replay, "plain passes": replay / plain,
            "batches replayed": f"{result.checks.passed.mean():.0%}",
            "difference / noise": float((result.checks.difference / result.checks.noise).max()),
            "knockouts of a prompt a second": knockouts * len(facts) / replay,
            "peak memory, GB": peak / 1e9, "scans": lens.hooks.backend,
        }  # fmt: skip
        for warning in said:
            if "replay" in str(warning.message):
                self.say(f"{type(lens.model).__name__}: {warning.message}\n")
        if hooked:
            every = lens.n_layers - window + 1
            timed = min(HOOKED, every)
            windows = [list(range(start, start + window)) for start in range(timed)]
            plan = Plan(SOURCES, "last", windows, ("all",), ("main",))
            started = time.perf_counter()
            slow = run_sweep(lens, facts, plan, None, False, None, False).table
            self.wait()
            of_all = (time.perf_counter() - started) * every / timed
            both = result.table.merge(slow, on=["fact_id", "source", "window_start"], suffixes=("", "_by_hooks"))
            assert len(both) == len(slow)
            apart = float(np.log(both.prob / both.prob_by_hooks).abs().max())
            row |= {"hooked passes, s": of_all, "hooked / replay": of_all / replay, "log p differs by": apart}
            row["holds"] = self.expect(
                apart < SAME, f"{config.model_type}: replay and hooks differ by {apart:.1e} nats"
            )
        return row

    def unfit(self, name: str, dtype: str, error: Exception) -> None:
        """A model that could not be run is a failure too, and told by its error."""
        what = f"{name} in {dtype} was not run: {type(error).__name__}: {str(error).splitlines()[0]}"
        self.say(f"{what}\n")
        self.failures.append(what)

    def forget(self) -> None:
        """Free what the last model took."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


PARTS = ("machine", "parity", "kernels", "replay", "sizes")


def shown(value: Any) -> str:
    """A cell."""
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.3g}"
    return str(value)


def version_of(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices_of(named: str) -> list[str]:
    """The devices that are measured.

    Raises:
        SystemExit: if there is no GPU to be measured, or none of that name.
    """
    kind = torch.device(named.split(",")[0])
    if kind.type != "cuda":
        return named.split(",")
    if not torch.cuda.is_available():
        why = ("this torch is built without CUDA" if torch.version.cuda is None
               else f"torch is built for CUDA {torch.version.cuda}, but finds no GPU or no driver")  # fmt: skip
        raise SystemExit(
            f"No GPU to measure: {why} (torch {torch.__version__}). On a machine with one, `make gpu` installs the build "
            "that fits. To take the whole path on the processor, with models a hundredth as large: "
            "make gpu GPU='--device cpu --small'"
        )
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if kind.index is None else [named]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a number is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="'cuda' for all GPUs, 'cuda:1' for one, 'cpu' to try the path")
    parser.add_argument("--small", action="store_true", help="models a hundredth as large")
    parser.add_argument("--part", action="append", choices=PARTS, help="by default all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.md"), help="the report")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    bench = Bench(devices_of(options.device), options.small)
    bench.say(f"# {', '.join(bench.devices)}{' (small)' if options.small else ''}\n")
    for part in options.part or PARTS:
        getattr(bench, part)()
    bench.say("All numbers hold.\n" if not bench.failures else "Not as they should be:\n")
    for failure in bench.failures:
        bench.say(f"- {failure}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(bench.lines) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    return int(bool(bench.failures))


if __name__ == "__main__":
    sys.exit(main())
