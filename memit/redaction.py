"""Texts that people and logs may see: without secrets, and on one line."""

from __future__ import annotations

import os
import re

LONGEST = 2_000
"""Characters of a sentence; what a user typed may be of any length."""
_SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|SECRET|API_KEY|ACCESS_KEY)$")
_TOKENS = re.compile(r"\b(hf_|gh[opsu]_|github_pat_|sk-|AKIA)[A-Za-z0-9_-]{12,}|(?i:bearer\s+)\S+")
_IN_ADDRESS = re.compile(
    r"[?&;](access_?token|token|password|passwd|secret|signature|sig|api_?key|x-amz-[a-z-]+)=",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """A text without the passwords and tokens that addresses, and this process, may carry."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    plain = re.sub(r"(?<=://)[^/@\s]+@", "***@", _TOKENS.sub("***", text))
    return re.sub(r"(://[^\s?]*)\?[^\s)]*", r"\1?***", plain)


def holds_secret(text: str) -> bool:
    """Whether a text carries a password or a token that does not belong into a file."""
    has_password = re.search(r"://[^/@\s:]*:[^/@\s]*@", text) is not None
    return has_password or _TOKENS.search(text) is not None or bool(_IN_ADDRESS.search(text))


def one_line(text: str) -> str:
    """A text that neither breaks its line nor steers a terminal, cut to `LONGEST`."""
    text = text[: LONGEST + 1]
    shown = "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."
