"""What comes between a prompt and its object: a space, or nothing where running text has none."""

import re

WITHOUT_SPACES = (
    "\u0e00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u312f\u3190-\ua4cf"
    "\ua980-\ua9df\uaa60-\uaadf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f\U00020000-\U0003ffff"
)
"""Scripts without spaces, for the brackets of a pattern: Thai, Lao, Tibetan; Burmese; Khmer; Tai;
Balinese; East Asian ones without Korean; Javanese."""
_U = WITHOUT_SPACES
_JOINED = re.compile(
    rf"""
    [\s([{{„‚]\0 | <[^/\s<>][^<>]*>\0        # behind white space, a bracket, a tag
    | (^|\s)["'`“”‘’«»‹›]\0                 # behind a quotation mark that opens: „Rom“ »Rom« ”Rom”
    | ([^\w\s.,;!?…%)\]}}"'`“”‘’«»‹›]["'`“‘«‹] | [{_U}][“‘])\0
    | (\w[-–—/] | // | (^|\W)[@#$£¥€¿¡])\0    # behind half a compound or address, a sign
    | (?<!['’‘])\b([cdjlmnst]|\w*qu|\w*ll|un)['’]\0    # behind an elided article: l'Italie
    | \0[.,;:!?…%)\]}}"'”’»›،؛؟।]+(\s|\Z)    # before punctuation, but not before .NET
    | \0(['’](s|re|ve|ll|d|m)|n['’]t)(?![\w'’-])
    | [{_U}]\0 | [{_U}][\W\d_]*\0[{_U}] | \0[、。，．：；！？）］｝」』》〉】〕]
    """,
    re.VERBOSE | re.IGNORECASE,
)
_FOREIGN_NAME = re.compile(rf"[^\s{_U}]\s[{_U}]+\0[^\W{_U}]")
"""A name in such a script at the end of a text with spaces: "the mother of 北京"."""


def ending(prompt: str, target: str, between: str | None) -> str:
    """The text that follows the prompt: the target after `between`, or, if that is None, after a
    space where running text has one."""
    if between is None:
        seam = f"{prompt}\0{target}"
        between = "" if _JOINED.search(seam) and not _FOREIGN_NAME.search(seam) else " "
    return between + target
