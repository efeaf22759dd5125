"""The lens: a model, its tokenizer and its hooks, and the questions one asks with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mambalens import defaults, evaluation, steering
from mambalens.evaluation import FactLike
from mambalens.facts.fact import Fact
from mambalens.facts.files import as_facts
from mambalens.facts.roles import check_role
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Features, Knockout, Paths
from mambalens.hooks.knockout import Path as KnockoutPath
from mambalens.html.render import render
from mambalens.loading.models import load_model
from mambalens.loading.origin import Origin
from mambalens.model import LoadedModel
from mambalens.result import CausalFeatures, Contributions, Flow, LogitLens, Patches, SweepResult, Traces

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from jaxtyping import Float
    from matplotlib.figure import Figure
    from torch import Tensor

    from mambalens.explore.widget import ExploreWidget
    from mambalens.facts.pairs import Pair, Pairs
    from mambalens.hooks.steering import Addition
    from mambalens.interventions.spots import Where
    from mambalens.measures import Measure


class Lens(LoadedModel):
    """Asks where a model's answer comes from.

    Args:
        model: any loaded Hugging Face causal LM with Mamba-1, Mamba-2 or attention layers.
        tokenizer: its fast tokenizer.
        name: what results call the model; its own name by default.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        hooks: its hook manager.
        name: what results call the model.
        origin: how it was loaded (name, options); None where the model was given as an object.
    """

    @classmethod
    def load(cls, name: str, **options: Any) -> Lens:
        """Load a checkpoint.

        Args:
            name: bundled name ('atlas-mamba1'), 'smollm2', local folder, hub id ('state-spaces/mamba-130m-hf') or
                .gguf file; folders and ids may hold checkpoints of mamba_ssm.
            options: for `from_pretrained`: dtype, device_map, revision, attn_implementation; `device` puts the model
                somewhere; `tokenizer` names another place to take the tokenizer from.
        """
        short, model, tokenizer = load_model(str(name), **options)
        lens = cls(model, tokenizer, short)
        lens.origin = Origin.of(str(name), options, model.dtype, lens.device)
        return lens

    def __repr__(self) -> str:
        return f"<Lens on {self.name}: {self.n_layers} layers, {', '.join(self.hooks.kinds)}>"

    def _repr_html_(self) -> str:
        """A model: its layers by kind of mixer, its size, where it is."""
        kinds = []
        for kind in self.hooks.kinds:
            mixers = self.hooks.mixers_of(None, kind)
            features = f"{max(mixer.n_features for mixer in mixers)} {mixers[0].features_are}"
            kinds.append((kind, len({mixer.layer for mixer in mixers}), features, ", ".join(mixers[0].paths.choices)))
        size = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = str(self.model.dtype).removeprefix("torch.")
        return render(
            "lens.html", lens=self, kinds=kinds, size=size, dtype=dtype, architecture=type(self.model).__name__
        )

    def describe(self) -> pd.DataFrame:
        """The model's layers: one row for each token mixer, and one for a layer that has none.

        Returns:
            layer, mixer (its kind, such as 'mamba1' or 'attention', or ''), module (its class), features (channels or
            heads), conv (whether a convolution carries information too), erase (whether positions remove something from
            the state), mixer_parameters, layer_parameters.
        """
        import pandas as pd

        def size(module: Any) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        rows = []
        for number, layer in enumerate(self.hooks.layers):
            of_layer = self.hooks.mixers_of(number)
            for mixer in of_layer:
                of_mixer = (
                    mixer.kind,
                    type(mixer.module).__name__,
                    mixer.n_features,
                    Paths.CONV in mixer.paths,
                    Paths.ERASE in mixer.paths,
                    size(mixer.module),
                )
                rows.append((number, *of_mixer, size(layer)))
            if not of_layer:
                rows.append((number, "", "", 0, False, False, 0, size(layer)))
        names = ["layer", "mixer", "module", "features", "conv", "erase", "mixer_parameters", "layer_parameters"]
        return pd.DataFrame(rows, columns=names)

    def predict(self, fact: Fact | str, k: int = 5) -> pd.DataFrame:
        """The k most probable next tokens of a fact's prompt, or of a text.

        Returns:
            One row a token, the most probable first: token, prob, token_id.
        """
        return evaluation.predict(self, fact, k)

    def evaluate(
        self, facts: FactLike, batch_size: int | None = None, progress: bool = True, whole_target: bool = False
    ) -> pd.DataFrame:
        """What the model answers, one row a fact, in the facts' order.

        Args:
            facts: facts, a name or a path.
            batch_size: prompts a batch.
            progress: show a progress bar.
            whole_target: ask for all tokens of the targets too (one more pass, over prompt and target).

        Returns:
            fact_id, relation, target, target_prob, target_rank (1 is the top), correct (the target's first token is the
            top prediction), top_token, top_prob, and `skipped`: why a fact could not be used, or ''. With
            `whole_target` also target_tokens and target_log_prob, the sum of their log-probabilities in nats.
        """
        return evaluation.evaluate(self, facts, batch_size, progress, whole_target)

    def accuracy(self, facts: FactLike, batch_size: int | None = None, progress: bool = True) -> pd.DataFrame:
        """Share of facts whose target's first token is the top prediction, by relation and for all together.

        Returns:
            relation ('all' comes last), facts (those that can be used), accuracy, target_prob (mean), skipped.
        """
        return evaluation.accuracy(evaluation.evaluate(self, facts, batch_size, progress))

    def with_short_subjects(self, facts: FactLike, tokens: int = 1) -> Facts:
        """The facts whose subject is at most so many tokens of this model's tokenizer."""
        return evaluation.with_short_subjects(self, facts, tokens)

    def known(
        self,
        facts: FactLike,
        batch_size: int | None = None,
        progress: bool = True,
        limit: int | None = None,
        seed: int = 0,
    ) -> Facts:
        """The facts whose target's first token is the model's top prediction, in their old order.

        Args:
            facts: facts, a name or a path.
            batch_size: prompts a batch.
            progress: show a progress bar.
            limit: stop when so many are found, looking at the facts in a random order given by `seed`.

        Raises:
            MambalensError: for a limit below 1.
        """
        return evaluation.known(self, facts, batch_size, progress, limit, seed)

    @contextmanager
    def knockout(
        self,
        fact: Fact,
        source: str = defaults.SOURCE,
        target: str = defaults.TARGET,
        layers: Sequence[int] | int | str | None = None,
        features: Features = defaults.GROUP,
        path: KnockoutPath = defaults.PATH,
        mixers: str | None = None,
        ablation: str = defaults.ABLATION,
        other: Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> Iterator[Knockout]:
        """Block what a role of this fact's prompt hands to another while the block runs; see `HookManager.knockout`.

        Args:
            fact: the fact that `predict` is asked about inside the block.
            source, target: roles (see `roles.ROLES`).
            layers, features, path, mixers: as there.
            ablation: what stands in the source's place: 'zero' (nothing), 'mean' (the mean over the facts `over`, by
                piece of the prompt: `facts.pieces`) or 'resample' (what stands at the aligned position of `other`).
            other: the fact whose values are put in.
            over: the facts whose mean is put in.
            keys: put in keys of attention too, not values alone (refused where no attention is cut).
        """
        from mambalens.sweep.ablation import Asked, values_for

        prompt = self.prompt(fact)
        if not prompt.spans:
            raise MambalensError(f"The subject {fact.subject!r} is not in the prompt {fact.prompt!r}.")
        positions = {}
        targets = prompt.positions(check_role(target))
        for role, found in ((target, targets), (source, prompt.positions(check_role(source), targets))):
            if not found:
                raise MambalensError(f"The role {role!r} is empty in the prompt {fact.prompt!r}.")
            positions[role] = found
        asked = Asked.of(ablation, over, other, keys)
        asked.check([self.hooks.resolve(layers, features, path, mixers)])
        instead = values_for(self, prompt, asked)
        chosen = Knockout(positions[source], targets, layers, features, path, mixers, instead=instead)
        with self.hooks.apply(chosen) as knockout:
            yield knockout

    @contextmanager
    def steer(
        self,
        fact: Fact,
        vector: Float[Tensor, "*rows hidden"],
        layers: Sequence[int] | int | str | None,
        positions: str | None = defaults.TARGET,
        scale: float = 1.0,
    ) -> Iterator[Addition]:
        """Add a vector behind some layers at a role of this fact's prompt while the block runs; see `HookManager.add`.

        Args:
            fact: the fact that `predict` is asked about inside the block.
            vector: what is added [hidden], such as a `direction`.
            layers: layer numbers, or a kind of mixer.
            positions: a role (see `roles.ROLES`); None: every position, generated ones too.
            scale: how many times.
        """
        with steering.steer(self, fact, vector, layers, positions, scale) as addition:
            yield addition

    def steered(
        self,
        facts: FactLike | Pairs,
        vector: Float[Tensor, "*rows hidden"],
        layers: Sequence[int] | int | str | None,
        positions: str | None = defaults.TARGET,
        scale: float = 1.0,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> pd.DataFrame:
        """What facts are answered with when a vector is added behind some layers, beside what they are without it.

        Args:
            facts: facts, a name or a path; or pairs (`Facts.pairs`), whose other answers are looked at too.
            vector: what is added [hidden], such as a `direction`.
            layers: layer numbers, or a kind of mixer.
            positions: role at which it is added in every prompt; None: every position.
            scale: how many times.
            batch_size: prompts a batch.
            progress: show a progress bar.

        Returns:
            One row a fact, in their order; columns in `steering.STEERED`, for pairs those in `steering.OTHERS` too, and
            `skipped`: why a fact could not be used, or ''.
        """
        return steering.steered(self, facts, vector, layers, positions, scale, batch_size, progress)

    def direction(
        self,
        positive: Iterable[Fact | str],
        negative: Iterable[Fact | str],
        layer: int | Sequence[int],
        positions: str = defaults.TARGET,
        batch_size: int | None = None,
    ) -> Float[Tensor, "*layers hidden"]:
        """The direction from one set of prompts to another: the difference of their means (Rimsky et al. 2024).

        Args:
            positive, negative: facts or texts.
            layer: layer number: what is taken is the residual stream behind it, where `steer` adds; or several.
            positions: role at which it is taken; of one with several positions, their mean in every prompt.
            batch_size: prompts a batch.

        Returns:
            [hidden], for several layers [layers, hidden]; float64, on the CPU.

        Raises:
            MambalensError: for a layer that does not exist, or a role that is empty in a prompt.
        """
        return steering.direction(self, positive, negative, layer, positions, batch_size)

    def sweep(
        self,
        facts: FactLike,
        sources: Sequence[str] | str = defaults.SOURCES,
        target: str = defaults.TARGET,
        window: int | Sequence[Sequence[int]] = defaults.WINDOW,
        features: Sequence[Features] | str = defaults.FEATURES,
        paths: Sequence[str] | str = defaults.PATHS,
        batch_size: int | None = None,
        out: str | Path | None = None,
        progress: bool = True,
        memory: int | str | None = None,
        mixers: str | None = None,
        block_size: int = defaults.BLOCK,
        measure: str | Measure | None = None,
        ablation: str = defaults.ABLATION,
        other: Pairs | Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> SweepResult:
        """Knock out every source in every window of layers, for every fact (Endy et al. 2025, section 4).

        Args:
            facts: facts, a name or a path; those that cannot be used are listed in `result.skipped`.
            sources: roles whose information is blocked, each on its own ('each': every position on its own).
            target: role that is not to receive it.
            window: how many consecutive layers a knockout covers (every run of that many), or a list of layer lists.
            features: groups of features, each on its own.
            paths: 'main', 'conv', 'erase', 'both', each on its own.
            batch_size: prompts a batch at most; by default as many as fill `BATCH_TOKENS` and fit the memory.
            out: a folder to keep the results in, block of facts by block of facts. The same sweep in the same folder
                goes on where it stopped; several processes that share the folder share the work.
            progress: show a progress bar.
            memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
            mixers: cut only mixers of this kind ('attention', 'mamba1', 'mamba2'), in models that have several kinds;
                windows count the model's layers all the same.
            block_size: facts of a block.
            measure: 'log_odds', 'log_prob', 'logit' or 'prob' of the target, or a function of logits
                [batch, vocabulary] and targets [batch] that gives a number for every prompt: two more columns,
                base_measure and measure.
            ablation: what stands in the sources' place: 'zero' (nothing), 'mean' (the mean over facts, by piece of the
                prompt: `facts.pieces`) or 'resample' (another fact's value, at the aligned position).
            other: for 'resample', pairs of facts (`Facts.pairs`), or one fact for all; by default `facts.pairs()`. A
                fact without a partner is left out, with the reason.
            over: for 'mean', the facts that are averaged over; by default those that are swept.
            keys: put in keys of attention too, not values alone; the table calls the ablation 'mean+keys' or
                'resample+keys' then. Recurrences beside attention keep theirs.

        Raises:
            MambalensError: for a window larger than the model, an unknown role, group, path or measure, keys where no
                attention is cut, or no usable fact.
        """
        from mambalens.sweep.ablation import Asked
        from mambalens.sweep.plan import Plan
        from mambalens.sweep.run import run

        plan = Plan(_tuple(sources), target, window, _tuple(features), _tuple(paths), mixers, measure, ablation, keys)
        asked = Asked.of(ablation, over, other, keys)
        found = run(self, as_facts(facts), plan, batch_size, progress, memory, True, out, block_size, asked)
        return SweepResult.of(found)

    def heatmap(
        self,
        fact: Fact,
        window: int = defaults.WINDOW,
        target: str = defaults.TARGET,
        features: Features = defaults.GROUP,
        path: str = defaults.PATH,
        memory: int | str | None = None,
        mixers: str | None = None,
        ablation: str = defaults.ABLATION,
        other: Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> Figure:
        """The effect of every single position as the source, by window, as a figure (Endy et al. 2025, heatmaps).

        What stands in the source's place is said as in `knockout`.
        """
        result = self.sweep(
            [fact], "each", target, window, (features,), path, progress=False, memory=memory, mixers=mixers,
            ablation=ablation, other=other, over=over, keys=keys,
        )  # fmt: skip
        return result.heatmap(result.facts.fact_id[0])

    def flow(
        self,
        facts: FactLike,
        target: str = defaults.TARGET,
        points: int = defaults.POINTS,
        paths: Sequence[str] | str = "both",
        features: Features = defaults.GROUP,
        measure: str | Measure = defaults.MEASURE,
        method: str = defaults.METHODS[0],
        batch_size: int | None = None,
        out: str | Path | None = None,
        progress: bool = True,
        memory: int | str | None = None,
        certify: int = 0,
        sample: int = 0,
        seed: int = 0,
        block_size: int = defaults.FLOW_BLOCK,
        ablation: str = defaults.ABLATION,
        other: Pairs | Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> Flow:
        """What cutting each token-to-token edge alone, of every layer and path, would change: all edges at once.

        Every edge s -> t with s < t is attributed by a few forward and backward passes of the whole batch (see
        `flow.attribution.attribute`). An attribution is a proposal: `certify` cuts the strongest edges exactly.

        Args:
            facts: facts, a name or a path; those that cannot be used are listed in `flow.skipped`.
            target: where the answer is read; the last token.
            points: gradients of every prompt: one of the model as it is, the others along the cuts of its strongest
                edges.
            paths: 'main', 'conv', 'erase', or 'both' for all that a mixer has.
            features: which features the edges stand for: a group, or masks.
            measure: 'log_odds', 'log_prob', 'logit' or 'prob' of the target, or a function of logits
                [batch, vocabulary] and targets [batch] that can be differentiated.
            method: 'gradient', or 'exact': every edge is cut by replay, for those who can wait.
            batch_size: prompts a batch at most; fewer where the memory needs it.
            out: a folder to keep the results in, block of facts by block of facts; it goes on where it stopped.
            progress: show a progress bar.
            memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
            certify: the strongest edges of every fact that are cut exactly at once, as `Flow.certify` does later.
            sample: edges of every fact that are cut beside them, drawn among all.
            seed: of the sample.
            block_size: facts of a block.
            ablation, other, over, keys: what stands in the place of the edges that are cut exactly, as for `sweep`; a
                fact without a partner is left out. What sources erase is cut to nothing all the same.

        Raises:
            MambalensError: for an unknown path, group, measure or method, an ablation where no edge is cut, or no
                usable fact.
        """
        from mambalens.flow.run import run
        from mambalens.flow.work import Flowing
        from mambalens.sweep.ablation import Asked

        if target != defaults.TARGET:
            raise MambalensError(f"target={target!r}: a flow ends where the answer is read, at {defaults.TARGET!r}.")
        asked = as_facts(facts)
        put_in = Asked.of(ablation, over, other, keys)
        flowing = Flowing.asked(_tuple(paths), features, measure, points, method, certify, sample, seed, put_in)
        found = run(self, asked, flowing, batch_size, progress, memory, out, block_size)
        return Flow.with_verbs(found).of(self, asked, flowing.attributed, memory)

    def logits_by_layer(
        self,
        facts: FactLike,
        k: int = 5,
        batch_size: int | None = None,
        progress: bool = False,
        out: str | Path | None = None,
        block_size: int = defaults.CELL_BLOCK,
    ) -> LogitLens:
        """The logit lens: what the model's own code behind its layers makes of the residual stream of every layer.

        Args:
            facts: a fact, facts, a name or a path; those that cannot be used are listed in `skipped`.
            k: how many of the most probable tokens are listed.
            batch_size: prompts a batch.
            progress: show a progress bar.
            out: a folder to keep the results in, block of facts by block of facts; it goes on where it stopped.
            block_size: facts of a block.

        Returns:
            A table of layers (0: the embeddings) and positions, with means over facts and a figure; see
            `interventions.lens_data.LogitLensData`.

        Raises:
            MambalensError: for a k that is out of range, no usable fact, or a folder that holds something else.
        """
        from mambalens.interventions.logit_lens import logits_by_layer

        found = logits_by_layer(self, as_facts(facts), k, batch_size, progress, out, block_size)
        return LogitLens.of(found)

    def contributions(
        self,
        facts: FactLike,
        measure: str | Measure = defaults.MEASURE,
        against: str | Sequence[str] | None = None,
        features: bool = False,
        batch_size: int | None = None,
        progress: bool = False,
        out: str | Path | None = None,
        block_size: int = defaults.CELL_BLOCK,
    ) -> Contributions:
        """What every part of the model adds to the answer's score at the last position; it adds up exactly.

        The score is split into the embedding, each layer's mixer by source position and path, each MLP, and biases.
        Contributions are direct effects, with the scale of the final norm held fixed: what a later layer makes of an
        earlier one's output is the later one's contribution. See `interventions.contributions` for the equations.

        Sources of a scan are positions of what it reads: behind a convolution, these have seen a few tokens before.

        Inside `hooks.knockout` or `knockout` they are those of the cut model, in which an edge that is cut adds
        nothing, or what stands in its place; inside `hooks.add` or `steer`, what is added behind a layer is a part of
        its own.

        Args:
            facts: a fact, facts, a name or a path; those that cannot be used are listed in `skipped`.
            measure: 'log_odds' (nats), 'log_prob', 'logit' or 'prob' of the answer, or a function of logits [batch,
                vocabulary] and targets [batch] that can be differentiated. 'logit_difference': the answer's logit above
                the mean of all, or above that of another answer.
            against: another answer, for 'logit_difference': one, or one for each fact.
            features: split mixers by channel or head too.
            batch_size: prompts a batch.
            progress: show a progress bar.
            out: a folder to keep the results in, block of facts by block of facts; it goes on where it stopped.
            block_size: facts of a block.

        Returns:
            A table, sums, means over facts and a figure; see `interventions.contribution_data.ContributionData`.

        Raises:
            MambalensError: for an unknown measure, no usable fact, a folder that holds something else, or where a layer
                is not linear in what is added up.
        """
        from mambalens.interventions.contributions import contributions

        asked = as_facts(facts)
        found = contributions(self, asked, measure, against, features, batch_size, progress, out, block_size)
        return Contributions.of(found)

    def patch(
        self,
        pairs: Sequence[Pair],
        site: str = defaults.SITE,
        window: int | Sequence[Sequence[int]] = 1,
        positions: Where = "each",
        batch_size: int | None = None,
        memory: int | str | None = None,
        progress: bool = True,
        measure: str | Measure | None = None,
        out: str | Path | None = None,
        block_size: int = defaults.CELL_BLOCK,
    ) -> Patches:
        """Put another prompt's activation in the place of a fact's own, and see what becomes of the answer.

        Every patch is answered exactly, all of them from one base pass of both prompts (`interventions.walk`).

        Args:
            pairs: facts, each with another one (`facts.pairs(tokenizer=lens.tokenizer)`). Prompts of unequal lengths
                are aligned by pieces (`facts.pairs.aligned`), but not for the site 'state'.
            site: 'residual' (before the layer; as one more layer behind the last), 'mixer', 'mlp', 'value' (what the
                layer's mixers read of a position, as `ablation='resample'` puts it in), or 'state': what later
                positions have of a position and those left of it, that is the recurrent state after it and the
                convolution's inputs, or keys and values.
            window: in how many consecutive layers at once (every run of that many), or a list of layer lists.
            positions: 'each' for every position on its own, roles, or positions; several are each on their own. The
                positions of a role are patched together; its state is that after its last position.
            batch_size: pairs a batch at most.
            memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
            progress: show a progress bar.
            measure: of the own answer, as for `sweep`: two more columns, base_measure and measure.
            out: a folder to keep the results in, block of pairs by block of pairs. The same patches in the same folder
                go on where they stopped; several processes that share the folder share the work.
            block_size: pairs of a block.

        Returns:
            A table with a row for every pair, window and position or role, means with intervals and a heatmap.

        Raises:
            MambalensError: for a site or window that the model does not have, positions that a prompt does not have, an
                unknown role, or if no pair can be used.
        """
        from mambalens.interventions.patching import Patching, patch

        asked = Patching.asked(site, window, positions, measure)
        return Patches.of(patch(self, pairs, asked, batch_size, memory, progress, True, out, block_size))

    def trace(
        self,
        facts: FactLike,
        noise: float | str = defaults.NOISE,
        restore: str = defaults.SITE,
        window: int | Sequence[Sequence[int]] | None = None,
        positions: Where = "each",
        samples: int = defaults.SAMPLES,
        seed: int = 0,
        batch_size: int | None = None,
        memory: int | str | None = None,
        progress: bool = True,
        measure: str | Measure | None = None,
        out: str | Path | None = None,
        block_size: int = defaults.CELL_BLOCK,
    ) -> Traces:
        """Corrupt a fact's subject, restore one site of the clean run, and see whether the answer comes back.

        Args:
            facts: facts, a name or a path.
            noise: standard deviation of the Gaussian noise on the subject's embeddings, in standard deviations of the
                embeddings of all these facts' subjects; or 'swap': another fact's subject (`facts.pairs`).
            restore: the site, as for `patch`.
            window: in how many consecutive layers at once, or a list of layer lists; by default 10 (or all, in models
                with fewer) for 'mixer', 'mlp' and 'value', else 1.
            positions: as for `patch`.
            samples: of the noise; one where subjects are swapped.
            seed: of the noise, and of the pairs.
            batch_size: facts a batch at most.
            memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
            progress: show a progress bar.
            measure: of the answer, as for `sweep`: three more columns, clean_measure, corrupted_measure and measure.
            out, block_size: as for `patch`, with facts in the place of pairs.

        Returns:
            A table with a row for every fact, sample, window and position or role, means with intervals, how far
            samples differ, and a heatmap.

        Raises:
            MambalensError: as for `patch`, and for a noise that is none.
        """
        from mambalens.interventions.tracing import Tracing, trace

        tracing = Tracing.asked(noise, restore, window, positions, samples, seed, measure)
        return Traces.of(trace(self, as_facts(facts), tracing, batch_size, memory, progress, True, out, block_size))

    def features(
        self, facts: FactLike | None = None, batch_size: int | None = None, progress: bool = True
    ) -> pd.DataFrame:
        """What each feature of every layer's token mixer is like, one row a layer and feature.

        Args:
            facts: prompts to measure on; without, only what the weights say.
            batch_size: prompts a batch.
            progress: show a progress bar.

        Returns:
            model, layer, kind ('mamba1', 'mamba2', 'attention'), feature (channel in Mamba-1, head elsewhere), and

            - decay_norm: `sum_n exp(-exp(A_log[f, n]))`, large means slow decay (Endy et al. 2025); NaN in attention.
            - group: its third by decay norm, 'slow', 'middle' or 'fast'; '' in attention.

            With facts, of the scan or attention before gate, norm and output projection. Its output at t, `sum_{s<t}
            alpha[t, s] x_s + (alpha[t, t] + D) x_t` (Ali et al. 2024, eq. 12), splits into exchange (from other
            positions) and enrichment (own position and skip):

            - half_life: tokens until what a position wrote has decayed to half (L1 norm over the state, see
              `hooks.decay`), under the step sizes of the data; geometric mean over the positions of all prompts.
            - exchange_share: `|exchange| / |output|`, norms (root of the sum of squares) over all positions of all
              prompts. NaN where the output is zero.
            - enrichment_share: `|enrichment| / |output|`. The parts may point apart: shares can add up to more than 1.
            - exchange_share_last, enrichment_share_last: the same at every prompt's last token alone.
        """
        from mambalens.features.measures import feature_table

        return feature_table(self, None if facts is None else as_facts(facts), batch_size, progress)

    def causal_features(
        self,
        facts: FactLike,
        source: str = defaults.SOURCE,
        target: str = defaults.TARGET,
        layers: Sequence[int] | int | str | None = None,
        block: int = 1,
        path: KnockoutPath = defaults.PATH,
        batch_size: int | None = None,
        memory: int | str | None = None,
        progress: bool = True,
        ablation: str = defaults.ABLATION,
        other: Pairs | Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> CausalFeatures:
        """Knock out every feature alone, in its layer alone, and see what the target's probability loses.

        Args:
            facts: facts, a name or a path.
            source, target: roles (see `roles.ROLES`).
            layers: layer numbers or a kind of mixer; None: every layer.
            block: features that are knocked out together, by falling exchange share at the last token; 1: each alone.
            path: 'main', 'conv', 'erase' or 'both'; mixers that do not have it are left out.
            batch_size, memory, progress: as for `sweep`.
            ablation, other, over, keys: what stands in the place of what is knocked out, as for `sweep`.

        Returns:
            A table with the features' measures beside their cost, rank correlations and a scatter plot.
        """
        from mambalens.features.causal import causal_features
        from mambalens.sweep.ablation import Asked

        given, put_in = as_facts(facts), Asked.of(ablation, over, other, keys)
        found = causal_features(self, given, source, target, layers, block, path, batch_size, memory, progress, put_in)
        return CausalFeatures.of(found)

    def diagnose(
        self, facts: FactLike, batch_size: int | None = None, progress: bool = True, seed: int = 0
    ) -> pd.DataFrame:
        """What kind of operator each layer's token mixing is, channels and heads on the same scale.

        Definitions and sources are in `mambalens.features.operators`. Values are means over prompts and then over the
        features of a group.

        Args:
            facts: prompts to measure on. The work grows with prompts x features x T^2.
            batch_size: prompts a batch.
            progress: show a progress bar.
            seed: of the random tokens that induction is measured on (4 sequences of 25 tokens, each twice).

        Returns:
            One row per layer, group ('all', and 'slow', 'middle', 'fast' where features decay) and diagnostic: model,
            layer, n_layers, kind, group, diagnostic ('sink_share', 'effective_rank', 'interaction_rank',
            'position_dependence', 'mean_distance', 'recency', 'induction_score'), lag (of recency: '0', '1', '2-3' ...;
            else ''), value, n_features, n_prompts.
        """
        from mambalens.features.diagnose import diagnose

        return diagnose(self, as_facts(facts), batch_size, progress, seed)

    def explore(
        self, fact: Fact | str | None = None, others: Sequence[Lens] = (), facts: FactLike = defaults.FACTS
    ) -> ExploreWidget:
        """The page of `mambalens explore` in a notebook: click tokens, cut between them, see what the model loses.

        Args:
            fact: what it begins with: a fact, a prompt, or nothing.
            others: further lenses, side by side on the same prompt.
            facts: what can be searched in it, and what ablation 'mean' is the mean over.

        Returns:
            The widget. `knockouts`, `result`, `fact` and `state` say what it shows, and `show` brings it elsewhere.

        Raises:
            MambalensError: without anywidget, or for lenses of the same name.
        """
        from mambalens.explore.widget import widget

        return widget(self, fact, others, facts)

    def attention_map(
        self,
        fact: Fact,
        layer: int,
        features: Features = defaults.GROUP,
        reduce: str | None = "mean_abs",
        mixers: str | None = None,
    ) -> Figure:
        """One layer's effective attention for a fact's prompt as a figure, tokens on both axes.

        Args:
            fact: its prompt is read.
            layer: layer number.
            features: a group, a feature's number, a mask or a list.
            reduce: 'mean_abs' or 'mean' over these features; None draws the entries of a single feature as they are.
            mixers: which kind of mixer, in layers that have two.
        """
        from mambalens.figures import attention_map

        prompt = self.prompt(fact)
        ids = torch.tensor([prompt.ids], device=self.device)
        alpha = self.hooks.effective_attention(ids, layer, features=features, reduce=reduce, mixers=mixers)
        if reduce is None:
            if alpha.shape[1] != 1:
                raise MambalensError(
                    f"reduce=None draws one feature, but {alpha.shape[1]} are named: give features=NUMBER, or "
                    "reduce='mean' or 'mean_abs'."
                )
            alpha = alpha[:, 0]
        kind = self.hooks.mixer_of(layer, mixers).kind
        what = f"feature {features}" if isinstance(features, int) else f"{features} features" if isinstance(
            features, str) else getattr(features, "name", "some features")  # fmt: skip
        how = {"mean_abs": "mean magnitude", "mean": "mean", None: "as it is"}[reduce]
        title = f"{self.name}, layer {layer} ({kind}): effective attention, {what}, {how}"
        return attention_map(alpha[0].float().cpu().numpy(), prompt.tokens, title, prompt.positions("subject"))


def _tuple(values: Any) -> tuple[Any, ...]:
    """One name is a tuple of one."""
    return (values,) if isinstance(values, str) else tuple(values)
