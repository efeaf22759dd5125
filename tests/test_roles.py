"""Roles are found by characters: spaces, accents, repeats, any place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from mambalens import Fact, MambalensError
from mambalens.facts.prompts import read_fact
from mambalens.facts.roles import ROLES, subject_spans


def byte_tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte: the worst case for accents. With `begin`, a token without characters comes first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    if begin:
        fast._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return fast


def positions(prompt: str, subject: str, role: str, target: list[int] | None = None, begin: bool = False) -> list[int]:
    return read_fact(Fact(prompt, subject, " x"), byte_tokenizer(begin)).positions(role, target or [])


def test_every_role_of_a_prompt() -> None:
    prompt = "In Peru is"  # positions 0..9, the subject at 3..6
    expected = {
        "subject": [3, 4, 5, 6], "subject_first": [3], "subject_last": [6], "relation": [0, 1, 2, 7, 8, 9],
        "relation_minus_last": [0, 1, 2, 7, 8], "context": [0, 1, 2], "first": [0], "last": [9],
        "others": [0, 1, 2, 3, 4, 5, 6, 7, 8], "all": list(range(10)),
    }  # fmt: skip
    assert {role: positions(prompt, "Peru", role, [9]) for role in ROLES if role != "each"} == expected


def test_repeats_accents_and_parts_of_words() -> None:
    assert subject_spans("Peru, the land of Peru", "Peru") == [(0, 4), (18, 22)]
    assert subject_spans("Nigeria and Niger are", "Niger") == [(12, 17)]
    assert subject_spans("Nigeria is", "Niger") == [(0, 5)]
    assert subject_spans("In São Tomé is", "São Tomé") == [(3, 11)]
    assert subject_spans("In Sa\u0303o Tome\u0301 is", "São Tomé") == [(3, 13)]
    assert subject_spans("In Peru", "Chile") == []
    # ã and é are two bytes each, so two tokens each.
    assert len(positions("In São Tomé is", "São Tomé", "subject")) == 10


def test_a_begin_of_text_token_is_first_and_no_subject() -> None:
    assert positions("Peru is", "Peru", "subject", begin=True) == [1, 2, 3, 4]
    assert positions("Peru is", "Peru", "first", begin=True) == [0]
    assert positions("Peru is", "Peru", "context", begin=True) == [0]


@given(st.text(min_size=1, max_size=8).filter(str.strip), st.text(max_size=8), st.text(max_size=8))
def test_the_subjects_tokens_spell_it(subject: str, before: str, after: str) -> None:
    prompt = f"{before} {subject} {after}"
    fact = read_fact(Fact(prompt, subject, " x"), byte_tokenizer())
    found = fact.positions("subject")
    covered = {c for p in found for c in range(*fact.offsets[p])}
    assert covered == {c for start, end in subject_spans(prompt, subject) for c in range(start, end)}
    assert sorted(found + fact.positions("relation")) == fact.positions("all")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self) -> dict:
            return {"x": 0}

        def _tokenize(self, text: str, **_: object) -> list[str]:
            return list(text)

    with pytest.raises(MambalensError, match="Slow gives no character offsets"):
        read_fact(Fact("a", "a", "b"), Slow())
