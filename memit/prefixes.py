"""Context prefixes x_j: texts put before a prompt, so that an edit holds in any context."""

from memit.generation import generate_texts
from memit.language_model import LanguageModel

WORDS = ("The", "Therefore", "Because", "I", "You")
"""First words of the prefixes."""
TOKENS = 10
"""Length of a prefix in tokens, its first word included."""
TOP_K = 5


def sample_prefixes(lm: LanguageModel, seed: int) -> tuple[str, ...]:
    """The model's own continuations of `WORDS`, each followed by a full stop and a space.

    Equal models and seeds give equal prefixes. Braces in them have no meaning.
    """
    texts = generate_texts(
        lm, WORDS, total_tokens=TOKENS, top_k=TOP_K, seed=seed, token_budget=len(WORDS) * TOKENS
    )
    # The last token may end inside a character, which decodes to the replacement character.
    return tuple(bounded(lm, text.rstrip("\ufffd")) + ". " for text in texts)


def bounded(lm: LanguageModel, text: str) -> str:
    """The text, cut at the end to `TOKENS` tokens before a full stop: tokenising it may give more
    tokens than the model generated."""
    while len(lm.tokenizer(f"{text}.", add_special_tokens=False)["input_ids"]) > TOKENS + 1:
        text = text[:-1].rstrip("\ufffd")
    return text
