"""Configuration of a study: arms, learning-rate multipliers and seeds, from a TOML file checked before any run."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import with_config
from tyro.conf import Suppress

from launch.loop.config import Config, parse_as
from launch.records.run_log import already_finished
from launch.study.report import ArmOutcome, Outcome, read_outcome
from symdist.routing.recipes import Recipe, load_recipe, parse_overrides
from symdist.toml_file import read_toml
from symdist.tools.run_format import LOG

RECORD = "study-run.json"
# Options of a run that the study itself sets, and options that do not change any result.
_DECIDED = ("model", "recipe", "lr", "override", "seed", "output", "resume", "validate_every")
_IRRELEVANT = ("output", "resume", "log_every", "checkpoint_every", "keep")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model with one optimizer stack: a recipe, and overrides of its options."""

    model: str
    name: str
    recipe: str
    label: str = ""
    override: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Model and name, which is also the folder of the arm's runs."""
        return f"{Path(self.model).stem}/{self.name}"

    def tuned(self) -> Recipe:
        """Return the recipe with the arm's overrides.

        Raises:
            ValueError: If the recipe is unknown, or a pattern in it sets a learning rate, which overrides cannot reach.
        """
        recipe = load_recipe(self.recipe).overridden(parse_overrides(self.override, option=f"arm {self.key}: override"))
        if any("lr" in pattern for pattern in recipe.patterns):
            raise ValueError(
                f"arm {self.key}: recipe {self.recipe} sets lr in a pattern, which a study cannot multiply; set it in "
                "a role's section"
            )
        return recipe

    def settings(self, multiplier: float) -> tuple[str, ...]:
        """Return the arm's overrides plus one for every learning rate, each multiplied by `multiplier`."""
        sections = self.tuned().multiplied("lr", multiplier).sections
        return (
            *self.override,
            *(f"{role}.lr={options['lr']!r}" for role, options in sections.items() if "lr" in options),
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Options of every run, the same as those of launch.pretrain."""

    steps: int = 200
    """Optimizer steps."""
    log_every: int = 20
    """Steps between log lines."""


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of arms, given in the file as [[arms]] tables with model, name, recipe, label and override."""

    output: Path = Path("runs/study")
    """Folder for runs, tables and the plot."""
    multipliers: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Learning-rate multipliers of the sweep; each multiplies all learning rates of an arm."""
    sweep_seed: int = 42
    """Seed of the sweep's runs."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Further seeds, each run with the arm's best multiplier; the table reports these runs."""
    jobs: int = 2
    """Number of runs at the same time."""
    nproc: int = 1
    """Number of ranks per run."""
    dry_run: bool = False
    """List the runs and start none."""
    report: bool = False
    """Write tables and plot from the finished runs, and start none."""
    run: RunConfig = field(default_factory=RunConfig)
    """Options of every run, the same as those of launch.pretrain."""
    arms: Suppress[tuple[Arm, ...]] = ()
    """The arms, which come from the file."""

    def check(self) -> None:
        """Check that the study can run.

        Raises:
            ValueError: If it cannot; the message names what is wrong and the remedy.
        """
        if not self.arms:
            raise ValueError("the study has no arms; add [[arms]] tables to the file of --config")
        if self.output == Path():
            raise ValueError("--output is empty, or the current folder; name a folder for runs, tables and the plot")
        if not (1 <= self.jobs <= 1024 and 1 <= self.nproc <= 1024):
            raise ValueError(f"--jobs {self.jobs} and --nproc {self.nproc} must be from 1 to 1024")
        if not self.multipliers or not all(1e-6 <= multiplier <= 1e6 for multiplier in self.multipliers):
            raise ValueError(
                f"--multipliers {self.multipliers} must be positive numbers, from 1e-6 to 1e6, at least one"
            )
        if not all(0 <= seed < 2**32 for seed in (self.sweep_seed, *self.seeds)):
            raise ValueError(f"--seeds {self.seeds} and --sweep-seed {self.sweep_seed} must be from 0 to 2**32 - 1")
        if not self.seeds or self.sweep_seed in self.seeds:
            raise ValueError(f"--seeds {self.seeds} must be at least one, none of them the sweep's {self.sweep_seed}")
        for name, values in (("multipliers", self.multipliers), ("seeds", self.seeds)):
            # As in the names of folders.
            if len({f"{value:g}" if name == "multipliers" else str(value) for value in values}) < len(values):
                raise ValueError(f"--{name} {values} has a value twice; give each once")
        keys = [arm.key for arm in self.arms]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"several arms are called {', '.join(twice)}; give each its own name")
        for name in _DECIDED:
            if getattr(self.run, name) != getattr(Config(), name):
                raise ValueError(
                    f"run.{name} cannot be set in a study, which sets it from its arms, multipliers, seeds and output; "
                    "leave it out"
                )
        for arm in self.arms:
            if not re.fullmatch(r"[\w.+-]+", arm.name) or ".." in Path(arm.key).parts or arm.name == ".":
                raise ValueError(f"arm {arm.key}: the name becomes a folder; use only letters, digits and . + - _")
            try:
                self.config(Run(arm=arm, multiplier=1.0, seed=self.sweep_seed)).check(ranks=self.nproc)
            except ValueError as error:
                raise ValueError(f"arm {arm.key}: {error}") from None

    def check_stacks(self) -> None:
        """Check that every arm's model exists and its stack fits the model.

        Raises:
            ValueError: If not; the message names the arm.
        """
        from symdist import route
        from symdist.param_groups import with_defaults
        from symdist.param_specs import describe_param
        from symdist.tools.models import build

        overrides = self.run.model_settings()
        for arm in self.arms:
            try:
                vocabulary = self.run.data.vocabulary
                model = build(arm.model, vocabulary=vocabulary, device="meta", overrides=overrides)
                for i, group in enumerate(map(with_defaults, route(model, arm.tuned()))):
                    for name, parameter in zip(group["param_names"], group["params"], strict=True):
                        describe_param(parameter, name=name, index=i, group=group)
            except ValueError as error:
                raise ValueError(f"arm {arm.key}: {error}") from None

    def sweep(self, arm: Arm) -> "list[Run]":
        """Return the arm's runs of the sweep, one per multiplier."""
        return [Run(arm=arm, multiplier=multiplier, seed=self.sweep_seed) for multiplier in self.multipliers]

    def further(self, arm: Arm, multiplier: float) -> "list[Run]":
        """Return the arm's runs with further seeds, all with the same multiplier."""
        return [Run(arm=arm, multiplier=multiplier, seed=seed) for seed in self.seeds]

    def folder(self, run: "Run") -> Path:
        """Return the folder of a run's logs and checkpoints."""
        return self.output / "runs" / run.name

    def config(self, run: "Run") -> Config:
        """Return the full configuration of a run."""
        return dataclasses.replace(
            self.run,
            model=run.arm.model,
            recipe=run.arm.recipe,
            override=run.arm.settings(run.multiplier),
            seed=run.seed,
            output=self.folder(run),
            resume="auto",
            validate_every=self.run.steps,
        )

    def record(self, run: "Run") -> dict[str, Any]:
        """Return the settings, the recipe's contents included, by which a folder is known to hold this run."""
        config = dataclasses.asdict(self.config(run))
        config["data"].pop("cache")
        recipe = dataclasses.asdict(self.config(run).adjusted_recipe())
        relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT}
        return json.loads(json.dumps(relevant | {"recipe": recipe, "ranks": self.nproc}))

    def finished(self, run: "Run") -> bool:
        """Return whether the run is finished."""
        return already_finished(self.folder(run), steps=self.run.steps)

    def check_folder(self, run: "Run") -> None:
        """Check that the run's folder is free or holds this run.

        Raises:
            ValueError: If it holds a run of another configuration, or one that no study started.
        """
        folder = self.folder(run)
        if not (folder / RECORD).exists():
            if (folder / LOG).exists():
                raise ValueError(
                    f"{folder} holds a run that was not started by a study; remove it or give another --output"
                )
            return
        recorded, expected = read_toml(folder / RECORD, what="record"), self.record(run)
        if changed := sorted(key for key in {*recorded, *expected} if recorded.get(key) != expected.get(key)):
            differences = "; ".join(f"{key} was {recorded.get(key)}, is {expected.get(key)}" for key in changed)
            raise ValueError(
                f"{folder} holds a run of another configuration ({differences}); remove it or give another --output"
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an arm, with its learning-rate multiplier and seed."""

    arm: Arm
    multiplier: float
    seed: int

    @property
    def name(self) -> str:
        """The run's folder, relative to the study's folder of runs."""
        return f"{self.arm.key}/x{self.multiplier:g}-seed{self.seed}"


def parse(arguments: list[str], *, description: str | None) -> Study:
    """Parse a study from `--config FILE.toml` and the options that override it.

    Args:
        arguments: The command line, without the program's name.
        description: The text at the top of `--help`.

    Raises:
        ValueError: As `launch.loop.config.load_config` does.

    Example:
        >>> study = parse(["--config", "launch/configs/study.toml"], description=None)
        >>> study.check()
    """
    return parse_as(Study, arguments, program="study.py", description=description)


def outcomes(study: Study) -> list[ArmOutcome]:
    """Read the finished runs of every arm.

    Raises:
        ValueError: If a run's folder holds a run of another configuration.
    """

    def read(runs: list[Run]) -> tuple[Outcome, ...]:
        for run in runs:
            study.check_folder(run)
        done = [run for run in runs if study.finished(run)]
        return tuple(read_outcome(study.folder(run), multiplier=run.multiplier, seed=run.seed) for run in done)

    arms = []
    for arm in study.arms:
        swept_arm = ArmOutcome(
            model=arm.model,
            name=arm.name,
            label=arm.label or arm.name,
            grid=study.multipliers,
            seeds=study.seeds,
            sweep=read(study.sweep(arm)),
            further=(),
        )
        further = () if swept_arm.best is None else read(study.further(arm, swept_arm.best))
        arms.append(dataclasses.replace(swept_arm, further=further))
    return arms
