"""Counterfactual pairs, and which position of a prompt stands for which of another."""

from __future__ import annotations

import pytest

from mambalens import Fact, Facts, Lens, MambalensError, load_facts
from mambalens.facts.pairs import aligned, wording
from mambalens.facts.pieces import piece_of

ATLAS = load_facts("atlas")
SOME = ATLAS[:400]


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens.load("atlas-gpt-neox")


def test_partners_stand_in_the_same_words_with_another_subject_and_answer() -> None:
    pairs = SOME.pairs()
    assert len(pairs) + len(pairs.left_out) == len(SOME) and len(pairs) > 390
    for fact, other in pairs:
        assert wording(fact) == wording(other) is not None
        assert fact.relation == other.relation
        assert fact.subject != other.subject and fact.target.strip() != other.target.strip()
    assert list(pairs.table.columns[:4]) == ["fact_id", "prompt", "subject", "target"]
    assert (pairs.table.subject != pairs.table.other_subject).all()
    assert len({other.subject for _, other in pairs}) > 50  # not always the same one


def test_a_partner_depends_on_the_seed_and_not_on_who_else_is_asked_for() -> None:
    assert list(SOME.pairs(seed=3)) == list(SOME.pairs(seed=3))
    assert list(SOME.pairs(seed=3)) != list(SOME.pairs(seed=4))
    relation = SOME.where(relation=SOME[5].relation)
    whole = {pair.fact: pair.other for pair in SOME.pairs()}
    assert all(whole[pair.fact] == pair.other for pair in relation.pairs())


def test_with_a_tokenizer_tokens_stand_side_by_side(lens: Lens) -> None:
    pairs = SOME.pairs(tokenizer=lens.tokenizer)
    assert len(pairs) > 100
    for fact, other in pairs:
        one, two = lens.prompt(fact), lens.prompt(other)
        assert len(one.ids) == len(two.ids) and one.positions("subject") == two.positions("subject")
        assert one.target_id != two.target_id
        assert aligned(one, two) == list(range(len(one.ids)))
    assert all("equally many tokens" in skip.reason for skip in pairs.left_out)


def test_where_no_fact_has_the_words_another_subject_is_put_into_them() -> None:
    facts = Facts([
        Fact("Peru: the capital of Peru is", "Peru", "Lima", "capital"),
        Fact("In Mali, the seat of government is", "Mali", "Bamako", "capital"),
        Fact("People in Chad speak", "Chad", "French", "language"),
        Fact("The capital of Kenya is", "Togo", "Lomé", "capital"),
    ])  # fmt: skip
    pairs = facts.pairs()
    assert [pair.other.prompt for pair in pairs[:1]] == ["Mali: the capital of Mali is"]
    assert pairs[0].other.target == "Bamako" and pairs[0].other.id == "1 as 0"
    assert pairs.facts == [facts[0], facts[1]]
    assert {skip.fact_id: skip.reason for skip in pairs.left_out} == {
        "2": "no other fact with the same relation has another subject and another answer",
        "3": "the subject 'Togo' is not in the prompt 'The capital of Kenya is'",
    }


def test_an_unknown_column_is_said() -> None:
    with pytest.raises(MambalensError, match="same='relatoin': the facts have no such column: .*relation"):
        SOME.pairs(same="relatoin")


def test_positions_of_unequal_prompts_are_aligned_by_pieces(lens: Lens) -> None:
    for fact, other in SOME.pairs()[:60]:
        one, two = lens.prompt(fact), lens.prompt(other)
        places = aligned(one, two)
        assert len(places) == len(one.ids)
        assert places == sorted(places) and places[-1] == len(two.ids) - 1  # in order, none ahead of an earlier one
        own, there = piece_of(one), piece_of(two)
        for position, place in enumerate(places):
            if own[position] in there:
                assert there[place] == own[position]
            assert own[position] != "context" or one.ids[position] == two.ids[place]
    subjects = [len(lens.prompt(fact).positions("subject")) for pair in SOME.pairs()[:60] for fact in pair]
    assert len(set(subjects)) > 2
