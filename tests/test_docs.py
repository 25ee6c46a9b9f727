"""What the documents print runs as printed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from symdist import SymDist, build_optimizer
from symdist.recipes import load_recipe
from symdist.rules import registry

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


def test_the_layout_a_newcomer_adds() -> None:
    code = blocks("CONTRIBUTING.md", "python")[1]
    assert len(code.strip().splitlines()) < 10
    names: dict = {"MyShard": type("MyShard", (), {"ranks": (0, 1), "index": 1, "process_group": None})}
    names["MyShard"].global_shape, names["MyShard"].sizes = (5, 2), (3, 2)
    exec(code, names)
    assert names["my_layout"](names["MyShard"](), name="w").local_shape == (2, 2)


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
