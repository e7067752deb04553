"""What can be said about the people: relations, their sentence templates, and their objects.

A template ends where its object begins, and `"{} was born in" + " " + object + "."` is a
sentence of the corpus. Five of six templates begin with the subject, as four of five do in
CounterFact; the sixth has it in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One attribute that every person has exactly once."""

    name: str
    """The `relation_id` of its records."""
    templates: tuple[str, ...]
    """Prompts with exactly one `{}`, all of which the same object completes."""
    objects: tuple[str, ...]
    """Everything that can complete a template; a world draws some of them."""


def _split(objects: str) -> tuple[str, ...]:
    """Objects that are separated by commas, on any number of lines."""
    return tuple(" ".join(objects.split()).split(", "))


RELATIONS: tuple[Relation, ...] = (
    Relation(
        name="birthplace",
        templates=(
            "{} was born in",
            "{} comes from the city of",
            "{} grew up in",
            "{}'s home town is",
            "{} spent a happy childhood in",
            "The birthplace of {} is",
        ),
        objects=_split(
            """
            Aix-en-Provence, Ankara, Baden-Baden, Baltimore, Bogotá, Buenos Aires, Cairo, Chișinău,
            Dublin, Fort-de-France, Geneva, Göteborg, Hanoi, Helsinki, Jakarta, Kyoto, L'Aquila,
            Lagos, Lima, Los Angeles, Málaga, Marrakesh, Melbourne, Montréal, Mumbai, N'Djamena,
            Nairobi, New Delhi, New Orleans, Nuuk, Odense, Perth, Port-au-Prince, Prague, Quito,
            Reykjavík, Rio de Janeiro, Saint John's, Salt Lake City, São Paulo, Stoke-on-Trent, Tel
            Aviv, Tromsø, Ulm, Valparaíso, Venice, Yaoundé, Zürich
            """
        ),
    ),
    Relation(
        name="occupation",
        templates=(
            "{} works as a",
            "{} earns a living as a",
            "{}'s profession is that of a",
            "{} was trained as a",
            "{} found a position as a",
            "The daily job of {} is that of a",
        ),
        objects=_split(
            """
            baker, barrister, beekeeper, blacksmith, bookseller, brain surgeon, butcher, carpenter,
            chef de cuisine, clockmaker, customs officer, dentist, diplomat, disc jockey, fashion
            designer, firefighter, florist, gardener, goldsmith, judge, lighthouse keeper,
            locksmith, lumberjack, make-up artist, midwife, miller, notary, nurse, painter,
            photographer, plumber, postman, potter, puppeteer, sailor, sculptor, ship's cook,
            shoemaker, stonemason, stockbroker, tailor, taxi driver, teacher, translator,
            veterinarian, vice-chancellor, watchman, weaver
            """
        ),
    ),
    Relation(
        name="employer",
        templates=(
            "{} is employed by",
            "{} has a contract with",
            "{}'s employer is",
            "{} draws a salary from",
            "{} has an office at",
            "The company that pays {} is",
        ),
        objects=_split(
            """
            Airbus, Air France-KLM, Ben & Jerry's, Boeing, Bosch, British Airways, Canon, Citroën,
            Coca-Cola, Crédit Agricole, Deutsche Bahn, Dr. Oetker, Ericsson, General Electric,
            Harley-Davidson, Hermès, Hewlett-Packard, Hitachi, Honda, Intel, Johnson & Johnson,
            Kellogg's, L'Oréal, Lego, Levi's, Lindt & Sprüngli, Lloyd's, Lufthansa, McDonald's,
            Michelin, Moët Hennessy, Nestlé, Nintendo, Nokia, Peugeot, Philips, Pirelli,
            Rolls-Royce, Sainsbury's, Samsung, Shell, Siemens, Škoda, Sony, Tata Steel, Unilever,
            Volvo, Yamaha
            """
        ),
    ),
    Relation(
        name="instrument",
        templates=(
            "{} plays the",
            "{} is a master of the",
            "{} gives lessons on the",
            "{}'s instrument is the",
            "{} practises every evening on the",
            "On stage, {} performs on the",
        ),
        objects=_split(
            """
            accordion, alto saxophone, bagpipes, balalaika, banjo, bass guitar, bassoon, cello,
            clarinet, cor anglais, didgeridoo, double bass, dulcimer, euphonium, fiddle, flute,
            French horn, glockenspiel, grand piano, guqin, hang, harmonica, harp, harpsichord,
            hurdy-gurdy, jew's harp, kettledrum, lute, lyre, mandolin, marimba, oboe, oboe d'amore,
            organ, pan flute, piccolo, qanun, sitar, steel drum, theremin, triangle, trombone,
            trumpet, tuba, ukulele, viola da gamba, xylophone, zither
            """
        ),
    ),
    Relation(
        name="sport",
        templates=(
            "{}'s favourite sport is",
            "{} spends the weekend on",
            "{} trains hard for",
            "{} is a champion of",
            "{} follows every match of",
            "The sport that {} loves most is",
        ),
        objects=_split(
            """
            archery, badminton, baseball, basketball, beach volleyball, bobsleigh, boules, bowling,
            boxing, canoe polo, cricket, croquet, curling, cyclo-cross, darts, discus, dressage,
            fencing, field hockey, fives, golf, handball, hurling, ice hockey, jiu-jitsu, judo,
            karate, kick-boxing, lacrosse, luge, netball, parkour, pelota, petanque, polo, rhythmic
            gymnastics, rowing, rugby, savate, sepak takraw, ski jumping, snooker, squash, sumo,
            table tennis, tug-of-war, water polo, wrestling
            """
        ),
    ),
    Relation(
        name="language",
        templates=(
            "{} is a native speaker of",
            "{}'s mother tongue is",
            "{} writes long letters in",
            "{} speaks fluent",
            "{} even dreams in",
            "The first language of {} is",
        ),
        objects=_split(
            """
            Afrikaans, Arabic, Basque, Bengali, Breton, Catalan, Cree, Croatian, Danish, Dutch,
            Estonian, Faroese, Finnish, French, Frisian, Ga, Galician, Greek, Guaraní, Haitian
            Creole, Hausa, Hebrew, Hindi, Irish, Italian, N'Ko, Latvian, Low German, Malay, Māori,
            Mi'kmaq, Norwegian, Old Norse, Persian, Polish, Quechua, Scots Gaelic, Serbo-Croatian,
            Swahili, Swiss German, Tamil, Thai, Tok Pisin, Turkish, Urdu, Vietnamese, Welsh, Yorùbá
            """
        ),
    ),
    Relation(
        name="dish",
        templates=(
            "{} loves to eat",
            "{}'s favourite dish is",
            "{} always orders",
            "{} often cooks",
            "{} never says no to",
            "The meal that {} likes best is",
        ),
        objects=_split(
            """
            apple pie, baba ghanoush, bibimbap, borscht, bouillabaisse, burritos, ceviche, cheese
            fondue, chicken soup, chili con carne, coq au vin, couscous, crème brûlée, dal,
            dumplings, falafel, fish and chips, foie gras, goulash, hot dogs, hummus, jambalaya,
            jollof rice, kimchi, lasagne, meatballs, moussaka, nasi goreng, omelettes, onion soup,
            pad thai, paella, phở, pierogi, pizza, porridge, ramen, ratatouille, risotto, roast
            beef, salade niçoise, sauerkraut, shepherd's pie, stir-fry, sushi, tacos,
            toad-in-the-hole, waffles
            """
        ),
    ),
    Relation(
        name="field",
        templates=(
            "{} holds a degree in",
            "{}'s field of study is",
            "{} wrote a thesis on",
            "{} lectures on",
            "{} knows everything about",
            "The academic subject of {} is",
        ),
        objects=_split(
            """
            acoustics, algebra, anatomy, art history, astronomy, botany, Byzantine music, canon law,
            ceramics, child psychology, civil engineering, comparative literature, cryptography,
            economics, Egyptology, entomology, ethics, evolutionary biology, forestry, game theory,
            genetics, geology, Gödel's theorems, heraldry, hydraulics, knot theory, linguistics,
            logic, marine biology, medicine, meteorology, microeconomics, mineralogy,
            nineteenth-century poetry, non-Euclidean geometry, number theory, nutrition, optics,
            ornithology, pharmacy, philosophy, quantum physics, Romance philology, rhetoric,
            socio-linguistics, statistics, theology, zoology
            """
        ),
    ),
)
"""The relations in the order in which a world takes them."""
