"""What the documents print runs as printed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import symdist
from symdist import SymDist, build_optimizer, route
from symdist.routing.recipes import load, load_recipe
from symdist.rules import registry
from symdist.tools.models import build
from tests import sharded
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.S)


def test_the_rule_a_newcomer_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    code = blocks("CONTRIBUTING.md", "python")[0]
    assert len(code.strip().splitlines()) < 12
    exec(code, {})
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.full((3, 4), 2.0)
    SymDist([{"params": [weight], "rule": "rms_rows", "lr": 0.5}]).step()
    assert torch.allclose(weight, torch.full((3, 4), -0.5))


def test_the_readmes_own_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: Ranks) -> None:
    """The two files as printed: one process, three ranks, and a plan take them by the recipe's path."""
    (code,) = (block for block in blocks("README.md", "python") if "@rule" in block)
    (recipe,) = (block for block in blocks("README.md", "toml") if "rules = [" in block)
    assert len(code.strip().splitlines()) < 12
    (tmp_path / "my_rules.py").write_text(code)
    (tmp_path / "mine.toml").write_text(recipe)
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(load, "_LOADED", set())
    expected = sharded.trained_by(None, str(tmp_path / "mine.toml"))
    assert any((weight - start).norm() > 0.01 for weight, start in zip(expected[-1], expected[0], strict=True))
    for found in ranks.run(3, sharded.trained_by, str(tmp_path / "mine.toml")):
        for weights, wanted in zip(found, expected, strict=True):
            assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(weights, wanted, strict=True))
    model = build("qwen3-tiny", device="meta", vocabulary=64)
    assert {group["rule"] for group in route(model, tmp_path / "mine.toml")} == {"rms_rows", "adamw"}


def test_what_is_wrong_with_a_rules_file_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    recipe = tmp_path / "mine.toml"
    for rules, text, said in (
        ('["gone.py"]', "", "rules file .*gone.py is no Python file that exists"),
        ('["broken.py"]', "1 / 0", "rules file .*broken.py failed: ZeroDivisionError: division by zero"),
        ('["empty.py"]', "", r"rules file .*empty.py registers no rule; mark one with @symdist.rule"),
        ("3", "", "rules = 3 should list Python files"),
    ):
        if text or "empty" in rules:
            (tmp_path / rules.strip('[]"')).write_text(text)
        recipe.write_text(f"rules = {rules}\n[default]\nrule = 'adamw'\nlr = 0.1\n")
        with pytest.raises(ValueError, match=said):
            load_recipe(recipe)


def test_the_layout_a_newcomer_adds() -> None:
    code = blocks("CONTRIBUTING.md", "python")[1]
    assert len(code.strip().splitlines()) < 10
    names: dict = {"MyShard": type("MyShard", (), {"ranks": (0, 1), "index": 1, "process_group": None})}
    names["MyShard"].global_shape, names["MyShard"].sizes = (5, 2), (3, 2)
    exec(code, names)
    assert names["my_layout"](names["MyShard"](), name="w").local_shape == (2, 2)


def test_the_readmes_front_door() -> None:
    (code,) = (block for block in blocks("README.md", "python") if "add_param_group" in block)
    given = {
        name: [nn.Parameter(torch.zeros(shape))]
        for name, shape in (("matrices", (3, 4)), ("rest", 3), ("more", (3, 2)))
    }
    space: dict = {"symdist": symdist, **given}
    exec(code, space)
    groups = space["optimizer"].param_groups
    assert [(group["rule"], group["lr"]) for group in groups] == [("muon", 1e-2), ("adamw", 3e-4), ("row_norm", 1e-2)]


def test_the_readmes_loop_and_recipe(tmp_path: Path) -> None:
    loop, recipe = blocks("README.md", "python")[0], blocks("README.md", "toml")[0]
    model = nn.Sequential()
    model.embed, model.router, model.lm_head = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(4, 9)
    model.router.experts = model.experts = nn.ModuleList()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    loss = model.lm_head(model.embed(torch.arange(9))).square().mean()
    exec(loop, {"model": model, "loss": loss})
    assert not torch.equal(weights[0], model.embed.weight)
    path = tmp_path / "mine.toml"
    path.write_text(recipe)
    assert load_recipe(path).patterns[0]["role"] == "matrix"
    model.my_gate = nn.Module()
    model.my_gate.my_gate = nn.Linear(4, 4, bias=False)
    assert build_optimizer(model, path).param_groups
