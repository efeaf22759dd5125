"""Contributions add up to the answer's score, and are what an explicit integral of explicit norms and heads gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, architecture, in_double
from torch import Tensor, nn
from transformers import AutoTokenizer

from mambalens import Fact, Lens, MambalensError, load_facts
from mambalens.data import checkpoints
from mambalens.interventions.contribution_data import COLUMNS

FOLDER = next(iter(checkpoints().values()))
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
FACTS = [
    Fact("The capital of Peru is", "Peru", " Lima", "capital", "a"),
    Fact("Chad, shown on a stamp of the nineteen sixties: the capital is", "Chad", " N'Djamena", "capital", "b"),
    Fact("In São Tomé people pay with the", "São Tomé", " Dobra", "currency", "c"),
]


def lens_on(name: str, dtype: torch.dtype = torch.float64) -> Lens:
    return Lens(architecture(name, dtype=dtype, vocabulary=len(TOKENIZER)), TOKENIZER, name)


def added_up(found: Any) -> np.ndarray:
    return found.table.groupby("fact_id", sort=False).contribution.sum()[found.scores.fact_id].to_numpy()


def scores_of(lens: Lens, measure: str = "log_odds") -> list[float]:
    """By the model's own pass, one prompt at a time."""
    values = []
    for fact in FACTS:
        prompt = lens.prompt(fact)
        with torch.no_grad():
            z = lens.model(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1].double()
        rest = torch.cat([z[: prompt.target_id], z[prompt.target_id + 1 :]])
        own = z[prompt.target_id]
        values.append(float({"log_odds": own - rest.logsumexp(0), "logit_difference": own - z.mean()}[measure]))
    return values


@pytest.mark.parametrize("measure", ["log_odds", "logit_difference"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_contributions_add_up_to_the_score_in_every_architecture(name: str, measure: str) -> None:
    lens = lens_on(name)
    with in_double(lens.model):
        found = lens.contributions(FACTS, measure)
        scores = scores_of(lens, measure)
    np.testing.assert_allclose(found.scores.score, scores, atol=1e-9)
    np.testing.assert_allclose(added_up(found), scores, atol=1e-9)
    # What is left to 'bias' is what the model says of an empty residual stream, and not what was not found.
    bias = found.table[found.table.part == "bias"].set_index("fact_id").contribution
    parts = found.table[found.table.part != "bias"].groupby("fact_id").contribution.sum()
    expected = [_of_nothing(lens, fact, measure) for fact in FACTS]
    np.testing.assert_allclose(bias[["a", "b", "c"]], expected, atol=1e-8)
    np.testing.assert_allclose(parts[["a", "b", "c"]] + expected, scores, atol=1e-8)


def _of_nothing(lens: Lens, fact: Fact, measure: str) -> float:
    """The score where the residual stream is empty but the final norm divides by what it divided by: biases alone.

    A final norm gives its bias for zeros whatever it divides by.
    """
    layer = lens.hooks.layers[-1]

    def empty(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    handle = layer.register_forward_hook(empty)
    prompt = lens.prompt(fact)
    with torch.no_grad():
        z = lens.model(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1].double()
    handle.remove()
    own, rest = z[prompt.target_id], torch.cat([z[: prompt.target_id], z[prompt.target_id + 1 :]])
    return float(own - (rest.logsumexp(0) if measure == "log_odds" else z.mean()))


def _rms(x: Tensor, whole: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(whole.square().mean() + eps) * weight


def _layer_norm(x: Tensor, whole: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(whole.var(correction=0) + eps) * weight


def _mamba(model: Any, x: Tensor, whole: Tensor) -> Tensor:
    norm = model.backbone.norm_f
    return _rms(x, whole, norm.weight, norm.variance_epsilon) @ model.lm_head.weight.T


def _gpt2(model: Any, x: Tensor, whole: Tensor) -> Tensor:
    norm = model.transformer.ln_f
    return _layer_norm(x, whole, norm.weight, norm.eps) @ model.lm_head.weight.T


def _gemma2(model: Any, x: Tensor, whole: Tensor) -> Tensor:
    norm = model.model.norm
    return _rms(x, whole, 1 + norm.weight, norm.eps) @ model.lm_head.weight.T


def _cohere(model: Any, x: Tensor, whole: Tensor) -> Tensor:
    norm = model.model.norm
    scaled = _layer_norm(x, whole, norm.weight, norm.variance_epsilon)
    return scaled @ model.lm_head.weight.T * model.logit_scale


def _lfm2(model: Any, x: Tensor, whole: Tensor) -> Tensor:
    norm = model.model.embedding_norm
    return _rms(x, whole, norm.weight, norm.variance_epsilon) @ model.lm_head.weight.T


HEADS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "mamba": _mamba, "mamba2": _mamba, "gpt2": _gpt2, "gemma2": _gemma2, "cohere": _cohere, "lfm2": _lfm2,
}  # fmt: skip
"""Logits of a part of the residual stream, the final norm's scale that of the whole, without biases and capping."""


@pytest.mark.parametrize("name", HEADS)
def test_layers_have_the_contributions_of_an_explicit_integral(name: str) -> None:
    """Simpson's rule on 4001 points, of softmax and capping written out; what a layer adds is what hooks see."""
    lens = lens_on(name)
    fact = FACTS[1]
    prompt, streams = lens.prompt(fact), []
    cap = getattr(lens.model.config, "final_logit_softcapping", None)
    with in_double(lens.model):
        found = lens.contributions(fact).by_layer()
        first = lens.hooks.layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: streams.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        others = [
            layer.register_forward_hook(lambda m, args, out: streams.append(out[0] if isinstance(out, tuple) else out))
            for layer in lens.hooks.layers
        ]
        with torch.no_grad():
            lens.model(torch.tensor([prompt.ids]), use_cache=False)
    for handle in (first, *others):
        handle.remove()
    with torch.no_grad():
        r = torch.stack([stream[0, -1] for stream in streams])  # [layers + 1, hidden]
        added = torch.cat([r[:1], r.diff(dim=0)])
        of_parts = HEADS[name](lens.model, added, r[-1])  # [layers + 1, vocabulary]
        bias = lens.model.transformer.ln_f.bias @ lens.model.lm_head.weight.T if name == "gpt2" else 0.0
    s = torch.linspace(0, 1, 4001, dtype=torch.float64)
    weights = torch.ones_like(s)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    u = s[:, None] * of_parts.sum(0) + bias  # along the ray
    z = u if cap is None else cap * torch.tanh(u / cap)
    others = z.clone()
    others[:, prompt.target_id] = -torch.inf
    gradient = -others.softmax(-1)
    gradient[:, prompt.target_id] = 1.0
    gradient = gradient if cap is None else gradient * (1 - (z / cap).square())
    mean = (weights[:, None] * gradient).sum(0) / 3 / 4000
    wanted = of_parts @ mean
    by_layer = found[found.part != "bias"].groupby("layer").contribution.sum()
    np.testing.assert_allclose(by_layer[[*range(-1, lens.n_layers)]], wanted, atol=1e-8)


@pytest.mark.parametrize("name", ["atlas-mamba1", "atlas-mamba2", "atlas-gpt-neox", "atlas-deltanet"])
def test_contributions_of_trained_models_in_float32_add_up(name: str) -> None:
    lens = Lens.load(name)
    facts = load_facts("atlas")[:6]
    found = lens.contributions(facts)
    np.testing.assert_allclose(added_up(found), found.scores.score, atol=1e-6)
    wanted = lens.evaluate(facts, progress=False).target_prob.to_numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-found.scores.score)), wanted, rtol=1e-3, atol=1e-7)
    bias = found.table[found.table.part == "bias"].contribution
    if name != "atlas-gpt-neox":  # no biases: an empty stream says nothing
        np.testing.assert_allclose(bias, -np.log(len(lens.tokenizer) - 1), atol=1e-4)


def test_the_table_has_every_part_source_and_path_in_order() -> None:
    lens = lens_on("falcon_h1")
    found = lens.contributions(FACTS)
    table = found.table
    assert tuple(table.columns) == tuple(COLUMNS)
    assert table.fact_id.drop_duplicates().tolist() == ["a", "b", "c"]  # batches are of falling length
    one = table[table.fact_id == "a"]
    n, layers = len(lens.prompt(FACTS[0]).ids), range(lens.n_layers)
    assert one[one.part == "embedding"][["layer", "source", "piece"]].values.tolist() == [[-1, n - 1, "last"]]
    assert one[one.part == "bias"].layer.tolist() == [lens.n_layers]
    for layer in layers:
        here = one[one.layer == layer]
        assert (here.part == "mlp").sum() == 1
        main = here[here.path == "main"]
        assert {kind: part.source.tolist() for kind, part in main.groupby("kind")} == {
            "mamba2": [*range(n)], "attention": [*range(n)]
        }  # fmt: skip
        assert here[here.path == "skip"].source.tolist() == [n - 1]
        assert here[(here.path == "bias")].kind.tolist() == ["mamba2", "attention"]
        tokens = lens.prompt(FACTS[0]).tokens
        assert [tokens[source] for source in main.source] == main.token.tolist()


def test_features_add_up_to_their_sources() -> None:
    lens = lens_on("qwen3_next")
    whole, parted = lens.contributions(FACTS[:2]), lens.contributions(FACTS[:2], features=True)
    assert (whole.table.feature == -1).all()
    of_features = parted.table[parted.table.feature >= 0]
    counts = {mixer.layer: mixer.n_features for mixer in lens.hooks.mixers}
    assert of_features.groupby("layer").feature.max().to_dict() == {k: n - 1 for k, n in counts.items()}
    keys = ["fact_id", "layer", "part", "path", "source"]
    a, b = (found.table.groupby(keys).contribution.sum() for found in (whole, parted))
    np.testing.assert_allclose(a, b.reindex(a.index), atol=1e-12)


def test_a_logit_difference_against_another_answer_is_that_of_the_logits() -> None:
    lens = lens_on("gemma2")
    others = [" Lomé", " Lima", " Cedi"]
    with in_double(lens.model):
        found = lens.contributions(FACTS, against=others)
        for fact, other, score in zip(FACTS, others, found.scores.score, strict=True):
            prompt = lens.prompt(fact)
            second = TOKENIZER(fact.prompt + other)["input_ids"][len(prompt.ids)]
            with torch.no_grad():
                z = lens.model(torch.tensor([prompt.ids])).logits[0, -1]
            assert score == pytest.approx(float(z[prompt.target_id] - z[second]), abs=1e-9)
        np.testing.assert_allclose(added_up(found), found.scores.score, atol=1e-9)
    assert found.measure == "logit_difference"


def test_a_function_is_a_measure() -> None:
    def hinge(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.gather(1, targets[:, None])[:, 0].sigmoid()

    lens = lens_on("mamba")
    found = lens.contributions(FACTS[0], hinge)
    np.testing.assert_allclose(added_up(found), found.scores.score, atol=1e-9)
    assert (found.measure, found.axis) == ("hinge", "hinge")


def test_summaries_are_means_over_the_facts_that_have_the_part() -> None:
    lens = lens_on("mamba")
    found = lens.contributions(FACTS)
    table = found.table
    summary = found.summary(by=("layer", "piece"), interval="t")
    here = table[(table.layer == 1) & (table.piece == "context")]
    assert here.fact_id.unique().tolist() == ["a", "c"]
    values = here.groupby("fact_id").contribution.sum()
    row = summary[(summary.layer == 1) & (summary.piece == "context")].iloc[0]
    assert (row.n, row["mean"]) == (2, pytest.approx(values.mean()))
    assert row.low < row["mean"] < row.high
    assert found.summary(by=()).n.tolist() == [3]
    assert found.summary(by=())["mean"].iloc[0] == pytest.approx(found.scores.score.mean())
    assert found.by_source().source.min() == 0
    assert found.where(part="mixer", layer=[0, 2]).table.layer.unique().tolist() == [0, 2]


def test_the_model_is_left_as_it_was_and_training_mode_too() -> None:
    lens = lens_on("gpt2")
    ids = torch.tensor([lens.prompt(FACTS[0]).ids])
    with torch.no_grad():
        before = lens.model(ids).logits
        lens.model.train()
        found = lens.contributions(FACTS[0])
        assert lens.model.training
        lens.model.eval()
        assert torch.equal(lens.model(ids).logits, before)
    assert all(parameter.grad is None for parameter in lens.model.parameters())
    assert found.scores.score[0] == pytest.approx(lens.contributions(FACTS[0]).scores.score[0])


def test_what_cannot_be_asked_is_refused() -> None:
    lens = lens_on("mamba")
    for wrong, said in (
        ({"measure": "log_ods"}, "'log_ods' is not a measure"),
        ({"measure": "entropy"}, "prob, logit_difference, or a function"),
        ({"measure": "prob", "against": " Lima"}, "leave out either"),
        ({"against": [" Lima", " Lomé"]}, "2 answers for 3 facts"),
    ):
        with pytest.raises(MambalensError, match=said):
            lens.contributions(FACTS, **wrong)
    found = lens.contributions(FACTS[:1])
    with pytest.raises(MambalensError, match="'pieces'.*did you mean 'piece'"):
        found.summary(by=("pieces",))
    with pytest.raises(MambalensError, match="no contributions to the fact 'z'"):
        found.tokens("z")
