"""What the documents print runs as printed, and what they say of the code is so."""

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import CONFIG_MAPPING

from launch.engines.deepspeed.config import DeepSpeedRun
from launch.engines.fsdp.config import FsdpRun
from launch.engines.megatron.config import MegatronRun
from launch.loop.config import Config, parse_as
from launch.study.plan import parse as parse_study
from symdist import SymDist, build_optimizer, route
from symdist.routing.recipes import load, load_recipe, parse_overrides, recipe_names
from symdist.routing.roles import FALLBACK
from symdist.rules import get_rule, registry, rule_names
from symdist.tools.cli import Plan, Route, _parse
from symdist.tools.megatron import MegatronMesh
from symdist.tools.models import build, names
from symdist.tools.plan import parse_mesh
from tests import docs_ranks, sharded
from tests.ranks import Ranks
from tests.trainers import trainer_ranks

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
FOLDERS = [f"{folder}/README.md" for folder in ("symdist", "integrations", "launch", "tests", "docs")]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *dict.fromkeys([*FOLDERS, *PAGES])]
RULE, LAYOUT = "docs/develop/add-a-rule.md", "docs/develop/add-a-layout.md"
ENTRIES: dict[str, type[Config]] = {
    "launch.pretrain": FsdpRun,
    "launch.pretrain_deepspeed": DeepSpeedRun,
    "launch.pretrain_megatron": MegatronRun,
}


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.S)


def printed(language: str) -> list[Any]:
    """Every block of a language, with its document."""
    return [
        pytest.param(document, block, id=f"{document}-{i}")
        for document in DOCUMENTS
        for i, block in enumerate(blocks(document, language))
    ]


# Where printed Python runs: each kind by the first word below that it has.
def where(document: str, code: str) -> str:
    """The test that runs a block of Python."""
    for word, kind in (
        ("deepspeed.", "tests/symdist_deepspeed/test_readme.py"),
        ("symdist_megatron", "megatron"),
        ("accelerator.", "trainers"),
        ("Trainer(", "trainers"),
        ("from tests", "tests"),
        ("fully_shard", "ranks"),
        ("FullyShardedDataParallel", "ranks"),
        ("init_device_mesh", "ranks"),
        ("pipeline_group", "ranks"),
        ("dcp.", "ranks"),
    ):
        if word in code:
            return kind
    return {RULE: "a rule", LAYOUT: "a layout"}.get(document, "alone")


def python(kind: str) -> list[Any]:
    """The blocks of Python that a test runs."""
    return [case for case in printed("python") if where(*case.values) == kind]


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that a test registers are forgotten after it."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(load, "_LOADED", set())


@pytest.mark.parametrize(("document", "code"), python("alone"))
def test_python_runs(document: str, code: str) -> None:
    given = {
        name: [nn.Parameter(torch.zeros(shape))]
        for name, shape in (("matrices", (3, 4)), ("rest", 3), ("more", (3, 2)))
    }
    model = docs_ranks.model_and_tokens()
    optimizer = build_optimizer(model["model"], "olmoe")
    before = {name: weight.detach().clone() for name, weight in model["model"].named_parameters()}
    weights = {"q_proj": nn.Parameter(torch.zeros(8, 6)), "qkv_proj": nn.Parameter(torch.zeros(48, 6))}
    space = docs_ranks.execute(code, {**model, **given, "optimizer": optimizer, **weights})
    assert isinstance(space["optimizer"], SymDist)
    if "optimizer.step()" in code:
        moved = [name for name, weight in model["model"].named_parameters() if not torch.equal(weight, before[name])]
        assert bool(moved) is ("skip_next_step" not in code)


@pytest.mark.parametrize(("document", "code"), python("ranks"))
def test_python_runs_on_ranks(document: str, code: str, ranks: Ranks, tmp_path: Path) -> None:
    assert all(ranks.run(4, docs_ranks.printed, code, str(tmp_path)))


@pytest.mark.parametrize(("document", "code"), python("trainers"))
def test_python_runs_under_trainers(document: str, code: str, tmp_path: Path) -> None:
    model = docs_ranks.model_and_tokens()["model"]
    with trainer_ranks.launched():
        arguments = trainer_ranks.arguments_of(str(tmp_path))
        given = {"model": model, "accelerator": Accelerator(cpu=True), "arguments": arguments}
        space = docs_ranks.execute(code, {**given, "dataset": trainer_ranks.Rows()})
        if "trainer" in space:
            optimizer = space["trainer"].create_optimizer()
        else:
            optimizer = space["optimizer"].optimizer
    assert isinstance(optimizer, SymDist)


@pytest.mark.parametrize(("document", "code"), python("megatron"))
def test_megatrons_calls_are_those_of_the_adapter(document: str, code: str) -> None:
    """Names and keywords alone, for the real package needs process groups; tests/symdist_megatron drive it."""
    functions: dict[str, ast.FunctionDef] = {}
    for path in (ROOT / "integrations/symdist_megatron").glob("*.py"):
        functions |= {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert calls
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        arguments = functions[call.func.attr].args
        assert {keyword.arg for keyword in call.keywords} <= {argument.arg for argument in arguments.kwonlyargs}
        assert len(call.args) == len(arguments.args)


@pytest.mark.parametrize(("document", "code"), python("tests"))
def test_the_printed_test_passes(document: str, code: str, ranks: Ranks) -> None:
    space: dict[str, Any] = {}
    exec(code, space)
    (test,) = (value for name, value in space.items() if name.startswith("test_"))
    test(ranks)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.usefixtures("own_rules")
def test_a_rule_of_your_own(index: int, tmp_path: Path, ranks: Ranks) -> None:
    """The two files as printed: one process, three ranks, and a plan take them by the recipe's path."""
    codes, (recipe,) = blocks(RULE, "python"), blocks(RULE, "toml")
    code = codes[index]
    (name,) = re.findall(r'@rule\("(\w+)"', code)
    assert len(codes) == 2
    assert len(code.strip().splitlines()) < 12
    (tmp_path / "my_rules.py").write_text(code)
    (tmp_path / "mine.toml").write_text(recipe.replace("rms_rows", name))
    expected = sharded.trained_by(None, str(tmp_path / "mine.toml"))
    assert any((weight - start).norm() > 0.01 for weight, start in zip(expected[-1], expected[0], strict=True))
    for found in ranks.run(3, sharded.trained_by, str(tmp_path / "mine.toml")):
        for weights, wanted in zip(found, expected, strict=True):
            assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(weights, wanted, strict=True))
    model = build("qwen3-tiny", device="meta", vocabulary=64)
    assert {group["rule"] for group in route(model, tmp_path / "mine.toml")} == {name, "adamw"}


@pytest.mark.usefixtures("own_rules")
def test_the_shortest_rule_does_what_it_says() -> None:
    exec(blocks(RULE, "python")[0], {})
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.full((3, 4), 2.0)
    SymDist([{"params": [weight], "rule": "rms_rows", "lr": 0.5}]).step()
    assert torch.allclose(weight, torch.full((3, 4), -0.5))


@pytest.mark.usefixtures("own_rules")
def test_what_is_wrong_with_a_rules_file_is_told(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    for rules, text, said in (
        ('["gone.py"]', "", "rules file .*gone.py does not exist"),
        ('["broken.py"]', "1 / 0", "rules file .*broken.py failed: ZeroDivisionError: division by zero"),
        ('["empty.py"]', "", r"rules file .*empty.py registers no rule; mark one with @symdist.rule"),
        ("3", "", "rules = 3 should list Python files"),
    ):
        if text or "empty" in rules:
            (tmp_path / rules.strip('[]"')).write_text(text)
        recipe.write_text(f"rules = {rules}\n[default]\nrule = 'adamw'\nlr = 0.1\n")
        with pytest.raises(ValueError, match=said):
            load_recipe(recipe)


def layout_blocks() -> tuple[str, str, str, str]:
    """The printed layout, its use, the flat one, and that of a tensor type."""
    layout, use, flat, tensor = blocks(LAYOUT, "python")
    return layout, use, flat, tensor


@pytest.mark.parametrize("rule", ["muon", "row_norm", "normuon", "aro"])
def test_a_layout_of_your_own(rule: str, ranks: Ranks) -> None:
    layout, use, _, _ = layout_blocks()
    assert len(layout.strip().splitlines()) < 12
    expected = docs_ranks.column_shards(None, layout, use, rule)
    found = ranks.run(3, docs_ranks.column_shards, layout, use, rule)
    for i, (wanted, start) in enumerate(zip(expected, docs_ranks.whole(0)[0], strict=True)):
        assert (wanted - start).norm() > 1e-3
        assert torch.allclose(torch.cat([shards[i] for shards in found], dim=1), wanted, rtol=0, atol=1e-9)


def test_a_flat_layout_of_your_own(ranks: Ranks) -> None:
    first, second = ranks.run(2, docs_ranks.flat_pieces, layout_blocks()[2])
    assert torch.allclose(torch.cat([first, second]), torch.full((8,), -0.01 / 2))


def test_the_layout_of_a_tensor_type() -> None:
    code = layout_blocks()[3]
    assert len(code.strip().splitlines()) < 10
    space: dict = {"MyShard": type("MyShard", (), {"ranks": (0, 1), "index": 1, "process_group": None})}
    space["MyShard"].global_shape, space["MyShard"].sizes = (5, 2), (3, 2)
    exec(code, space)
    assert space["my_layout"](space["MyShard"](), name="w").local_shape == (2, 2)


@pytest.mark.parametrize(("document", "text"), printed("toml"))
@pytest.mark.usefixtures("own_rules")
def test_toml_is_a_recipe(document: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    for file in tomllib.loads(text).get("rules", ()):
        (tmp_path / file).write_text(blocks(RULE, "python")[0])
    recipe = load_recipe(path)
    model = nn.Sequential()
    model.embed, model.lm_head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    model.my_gate = nn.Module()
    model.my_gate.my_gate = nn.Linear(4, 4, bias=False)
    groups = build_optimizer(model, recipe).param_groups if recipe.patterns else route(build("qwen3-tiny"), recipe)
    assert groups


@pytest.mark.parametrize(("document", "text"), printed("json"))
def test_json_is_a_deepspeed_config(document: str, text: str) -> None:
    # tests/symdist_deepspeed/test_readme.py trains with it.
    params = json.loads(text)["optimizer"]["params"]
    assert load_recipe(params["recipe"]).adjusted(lr=params["lr"], overrides=params["overrides"])


def commands() -> list[Any]:
    """Every command in a block of shell, and every one in running text that has options."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        lines = [line for block in blocks(document, "sh") for line in block.splitlines()]
        lines += re.findall(r"`((?:symdist|bash|torchrun|python|mkdocs|pip) [^`]+)`", text)
        found += [(document, line) for line in lines if shlex.split(line, comments=True)]
    return [pytest.param(*case, id=f"{case[0]}-{case[1][:60]}") for case in dict.fromkeys(found)]


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_know_their_options(document: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    match words:
        case ["symdist", subcommand, *_]:
            if len(words) > 2:
                check_symdist(words[1:])
            assert subcommand in ("route", "plan", "compare", "report")
        case ["torchrun" | "python" | "deepspeed", *_]:
            check_module(words)
        case ["bash" | "." | "sbatch", *rest]:
            check_script([word for word in rest if not word.startswith("--nodes=")])
        case ["pip", "install", "-e", extra]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert extra.removeprefix(".[").removesuffix("]") in extras
        case ["pip", "install", source] if source.startswith("git+"):
            assert re.fullmatch(r"git\+https://github\.com/[\w-]+/[\w-]+", source)
        case ["mkdocs", "serve" | "build", *_]:
            assert (ROOT / "mkdocs.yml").exists()
        case _:
            pytest.fail(f"{document}: no check for {line!r}")


def check_symdist(words: list[str]) -> None:
    command = _parse(words)
    if isinstance(command, Route) and command.hf is not None:
        assert command.model is None
        assert command.hf in CONFIG_MAPPING or command.hf == "path/to/config.json"
    elif isinstance(command, Route | Plan):
        assert command.model in names()
    if isinstance(command, Route | Plan):
        assert load_recipe(command.recipe).adjusted(lr=command.lr, overrides=parse_overrides(command.override))
    if isinstance(command, Plan):
        assert parse_mesh(command.mesh) if command.mesh else MegatronMesh.parse(command.megatron)


def check_module(words: list[str]) -> None:
    start = words.index("-m") if "-m" in words else words.index("--module")
    module, options = words[start + 1], words[start + 2 :]
    if module == "launch.study":
        assert parse_study(options, description=None)
        return
    config = parse_as(ENTRIES[module], options)
    ranks = next((int(word.partition("=")[2]) for word in words if word.startswith("--nproc_per_node=")), None)
    if ranks is not None and options:
        config.check(ranks=ranks)


def check_script(words: list[str]) -> None:
    if words == [".venv/bin/activate"]:
        return
    script, *options = words
    assert (ROOT / script).exists()
    if script == "launch/quickstart.sh":
        # Two options are the script's own.
        options = [word for word in options if word not in ("--nproc", "4", "--newest")]
        assert parse_as(FsdpRun, options)
    if script.startswith("launch/cluster"):
        entry, file, *more = options
        assert parse_as(ENTRIES[f"launch.{entry}"], ["--config", str(ROOT / file), *more])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if not re.match(r"https?://|#", target):
            assert (folder / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize(
    "document", ["docs/develop/architecture.md", "docs/develop/testing.md", "docs/develop/add-a-layout.md", *FOLDERS]
)
def test_files_that_documents_name_exist(document: str) -> None:
    folders = ("symdist", "integrations", "launch", "tests")
    files = {path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    for name in re.findall(r"`([a-z0-9_/]+\.py)`", (ROOT / document).read_text()):
        if name not in ("x_ranks.py", "test_x.py"):
            assert any(file.endswith(f"/{name}") for file in files), name


def test_the_two_commands_come_first() -> None:
    first = re.search(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert first is not None
    assert first[1] == "sh"
    assert [line.split("  ")[0] for line in first[2].splitlines()] == ["bash launch/quickstart.sh", "bash tests/run.sh"]
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    for document in FOLDERS:
        assert len((ROOT / document).read_text().splitlines()) <= 20, document


def test_every_rule_has_a_page_and_a_row() -> None:
    own = [name for name in rule_names() if get_rule(name).update.__module__.startswith("symdist.rules.")]
    table = (ROOT / "docs/rules/README.md").read_text()
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", table, re.M)) == own
    listed = re.search(r"Rules: (.*?) and \[", (ROOT / "README.md").read_text(), re.S)[1]
    assert sorted(re.findall(r"`(\w+)`", listed)) == own
    for name in own:
        page = (ROOT / f"docs/rules/{name}.md").read_text()
        assert f"::: {get_rule(name).update.__module__}.{name}\n" in page
        doc = get_rule(name).update.__doc__
        assert all(word in doc for word in ("Source:", "quivariant", "Args:", "Example:")), name


def test_recipes_and_roles_are_listed() -> None:
    text = (ROOT / "docs/guide/routing.md").read_text()
    listed = re.search(r"The recipes are (.*?)\.", text, re.S)
    assert sorted(re.findall(r"`([\w-]+)`", listed[1])) == sorted(recipe_names())
    fallback = {
        role: target
        for roles, target in re.findall(r"^\| (`.*?`) \| `(\w+)` \|$", text, re.M)
        for role in re.findall(r"`(\w+)`", roles)
    }
    assert fallback == FALLBACK


def constant(file: str, name: str) -> str:
    """A constant of a module that is not imported."""
    return re.search(rf'^{name} = "(.*)"$', (ROOT / file).read_text(), re.M)[1]


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_engines_pages_say_what_the_adapters_say(engine: str) -> None:
    page = (ROOT / f"docs/engines/{engine}.md").read_text()
    supported = constant(f"integrations/symdist_{engine}/register.py", "SUPPORTED")
    assert supported in page
    assert supported in (ROOT / "README.md").read_text()
    if engine == "megatron":
        known = re.findall(r'"(--symdist-[\w-]+)"', (ROOT / "integrations/symdist_megatron/arguments.py").read_text())
    else:
        source = (ROOT / "integrations/symdist_deepspeed/options.py").read_text()
        known = re.findall(r"^    (\w+): .*", source[: source.index("def from_params")].rsplit('"""', 1)[1], re.M)
    assert len(known) >= 5
    assert all(f"`{option}" in page for option in known)
    assert set(re.findall(r"--symdist-[a-z-]+", page)) <= set(known)


def test_versions_are_those_of_the_constraints() -> None:
    pins = (ROOT / "launch/constraints.txt").read_text()
    text = " ".join((ROOT / "docs/quickstart.md").read_text().split())
    for package in ("torch", "transformers", "accelerate", "deepspeed", "megatron-core"):
        version = re.search(rf"^{package}==(.*)$", pins, re.M)[1]
        assert f"{package} {version}" in text


def test_figures_have_a_command_and_a_date() -> None:
    """A paragraph that introduces a table of results names both."""
    sections = re.split(r"^## ", (ROOT / "docs/results.md").read_text(), flags=re.M)[1:]
    assert len(sections) == 4
    for section in sections:
        assert re.search(r"20\d\d-\d\d-\d\d", section)
        assert re.search(r"`(bash|python|symdist) ", section)
