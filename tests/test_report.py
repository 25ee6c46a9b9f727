"""Reports: folders of runs as a job leaves them at any moment, the page they make, and following them."""

import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bokeh.resources import Resources
from rich.console import Console

from launch.records.run_log import RunLog
from symdist.tools.preview import preview
from symdist.tools.report import follow, live_table, report, run_table, write_page
from symdist.tools.report_curves import panels, smoothed, thin
from symdist.tools.report_page import page, summary_columns
from symdist.tools.run import in_time
from symdist.tools.run_format import EVENTS, LOG, PLAN, ROUTING, RUN, SUMMARY, assignments_of, routing_entries
from symdist.tools.run_log import Reader, read_run, readers

NOW = 1_800_000_000.0
HOSTILE = "</script><script>throw 1</script><!--"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def train(step: int, **more: float) -> dict[str, Any]:
    measures = {"loss": 4 - step / 100, "gradient_norm": 1.5, "tokens_per_second": 1000.0, "optimizer_share": 0.1}
    parts = {"optimizer_ms/local": 2.0, "update_rms/router": 0.1, "update_rms/head": 0.2, "nu/head": 3.0}
    routers = {"router_load_cv": 0.8, "router_dead": 0.125, "mfu": 0.4, "a_measure_of_ones_own": step * 2.0}
    return {"step": step, "kind": "train", **measures, **parts, **routers, **more}


def validation(step: int) -> dict[str, Any]:
    return {"step": step, "kind": "validation", "loss": 3.9, "router_load_cv": 0.75, "router_dead": 0.25}


def lines(steps: int) -> list[dict[str, Any]]:
    return [*map(train, range(1, steps + 1)), validation(steps)]


def dump(objects: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


def facts(**more: Any) -> dict[str, Any]:
    config = {"seed": 42, "output": "somewhere", "recipe": "small-moe", "data": {"source": HOSTILE}}
    numbers = {"steps": 20, "ranks": 2, "tokens_per_step": 100, "parameters": 2_900_000, "active_parameters": 1_700_000}
    return {"model": "olmoe-tiny", "recipe": "small-moe", "launcher": "fsdp2", **numbers, "config": config, **more}


def write(folder: Path, log: str, **files: Any) -> Path:
    """A run's folder; `files` by the names of their constants."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).write_text(log)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    os.utime(folder / LOG, (NOW, NOW))
    return folder


def summary(steps: int = 20) -> dict[str, Any]:
    found = {"model": "olmoe-tiny", "recipe": "small-moe", "steps": steps, "ranks": 2, "tokens": steps * 100}
    return {**found, "tokens_per_second": 990.0, "optimizer_share": 0.12, "validation_loss": 3.81}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    routing = [asdict(each) for each in preview("olmoe-tiny", "small-moe", mesh={"dp_shard": 2}).parameters]
    kinds = [{"kind": "all_reduce", "ranks": 2, "count": 3, "sent": 5_000_000}]
    roles = [{"role": "head", "rules": ["row_norm"], "parameters": 1, "weights": 99, "strategies": {"reduce": 1}}]
    plan = {"collectives": 7, "sent": 1.5e6, "waves": 2, "kinds": kinds, "roles": roles}
    folder = write(tmp_path / "done", dump(lines(20)), summary=summary(), run=facts(), routing=routing, plan=plan)
    events = [
        {"time": NOW, "step": 0, "event": "start", "text": "started on 2 ranks"},
        {"time": NOW + 5, "step": 12, "event": "spike", "text": f"a spike {HOSTILE}"},
    ]
    (folder / EVENTS).write_text(dump(events))
    return folder


@pytest.fixture
def running(tmp_path: Path) -> Path:
    return write(tmp_path / "going", dump(lines(8)) + '{"step": 9, "ki', run=facts(recipe="muon"))


def shown(text: str) -> tuple[bool, int]:
    """Whether a page reloads itself, and the last step of its second run, or of its only one."""
    return "<body data-every=" in text, int(re.findall(r"<td class=n>(\d+) of ", text)[-1])


def printed(*parts: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


def test_a_run_is_read(finished: Path) -> None:
    run = read_run(finished)
    assert (run.name, run.last_step, run.steps, run.tokens_per_step) == ("done", 20, 20, 100)
    assert run.finished
    assert run.state(NOW).text == "finished"
    assert run.curve("validation", "loss") == ([2000.0], [3.9])
    assert run.figure("loss", "validation") == 3.81
    # 100 tokens a step at 1000 a second.
    assert run.clock[1][-1] == pytest.approx(2.0)
    assert [event["event"] for event in run.events] == ["start", "spike"]


def test_what_a_run_writes_is_read(tmp_path: Path) -> None:
    log = RunLog(tmp_path, steps=3, write=True)
    log.begin(None)
    for step in (1, 2, 3):
        log.step(step, "train", {"loss": 4.0 - step})
    log.event(3, "rollback", "back to step 2")
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 2, "ki')
    # A run that continues from a step keeps the lines up to it, and drops an incomplete one.
    log.begin(2)
    log.step(3, "train", {"loss": math.inf})
    parameters = preview("olmoe-tiny", "small-moe", mesh={"dp_shard": 2}).parameters
    log.describe({RUN: facts(steps=3), ROUTING: routing_entries(parameters)})
    log.finish(summary(3))
    run = read_run(tmp_path)
    assert run.curve("train", "loss") == ([100, 200, 300], [3.0, 2.0, math.inf])
    assert [(event["step"], event["event"], event["text"]) for event in run.events] == [
        (3, "rollback", "back to step 2")
    ]
    assert run.routing is not None
    assert assignments_of(run.routing) == parameters
    assert run.finished


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no log\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no run given"):
        report([], output=tmp_path / "page.html")


def test_only_the_last_line_may_be_torn(running: Path) -> None:
    run = read_run(running)
    assert (run.last_step, run.problems) == (8, [])
    (running / LOG).write_text(dump(lines(2)) + '{"step": 3, "k\n' + dump([train(4)]))
    run = read_run(running)
    assert run.curve("train", "loss")[0] == [100, 200, 400]
    (problem,) = run.problems
    assert (
        problem == 'log.jsonl has 1 line that is not of its form and left out, the first of them line 4: {"step": 3, "k'
    )
    assert f"going: {html.escape(problem)}." in page([run], live=False, every=0, now=NOW)
    for bad in ("[1]\n", '{"kind": "train"}\n', '{"step": 1.5, "kind": "train"}\n'):
        (running / LOG).write_text(dump(lines(2)) + 2 * bad)
        assert (
            "has 2 lines that are not of its form and left out, the first of them line 4"
            in read_run(running).problems[0]
        )
    # Only its newline is missing.
    (running / LOG).write_text(dump([train(1)]) + json.dumps(train(2)))
    assert read_run(running).last_step == 2


def test_torn_events_are_counted(finished: Path) -> None:
    with (finished / EVENTS).open("a") as file:
        file.write('{"time": 1, "st\n' + dump([{"time": NOW, "step": 20, "event": "finish", "text": "done"}]) + '{"ti')
    run = read_run(finished)
    assert run.events[-1]["event"] == "finish"
    assert "events.jsonl has 1 line that is not" in page([run], live=False, every=0, now=NOW)


def test_states(running: Path) -> None:
    run = read_run(running)
    assert run.state(NOW + 12).text == "running, last line 12 s ago"
    assert run.state(NOW + 7200).text == "stopped, last line 2 h ago"
    (running / EVENTS).write_text(dump([{"time": NOW + 1, "step": 8, "event": "stop", "text": "told to stop"}]))
    assert read_run(running).state(NOW + 31).text == "stopped 30 s ago (by a signal)"
    with (running / EVENTS).open("a") as file:
        file.write(dump([{"time": NOW + 2, "step": 8, "event": "resume", "text": "resumed"}]))
    os.utime(running / EVENTS, (NOW + 2, NOW + 2))
    assert read_run(running).state(NOW + 30).kind == "running"
    empty = write(running.parent / "empty", "")
    assert read_run(empty).state(NOW + 60).text == "starting, for 1 min"
    assert "starting" in page([read_run(empty)], live=True, every=5, now=NOW + 60)


def test_a_finished_run_resumed_for_more_steps_is_running(finished: Path) -> None:
    (finished / RUN).write_text(json.dumps(facts(steps=40)))
    run = read_run(finished)
    assert not run.finished
    # The figures are those of the lines again.
    assert run.figure("loss", "validation") == 3.9


@pytest.mark.parametrize("name", [SUMMARY, RUN, ROUTING, PLAN])
def test_a_file_just_being_written_is_waited_for(finished: Path, name: str) -> None:
    reader = Reader(finished)
    before = reader.read()
    assert reader.read() is before
    whole = (finished / name).read_text()
    (finished / name).write_text(whole[: len(whole) // 2])
    assert reader.read() is before
    os.utime(finished / name, (NOW - 1e9, NOW - 1e9))
    after = reader.read()
    assert re.fullmatch(f"{name} cannot be read: .*; it is left out", after.problems[0])
    assert (after.last_step, after.name) == (before.last_step, before.name)
    (finished / name).write_text(whole)
    assert reader.read().problems == []


def test_only_what_is_new_is_read(running: Path) -> None:
    reader = Reader(running)
    first = reader.read()
    with (running / LOG).open("a") as file:
        file.write('nd": "train", "loss": 1.0}\n{"step": 10')
    second = reader.read()
    assert (first.last_step, second.last_step) == (8, 9)
    assert second.lines["train"][0] is first.lines["train"][0]
    assert second.last("train", "loss") == 1.0


def cut_short(path: Path) -> None:
    path.write_text(dump(lines(3)))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_text(dump(lines(3)))
    os.replace(other, path)


def grown_again(path: Path) -> None:
    path.write_text(dump([train(step, loss=9.0) for step in (1, 2, 3)]) + " " * 5000 + "\n")


@pytest.mark.parametrize("rewrite", [cut_short, replaced, grown_again])
def test_a_log_written_anew_is_read_afresh(running: Path, rewrite: Callable[[Path], None]) -> None:
    reader = Reader(running)
    assert reader.read().last_step == 8
    rewrite(running / LOG)
    assert reader.read().last_step == 3
    assert len(reader.read().lines["train"]) == 3


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / at, dump(lines(1))) for at in ("x/a", "y/a", "x/b")]
    assert [reader.name for reader in readers([*folders, folders[2]])] == ["x/a", "y/a", "b", "b (2)"]


def test_tables(finished: Path, running: Path) -> None:
    runs = [read_run(finished), read_run(running)]
    columns = {column.heading: column.cells for column in summary_columns(runs, NOW + 60)}
    assert columns["state"] == ("finished", "running, last line 1 min ago")
    assert columns["step"] == ("20 of 20", "8 of 20")
    assert columns["validation loss"] == ("3.810", "3.900")
    assert columns["dead experts"] == ("25%", "25%")
    assert "skipped" not in columns
    text = printed(run_table(runs, NOW), live_table(runs, NOW))
    assert "2.9 M parameters (1.7 M active), 2 k tokens, 2 ranks" in text
    # Twelve steps of 100 tokens at 1000 a second.
    assert re.search(r"going .*8 of 20 .*3\.920 .*1,000 +1 s +0\.80", text)
    assert f"spike: a spike {HOSTILE}" in text


def test_the_page_holds_everything(finished: Path, running: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "deep" / "page.html", tmp_path / "curves.png"
    result = report([finished, running], output=output, picture=picture)
    assert result[1:] == [f"page: {output}", f"picture: {picture}"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not [each for each in output.parent.iterdir() if each != output]
    text = output.read_text()
    # What Bokeh brings names addresses; the policy keeps it from loading anything.
    assert "default-src 'none'" in text
    own = text.replace(Resources(mode="inline", components=["bokeh"]).render_js(), "")
    assert len(text) - len(own) > 1e6
    for foreign in (r"https?://", r"\bsrc=", r"@import", r"url\((?!#)", r"\bfetch\("):
        assert not re.search(foreign, own), foreign
    assert own.count("<script") == own.count("</script") == 1
    assert HOSTILE not in text
    assert html.escape(HOSTILE) in text
    # The layers of olmoe-tiny are one row; only what differs is set side by side.
    assert "<td>model.layers.*.self_attn.q_proj.weight</td><td>4</td>" in text
    assert "starts 7 collectives in 2 waves and sends 1.5 MB" in text
    differing = text[text.index("Where the runs differ") : text.index('<details id="config-0"')]
    assert re.findall(r"<tr><td>(.*?)</td>", differing) == ["recipe"]
    assert "somewhere" in text


def test_panels(finished: Path, running: Path) -> None:
    drawn = {panel.plot.title.text: panel for panel in panels([read_run(finished), read_run(running)])[0]}
    assert drawn["A measure of ones own"].group == "Other"
    assert drawn["RMS of updates: going"].parts == ["router", "head"]
    assert {title: panel.split for title, panel in drawn.items() if title.startswith("ν")} == {
        "ν: done": "run",
        "ν: going": "run",
        "ν: head": "part",
    }
    # A line and dots for each run.
    assert len(drawn["Validation loss"].plot.renderers) == 4
    logged = {key.split("/")[0] for key in train(1)} - {"step", "kind"}
    assert len({title.split(":")[0] for title in drawn}) == len(logged) + 1
    loss = drawn["Loss, nats a token"].plot
    (marks,) = (line.data_source.data for line in loss.renderers if "event" in line.data_source.data)
    assert (marks["step"][1], marks["tokens"][1], marks["event"][1]) == (12, 1200, "spike")
    assert marks["text"][1] == f"a spike {HOSTILE}"
    points = loss.renderers[0].data_source.data
    assert points["tokens"].tolist() == list(range(100, 2001, 100))
    # 100 tokens a step at 1000 a second.
    assert points["time"][-1] == pytest.approx(2.0)


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    values = [3.0, math.nan, math.inf, 2.0]
    log = dump([train(i + 1, loss=value) for i, value in enumerate(values)])
    assert "NaN" in log
    # The run goes back to a step that it had before.
    run = read_run(write(tmp_path / "run", log + dump([train(3, loss=1.0)])))
    points = panels([run])[0][0].plot.renderers[0].data_source.data
    assert points["step"].tolist() == [1, 2, 3, 4, 3, 3]
    np.testing.assert_array_equal(points["0"], [3, math.nan, math.nan, 2, math.nan, 1])
    np.testing.assert_array_equal(np.isnan(points["0.9"]), np.isnan(points["0"]))
    run_table([run], NOW)


def test_thinning_keeps_extremes_ends_and_gaps() -> None:
    values = np.arange(1001.0) % 7
    values[[333, 500, 700]] = 99.0, math.nan, -99.0
    kept = thin(values, 20)
    assert len(kept) < 110
    assert {0, 333, 500, 700, 1000} <= set(kept)
    assert kept.tolist() == sorted(set(kept))
    assert thin(values, 0).tolist() == list(range(1001))


def test_smoothing_does_not_hang_on_how_often_is_logged() -> None:
    steps = np.arange(1, 2001)
    values = np.sin(steps / 200)
    often, seldom = smoothed(steps, values, 0.9, 10), smoothed(steps[9::10], values[9::10], 0.9, 10)
    assert often[0] == values[0]
    np.testing.assert_allclose(often[9::10], seldom, atol=0.05)


def test_a_page_of_many_long_runs_stays_small(tmp_path: Path) -> None:
    roles = {f"{measure}/{i}": 0.123456789 * i for measure in ("update_rms", "weight_rms", "nu") for i in range(8)}
    log = dump([train(step, **roles, loss=math.sin(step)) for step in range(1, 5001)])
    runs = [read_run(write(tmp_path / str(i), log), name=str(i)) for i in range(10)]
    text = page(runs, live=False, every=0, now=NOW)
    assert len(text) < 4e6
    assert "Long curves are thinned" in text


def test_following_ends_with_the_runs(finished: Path, running: Path, tmp_path: Path) -> None:
    output, seen = tmp_path / "page.html", []

    def ended() -> bool:
        seen.append(shown(output.read_text()))
        # A reading later the log has grown; then the run is over.
        if seen[-1][1] == 8:
            (running / LOG).write_text(dump(lines(9)))
        else:
            (running / SUMMARY).write_text(json.dumps(summary(9)))
            (running / RUN).write_text(json.dumps(facts(steps=9)))
        return False

    console = Console(file=io.StringIO())
    result = follow([finished, running], output=output, every=0.05, stop=ended, console=console)
    assert {(True, 8), (True, 9)} <= set(seen)
    assert "9 of 9" in printed(result[0])
    assert shown(output.read_text()) == (False, 9)


def test_following_is_left_at_any_time(running: Path, tmp_path: Path) -> None:
    output, ended = tmp_path / "page.html", threading.Event()
    console = Console(file=io.StringIO())
    threading.Timer(0.3, ended.set).start()
    began = time.monotonic()
    follow([running], output=output, every=600, stop=ended.is_set, console=console)
    assert time.monotonic() - began < 30
    assert not shown(output.read_text())[0]

    def interrupted() -> bool:
        assert shown(output.read_text())[0]
        raise KeyboardInterrupt

    assert follow([running], output=output, every=600, stop=interrupted, console=console)
    assert not shown(output.read_text())[0]
    with pytest.raises(ValueError, match="every=0 must be positive"):
        follow([running], output=output, every=0)


def test_a_page_is_written_whole_or_not_at_all(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "pages" / "page.html"
    output.parent.mkdir()
    output.write_text("before")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_page([read_run(finished)], output, live=False, every=0, now=NOW)
    assert [(each.name, each.read_text()) for each in output.parent.iterdir()] == [("page.html", "before")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3599.7, "1 h"), (7260, "2 h 1 min"), (90000, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to load the page in")
@pytest.mark.parametrize("live", [False, True])
def test_a_browser_draws_the_page(finished: Path, running: Path, tmp_path: Path, live: bool) -> None:
    (running / LOG).write_text(dump([*lines(8), train(9, loss=math.nan), train(10)]))
    output = tmp_path / "page.html"
    write_page([read_run(finished), read_run(running)], output, live=live, every=600, now=NOW)
    # Beside the page's own script, one that uses each control and writes down what the first plot shows then.
    output.write_text(output.read_text().replace("</body>", f"<script>{_USE}</script></body>"))
    quiet = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
    more = ("--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}")
    more += ("--enable-logging=stderr", "--window-size=1300,1000", "--remote-debugging-port=0")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", *quiet, *more, output.as_uri()]
    states: list[dict[str, Any]] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
        assert browser.stderr
        limit = threading.Timer(240, browser.kill)
        limit.start()
        for line in browser.stderr:
            assert "Uncaught" not in line
            assert "Content Security Policy" not in line
            if state := re.search(r'"STATE (.*)", source:', line):
                states.append(json.loads(state[1]))
            if len(states) == 5:
                break
        limit.cancel()
        browser.terminate()
    first, log, tokens, smooth, hidden = states
    assert first["painted"] > 50
    assert (first["scale"], log["scale"]) == ("LinearScale", "LogScale")
    assert first["x"][1] == pytest.approx(20, rel=0.15)
    assert tokens["x"][1] == pytest.approx(2000, rel=0.15)
    assert smooth["y"] == ["0", "0.9"]
    # The hidden run's own panels of optimizer_ms, update_rms and nu.
    assert first["plots"] - hidden["plots"] == 3
    assert (first["lines"], hidden["lines"]) == (6, 3)
    assert 'aria-label="Loss, nats a token' in output.read_text()


_USE = """
(async () => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  while (!document.documentElement.dataset.ready) await pause(50);
  const form = document.forms.controls;
  const tell = async () => {
    const plot = Bokeh.documents[0].roots()[0];
    await pause(200);
    // Axes are fitted in frames, which a busy machine may be late with.
    for (let i = 0; i < 200 && (plot.x_range.end > 1000) !== (form.axis.value === "tokens"); i++) await pause(50);
    const lines = plot.renderers.filter((line) => line.glyph.type === "Line" && line.visible);
    const { canvas } = [...Bokeh.index].find((view) => view.model === plot).export("auto");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let painted = 0;
    // Pixels of about the first run's color.
    for (let i = 0; i < data.length; i += 4) painted += data[i] < 120 && data[i + 2] > data[i] + 90;
    console.log("STATE " + JSON.stringify({
      scale: plot.y_scale.type, x: [plot.x_range.start, plot.x_range.end],
      y: [...new Set(lines.map((line) => line.glyph.y.field))], lines: lines.length,
      painted, plots: document.querySelectorAll(".plot:not([hidden])").length,
    }));
  };
  const change = async (field, key, value) => {
    field[key] = value;
    field.dispatchEvent(new Event("change", { bubbles: true }));
    await tell();
  };
  await tell();
  await change(form.log, "checked", true);
  await change(form.axis[1], "checked", true);
  await change(form.smooth, "value", "0.9");
  await change(form.run[1], "checked", false);
})();
"""
