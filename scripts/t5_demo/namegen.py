"""Names and filler words for the templates of ``grammar.py``.

A name is taken from the lists in ``names.txt``, put together from listed parts by the patterns
that its kind follows (``Bank of X``, ``X & Sons``, ``The Silent River``), or invented from
syllables, so that the model has to read the context instead of remembering names.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from corpus import HERE, fragments, plural, read_sections

ENTITY_SLOTS: dict[str, str] = {
    slot: kind
    for kind, slots in {
        "PER": "first surname full person",
        "LOC": "city country nature region street place",
        "ORG": "company bank agency ministry party university school2 club band paper org",
        "MISC": "nat nats lang event prize work law religion product",
    }.items()
    for slot in slots.split()
}


class Names:
    """Draws names and fillers.  Every public method is a slot of the templates."""

    def __init__(self, rng: random.Random, prose: list[str]) -> None:
        self.rng = rng
        self.lists = read_sections(HERE / "names.txt", ",") | read_sections(HERE / "words.txt", ",")
        self.lists["frag"] = fragments(prose) or ["as it was said"]
        self.lists["word"] = sorted({word for run in self.lists["frag"] for word in run.split() if word.isalpha()})

    def pick(self, name: str) -> str:
        """One item of a list, all equally likely."""
        items = self.lists[name]
        return items[int(self.rng.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.rng.random() < probability

    def one_of(self, *makers: Callable[[], str]) -> str:
        """Call one of the makers."""
        return makers[int(self.rng.random() * len(makers))]()

    def invented(self, ending: str | None = None) -> str:
        """A capitalised word from syllables, most often with an ending typical of its kind."""
        word = "".join(self.pick("syllable") for _ in range(self.rng.choice((1, 2, 2, 3))))
        if ending and self.chance(0.65):
            word += self.pick(ending)
        if len(word) < 3:
            word += self.pick("syllable")
        if self.chance(0.25):
            word += self.rng.choice("nrslmtdk")
        return word[0].upper() + word[1:]

    def capitalised(self) -> str:
        """An ordinary word in the role of a name, as in ``Velvet Energy``."""
        word = self.one_of(lambda: self.pick("noun"), lambda: self.pick("adj"), lambda: self.pick("word"))
        return word.split()[0].capitalize()

    # People.

    def first(self) -> str:
        """A given name."""
        if self.chance(0.04):
            return self.pick("city")
        return self.invented("person_end") if self.chance(0.25) else self.pick("first")

    def surname(self) -> str:
        """A family name, now and then double or with a particle."""
        if self.chance(0.03):
            return self.capitalised()
        name = self.invented("person_end") if self.chance(0.4) else self.pick("surname")
        if self.chance(0.04):
            particle = self.rng.choice(("de ", "von ", "van ", "O'", "Mc", "al-", "da ", "di ", "ten "))
            return particle + name
        return f"{name}-{self.pick('surname').split()[-1]}" if self.chance(0.03) else name

    def full(self) -> str:
        """Given name and surname, now and then with more between them."""
        first, last = self.first(), self.surname()
        draw = self.rng.random()
        if draw < 0.05:
            return f"{first} {self.rng.choice('ABCDEFGHJKLMNPRSTW')}. {last}"
        if draw < 0.1:
            return f"{first} {self.first()} {last}"
        return f"{first} {last}"

    def person(self) -> str:
        """A person named in any of the usual ways."""
        draw = self.rng.random()
        return self.full() if draw < 0.55 else self.first() if draw < 0.75 else self.surname()

    # Places.

    def city(self) -> str:
        """A town."""
        if self.chance(0.05):
            return self.one_of(self.capitalised, lambda: self.pick("surname"))
        if self.chance(0.08):
            return f"{self.pick('place_head')} {self.invented('place_end')}"
        return self.invented("place_end") if self.chance(0.35) else self.pick("city")

    def country(self) -> str:
        """A state."""
        return self.invented("place_end") if self.chance(0.12) else self.pick("country")

    def nature(self) -> str:
        """A river, a mountain, a sea; templates may put ``the`` before it."""
        if self.chance(0.5):
            return self.pick("nature")
        root = self.one_of(lambda: self.invented("place_end"), self.capitalised)
        form = self.rng.choice(("{}", "{} {t}", "{} {t}", "{h} {}"))
        return form.format(root, t=self.pick("place_tail"), h=self.pick("place_head"))

    def region(self) -> str:
        """A part of a country or of the world."""
        if self.chance(0.25):
            return self.one_of(
                lambda: f"{self.pick('place_head')} {self.pick('region')}",
                lambda: self.invented("place_end"),
            )
        return self.pick("region")

    def street(self) -> str:
        """A street, a square, a quarter or a building."""
        if self.chance(0.25):
            return self.pick("street")
        root = self.one_of(
            self.surname, self.capitalised, lambda: self.pick("first"), lambda: self.invented("place_end")
        )
        return f"{root} {self.pick('place_tail')}"

    def place(self) -> str:
        """Any place."""
        draw = self.rng.random()
        for limit, maker in ((0.4, self.city), (0.62, self.country), (0.78, self.region), (0.88, self.nature)):
            if draw < limit:
                return maker()
        return self.street()

    # Organisations.

    def company(self) -> str:
        """A firm or a brand."""
        if self.chance(0.4):
            return self.pick("company")
        root = self.one_of(
            lambda: self.pick("surname"), self.invented, self.capitalised, self.invented, lambda: self.pick("city")
        )
        form = self.rng.choice(("{}", "{} {t}", "{} {t}", "{} {t} {t2}", "{} & {s}", "{} {w}", "{} {w} {t}"))
        return form.format(
            root, t=self.pick("cotail"), t2=self.pick("cotail"), s=self.pick("surname"), w=self.capitalised()
        )

    def bank(self) -> str:
        """A bank, central or not."""
        form = self.rng.choice(("Bank of {p}", "{c} Bank", "{i} Bank", "{n} National Bank", "{c} Savings Bank"))
        return form.format(p=self.place(), c=self.city(), i=self.invented(), n=self.pick("nat"))

    def agency(self) -> str:
        """A public body, an association, a charity, often an acronym."""
        if self.chance(0.45):
            return self.pick("agency")
        if self.chance(0.3):
            return "".join(self.rng.choice("ABCDEFGHIKLMNOPRSTUW") for _ in range(self.rng.choice((2, 3, 3, 4, 5))))
        form = self.rng.choice((
            "National {f} Agency", "{n} {f} Federation", "{c} {f} Association", "{f} Council", "{p} Trust",
            "{c} City Council", "Institute of {f}", "{f} Commission", "World {f} Organisation", "{w} Foundation",
            "{n} {f} Union", "{c} Fire Brigade", "Friends of {p}", "Royal {f} Society", "{p} Hospital", "{c} Museum",
            "{w} Museum", "Museum of {f}", "{c} Zoo", "{w} Club", "Church of {p}", "{s} Foundation", "{p} Police",
        ))  # fmt: skip
        return form.format(
            f=self.pick("portfolio"), n=self.pick("nat"), c=self.city(), p=self.place(), w=self.capitalised(),
            s=self.pick("surname"),
        )  # fmt: skip

    def ministry(self) -> str:
        """A ministry or a department."""
        form = self.rng.choice(("Ministry of {p}", "{p} Ministry", "Department of {p}", "Ministry of {p} and {q}"))
        return form.format(p=self.pick("portfolio"), q=self.pick("portfolio"))

    def party(self) -> str:
        """A political party."""
        form = self.rng.choice(("{a} Party", "{n} {a} Party", "{a} Front", "{a} Alliance", "{g}", "{g}"))
        word = self.one_of(self.capitalised, lambda: "Democratic", lambda: "Labour", lambda: "Liberal")
        return form.format(a=word, n=self.pick("nat"), g=self.pick("agency"))

    def university(self) -> str:
        """A school of any kind, named after a place, a person or a subject."""
        if self.chance(0.3):
            return self.pick("school")
        form = self.rng.choice((
            "University of {c}", "{c} University", "{c} College", "{c} Institute of {f}", "{s} University",
            "{c} School of {f}", "{w} College", "{c} Academy", "{c} Polytechnic",
        ))  # fmt: skip
        return form.format(c=self.city(), s=self.surname(), f=self.pick("field"), w=self.capitalised())

    def school2(self) -> str:
        """A school, a clinic or a library of the neighbourhood."""
        tail = self.rng.choice(("Primary School", "High School", "School", "Hospital", "Library", "Clinic", "Academy"))
        return f"{self.one_of(self.surname, self.capitalised, self.invented, self.city)} {tail}"

    def club(self) -> str:
        """A sports club; a town may stand for its club."""
        if self.chance(0.4):
            return self.pick("club")
        word = self.pick("clubword")
        form = self.rng.choice(("{c}", "{c}", "{c} {w}", "{w} {c}", "{c} {w}"))
        return form.format(c=self.city(), w=word)

    def band(self) -> str:
        """A band, an orchestra, a museum, a theatre."""
        if self.chance(0.3):
            return self.pick("band")
        form = self.rng.choice((
            "The {a} {t}s", "The {t}s", "{a} {t}", "{c} {o}", "{c} {o}", "{i}", "{w} and the {t}s", "{c} Theatre",
            "{w} Theatre",
        ))  # fmt: skip
        orchestra = self.rng.choice(("Philharmonic", "Symphony Orchestra", "Opera", "Ballet", "Chamber Players"))
        return form.format(
            a=self.pick("titleadj"), t=self.pick("title"), c=self.city(), o=orchestra, i=self.invented(),
            w=self.capitalised(),
        )  # fmt: skip

    def paper(self) -> str:
        """A newspaper, a journal, a broadcaster."""
        if self.chance(0.45):
            return self.pick("paper")
        form = self.rng.choice(("{c} {t}", "{c} {t}", "Daily {t}", "{n} {t}", "Radio {c}", "{w} {t}", "Journal of {f}"))
        return form.format(
            c=self.city(), t=self.pick("papertail"), n=self.pick("nat"), w=self.capitalised(), f=self.pick("field")
        )

    def org(self) -> str:
        """Any organisation."""
        makers = (
            self.company, self.company, self.agency, self.agency, self.university, self.ministry, self.bank,
            self.paper, self.band, self.club, self.party, self.school2,
        )  # fmt: skip
        return self.one_of(*makers)

    # The rest: events, prizes, works, laws, products, peoples, languages.

    def nat(self) -> str:
        """An adjective of origin."""
        return self.invented() + self.rng.choice(("ian", "ese", "ish", "an")) if self.chance(0.1) else self.pick("nat")

    def nats(self) -> str:
        """A people in the plural, or one of them."""
        return self.invented() + self.rng.choice(("ians", "ans", "ese")) if self.chance(0.1) else self.pick("nats")

    def event(self) -> str:
        """A contest, a festival, a war."""
        if self.chance(0.5):
            return self.pick("event")
        form = self.rng.choice((
            "{c} Open", "{c} Marathon", "{c} Grand Prix", "{n} Cup", "{c} Festival", "{w} Festival", "Battle of {c}",
            "{n} Championship", "{w} Cup", "{s} Cup", "{n} Revolution", "{c} Biennale", "{c} Classic", "{w} War",
            "{n} Open", "{c} Book Fair", "{w} Week", "{n} League", "Tour of {c}", "{s} Trophy", "{w} Day",
        ))  # fmt: skip
        return form.format(c=self.place(), n=self.pick("nat"), w=self.capitalised(), s=self.pick("surname"))

    def prize(self) -> str:
        """A prize or a medal."""
        if self.chance(0.45):
            return self.pick("prize")
        tail = self.rng.choice(("Prize", "Medal", "Award", "Cup", "Trophy", "Scholarship", "Book Prize"))
        return f"{self.one_of(self.surname, self.capitalised, self.invented, self.nat)} {tail}"

    def work(self) -> str:
        """A book, a film, a song, a painting."""
        if self.chance(0.25):
            return self.pick("work")
        form = self.rng.choice((
            "The {a} {t}", "The {a} {t}", "The {w} {t}", "{a} {t}", "{t} of {t}", "The {t} and the {t}", "The {t}",
            "{t} in {p}", "{w}", "The {r} 's {t}", "A {t} for {f}", "{t} Without {t}", "The {t} of {p}", "The {w} {r}",
        ))  # fmt: skip
        role = self.pick("role").split()[-1].capitalize()
        return form.format(
            a=self.pick("titleadj"), t=self.pick("title"), w=self.capitalised(), p=self.place(), r=role,
            f=self.pick("first"),
        )  # fmt: skip

    def law(self) -> str:
        """A law or a treaty."""
        if self.chance(0.4):
            return self.pick("law")
        form = self.rng.choice(("{w} Act", "{f} Act", "Treaty of {c}", "{c} Agreement", "{c} Accord", "{w} Charter"))
        return form.format(w=self.capitalised(), f=self.pick("portfolio"), c=self.city())

    def product(self) -> str:
        """A thing sold or launched under a name."""
        if self.chance(0.55):
            return self.pick("product")
        form = self.rng.choice(("{i}", "{i} {d}", "{i}-{d}", "{i} {w}"))
        return form.format(i=self.invented(), d=self.rng.randint(1, 900), w=self.capitalised())

    # Fillers: no entities.

    def num(self) -> str:
        """A number in figures or in letters."""
        if self.chance(0.2):
            return self.rng.choice(("two", "three", "four", "five", "six", "seven", "nine", "ten", "twelve", "forty"))
        sizes = self.rng.randint(2, 99), self.rng.randint(100, 9999), self.rng.randint(10, 90) * 1000
        number = self.rng.choice(sizes)
        return f"{number:,}" if number >= 10000 or self.chance(0.1) else str(number)

    def d(self) -> str:
        """A single digit, a score."""
        return str(self.rng.randint(0, 9))

    def dec(self) -> str:
        """A time or a distance."""
        return f"{self.rng.randint(1, 99)}.{self.rng.randint(0, 99):02d}"

    def score(self) -> str:
        """A result such as 3-1."""
        top = self.rng.choice((6, 6, 120))
        return f"{self.rng.randint(0, top)}-{self.rng.randint(0, top)}"

    def tennis(self) -> str:
        """A result in sets."""
        sets = [f"{self.rng.choice((6, 7, 4, 6))}-{self.rng.randint(0, 6)}" for _ in range(self.rng.choice((2, 2, 3)))]
        return (" " if self.chance(0.5) else " , ").join(sets)

    def year(self) -> str:
        """A year."""
        return str(self.rng.randint(1200, 2030) if self.chance(0.3) else self.rng.randint(1900, 2025))

    def age(self) -> str:
        """An age."""
        return str(self.rng.randint(3, 99))

    def money(self) -> str:
        """A sum."""
        unit = self.rng.choice(("million euros", "dollars", "pounds", "billion yen", "million", "euros", "crowns"))
        return f"${self.num()}" if self.chance(0.3) else f"{self.num()} {unit}"

    def time(self) -> str:
        """A time of day."""
        return self.rng.choice(("noon", "midnight", "dawn", "nine", "half past six", f"{self.rng.randint(1, 12)} p.m."))

    def the(self) -> str:
        """The article, now and then left out."""
        return "" if self.chance(0.15) else "the"

    def noun(self) -> str:
        """A singular noun, sometimes a compound."""
        if self.chance(0.25):
            return self.pick("word")
        return f"{self.pick('noun')} {self.pick('noun')}" if self.chance(0.1) else self.pick("noun")

    def adj(self) -> str:
        """An adjective or, for variety, any word in its place."""
        return self.pick("word") if self.chance(0.3) else self.pick("adj")

    def nouns(self) -> str:
        """A plural noun."""
        return plural(self.noun())

    def roles(self) -> str:
        """People of one trade."""
        return plural(self.pick("role"))

    def vinf_capital(self) -> str:
        """A verb that opens a sentence."""
        return self.pick("vinf").capitalize()
