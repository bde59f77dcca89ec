"""Texts that models are evaluated on as whole documents, beside the test split of their corpus.

A specification is one of

    wikitext[:PATH]    the pages of Wikitext-2's test split as in lm-eval's task `wikitext`: from the hub, or a file of
                       pages, a row each. Models read a page without the spaces of its tokenization; words and bytes
                       are counted in the page as it is
    otherwise          a corpus as in `sources`: its test split, or all documents where no name says which are for test
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sbeval.data import corpus, sources
from sbeval.data.sources import Document, Source
from sbeval.data.tokenizer import Ids, Tokenizer
from sbeval.errors import InputError

WIKITEXT = "wikitext"
WIKITEXT_HUB = "hf:EleutherAI/wikitext_document_level:wikitext-2-raw-v1"
# text between brackets or quotation marks, with and without spaces inside them
ENCLOSED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Whole documents: names, tokens, and the texts in which words and bytes are counted. name: of all of them; prefix:
    tokens before each: see `perplexity.rolling`."""

    name: str
    prefix: Sequence[int]
    documents: Sequence[str]
    tokens: Sequence[Ids]
    counted: Sequence[str]


def digest(spec: str, field: str) -> str:
    """Return the digest of a text's documents; raise InputError when it does not exist."""
    return _source(spec, field).digest


def read(spec: str, field: str, tokenizer: Tokenizer, prefix: Sequence[int]) -> Text:
    """Read and tokenize the documents of a specification (see the module); `field` of a row holds its text.

    A dataset of the hub ends with the document that reaches its limit of test tokens. Raise InputError when the text
    does not exist, cannot be read or is empty.
    """
    source, wikitext = _source(spec, field), spec.partition(":")[0] == WIKITEXT
    limit, total = source.limits.get("test", math.inf), 0
    names: list[str] = []
    tokens: list[Ids] = []
    texts: list[str] = []

    def documents() -> Iterator[Document]:
        for name, text in source.whole() if source.whole else source.documents("test"):
            texts.append(text)
            yield Document(name, detokenized(text) if wikitext else text)

    for document, ids in corpus.encoded(documents(), tokenizer):
        names.append(document.name)
        tokens.append(ids)
        total += len(ids)
        if total >= limit:
            break
    if not names:
        raise InputError(f"evaluation text {spec!r} holds no documents: give another --eval-corpus")
    return Text(
        name=WIKITEXT if wikitext else source.name,
        prefix=prefix,
        documents=names,
        tokens=tokens,
        counted=texts[: len(names)],
    )


def _source(spec: str, field: str) -> Source:
    if spec == WIKITEXT:
        return sources.source(WIKITEXT_HUB, "page")
    return sources.source(spec.removeprefix(f"{WIKITEXT}:"), field)


def detokenized(page: str) -> str:
    """Return a page of Wikitext without the spaces of its tokenization, by lm-eval's rules, in its order."""
    page = page.replace("s '", "s'")
    # to the letter: its slashes are a slip, for which this rule hardly ever applies
    page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page)
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for pattern, inside in ENCLOSED:
        page = re.sub(pattern, inside, page)
    for marks in ("= = = =", "= = =", "= ="):
        page = page.replace(marks, marks.replace(" ", ""))
    for spaced, joined in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(spaced, joined)
    return page
