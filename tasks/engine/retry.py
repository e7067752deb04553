"""Retry transient network errors with exponential backoff."""

import logging
import os

import tenacity

from memit.errors import UnreachableError

ATTEMPTS = 4
"""The waits between them double and add up to some seconds."""

logger = logging.getLogger(__name__)


def is_transient(error: BaseException) -> bool:
    """Whether waiting can help: a host does not answer, and the user has not forbidden requests."""
    return isinstance(error, UnreachableError) and not os.environ.get("HF_HUB_OFFLINE")


def _warn(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("%s Trying again (%d of %d).", error, state.attempt_number + 1, ATTEMPTS)


retry_unreachable = tenacity.retry(
    retry=tenacity.retry_if_exception(is_transient),
    stop=tenacity.stop_after_attempt(ATTEMPTS),
    wait=tenacity.wait_exponential_jitter(initial=1, max=10, jitter=0.5),
    before_sleep=_warn,
    reraise=True,
)
"""Decorates functions that use the network."""
