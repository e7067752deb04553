"""Token positions against brute force: decode ever longer prefixes of the whole string."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memit import reference as oracle
from memit.errors import InputError
from memit.positions import continuation_rows, locate, mark, open_ids, tokenize
from tests.families import CITIES, DOCUMENTS, PREFIXES, SUBJECTS, closed, tokenizers
from tests.reference import prompt_row

KINDS = tuple(tokenizers())
TEMPLATES = (
    "{} is from",
    "In the summer, {} moved to",
    "{so} they say of {}'s town: {",
    "The mother of {}",
    "«{}» was born in",
)
# Characters that neither NFC nor NFKC changes, and that need one to four bytes.
LETTERS = "abeinorstMZPéüŁóćžđßΩжи北京大学東한🎵𝔸"[:-1] + "'’-.{}0"


def words(letters: str = LETTERS) -> st.SearchStrategy[str]:
    """Names of one to three words."""
    word = st.text(letters, min_size=1, max_size=8)
    return st.lists(word, min_size=1, max_size=3).map(" ".join)


subjects = st.one_of(st.sampled_from(SUBJECTS), words())
objects = st.one_of(st.sampled_from(CITIES), words())
prefixes = st.one_of(st.sampled_from(("", *PREFIXES)), words().map(lambda text: text + ". "))


def agrees(tokenizer, prefix: str, template: str, subject: str, target: str | None) -> None:
    found = prompt_row(tokenizer, template, subject, prefix=prefix, target=target)
    expected = oracle.row(tokenizer, prefix, template, subject, target or "")
    length = expected.target[-1] + 1 if expected.target else len(expected.ids)
    assert list(found.ids) == expected.ids[:length]
    assert found.subject_last == expected.subject_last
    assert found.target == tuple(expected.target)


@pytest.mark.parametrize("kind", KINDS)
@given(
    template=st.sampled_from(TEMPLATES),
    subject=subjects,
    target=st.one_of(st.none(), objects),
    prefix=prefixes,
)
@example(template=TEMPLATES[1], subject="北京大学", target="東京", prefix="")
@example(template=TEMPLATES[4], subject="🎵", target="🎵🎵", prefix=PREFIXES[0])
@example(template=TEMPLATES[2], subject="{x}", target="{0}", prefix=PREFIXES[1])
def test_rows_are_those_of_brute_force(kind, template, subject, target, prefix):
    agrees(tokenizers()[kind], prefix, template, subject, target)


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=words(), target=objects)
def test_continuations_are_those_of_brute_force(kind, prompt, target):
    tokenizer = tokenizers()[kind]
    (found,) = continuation_rows(tokenizer, [(prompt, f" {target} ")])
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    assert list(found.ids) == ids
    assert found.target == tuple(oracle.target_tokens(tokenizer, ids, prompt))
    said = tokenizer.decode([ids[i] for i in found.target])
    assert str(said).strip() == target


@pytest.mark.parametrize("kind", KINDS)
def test_many_texts_at_once_are_the_same_as_one_by_one(kind):
    tokenizer = tokenizers()[kind]
    marked = [
        mark("{} is in", subject, prefix=prefix, target=f" {city}")
        for subject in SUBJECTS
        for prefix, city in zip(PREFIXES, CITIES, strict=False)
    ]
    assert locate(tokenizer, marked) == [locate(tokenizer, [one])[0] for one in marked]
    texts = [one.text for one in marked]
    assert tokenize(tokenizer, texts) == [tokenize(tokenizer, [text])[0] for text in texts]


def test_positions_by_hand():
    """Whatever the oracle says: one BOS, and a subject of known tokens."""
    tokenizer = tokenizers()["metaspace_first"]
    row = prompt_row(tokenizer, "{} is in", "Paul", prefix="Zoë. ", target="Rome")
    tokens = tokenizer.convert_ids_to_tokens(list(row.ids))
    assert tokens[0] == "<s>"
    last = "".join(tokens[: row.subject_last + 1])
    assert last == "<s>▁Zoë.▁Paul"
    assert "".join(tokens[row.target[0] :]) == "▁Rome"
    assert row.target[-1] == len(row.ids) - 1


# --- tokenizers with missing or wrong offsets --------------------------------------------------


class _Misplaced(PreTrainedTokenizerFast):
    """A tokenizer whose offsets are rewritten by `place` before anyone sees them."""

    place = staticmethod(lambda text, offsets: offsets)

    def __call__(self, text, *args, **kwargs):
        encoded = super().__call__(text, *args, **kwargs)
        if "offset_mapping" not in encoded:
            return encoded
        if isinstance(text, str):
            encoded["offset_mapping"] = self.place(text, encoded["offset_mapping"])
        else:
            encoded["offset_mapping"] = [
                self.place(t, offsets)
                for t, offsets in zip(text, encoded["offset_mapping"], strict=True)
            ]
        return encoded


def _in_bytes(text, offsets):
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in offsets]


WRONG = {
    "none": lambda text, offsets: [(0, 0)] * len(offsets),
    "one too small": lambda text, offsets: [(max(0, s - 1), max(0, e - 1)) for s, e in offsets],
    "one too large": lambda text, offsets: [(s + 1, e + 1) for s, e in offsets],
    "in bytes": _in_bytes,
    "backwards": lambda text, offsets: offsets[::-1],
}


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos", "metaspace_first"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_offsets_are_noticed(kind, wrong):
    original = tokenizers()[kind]
    tokenizer = _Misplaced(
        tokenizer_object=original.backend_tokenizer,
        bos_token=original.bos_token,
        eos_token=original.eos_token,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.place = WRONG[wrong]
    text = "Zoë lives"
    kept = original(text, return_offsets_mapping=True)["offset_mapping"]
    assert tokenizer(text, return_offsets_mapping=True)["offset_mapping"] != kept
    for subject in (*SUBJECTS, "🎵"):
        for template in ("{} was born in", "In the summer, {} moved to"):
            agrees(tokenizer, PREFIXES[2], template, subject, "São Paulo")


@pytest.mark.parametrize("subject", ["Zoë Müller", "José Ñandú", "Łukasz Żółć"])
def test_decomposed_names_stand_where_composed_ones_do(subject):
    """Offsets count the characters that were given, not the normalised ones."""
    tokenizer = tokenizers()["byte_level_nfc"]
    composed = prompt_row(tokenizer, "In {}'s town of", subject, target="São Paulo")
    decomposed = prompt_row(
        tokenizer,
        "In {}'s town of",
        unicodedata.normalize("NFD", subject),
        target=unicodedata.normalize("NFD", "São Paulo"),
    )
    assert composed == decomposed


def test_special_token_at_the_end_is_no_target():
    tokenizer = closed(tokenizers()["byte_level"])
    assert tokenizer("Rome")["input_ids"][-1] == tokenizer.eos_token_id
    plain = prompt_row(tokenizers()["byte_level"], "{} is in", "Zoë", target="Rome")
    assert prompt_row(tokenizer, "{} is in", "Zoë", target="Rome") == plain


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_go_on_have_the_tokens_of_their_characters(kind):
    tokenizer = tokenizers()[kind]
    eos = str(tokenizer.eos_token)
    texts = ["Paul lives in", "a ", "assistant\n", f"Paul{eos}", "北京"]
    plain = [tokenizer(text)["input_ids"] for text in texts]
    assert open_ids(tokenizer, texts) == plain
    assert open_ids(tokenizer, []) == []
    if tokenizer.is_fast:
        assert closed(tokenizer)(texts)["input_ids"] == [
            [*ids, tokenizer.eos_token_id] for ids in plain
        ]
        assert open_ids(closed(tokenizer), texts) == plain


def test_what_has_no_tokens_is_refused():
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcde▁")}, []))
    tokenizer.normalizer = normalizers.Replace("☃", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never")
    tokenizer.decoder = decoders.Metaspace("▁", "never")
    blind = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert prompt_row(blind, "{} a", "b", target="c").target
    with pytest.raises(InputError, match="☃"):
        prompt_row(blind, "a {} b", "☃", target="c")
    with pytest.raises(InputError, match="☃"):
        prompt_row(blind, "a {} b", "c", target="☃")


def test_text_is_never_formatted():
    marked = mark("{x} {} {0}", "{}{1}", prefix="%s {} ", target=" {y}")
    assert marked.text == "%s {} {x} {}{1} {0} {y}"
    assert marked.text[: marked.subject_end] == "%s {} {x} {}{1}"
    assert marked.text[: marked.prompt_end] == "%s {} {x} {}{1} {0}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_of_the_corpus_is_accounted_for(kind):
    for text, (ids, ends) in zip(DOCUMENTS, tokenize(tokenizers()[kind], DOCUMENTS), strict=True):
        assert len(ids) == len(ends)
        assert ends == sorted(ends)
        assert ends[-1] == len(text)
