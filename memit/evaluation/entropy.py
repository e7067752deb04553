"""Generation entropy GE: low where an edited model repeats itself (paper, section 5.2)."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from math import log2

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Weight of the entropy of word n-grams, by n. The mean of the two weighted entropies is taken;
the paper's formula shows their sum, the published numbers come from the mean."""


def word_tokenizer() -> tuple[Callable[[str], list[str]], bool]:
    """NLTK's `word_tokenize` and True where its sentence data `punkt_tab` is present.

    Without it: its word tokenizer on the whole text and False, which leaves the full stop on the
    last word of inner sentences, so that numbers are approximate.
    """
    import nltk  # here, since it takes seconds and most processes compute no entropy
    from nltk.tokenize import NLTKWordTokenizer

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return NLTKWordTokenizer().tokenize, False
    return nltk.word_tokenize, True


def text_entropy(text: str, words: Callable[[str], list[str]]) -> float:
    """(⅔·H₂ + 4⁄3·H₃) / 2 in bits × 100, over the NFKD-normalised text's words."""
    tokens = words(unicodedata.normalize("NFKD", text))
    weighted = [weight * _entropy(tokens, n) for n, weight in WEIGHTS.items()]
    return 100.0 * sum(weighted) / len(weighted)


def record_entropies(texts: Sequence[Sequence[str]]) -> list[float]:
    """Mean entropy of each record's generated texts, NaN where it has none."""
    words, _ = word_tokenizer()
    entropies = [[text_entropy(text, words) for text in record] for record in texts]
    return [sum(each) / len(each) if each else float("nan") for each in entropies]


def _entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy of the n-grams' frequencies in bits; 0 where there are none."""
    counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return sum(count / total * log2(total / count) for count in counts.values())
