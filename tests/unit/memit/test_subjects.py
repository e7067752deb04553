"""Which subjects have a share in C."""

from memit.facts.records import embedded_records
from memit.facts.subjects import BEHIND_NORMS, default_share, subjects_to_keep
from memit.model_shape import ModelShape


def test_edited_subjects_are_left_out_whatever_their_case() -> None:
    every = {record.request.subject for record in subjects_to_keep(())}
    kept = {record.request.subject for record in subjects_to_keep(["BRISBANE", "Nobody"])}
    assert every - kept == {"Brisbane"}


def test_facts_for_choosing_share_no_subject_with_those_that_are_reported() -> None:
    reported = {record.request.subject for record in embedded_records("reported")}
    kept = {record.request.subject for record in subjects_to_keep((), "choosing")}
    assert kept
    assert not kept & reported


def test_they_have_a_share_behind_norms_alone() -> None:
    shape = ModelShape(18, 640, 2_048, 0, "Gemma3ForCausalLM", output_norm=True)
    assert default_share(shape) == BEHIND_NORMS
    assert default_share(ModelShape(30, 576, 1_536, 0, "LlamaForCausalLM")) == 0.0
