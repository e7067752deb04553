"""The model as it is: the baseline that every edit is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

from memit.editors.base import Editor, Resources, provenance, register
from memit.language_model import LanguageModel
from memit.requests import EditRequest
from memit.weight_delta import WeightDelta, base_digests


@register("unedited")
@dataclass(frozen=True)
class Unedited(Editor):
    """Changes nothing."""

    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> WeightDelta:
        """An edit without changes."""
        if resources.progress is not None:
            resources.progress(len(requests))
        return WeightDelta({}, {**provenance(self, lm, requests), "base": base_digests(lm, [])})
