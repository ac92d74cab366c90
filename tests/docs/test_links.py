"""What the documents of the repository point to is there: links, files, names of the library."""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import os
import re
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.pages import COMMENT, FENCE, INLINE, REPOSITORY

PACKAGES = ("bokehdiff", "data_synthesis", "evaluation", "training")

ATX = re.compile(r"^ {0,3}#{1,6} +(.+?)(?: +#+)? *$", re.MULTILINE)
IDENTIFIER = re.compile(r"^::: ([\w.]+)", re.MULTILINE)
HTML_ANCHOR = re.compile(r"""<[^>]+\b(?:id|name)=["']([^"']+)["']""")
TARGETS = (
    re.compile(r"\]\(\s*<?((?:[^()\s<>]|\([^()\s]*\))+)>?(?:\s+[\"'][^)]*)?\)"),  # [words](target)
    re.compile(r"^ {0,3}\[[^\]]+\]:\s+<?([^\s>]+)>?", re.MULTILINE),  # [words]: target
    re.compile(r"""<(?:a|img|source|video|link)\b[^>]*?\b(?:href|src)=["']([^"']+)["']"""),
    re.compile(r"(?<![(\"'\w])<?(https?://[^\s<>)\]\"'`]+)"),
)


@functools.cache
def repository_files() -> frozenset[str]:
    """What git tracks or would add, and is there, by its path; empty without git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    return frozenset(name for name in names if name and (REPOSITORY / name).is_file())


@functools.cache
def repository_folders() -> frozenset[str]:
    return frozenset(
        str(folder) for name in repository_files() for folder in PurePosixPath(name).parents
    )


def documents() -> list[str]:
    return sorted(name for name in repository_files() if name.endswith(".md"))


def documents_of_today() -> list[str]:
    """All but the one that may name what is gone."""
    return [document for document in documents() if document != "CHANGELOG.md"]


def is_of_the_site(document: str) -> bool:
    """Whether mkdocs shows it, with anchors of its own."""
    return document.startswith("docs/")


# --- What stands in a document --------------------------------------------------------------------


def blanked(pattern: re.Pattern[str], text: str) -> str:
    """The text with spaces in the place of what is found; lines keep their numbers."""
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def numbered(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    for found in pattern.finditer(text):
        yield text.count("\n", 0, found.start(1)) + 1, found[1]


def targets_of(text: str) -> list[tuple[int, str]]:
    """The line and the target of each link and picture, which are not in code."""
    text = blanked(INLINE, blanked(COMMENT, blanked(FENCE, text)))
    return sorted({one for pattern in TARGETS for one in numbered(pattern, text)})


def code_of(text: str) -> list[tuple[int, str]]:
    """The line and the words of each piece of code in a sentence."""
    return list(numbered(INLINE, blanked(COMMENT, blanked(FENCE, text))))


def github_slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def mkdocs_slug(heading: str) -> str:
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors_of(text: str, slug: Callable[[str], str], between: str) -> set[str]:
    """The anchors of a document.

    Args:
        text: of the document.
        slug: what becomes of the words of a heading.
        between: what stands between it and the number, where it is not the first of its kind.
    """
    text = blanked(COMMENT, blanked(FENCE, text))
    anchors = set(HTML_ANCHOR.findall(text))
    for heading in ATX.findall(text):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        words = re.sub(r"<[^>]+>|[`*]", "", words)
        one, number = slug(words), 0
        while (numbered_slug := f"{one}{between}{number}" if number else one) in anchors:
            number += 1
        anchors.add(numbered_slug)
    return anchors


def problem_of_anchor(document: str, anchor: str, text: str) -> str | None:
    """Why a document has no such anchor, if it has none.

    Args:
        document: its path.
        anchor: what is looked for.
        text: of the document.
    """
    for identifier in IDENTIFIER.findall(text):  # entries of the API
        if anchor == identifier or anchor.startswith(f"{identifier}."):
            return problem_of_name(anchor)
    on_github = anchors_of(text, github_slug, "-")
    on_the_site = anchors_of(text, mkdocs_slug, "_") if is_of_the_site(document) else on_github
    if anchor in on_github & on_the_site:
        return None
    if anchor in on_github | on_the_site:
        where = "GitHub" if anchor in on_github else "the site of mkdocs"
        return f"{document} has the heading #{anchor} on {where} alone; word it so that both agree"
    return f"{document} has no heading #{anchor}; it has {sorted(on_github & on_the_site)}"


# --- Whether it is there --------------------------------------------------------------------------


def problem_of_target(document: str, target: str) -> str | None:
    """Why a link or a picture leads nowhere, if it does.

    Args:
        document: the path of the file it stands in.
        target: where it leads.
    """
    address = urlsplit(target)
    if address.scheme or target.startswith("//"):
        return problem_of_address(target)
    if target.startswith("/"):
        return f"{target} is an absolute path; wanted one from the document's own folder"
    place = document
    if address.path:
        place = os.path.normpath(PurePosixPath(document).parent / unquote(address.path))
    if place.startswith(".."):
        return f"{target} leads out of the repository"
    if document.startswith("docs/") and not place.startswith("docs/"):
        return f"{target} leads to no page of the documentation"
    if place not in repository_files() | repository_folders():
        return f"there is no {place} in the repository"
    if not address.fragment:
        return None
    if not place.endswith(".md"):
        return f"{place} has no headings, and none #{address.fragment}"
    return problem_of_anchor(place, unquote(address.fragment), text_of(place))


def problem_of_address(address: str) -> str | None:
    """Why an address is not one of a public site, if it is none."""
    parts = urlsplit(address)
    if parts.scheme != "https":
        return f"{address} does not begin with https://"
    host = parts.hostname or ""
    try:
        ip_address(host)
    except ValueError:
        if re.fullmatch(r"(?:[a-z\d](?:[a-z\d-]*[a-z\d])?\.)+[a-z]{2,}", host) is not None:
            return None
    return f"{address} has no host that everybody can reach: {host!r}"


def problem_of_file(document: str, word: str) -> str | None:
    """Why what looks like a file of the repository is none, if it is none.

    Args:
        document: the path of the file it is named in.
        word: of a piece of code.
    """
    word = re.sub(r"(?:::?[\w.:-]+|#.*)$", "", word).removeprefix("./").rstrip("/,;.")
    first, slash, _ = word.partition("/")
    if re.search(r"[{}<>$\[\]()=]|\.\.\.|\b[A-Z]{2,}\b(?!\.md)", word) or not slash:
        return None
    here = str(PurePosixPath(document).parent / word)
    known = repository_files() | repository_folders()
    if first not in repository_folders() or word in known or here in known:
        return None
    if "*" in word and any(fnmatch.fnmatchcase(name, word) for name in known):
        return None
    return f"there is no {word} in the repository"


def names_in(code: str) -> list[str]:
    """What of a piece of code are names of the library, with dots, from one of its packages."""
    pattern = rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+(?![\w*{{/])"
    files = r"\.(?:css|csv|gif|html|jpg|json|md|mp4|onnx|png|py|safetensors|tflite|toml|txt|ya?ml)$"
    return [name for name in re.findall(pattern, code) if not re.search(files, name)]


def problem_of_name(name: str) -> str | None:
    """Why a name is none of the library, if it is none.

    What a module says it holds is read; only what that does not tell is imported.
    """
    parts = name.split(".")
    module = parts[:1]
    while len(module) < len(parts) and module_file(".".join(parts[: len(module) + 1])):
        module = parts[: len(module) + 1]
    attributes = parts[len(module) :]
    if not attributes or attributes[1:] == [] and attributes[0] in held_by(".".join(module)):
        return None
    found = importlib.import_module(".".join(module))
    for attribute in attributes:
        if not hasattr(found, attribute):
            return f"there is no {name}: {found!r} has no {attribute}"
        found = getattr(found, attribute)
    return None


def module_file(module: str) -> Path | None:
    """The file of a module of this repository, if there is one."""
    path = REPOSITORY.joinpath(*module.split("."))
    return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()), None)


@functools.cache
def held_by(module: str) -> frozenset[str]:
    """The names that a module defines or imports at its top level."""
    file = module_file(module)
    assert file is not None, module
    statements = list(ast.parse(file.read_text("utf-8")).body)
    names: set[str] = set()
    for statement in statements:
        match statement:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import(names=imported) | ast.ImportFrom(names=imported):
                names |= {one.asname or one.name.partition(".")[0] for one in imported}
            case ast.Assign(targets=targets):
                names |= {one.id for one in targets if isinstance(one, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body):
                statements += body  # what is imported when it is first used
    return frozenset(names)


@functools.cache
def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text("utf-8")


# --- Of every document ----------------------------------------------------------------------------

pytestmark = pytest.mark.skipif(
    not repository_files(), reason="needs git and a checkout, to tell what is in the repository"
)


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document: str) -> None:
    wrong = [
        f"{document}:{line}: {problem}"
        for line, target in targets_of(text_of(document))
        if (problem := problem_of_target(document, target))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", documents_of_today())
def test_files_are_there(document: str) -> None:
    wrong = [
        f"{document}:{line}: {problem}"
        for line, code in code_of(text_of(document))
        for word in code.split()
        if (problem := problem_of_file(document, word))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", documents_of_today())
def test_names_are_there(document: str) -> None:
    wrong = [
        f"{document}:{line}: {problem}"
        for line, code in code_of(text_of(document))
        for name in names_in(code)
        if (problem := problem_of_name(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_in_contributing_are_there() -> None:
    """Its table names modules without their folder where that goes without saying."""
    modules = [PurePosixPath(name).name for name in repository_files() if name.endswith(".py")]
    wrong = [
        f"CONTRIBUTING.md:{line}: there is no module {code}"
        for line, code in code_of(text_of("CONTRIBUTING.md"))
        if re.fullmatch(r"[a-z\d_*]+\.py", code) and not fnmatch.filter(modules, code)
    ]
    assert not wrong, "\n".join(wrong)


# --- That a mistake is found ----------------------------------------------------------------------

TEXT = """# One & two
[a](b.md) ![c](d.png "words") [![e](f.png)](g.md#h "i"
j) [k](l_(m).md), https://n.org/o. `[p](q.md)`

<!-- [r](s.md) -->
```python
t = "[u](v.md)"  # no heading
```
<img alt="w" src="x.png">
[y]: z.md

## One two
## One two
## A `code` and [a link](b.md)
<a id="by-hand"></a>
"""


def test_targets_and_their_lines_are_found() -> None:
    assert targets_of(TEXT) == [
        (2, "b.md"), (2, "d.png"), (2, "f.png"), (2, "g.md#h"),
        (3, "https://n.org/o."), (3, "l_(m).md"), (9, "x.png"), (10, "z.md"), (14, "b.md"),
    ]  # fmt: skip


def test_anchors_are_those_of_github_and_of_mkdocs() -> None:
    shared = {"one-two", "a-code-and-a-link", "by-hand"}
    assert anchors_of(TEXT, github_slug, "-") == shared | {"one--two", "one-two-1"}
    # To Python-Markdown both are "one-two".
    assert anchors_of(TEXT, mkdocs_slug, "_") == shared | {"one-two_1", "one-two_2"}
    toc = pytest.importorskip("markdown.extensions.toc", reason="comes with mkdocs")
    for heading in ("One & two", "K: what it is", "Größe in px, 2 × 3", "a_b - c", "`f(x)`?"):
        assert mkdocs_slug(heading) == toc.slugify(heading, "-")


def test_an_anchor_has_to_be_one_for_both() -> None:
    assert problem_of_anchor("docs/a.md", "by-hand", TEXT) is None
    assert problem_of_anchor("CONTRIBUTING.md", "one--two", TEXT) is None
    assert "on GitHub alone" in str(problem_of_anchor("docs/a.md", "one--two", TEXT))
    assert "on the site of mkdocs alone" in str(problem_of_anchor("docs/a.md", "one-two_1", TEXT))
    assert "has no heading #three" in str(problem_of_anchor("docs/a.md", "three", TEXT))
    entry = "::: evaluation.report\n"
    assert problem_of_anchor("docs/a.md", "evaluation.report.table", entry) is None
    assert "there is no evaluation.report.magic" in str(
        problem_of_anchor("docs/a.md", "evaluation.report.magic", entry)
    )


@pytest.mark.parametrize(
    ("document", "target", "problem"),
    [
        ("README.md", "docs/index.md", None),
        ("README.md", "docs", None),
        ("README.md", "docs/nothing.md", "there is no docs/nothing.md"),
        ("README.md", "#no-such-heading", "README.md has no heading #no-such-heading"),
        ("README.md", "docs/index.md#no-such-heading", "docs/index.md has no heading"),
        ("README.md", "../elsewhere.md", "leads out of the repository"),
        ("README.md", "/docs/index.md", "is an absolute path"),
        ("README.md", "app.py#L3", "app.py has no headings"),
        ("docs/index.md", "../README.md", "leads to no page of the documentation"),
        ("docs/api/optics.md", "../index.md", None),
        ("README.md", "https://example.org/a?b#c", None),
        ("README.md", "http://example.org", "does not begin with https://"),
        ("README.md", "file:///etc/hostname", "does not begin with https://"),
        ("README.md", "//example.org", "does not begin with https://"),
        ("README.md", "https://localhost:7860", "no host that everybody can reach"),
        ("README.md", "https://127.0.0.1/a", "no host that everybody can reach"),
        ("README.md", "https://", "no host that everybody can reach"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(
    document: str, target: str, problem: str | None
) -> None:
    found = problem_of_target(document, target)
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("word", "is_there"),
    [
        ("bokehdiff/optics.py", True),
        ("bokehdiff/", True),
        ("bokehdiff/optics.py:signed_defocus", True),
        ("tests/docs/test_*.py", True),
        ("tests/docs/{one,two}.py", True),
        ("bokehdiff/rendering/NAME.py", True),
        ("photos/cat.jpg", True),
        ("10/20", True),
        ("bokehdiff/optik.py", False),
        ("bokehdiff/nothing_*.py", False),
        ("docs/nothing.md", False),
        ("training/no_such_folder/", False),
    ],
)
def test_a_file_that_is_not_there_is_found(word: str, is_there: bool) -> None:
    assert (problem_of_file("README.md", word) is None) == is_there


def test_names_of_the_library_are_told_from_others() -> None:
    code = "python -m training.finetune bokehdiff.yaml x.training.y a/bokehdiff.b bokehdiff.TINY()"
    assert names_in(code) == ["training.finetune", "bokehdiff.TINY"]


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("bokehdiff.TINY", True),
        ("bokehdiff.BokehDiffPipeline", True),
        ("bokehdiff.optics.signed_defocus", True),
        ("bokehdiff.__version__.split", True),
        ("training.finetune", True),
        ("evaluation.report.magic", False),
        ("bokehdiff.BokehDifPipeline", False),
        ("bokehdiff.__version__.cut", False),
        ("evaluation.no_such_module", False),
    ],
)
def test_a_name_that_is_not_there_is_found(name: str, is_there: bool) -> None:
    assert (problem_of_name(name) is None) == is_there
