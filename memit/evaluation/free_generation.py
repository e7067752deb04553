"""Free generation: what a model says by itself, and whether its text gives an object.

Teacher forcing gives away the answer's length and, of a long one, its beginning. Here the model
writes until it ends the sentence: the protocol of WILD (Yang et al., *The Mirage of Model Editing*,
ACL 2025), with greedy decoding, and a text judged by exact match and by containment.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from memit.errors import InputError
from memit.evaluation.counterfact import means_by_record
from memit.evaluation.generations import answer_all
from memit.joining import WITHOUT_SPACES
from memit.language_model import LanguageModel
from memit.requests import Record

NEW_TOKENS = 50
"""The longest answer, in tokens."""
STOPS = (".", "\n")
"""What ends an answer besides a special token."""
QUESTION = "Please answer the question:\n\nQ: {}\nA:"
JUDGED = {kind: kind for kind in ("question", "chat", "paraphrase")} | {"rewrite": "efficacy"}
"""The name that the metrics have of each kind of prompt whose answer should be the new object."""
_PUNCTUATION = " .,;:!?…\"'`“”„‘’«»‹›()[]{}。、，！？：；「」『』（）"
_LETTER = rf"[^\W{WITHOUT_SPACES}]"


def answer_freely(
    lm: LanguageModel,
    records: Sequence[Record],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> pa.Table:
    """What the model says, until it stops, to all prompts of `asked_of` each record: a table of
    `ANSWERS`. `progress` is called with the number of newly written answers."""
    asked = [(r.case_id, kind, prompt) for r in records for kind, prompt in asked_of(lm, r)]
    return answer_all(
        lm,
        asked,
        new_tokens=NEW_TOKENS,
        stops=STOPS,
        token_budget=token_budget,
        progress=progress,
    )


def asked_of(lm: LanguageModel, record: Record) -> Iterator[tuple[str, str]]:
    """Kinds and prompts: the edited prompt as it is, as a question and, if the model has a chat
    template, as a user's message; paraphrases and prompts about something else as they are."""
    prompt = record.request.text
    yield "rewrite", prompt
    yield "question", QUESTION.replace("{}", prompt)
    if lm.tokenizer.chat_template:
        yield "chat", as_message(lm, prompt)
    yield from (("paraphrase", text) for text in record.paraphrase_prompts)
    yield from (("neighborhood", t) for t in (*record.neighborhood_prompts, *record.kept_prompts))


def as_message(lm: LanguageModel, prompt: str) -> str:
    """A prompt as a user's message in the model's chat template, up to the answer.

    Raises:
        InputError: the model has no chat template.
    """
    if not lm.tokenizer.chat_template:
        raise InputError(f"{lm.name} has no chat template: ask it without --chat.")
    messages = [{"role": "user", "content": prompt}]
    text = str(
        lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    # Templates name a first token that many tokenizers put in front by themselves.
    adds_first = lm.tokenizer("a")["input_ids"][0] == lm.tokenizer.bos_token_id
    return text.removeprefix(str(lm.tokenizer.bos_token)) if adds_first else text


def free_record_means(said: pa.Table, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Share of each record's answers that are, or contain, an object (0–100), NaN where it has
    none; left out where no record has any. Records are in the order of their case ids.

    `said` has each answer of the unedited model (`answer_before`) beside that of the edited one
    (`answer_after`). `generated_efficacy_exact` is of the new object after bare edited prompts;
    `_true` names the old object, and `generated_neighborhood` the answers that are as before.
    """
    requests = {record.case_id: record.request for record in records}
    rows, kinds = said.to_pylist(), np.array(said["kind"].to_pylist())

    def judged(how: Callable[[str, str], bool], name: str) -> np.ndarray:
        objects = [getattr(requests[row["case_id"]], name) for row in rows]
        pairs = zip(rows, objects, strict=True)
        return np.array([np.nan if o is None else how(r["answer_after"], o) for r, o in pairs])

    found = {
        name + old + suffix: np.where(kinds == kind, judged(how, target), np.nan)
        for kind, name in JUDGED.items()
        for target, old in (("target_new", ""), ("target_true", "_true"))
        for how, suffix in ((is_exactly, "_exact"), (contains, "_contains"))
    }
    same = np.array([row["answer_before"] == row["answer_after"] for row in rows])
    found["neighborhood"] = np.where(kinds == "neighborhood", same, np.nan)
    places = np.searchsorted(sorted(requests), np.unique(said["case_id"].to_numpy()))
    means: dict[str, np.ndarray] = {}
    for name, values in found.items():
        if not np.isnan(values).all():
            means[f"generated_{name}"] = np.full(len(requests), np.nan)
            means[f"generated_{name}"][places] = 100.0 * means_by_record(said, values)
    return means


def is_exactly(text: str, name: str) -> bool:
    """Whether a text is an object, whatever its case, spaces and outer punctuation."""
    return _plain(text) == _plain(name)


def contains(text: str, name: str) -> bool:
    """Whether an object stands in a text as whole words."""
    pattern = rf"(?<!{_LETTER}){re.escape(_plain(name))}(?!{_LETTER})"
    return re.search(pattern, _plain(text)) is not None


def _plain(text: str) -> str:
    words = " ".join(text.casefold().split())
    return words.strip(_PUNCTUATION) or words  # C++ and -5 keep their signs
