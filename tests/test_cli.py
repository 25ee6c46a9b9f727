"""The command: tables of what a recipe does, refusals in one line, and a benchmark that anyone can run."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from symdist.tools.baselines import ADAMW, parts
from symdist.tools.cli import main
from symdist.tools.models import build, names
from symdist.tools.preview import Assignment, preview

FULL_SIZE = [("olmoe-1b-7b", 8), ("qwen3-moe-30b-a3b", 8), ("qwen3-moe-30b-a3b", 64)]


def route(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[list[str]], str]:
    """The table's rows as words, and the line of totals."""
    main(["route", *arguments])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    start = next(i for i, line in enumerate(lines) if "───" in line) + 1
    return [line.split() for line in lines[start:-1]], lines[-1]


def by_name(model: str, recipe: str, ranks: int) -> dict[str, Assignment]:
    return {parameter.name: parameter for parameter in preview(model, recipe, mesh={"dp_shard": ranks}).parameters}


@pytest.mark.parametrize("model", [name for name in names() if name.endswith("-tiny")])
def test_every_parameter_has_a_row(capsys: pytest.CaptureFixture[str], model: str) -> None:
    folded, line = route(capsys, "--model", model)
    unfolded, same = route(capsys, "--model", model, "--all")
    assert line == same
    assert f"in {len(unfolded)} parameters" in line
    assert len(folded) < len(unfolded) == sum(int(row[1]) for row in folded)
    assert not any(".*." in row[0] for row in unfolded)


@pytest.mark.parametrize(("model", "ranks"), FULL_SIZE)
def test_full_size(capsys: pytest.CaptureFixture[str], model: str, ranks: int) -> None:
    rows, _ = route(capsys, "--model", model, "--ranks", str(ranks))
    cells = {row[0]: row for row in rows}
    # An expert is whole on one rank; a centred head takes sums over all.
    assert "local" in cells["model.layers.*.mlp.experts.gate_up_proj"]
    assert "reduce" in cells["lm_head.weight"]
    assert {"reduce", "owner"} & {*cells["model.layers.*.mlp.gate.weight"]}


def test_totals_of_a_full_size(capsys: pytest.CaptureFixture[str]) -> None:
    _, line = route(capsys, "--model", "olmoe-1b-7b", "--ranks", "8")
    assert line.startswith("2,824,177,664 weights in 135 parameters, ")


def test_layers_fold_into_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = route(capsys, "--model", "olmoe-tiny")
    query = next(row for row in rows if "q_proj" in row[0])
    assert query[:2] == ["model.layers.*.self_attn.q_proj.weight", "4"]
    assert " ".join(query[2:]) == "128 × 128 attention_q name muon 0.01 4 heads, dim 0 local float32"


def test_set_replaces_options(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--override", "router.rule=left_spectral", "--override", "router.alpha=1.0", "--override", "head.lr=0.2"]
    rows, _ = route(capsys, "--model", "olmoe-tiny", *given, "--override", "attention.view={heads = 2, dim = 0}")
    text = [" ".join(row) for row in rows]
    assert any("router class left_spectral centered alpha=1.0 0.01" in row for row in text)
    assert any("head config row_norm centered 0.2" in row for row in text)
    assert sum("2 heads, dim 0" in row for row in text) == 4


def test_a_model_and_a_recipe_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, recipe = tmp_path / "mine.toml", tmp_path / "flat.toml"
    model.write_text('family = "qwen3"\n[config]\nvocab_size = 96\nhidden_size = 16\nnum_hidden_layers = 1\n')
    recipe.write_text('[default]\nrule = "adamw"\nlr = 0.125\n')
    rows, _ = route(capsys, "--model", str(model), "--recipe", str(recipe), "--ranks", "1")
    assert all("adamw 0.125 as_stored local" in " ".join(row) for row in rows)


def test_a_single_rank_sends_nothing() -> None:
    found = preview("olmoe-tiny", "small-moe", mesh={"dp_shard": 1})
    assert found.collectives == found.sent == 0
    assert {parameter.strategy for parameter in found.parameters} == {"local"}


def test_strategies_follow_the_ranks() -> None:
    # Four heads: whole on two ranks, cut through on eight.
    name = "model.layers.0.self_attn.q_proj.weight"
    assert by_name("olmoe-tiny", "small-moe", 2)[name].strategy == "local"
    assert by_name("olmoe-tiny", "small-moe", 8)[name].strategy == "owner"


def test_any_model_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    rows, line = route(capsys, "--hf", "deepseek_v32", "--ranks", "64", "--override", "router.lr=0.5")
    cells = {row[0]: " ".join(row[1:]) for row in rows}
    assert line.startswith("671,877,929,216 weights in 1214 parameters, ")
    assert cells["model.layers.*.mlp.gate.weight"].startswith("58 256 × 7168 router class left_spectral centered 0.5 ")
    assert cells["model.layers.*.self_attn.q_b_proj.weight"].startswith("61 24576 × 1536 attention_q name muon")


def test_the_table_is_that_of_the_same_model_elsewhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    build("olmoe-tiny", device="meta").config.save_pretrained(tmp_path)
    preset = route(capsys, "--model", "olmoe-tiny")
    assert preset == route(capsys, "--hf", str(tmp_path)) == route(capsys, "--hf", str(tmp_path / "config.json"))


def test_the_table_says_what_told_a_role(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    patterns = ('match = "*.q_proj.weight"\nrole = "matrix"', 'match = "*.up_proj.weight"\nlr = 1.0')
    text = '[default]\nrule = "adamw"\nlr = 0.125\n' + "".join(f"[[patterns]]\n{each}\n" for each in patterns)
    recipe.write_text(text)
    rows, _ = route(capsys, "--hf", "mamba2", "--recipe", "adamw")
    cells = {row[0]: " ".join(row[1:]) for row in rows}
    assert " convolution class adamw" in cells["backbone.layers.*.mixer.conv1d.weight"]
    rows, _ = route(capsys, "--model", "qwen3-tiny", "--recipe", str(recipe))
    cells = {row[0]: " ".join(row[1:]) for row in rows}
    assert " matrix pattern adamw 0.125" in cells["model.layers.*.self_attn.q_proj.weight"]
    # A pattern that changes options alone does not tell a role.
    assert " mlp_up name adamw 1 " in cells["model.layers.*.mlp.up_proj.weight"]


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    """The exit code of `route --check`, and what it prints."""
    code: int | str | None = 0
    try:
        main(["route", "--check", *arguments])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a linear layer and raw matrices that nothing explains, whatever --hf names."""

    def build_odd(source: str) -> torch.nn.Module:
        model = build("olmoe-tiny", device="meta")
        layers = model.model.layers
        layers[1].mystery = torch.nn.Linear(96, 40, bias=False, device="meta")
        for layer in (layers[0], layers[2]):
            layer.register_parameter("riddle[0]", torch.nn.Parameter(torch.empty(96, 40, device="meta")))
        return model

    monkeypatch.setattr("symdist.tools.models.outlines.outline", build_odd)


@pytest.mark.usefixtures("odd")
def test_check_says_what_to_add(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, patterns, said = check(capsys, "--hf", "odd")
    assert code == 3
    assert said.count("\n") == 1
    assert "model.layers.0.riddle[0] (96, 40) has no role" in said
    listed = tomllib.loads(patterns)
    assert set(listed) == {"patterns"}
    assert [each["match"] for each in listed["patterns"]] == ["model.layers.*.riddle[[]0]"]
    # Without --check, the same is refused as anything else is, in a line without the patterns.
    with pytest.raises(SystemExit) as exit:
        main(["route", "--hf", "odd"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == said

    recipe = tmp_path / "mine.toml"
    recipe.write_text('[default]\nrule = "adamw"\nlr = 0.1\n\n' + check(capsys, "--hf", "odd", "--recipe", "adamw")[1])
    code, placed, said = check(capsys, "--hf", "odd", "--recipe", str(recipe))
    assert (code, said) == (0, "")
    assert placed == "# recipe mine has a rule for each of the 50 parameters of odd\n"
    rows, _ = route(capsys, "--hf", "odd", "--recipe", str(recipe))
    assert sum("riddle" in row[0] and "pattern" in row for row in rows) == 1


@pytest.mark.usefixtures("odd")
def test_strict_refuses_what_only_its_type_tells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[default]\nrule = "adamw"\nlr = 0.1\n\n[[patterns]]\nmatch = "*.riddle*"\nrole = "matrix"\n')
    rows, _ = route(capsys, "--hf", "odd", "--recipe", str(recipe))
    assert any("mystery" in row[0] and " matrix type adamw " in " ".join(row) for row in rows)
    assert check(capsys, "--hf", "odd", "--recipe", str(recipe))[0] == 0
    code, patterns, said = check(capsys, "--hf", "odd", "--recipe", str(recipe), "--strict")
    assert code == 3
    assert "model.layers.1.mystery.weight (40, 96)" in said
    assert [each["match"] for each in tomllib.loads(patterns)["patterns"]] == ["model.layers.1.mystery.weight"]


REFUSED = {
    "model": (["--model", "nope"], "no model 'nope'"),
    "recipe": (["--recipe", "nope"], "no recipe 'nope'"),
    "recipe file": (["--recipe", "nope.toml"], "nope.toml does not exist"),
    "model file": (["--model", "nope.toml"], "nope.toml"),
    "option": (["--override", "head.nope=1"], "'head': rule 'row_norm' knows no option 'nope'"),
    "role": (["--override", "nope.lr=1"], "'nope', which is no role"),
    "role named like an argument": (["--override", "model.lr=1"], "'model', which is no role"),
    "rule": (["--override", "head.rule=nope"], "no rule 'nope'"),
    "strategy": (["--override", "embedding.strategy=local"], "cannot run with strategy 'local'"),
    "neither": (["--ranks", "2"], "give either --model with a preset or --hf"),
    "both": (["--model", "olmoe-tiny", "--hf", "llama"], "give either --model with a preset or --hf"),
    "model type": (["--hf", "deepseek_v33"], "no model type of transformers"),
    "cached model": (["--hf", "nobody/nothing"], "download its config.json and give the path"),
    "no language model": (["--hf", "vit"], "vit is no causal language model"),
    "config file": (["--hf", "nope/config.json"], "nope/config.json does not exist"),
    "check": (["--model", "olmoe-tiny", "--check", "--recipe", "nope"], "no recipe 'nope'"),
    "setting": (["--override", "head"], "should be role.option=value"),
    "ranks": (["--ranks", "0"], "ranks=0 must be 1 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, message = REFUSED[case]
    given = {"--model", "--hf"} & {*arguments} or case == "neither"
    with pytest.raises(SystemExit) as exit:
        main(["route", *(() if given else ("--model", "olmoe-tiny")), *arguments])
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_compare_refuses_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["compare", "--recipes", "small-moe", "nope"])
    assert exit.value.code == 2
    assert "no recipe 'nope'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--steps", "0"])
    assert "steps=0 must be 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--ranks", "2", "0"])
    assert "ranks=0 must be 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--against", "torch.optim.SGD"])
    assert "torch.optim.Muon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cards", "ranks", "message"),
    [
        (0, "1", "ranks=1 needs a GPU for each rank, and PyTorch finds 0 here; run on the CPU with --device cpu"),
        (1, "1 4", "ranks=4 needs a GPU for each rank, and PyTorch finds 1 here; give at most --ranks 1, or run on"),
    ],
)
def test_compare_refuses_cards_that_there_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cards: int, ranks: str, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    monkeypatch.setattr("symdist.tools.compare._run", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(SystemExit) as exit:
        main(["compare", "--device", "cuda", "--ranks", *ranks.split()])
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert f"device='cuda' with {message}" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "expected"),
    [(None, ["cuda", "cpu"]), ("auto", ["cuda", "cpu"]), ("cpu", ["cpu", "cpu"]), ("cuda", ["cuda"])],
)
def test_compare_runs_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, device: str | None, expected: list[str]
) -> None:
    started = []

    def run(model: str, ranks: int, device: str, *_: object) -> NoReturn:
        started.append(device)
        raise ValueError("not in this test")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("symdist.tools.compare._run", run)
    for ranks in ("2", "4"):
        with pytest.raises(SystemExit):
            main(["compare", "--recipes", "adamw", "--ranks", ranks, *(["--device", device] if device else [])])
    assert started == expected


def test_a_missing_extra_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit) as exit:
        main(["route", "--model", "olmoe-tiny"])
    assert exit.value.code == 2
    assert "pip install symdist[tools]" in capsys.readouterr().err


def test_the_library_does_not_load_the_command() -> None:
    check = "import sys, symdist; assert not {'tyro', 'rich', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    path = tmp_path / "compare.json"
    sizes = ["--ranks", "1", "2", "--steps", "1", "--batch", "2", "--sequence", "16"]
    main(["compare", "--recipes", "small-moe", "adamw", *sizes, "--json", str(path)])
    printed = capsys.readouterr().out
    alone, found = json.loads(path.read_text())
    assert printed.index("olmoe-tiny, 1 rank (") < printed.index("olmoe-tiny, 2 ranks (")
    assert alone["ranks"] == 1
    # Whatever is started there.
    assert {arm["sent_bytes"] for arm in alone["arms"]} == {0}
    assert [found[key] for key in ("model", "ranks", "steps", "batch", "sequence")] == ["olmoe-tiny", 2, 1, 2, 16]
    arms = {arm["name"]: arm for arm in found["arms"]}
    sources = {"muon-fsdp2": "muon-fsdp2", "dion": "git+https://github.com/microsoft/dion"}
    installed = [name for name in sources if importlib.util.find_spec(name.replace("-", "_"))]
    assert list(arms) == [ADAMW, "torch.optim.Muon", *installed, "all-gather-muon", "small-moe", "adamw"]
    missing = {name: source for name, source in sources.items() if name not in installed}
    assert found["refused"] == {name: f"not installed: pip install {source}" for name, source in missing.items()}
    for name, note in [*((name, arm["note"]) for name, arm in arms.items()), *found["refused"].items()]:
        assert f"{name}: {note}" in printed.splitlines()
        assert printed.count(f"  {name} ") == 2
    first = arms[ADAMW]
    for arm in arms.values():
        assert 0 < arm["optimizer_seconds"] < arm["step_seconds"]
        assert arm["share"] == pytest.approx(arm["optimizer_seconds"] / arm["step_seconds"])
        assert arm["optimizer_ratio"] == pytest.approx(arm["optimizer_seconds"] / first["optimizer_seconds"])
        assert arm["step_ratio"] == pytest.approx(arm["step_seconds"] / first["step_seconds"])
    assert (first["collectives"], first["sent_bytes"]) == (0, 0)
    # What `route` foretells is what is sent.
    foretold = preview("olmoe-tiny", "small-moe", mesh={"dp_shard": 2})
    assert arms["small-moe"]["collectives"] == foretold.collectives <= 12
    assert arms["small-moe"]["sent_bytes"] == foretold.sent
    # Each matrix of four-byte numbers is gathered from halves, in both ways.
    hidden = parts(build("olmoe-tiny", device="meta")).hidden
    whole = 4 * sum(parameter.numel() for parameter in hidden.values())
    assert arms["all-gather-muon"]["collectives"] == len(hidden)
    assert arms["all-gather-muon"]["sent_bytes"] == whole / 2
    # The one sends each matrix there and back, the other all of one shape together, and no stack of experts.
    expected = {"muon-fsdp2": 2 * len(hidden), "dion": 2}
    for name in installed:
        assert arms[name]["collectives"] == expected[name]
    assert arms["torch.optim.Muon"]["sent_bytes"] > 0
    # Momentum alone on nearly every weight, and the same two buffers as PyTorch where the rule is AdamW.
    assert arms["small-moe"]["state_bytes"] < 0.55 * first["state_bytes"]
    assert arms["adamw"]["state_bytes"] == first["state_bytes"]
    assert arms["small-moe"]["peak_bytes"] > arms["adamw"]["peak_bytes"] >= 0
    assert first["state_bytes"] > arms["torch.optim.Muon"]["state_bytes"] > arms["all-gather-muon"]["state_bytes"]
