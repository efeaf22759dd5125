"""Pieces: a prompt's positions cut into parts that do not overlap, so that prompts of different lengths add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mambalens.facts.prompts import Prompt

PIECES: dict[str, str] = {
    "context": "the tokens before the subject",
    "subject_first": "the subject's first token, where it has several",
    "subject_middle": "the subject's tokens between its first and last",
    "subject_last": "the subject's last token",
    "after_subject": "the token after the subject",
    "soon_after": "the second and third token after the subject",
    "relation": "the tokens between these and the last",
    "last": "the last token",
}
"""What each piece is, in the order in which they stand in a prompt. The subject is its last occurrence; tokens of
earlier ones are context."""


def piece_of(prompt: Prompt) -> list[str]:
    """The piece that each position of a prompt belongs to.

    A subject of one token is `subject_last`, a last token right behind the subject `last`, and a subject at the end of
    the prompt ends with `last`, from where the prediction is read.
    """
    time = len(prompt.ids)
    subject = prompt.positions("subject")
    if not subject:
        return ["context"] * (time - 1) + ["last"]
    end = subject[-1]
    begin = end
    while begin - 1 in subject:
        begin -= 1
    # Two occurrences side by side are one run of tokens: the last one's begins where its first character is.
    start = prompt.spans[-1][0]
    begin = max([begin, *(i for i in range(begin, end + 1) if prompt.offsets[i][0] <= start < prompt.offsets[i][1])])
    found = []
    for i in range(time):
        if i == time - 1:
            found.append("last")
        elif i < begin:
            found.append("context")
        elif i == end:
            found.append("subject_last")
        elif i == begin:
            found.append("subject_first")
        elif i < end:
            found.append("subject_middle")
        else:
            found.append("after_subject" if i == end + 1 else "soon_after" if i <= end + 3 else "relation")
    return found
