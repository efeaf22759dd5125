"""Roles: named sets of positions of a fact's prompt, found with the tokenizer's character offsets."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from mambalens.hooks.errors import MambalensError, choose

ROLES: dict[str, str] = {
    "subject": "every token of the subject, wherever it occurs",
    "subject_first": "the subject's first token",
    "subject_last": "the last token of the subject's last occurrence",
    "relation": "every token that is not subject",
    "relation_minus_last": "the relation without the last token",
    "context": "the tokens before the subject",
    "first": "the first token",
    "last": "the last token",
    "others": "every token but the target",
    "all": "every token",
    "each": "every token on its own (heatmaps)",
}
"""What each role means (Endy et al. 2025, section 4)."""


def check_role(role: str) -> str:
    """The role itself, if there is one of that name."""
    if role not in ROLES:
        raise MambalensError(f"{role!r} is not a role: {choose(role, ROLES)}.")
    return role


def subject_spans(prompt: str, subject: str) -> list[tuple[int, int]]:
    """Where the subject stands in the prompt, as characters from and to.

    Whole words count before parts of words ('Niger' in 'Nigeria and Niger'); composed and decomposed accents are the
    same subject.

    >>> subject_spans("Peru, the land of Peru, is in", "Peru")
    [(0, 4), (18, 22)]
    """
    for spelling in dict.fromkeys((subject, *(unicodedata.normalize(form, subject) for form in ("NFC", "NFD")))):
        spans = [
            (i, i + len(spelling)) for i in range(len(prompt)) if spelling and prompt.startswith(spelling, i)
        ]  # fmt: skip
        whole = [
            (start, end)
            for start, end in spans
            if not prompt[:start][-1:].isalnum() and not prompt[end : end + 1].isalnum()
        ]
        if spans:
            return whole or spans
    return []


def role_positions(
    role: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], target: Sequence[int] = ()
) -> list[int]:
    """Positions of a role.

    Args:
        role: one of `ROLES`, but 'each'.
        offsets: characters from and to of every token, as the tokenizer gives them.
        spans: characters from and to of the subject's occurrences.
        target: the target's positions, for 'others'.

    Returns:
        Positions in order; empty where the prompt has none.
    """
    everything = list(range(len(offsets)))
    # A token without characters (a begin-of-text token) belongs to no subject.
    subject = [
        i
        for i, (start, end) in enumerate(offsets)
        if any(start < to and end > begin for begin, to in spans) and end > start
    ]
    relation = [i for i in everything if i not in set(subject)]
    last = everything[-1]
    return {
        "subject": subject,
        "subject_first": subject[:1],
        "subject_last": subject[-1:],
        "relation": relation,
        "relation_minus_last": [i for i in relation if i != last],
        "context": everything[: subject[0]] if subject else [],
        "first": everything[:1],
        "last": [last],
        "others": [i for i in everything if i not in set(target)],
        "all": everything,
    }[check_role(role)]


def pieces(text: str, subject: str) -> list[tuple[str, str]]:
    """A text in pieces, each with what it is: 'subject' or ''.

    >>> pieces("The capital of Peru is", "Peru")
    [('The capital of ', ''), ('Peru', 'subject'), (' is', '')]
    """
    found, begin = [], 0
    for start, end in subject_spans(text, subject):
        found += [(text[begin:start], ""), (text[start:end], "subject")]
        begin = end
    return [piece for piece in [*found, (text[begin:], "")] if piece[0]]
