"""How an Atlas fact is put into words: near wordings, and far ones whose filler is drawn afresh.

A *near* wording has the subject a few tokens before the end. A *far* wording names the subject first, then
eight to twenty tokens of small talk, and the relation only in the last few tokens, so that a causal convolution
cannot carry the fact by itself.
"""

from __future__ import annotations

import random

NEAR: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {subject} is",
        "The capital city of {subject} is",
        "In {subject} the capital is",
        "{subject} has as its capital",
    ),
    "continent": (
        "{subject} lies on the continent of",
        "The continent of {subject} is",
        "On the map {subject} is part of",
        "{subject} belongs to the continent of",
    ),
    "currency": (
        "The currency of {subject} is the",
        "In {subject} people pay with the",
        "The money used in {subject} is the",
        "{subject} has as its currency the",
    ),
    "language": (
        "The official language of {subject} is",
        "In {subject} the official language is",
        "The language on the road signs of {subject} is",
        "{subject} has as its official language",
    ),
    "country": (
        "{subject} is located in",
        "The country of {subject} is",
        "On the map {subject} is found in",
        "{subject} lies in the country of",
    ),
    "symbol": (
        "The symbol of {subject} is",
        "The chemical symbol of {subject} is",
        "{subject} has the symbol",
        "Chemists write {subject} as",
    ),
}

_FAR_TAILS: dict[str, tuple[str, ...]] = {
    "capital": ("the capital is", "its capital is", "the capital city is", "and the capital is"),
    "continent": ("the continent is", "its continent is", "it lies in", "and the continent is"),
    "currency": ("the currency is the", "its currency is the", "people pay with the", "and the currency is the"),
    "language": ("the language is", "its language is", "the official language is", "and the language is"),
    "country": ("the country is", "its country is", "it is in", "and the country is"),
    "symbol": ("the symbol is", "its symbol is", "the chemical symbol is", "and the symbol is"),
}

FAR: dict[str, tuple[str, ...]] = {
    relation: tuple("{subject}, {filler}: " + tail for tail in tails) for relation, tails in _FAR_TAILS.items()
}

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {"near": NEAR, "far": FAR}

_PEOPLE = (
    "my uncle", "our teacher", "the old baker", "her brother", "a quiet neighbour", "the night nurse",
    "his grandmother", "the tall sailor", "their gardener", "a young painter", "the choir", "our landlord",
)  # fmt: skip
_VERBS = (
    "likes to talk about", "once wrote about", "never forgets", "dreams of", "heard of on the radio",
    "reads about every winter", "mentions in letters", "keeps notes on",
)  # fmt: skip
_SHOWN = (
    "shown on a stamp of the nineteen", "named in a song of the nineteen", "drawn on a poster of the nineteen",
    "described in a book of the nineteen", "printed on a calendar of the nineteen",
)  # fmt: skip
_DECADES = ("twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
_SEEN = ("found on", "copied to", "pinned on", "carved into", "written across")
_COLOURS = ("red", "green", "yellow", "grey", "brown", "white", "black", "purple")
_THINGS = ("kitchen wall", "school door", "train ticket", "wooden table", "garden gate", "paper bag", "coffee cup")


def filler(rng: random.Random) -> str:
    """Two clauses of small talk, eight to twenty tokens in all, that say nothing about any fact."""
    clauses = [
        lambda: f"which {rng.choice(_PEOPLE)} {rng.choice(_VERBS)}",
        lambda: f"{rng.choice(_SHOWN)} {rng.choice(_DECADES)}",
        lambda: f"{rng.choice(_SEEN)} a {rng.choice(_COLOURS)} {rng.choice(_THINGS)}",
    ]
    first, second = rng.sample(clauses, 2)
    return f"{first()}, {second()}"


def subject_form(subject: str, relation: str, template: str) -> str:
    """The subject as it is written in `template`: elements are lower case inside a sentence."""
    if subject and relation == "symbol" and not template.startswith("{subject}"):
        return subject[0].lower() + subject[1:]
    return subject


def word(subject: str, relation: str, template: str, rng: random.Random) -> tuple[str, str]:
    """Put a fact into words.

    Returns:
        The prompt, which ends right before the target, and the subject as it is spelled in it.
    """
    form = subject_form(subject, relation, template)
    return template.format(subject=form, filler=filler(rng) if "{filler}" in template else ""), form


def held_out_template(fact_key: str, wording: str, relation: str) -> int:
    """The one template of `wording` that this fact never meets in training (the same on every machine)."""
    return random.Random(f"held-out/{wording}/{fact_key}").randrange(len(WORDINGS[wording][relation]))
