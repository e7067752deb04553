"""What may be shown or logged: no secrets, one printable line."""

import os
import re

LONGEST = 2_000
"""Characters of a line; what a user typed may be of any length."""
_SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|SECRET|API_KEY|ACCESS_KEY)$")
_TOKENS = re.compile(r"\b(hf_|gh[opsu]_|github_pat_|sk-|AKIA)[A-Za-z0-9_-]{12,}|(?i:bearer\s+)\S+")
_IN_ADDRESS = re.compile(
    r"[?&;](access_?token|token|password|passwd|secret|signature|sig|api_?key|x-amz-[a-z-]+)=",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """A text with the passwords and tokens of URLs and of the environment replaced by `***`."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    plain = re.sub(r"(?<=://)[^/@\s]+@", "***@", _TOKENS.sub("***", text))
    return re.sub(r"(://[^\s?]*)\?[^\s)]*", r"\1?***", plain)


def holds_secret(text: str) -> bool:
    """Whether a text contains a password or token, which belongs in no file."""
    has_password = re.search(r"://[^/@\s:]*:[^/@\s]*@", text) is not None
    return has_password or _TOKENS.search(text) is not None or bool(_IN_ADDRESS.search(text))


def one_line(text: str) -> str:
    """A text on one printable line, with control characters escaped, cut to `LONGEST`."""
    text = text[: LONGEST + 1]
    shown = "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."
