"""Another try after a while, where an address may answer later; never for what is wrong here."""

from __future__ import annotations

import logging
import os

import tenacity

from memit.errors import UnreachableError

ATTEMPTS = 4
"""Tries in all; the waits between them double and add up to some seconds."""

logger = logging.getLogger(__name__)


def may_pass(error: BaseException) -> bool:
    """Whether waiting can help: somebody does not answer, and was not told to be left alone."""
    return isinstance(error, UnreachableError) and not os.environ.get("HF_HUB_OFFLINE")


def _tell(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("%s Trying again (%d of %d).", error, state.attempt_number + 1, ATTEMPTS)


patient = tenacity.retry(
    retry=tenacity.retry_if_exception(may_pass),
    stop=tenacity.stop_after_attempt(ATTEMPTS),
    wait=tenacity.wait_exponential_jitter(initial=1, max=10, jitter=0.5),
    before_sleep=_tell,
    reraise=True,
)
"""Decorates what asks a hub or an address."""
