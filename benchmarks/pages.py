"""Pages of results: prose with marked places.

Between ``<!-- name -->`` and ``<!-- end -->`` stands what is made from data: no result is typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any


def table(head: Iterable[str], body: Iterable[Iterable[Any]]) -> str:
    """Markdown."""
    lines = [list(head), *(list(map(str, row)) for row in body)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(about: dict[str, Any], dtype: str) -> str:
    """Conditions of the run in one sentence."""
    machine, versions = about["machine"], about["versions"]
    return (
        f"Measured in one run of {about['minutes']} minutes on {machine['cores']} cores of "
        f"{machine['cpu']}, {dtype}, SGLang {versions['sglang']}, torch {versions['torch']}, "
        f"commit `{about['commit']}`."
    )


def fill(page: str, places: dict[str, Callable[[], str]]) -> str:
    """The page with every marked place made anew.

    Raises:
        ValueError: a place of the page is unknown, or missing.
    """

    def made(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in places:
            raise ValueError(f"the page marks {name!r}, which nothing fills; remove the mark")
        seen.add(name)
        return f"<!-- {name} -->\n{places[name]()}\n<!-- end -->"

    seen: set[str] = set()
    text = re.sub(r"<!-- ([a-z0-9 ]+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)
    missing = sorted(set(places) - seen)
    if missing:
        raise ValueError(f"the page has no place for {missing[0]!r}; mark one")
    return text
