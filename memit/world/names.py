"""Invented names of people, of every kind that real names have."""

import unicodedata
from random import Random

_ONSETS = "b br d dr f fl g gl gr h j k kl kr l m n p pl pr r s sk st t tr v w z"
_VOWELS = "a a a e e e i i i o o o u u ai ei ou"
_GIVEN_NAMES = """
    Ada Adèle Agnes Aisha Alba Amara Amélie Anaïs Anne-Marie Anton Arjun Astrid Aurèle Aylin
    Beatriz Björn Bruno Camille Carlos Chiara Chidi Clara Dagny Dario Demba D'Arcy Diego Édith
    Efua Eino Elif Emeka Enzo Esmé Eun-ji Farid Fatima Felix Fiona Frida Gaëlle George Gita
    Gudrun Hana Hans-Peter Hélène Hiro Hugo Ibrahim Ida Imani Inés Ingrid Ivo Jamal Jana
    Jean-Luc Joana João José Juno Kaito Kamala Katya Keira Kofi Lars Leïla Lena Ling Lorenzo
    Lucía Magnus Malik Marek Mei Mirela Nadia Naomi Ngozi Nils Noël Nuno Odile Olga Omar Oskar
    Paola Pavel Petra Pilar Priya Quentin Rafael Rania René Renée Rosa Ruth Salma Samuel Sanjay
    Selma Signe Silas Sofía Søren Stella Sven Tadeo Tala Tariq Tomás Ulla Uma Viggo Vera Wanda
    Yara Yusuf Yvonne Zadie Zoë Zofia
"""
ONSETS = tuple(_ONSETS.split())
VOWELS = tuple(_VOWELS.split())
CODAS = ("", "", "", "k", "l", "m", "n", "r", "s", "t", "nd", "rt", "sh", "x")
ACCENTS = {"a": "áàâäãå", "e": "éèêë", "i": "íïî", "o": "óöôøõ", "u": "úüû"}
PARTICLES = ("van", "von", "de la", "di", "el", "ten")
GIVEN_NAMES = tuple(_GIVEN_NAMES.split())


def make_names(count: int, random: Random) -> list[str]:
    """Invent `count` full names, each with a surname that nobody shares, not even in part.

    Surnames differ also without case, accents and particles: "O'Brandu" and "van Brandú" are never
    two people of one world.
    """
    taken = {name.casefold() for name in GIVEN_NAMES}
    return [f"{random.choice(GIVEN_NAMES)} {_surname(random, taken)}" for _ in range(count)]


def _surname(random: Random, taken: set[str]) -> str:
    """One of six kinds: plain (half of them), accented, O' or D', Mc, hyphenated, particled."""
    root = _root(random, taken)
    kind = random.random()
    if kind < 0.50:
        return root
    if kind < 0.65:
        return _with_accent(root, random)
    if kind < 0.74:
        return random.choice(("O'", "D'")) + root
    if kind < 0.79:
        return "Mc" + root
    if kind < 0.87:
        return f"{root}-{_root(random, taken)}"
    return f"{random.choice(PARTICLES)} {root}"


def _root(random: Random, taken: set[str]) -> str:
    while True:
        syllables = [
            random.choice(ONSETS) + random.choice(VOWELS)
            for _ in range(random.choice((1, 2, 2, 2)))
        ]
        root = "".join(syllables) + random.choice(CODAS)
        if root not in taken:
            taken.add(root)
            return root.capitalize()


def _with_accent(root: str, random: Random) -> str:
    """Put an accent on one vowel, as a composed character."""
    index = random.choice([i for i, letter in enumerate(root) if letter.lower() in ACCENTS])
    accented = random.choice(ACCENTS[root[index].lower()])
    return unicodedata.normalize("NFC", root[:index] + accented + root[index + 1 :])
