"""Which module may import which, and what `import symdist` brings along."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = ("mpmath", "numpy", "sympy")
"""What PyTorch's DTensor imports in its turn."""
PACKAGES = ("symdist", "integrations", "launch", "tests")
SAY_MODULES = """
import sys
import torch
import torch.utils.flop_counter  # It imports Triton, where that is installed.
before = set(sys.modules)
import symdist
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """The linter's verdict on the packages of a folder."""
    path = os.pathsep.join([str(folder), str(folder / "integrations")])
    linter = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [linter, ROOT / "pyproject.toml", "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_an_upward_import_is_refused(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    assert lint(tmp_path).returncode == 0
    for file, module, message in (
        (
            "symdist/rules/muon.py",
            "symdist.optimizer",
            "symdist.rules is not allowed to import symdist.optimizer",
        ),
        ("launch/pretrain.py", "tests.cases", "launch is not allowed to import tests"),
    ):
        path = tmp_path / file
        text = path.read_text()
        path.write_text(f"{text}\nimport {module}\n")
        done = lint(tmp_path)
        assert done.returncode == 1
        assert message in " ".join(done.stdout.split())
        path.write_text(text)


def test_import_symdist_brings_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SAY_MODULES], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"symdist", "torch", "_remote_module_non_scriptable", *OF_TORCH}
