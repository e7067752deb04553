"""Records of EasyEdit and of QAEdit, whose prompts name their subjects in full, as facts.

EasyEdit has `prompt`, `subject`, `target_new`, `ground_truth`, `rephrase_prompt`, and prompts about
other things in `locality_prompt`, or in `locality` as any `prompt`; QAEdit has `target`,
`rephrase`, and such prompts in `locality` as `loc`. Other keys are ignored: nothing here measures
portability.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any


def is_easyedit(row: Mapping[str, Any]) -> bool:
    """Whether a row has their keys, and no `{}` in its prompt."""
    keys = ("target_new", "rephrase", "rephrase_prompt", "locality", "locality_prompt")
    return "{}" not in str(row.get("prompt")) and any(key in row for key in keys)


def slot_at_first_mention(prompt: str, subject: str) -> str:
    """A prompt with `{}` where it first names the subject, in whole words if it does anywhere."""
    whole = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")
    found = whole.search(prompt)
    if found is None:
        return prompt.replace(subject, "{}", 1)
    return f"{prompt[: found.start()]}{{}}{prompt[found.end() :]}"


def as_fact(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the keys of a user's own fact; the subject's first mention gives the template.
    A `ground_truth` that is the new object is no old one, and is left out."""
    prompt, subject = row.get("prompt"), row.get("subject")
    if isinstance(prompt, str) and isinstance(subject, str) and subject:
        prompt = slot_at_first_mention(prompt, subject)
    target, true = (
        _first(row.get(one, row.get(other)))
        for one, other in (("target_new", "target"), ("ground_truth", "target_true"))
    )
    rephrased = row.get("rephrase_prompt", row.get("rephrase"))
    fact = {
        "subject": subject,
        "prompt": prompt,
        "target": target,
        "target_true": None if true == target else true,
        "paraphrases": [rephrased] if isinstance(rephrased, str) else rephrased,
        "neighbors": [
            *_prompts({"prompt": row.get("locality_prompt", [])}),
            *_prompts(row.get("locality")),
        ],
    }
    return {key: value for key, value in fact.items() if value is not None}


def _first(value: Any) -> Any:
    """Answers may come in lists, the best first."""
    return value[0] if isinstance(value, list) and value else value


def _prompts(locality: Any) -> Iterator[str]:
    """All prompts in nested lists and objects."""
    if isinstance(locality, list):
        for part in locality:
            yield from _prompts(part)
    elif isinstance(locality, dict):
        for key, value in locality.items():
            if key in ("prompt", "loc"):
                yield from value if isinstance(value, list) else [value]
            else:
                yield from _prompts(value)
