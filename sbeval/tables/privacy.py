"""What is left out of a run's record: secrets, and the names of users, hosts and home folders.

/home/ann/books/a.txt                      ~/books/a.txt, and below the current folder relative to it
/scratch/ann/books                         /scratch/USER/books
https://ann:pass@host/set?token=abc        https://***@host/set?token=***
--hf-token abc   --address gpu7:6379       --hf-token ***   --address ***
"""

import getpass
import re
from collections.abc import Iterable
from pathlib import Path

MASK = "***"
SECRET = r"(?:token|secret|password|passwd|api[-_]?key|credential|signature)"
# (pattern, replacement): credentials in a URL, a secret in its query, and keys that are known by their first letters
MASKED = (
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/@\s]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(rf"([?&;](?:key|sig|[^=&;\s]*{SECRET}[^=&;\s]*)=)[^&;#\s]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"\b(?:hf_|gh[opsu]_|github_pat_|sk-|AKIA)[A-Za-z0-9_-]{16,}"), MASK),
)
# an option whose value is a secret or the name of a machine
HIDDEN = re.compile(rf"--(?:address|(?:[\w-]+[-_])?(?:key|{SECRET}))", re.IGNORECASE)
# where a path may begin and a part of it end: not /home/anna for /home/ann
BEGIN, END = r"(?<![\w.~/])", r"(?![^/\s'\":,])"
HOMES = re.compile(rf"{BEGIN}(?:/home|/Users|/var/home)/[^/\s'\":,]+")


def shared(text: str) -> str:
    """Return a text, such as a path or a message, as it may be shown to others."""
    for pattern, replacement in MASKED:
        text = pattern.sub(replacement, text)
    if "/" not in text:
        return text
    for folder, alone, below in ((Path.cwd(), ".", ""), (Path.home(), "~", "~/")):
        # not where it is all of the disk
        if folder != Path(folder.anchor):
            text = re.sub(rf"{BEGIN}{re.escape(str(folder))}/", below, text) or alone
            text = re.sub(rf"{BEGIN}{re.escape(str(folder))}{END}", alone, text)
    text, user = HOMES.sub("~", text), _user()
    return re.sub(rf"(?<=/){re.escape(user)}{END}", "USER", text) if user else text


def shared_argv(words: Iterable[str]) -> list[str]:
    """Return the words of a command line as they may be shown; also the value of an option that holds a secret."""
    kept: list[str] = []
    for word in words:
        option, equals, _ = word.partition("=")
        if kept and HIDDEN.fullmatch(kept[-1]):
            kept.append(MASK)
        else:
            kept.append(f"{option}={MASK}" if equals and HIDDEN.fullmatch(option) else shared(word))
    return kept


def _user() -> str:
    """Return the name of the user; empty where there is none, or it says nothing."""
    try:
        name = getpass.getuser()
    # a container may run as a number without a name
    except (KeyError, OSError):
        return ""
    return "" if name in ("root", "user", "USER") else name
