"""Whatever lies in the folder of a run, the report shows what can be shown, and says what it leaves out."""

import html
import io
import json
import math
import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from bokeh.resources import Resources

from symdist.tools.cli import main
from symdist.tools.report import live_table
from symdist.tools.run_format import EVENTS, LOG, PLAN, ROUTING, RUN, SUMMARY
from symdist.tools.run_log import Reader
from symdist.tools.tables import plain_console
from tests.attacks.hostile import attack, one_line, outcome, spoilt

NOW = 1_800_000_000.0
BOKEH = Resources(mode="inline", components=["bokeh"]).render_js()
FILES = (LOG, EVENTS, RUN, ROUTING, PLAN, SUMMARY)
LINE = {"step": 1, "kind": "train", "loss": 3.5, "tokens_per_second": 1000.0, "update_rms/router": 0.1}
TABLES: dict[str, dict[str, Any]] = {
    EVENTS: {"time": NOW, "step": 1, "event": "spike", "text": "a spike"},
    RUN: {
        **{"model": "olmoe-tiny", "recipe": "muon", "launcher": "fsdp2", "mesh": {"dp_shard": 2}, "started": NOW},
        **{"steps": 20, "ranks": 2, "tokens_per_step": 100, "parameters": 2_900_000, "active_parameters": 1_700_000},
        **{"config": {"seed": 42, "data": {"source": "stdlib"}}, "versions": {"torch": "2.9"}, "device": "cpu"},
    },
    ROUTING: {
        **{"name": "head.weight", "shape": [8, 4], "role": "head", "rule": "row_norm", "options": {"centered": True}},
        **{"lr": 0.1, "view": {"heads": 2, "dim": 0}, "strategy": "reduce", "precision": "float32"},
    },
    PLAN: {
        **{"collectives": 7, "sent": 1.5e6, "waves": 2},
        "kinds": [{"kind": "all_reduce", "ranks": 2, "count": 3, "sent": 5_000_000}],
        "roles": [{"role": "head", "rules": ["muon"], "parameters": 1, "weights": 9, "strategies": {"reduce": 1}}],
    },
    SUMMARY: {
        **{"model": "olmoe-tiny", "recipe": "muon", "steps": 20, "ranks": 2, "tokens": 2000, "parameters": 2_900_000},
        **{"tokens_per_second": 990.0, "optimizer_share": 0.12, "validation_loss": 3.81, "mfu": 0.4},
    },
}


def write(folder: Path, name: str, content: Any) -> None:
    """A file of a run, as a job writes it."""
    if name in (LOG, EVENTS):
        (folder / name).write_text("".join(json.dumps(line, default=str) + "\n" for line in content))
    else:
        (folder / name).write_text(json.dumps([content] if name == ROUTING else content, default=str))


def run(folder: Path) -> Path:
    """The folder of a run that is over."""
    folder.mkdir(parents=True)
    write(folder, LOG, [{**LINE, "step": step} for step in (10, 20)])
    write(folder, EVENTS, [TABLES[EVENTS]])
    for name in (RUN, ROUTING, PLAN, SUMMARY):
        write(folder, name, TABLES[name])
    return folder


def as_folder(path: Path) -> None:
    path.mkdir()


def as_loop(path: Path) -> None:
    path.symlink_to(path)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_nothing(path: Path) -> None:
    pass


CONTENTS: dict[str, bytes | Callable[[Path], None]] = {
    "empty": b"",
    "blank": b" \n\n\t\r\n\n",
    "NULs": b"\0" * 10_000 + b"\n",
    "binary": bytes(range(256)) * 8 + b"\n",
    "not UTF-8": b'{"step": 1, "kind": "\xff\xfe", "text": "\xc3\x28"}\n',
    "deep lists": b"[" * 100_000 + b"\n",
    "deep tables": b'{"config": ' * 100 + b"1" + b"}" * 100 + b"\n",
    "another type": b'"text"\n',
    "null": b"null\n[]\n5\n",
    "cut short": b'{"step": 3, "kind": "tr',
    "a line of 10 MB": b'{"step": 3, "kind": "train", "text": "' + b"x" * 10_000_000 + b'"}\n',
    "halves of characters": rb'{"step": 3, "kind": "\ud800", "event": "\udc80", "text": "\ud800", "model": "\ud800"}'
    + b"\n",
    "escapes": rb'{"step": 3, "kind": "\u001b[31m", "event": "\u202e", "text": "[/x]\u0007\r\u009b", "model": "[/x]"}'
    + b"\n",
    "a folder": as_folder,
    "a pipe": os.mkfifo,
    "a link to itself": as_loop,
    "a device": as_device,
    "nothing": as_nothing,
}


# What is nothing to speak of: a file that is not there, or a log whose last line is being written.
FINE = {(name, "nothing") for name in FILES if name != LOG}
FINE |= {(name, content) for name in (LOG, EVENTS) for content in ("empty", "blank", "cut short")}
# Texts are shown with escapes, and shortened.
FINE |= {(name, "a line of 10 MB") for name in (RUN, SUMMARY)}
FINE |= {(name, "escapes") for name in (LOG, EVENTS, RUN, SUMMARY)}
FINE |= {(name, "halves of characters") for name in (LOG, EVENTS, RUN, SUMMARY)}


def reported(folder: Path, tmp_path: Path) -> str:
    """Report on a run beside one that is whole; what was printed, or the one line of a refusal."""
    page, printed = tmp_path / "page.html", io.StringIO()
    page.unlink(missing_ok=True)
    names = [str(folder), str(tmp_path / "whole"), "--output", str(page), "--picture", str(tmp_path / "picture.png")]

    def program() -> None:
        try:
            with redirect_stdout(printed):
                main(["report", *names])
        finally:
            print(printed.getvalue())

    error = outcome(program, tmp_path)
    one_line(error)
    if error:
        return error
    text = page.read_text()
    own = text.replace(BOKEH, "")
    assert own.count("<script") == own.count("</script") == 1
    assert re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", own.partition("<script")[0]) is None
    found = Reader(folder).read()
    with redirect_stdout(io.StringIO()):
        plain_console(width=200).print(live_table([found], NOW))
    for problem in found.problems:
        assert html.escape(problem) in own
        assert problem in printed.getvalue()
    return printed.getvalue()


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", FILES)
def test_any_file(tmp_path: Path, name: str, content: str) -> None:
    run(tmp_path / "whole")
    path = run(tmp_path / "spoilt") / name
    path.unlink()
    written = CONTENTS[content]
    if isinstance(written, bytes):
        path.write_bytes(written)
        os.utime(path, (NOW - 1e9, NOW - 1e9))
    else:
        written(path)
    text = reported(path.parent, tmp_path)
    assert text.startswith("symdist: ") == (name == LOG and not (isinstance(written, bytes)))
    assert (name in text) == ((name, content) not in FINE)


WRONG: list[Any] = [
    *(
        "text",
        "",
        None,
        True,
        [],
        {},
        [1],
        {"a": {}},
        -1,
        0,
        1.5,
        10**400,
        -(10**400),
        2**63,
        2**53,
        1e300,
        -1e300,
        1e-320,
    ),
    *(math.nan, math.inf, -math.inf, "[/x]\x1b[31m", "\ud800", "</script><script>throw 1</script><!--", "x" * 100_000),
]


@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_any_value_of_a_measure(tmp_path: Path, wrong: int) -> None:
    run(tmp_path / "whole")
    folder, value = run(tmp_path / "spoilt"), WRONG[wrong]
    lines = [LINE, *({**LINE, "step": 3, key: value} for key in LINE), {**LINE, "step": 2}, {**LINE, str(value): value}]
    write(folder, LOG, [*lines, {"step": 20, "kind": "train", "loss": 3.0}])
    bad = (type(value) is not int or not 0 <= value < 2**31) + (type(value) is not str)
    text = reported(folder, tmp_path)
    assert ("", "has 1 line that is not", "has 2 lines that are not")[bad] in text
    assert bad or "left out" not in text
    assert Reader(folder).read().last_step >= 20


@pytest.mark.parametrize("wrong", range(len(WRONG)))
@pytest.mark.parametrize("name", [EVENTS, RUN, ROUTING, PLAN, SUMMARY])
def test_any_value_of_a_file(tmp_path: Path, name: str, wrong: int) -> None:
    """Each of its values is wrong once, each in a run of its own."""
    tables = [{**TABLES[name], key: WRONG[wrong]} for key in TABLES[name]]
    run(tmp_path / "whole")
    folders = []
    for i, table in enumerate(tables):
        folders.append(run(tmp_path / f"spoilt {i}"))
        write(folders[-1], name, [table] if name == EVENTS else table)
    page = tmp_path / "page.html"
    one_line(outcome(lambda: main(["report", *map(str, folders), "--output", str(page)]), tmp_path))
    assert page.exists()
    assert "throw 1</script>" not in page.read_text()


@pytest.mark.parametrize("batch", range(3))
@pytest.mark.parametrize("name", [EVENTS, RUN, ROUTING, PLAN, SUMMARY])
def test_files_by_chance(tmp_path: Path, name: str, batch: int) -> None:
    run(tmp_path / "whole")
    folder = run(tmp_path / "spoilt")

    def check(table: dict[str, Any]) -> None:
        write(folder, name, [table] if name == EVENTS else table)
        os.utime(folder / name, (NOW - 1e9, NOW - 1e9))
        assert not reported(folder, tmp_path).startswith("symdist: ")

    attack(spoilt(TABLES[name]), check, batch=batch, cases=5)


def test_measures_without_end(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    folder = run(tmp_path / "spoilt")
    write(folder, LOG, [{**LINE, **{f"measure {i}/{k}": 1.0 for i in range(100) for k in range(20)}}])
    assert "spoilt" in reported(folder, tmp_path)
    assert "the first 400 of 2,003 measures are drawn" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "name", ["[/x]", "[bold red]", "$x_{$", "_hidden", ":x:", "\x1b[31m", "\u202eabc", "a\nb", "é" * 80]
)
def test_any_name_of_a_run(tmp_path: Path, name: str) -> None:
    run(tmp_path / "whole")
    text = reported(run(tmp_path / name), tmp_path)
    last = name.rpartition("/")[2]
    shown = last if last.isprintable() else last.encode("unicode_escape").decode()
    # A long name is wrapped.
    assert shown in text or len(shown) > 50
