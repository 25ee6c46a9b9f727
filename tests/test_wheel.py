"""What users install is the wheel, not this tree: it is built, put into an environment of its own, and used there."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEP = """
import pathlib, sys, torch, symdist, symdist_deepspeed, symdist_megatron
for package in (symdist, symdist_deepspeed, symdist_megatron):
    assert pathlib.Path(package.__file__).is_relative_to(sys.prefix), package.__file__
weight = torch.nn.Parameter(torch.eye(4, 3))
optimizer = symdist.SymDist([("w", weight)], rule="muon", lr=0.1)
weight.grad = torch.ones(4, 3)
optimizer.step()
assert not torch.equal(weight, torch.eye(4, 3))
print(len(symdist.recipe_names()), "recipes")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with this one's packages but for symdist, which is not installed in there."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # Built from a copy, since building leaves folders behind.
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    # Other tests may have put this tree on the path, where pip would take it for an installed symdist.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(build, check=True, env=env)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A folder named in a .pth file is on the path, but the .pth files in it, as of the editable symdist, are not read.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "env" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True, env=env
    )
    return folder / "env"


def run(environment: Path, *command: str) -> str:
    # Elsewhere, so that this tree is not on the path.
    done = subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=environment,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_takes_a_step(environment: Path) -> None:
    recipes = len(list((ROOT / "symdist" / "routing" / "recipes").glob("*.toml")))
    assert run(environment, "python", "-c", STEP).splitlines()[-1] == f"{recipes} recipes"


def test_the_wheels_command_routes_plans_and_reports(environment: Path, tmp_path: Path) -> None:
    assert "weights in 47 parameters" in run(
        environment, "symdist", "route", "--model", "olmoe-tiny", "--recipe", "olmoe"
    )
    assert "collectives" in run(environment, "symdist", "plan", "--model", "olmoe-tiny", "--mesh", "dp=8")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2.0}\n')
    run(environment, "symdist", "report", str(tmp_path), "--output", str(tmp_path / "report.html"))
    assert "<style>" in (tmp_path / "report.html").read_text()
