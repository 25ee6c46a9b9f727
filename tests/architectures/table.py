"""Write docs/guide/architectures.md: how every causal language model of the installed transformers is routed.

python -m tests.architectures.table
"""

import re
from collections import Counter
from pathlib import Path

import transformers

from tests.architectures.models import MODEL_TYPES
from tests.architectures.survey import Verdict, verdict

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "guide" / "architectures.md"

_HEAD = """# Architectures

How [routing](routing.md) does on every causal language model of transformers {version}, each at its default
configuration. Of {total}, {built} build; {right} of these are right as they are, and {lines} need lines in the recipe.

What is *right* is judged without the router. A forward pass of each model is followed. It shows of a weight which side
is summed over, whether it reads the residual stream or writes to it, where its output is cut, what its heads are,
whether its rows are looked up, and whether experts are chosen by it. Every weight's role, rule and view must agree
with that, by a recipe of each kind of view: `muon`, `olmoe`, and one with `view = "residual"`. Weights that the pass
does not come to, such as those of a vision tower, are judged by the classes of their modules.

A *pattern* is what `route` prints when it refuses a weight, to be checked and pasted into the recipe. Where "by view
`residual`" is added, only recipes that ask for this view need it.

`tests/architectures/table.py` writes this page, and a test compares the two.

| architecture | routing | what is special |
|---|---|---|
"""


def page(*, thorough: bool = False) -> str:
    """Return the page for the installed transformers; see `verdict` for `thorough`, which should change nothing."""
    verdicts = [verdict(model_type, thorough=thorough) for model_type in MODEL_TYPES]
    count = Counter(each.status for each in verdicts)
    head = _HEAD.format(
        version=transformers.__version__,
        total=len(verdicts),
        built=len(verdicts) - count["not built"],
        right=count["right"],
        lines=count["needs a line"],
    )
    rows = (f"| `{each.model_type}` | {_routing(each)} | {'; '.join(each.special)} |\n" for each in verdicts)
    return head + "".join(rows)


def version_of(text: str) -> str:
    """Return the version of transformers that a page is about."""
    found = re.search(r"of transformers (\S+), each", text)
    return found.group(1) if found else ""


def _routing(found: Verdict) -> str:
    match found.status:
        case "not built":
            return f"does not build: {_cell(found.reason)}"
        case "needs a line":
            return f"needs a pattern for {', '.join(found.lines)}"
        case "wrong":
            return f"wrong: {_cell(found.faults[0])}"
    return "right"


def _cell(text: str) -> str:
    """Return a text as one cell: its first sentence or so, with nothing that ends the cell or is taken for a tag."""
    text = text.partition(". ")[0]
    text = text if len(text) <= 120 else f"{text[:117].rstrip()}…"
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    PAGE.write_text(page())
