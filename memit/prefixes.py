"""Context prefixes x_j: what stands before a prompt, so that an edit holds in any context."""

from __future__ import annotations

from memit.generation import generate_texts
from memit.language_model import LanguageModel

WORDS = ("The", "Therefore", "Because", "I", "You")
"""What the prefixes begin with."""
TOKENS = 10
"""Length of a prefix in tokens, its first word included."""
TOP_K = 5


def sample_prefixes(lm: LanguageModel, seed: int) -> tuple[str, ...]:
    """The model's own continuations of `WORDS`, each ended by a full stop and a space.

    They are plain text: a brace in one is a brace. Equal models and seeds give equal prefixes.
    """
    texts = generate_texts(
        lm, WORDS, total_tokens=TOKENS, top_k=TOP_K, seed=seed, token_budget=len(WORDS) * TOKENS
    )
    # The last token may end inside a character, which decodes to the replacement character.
    return tuple(bounded(lm, text.rstrip("\ufffd")) + ". " for text in texts)


def bounded(lm: LanguageModel, text: str) -> str:
    """The text, without its end where that would read as more than `TOKENS` tokens with a full stop
    as another: what the model wrote may be spelt otherwise when it is read."""
    while len(lm.tokenizer(f"{text}.", add_special_tokens=False)["input_ids"]) > TOKENS + 1:
        text = text[:-1].rstrip("\ufffd")
    return text
