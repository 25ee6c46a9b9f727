"""What a study runs: arms, a grid of rates and seeds, told by a TOML file and checked before anything starts."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Suppress

from launch.loop.config import Config, load_toml, split_configs, words
from launch.records.run_log import LOG, already_finished
from launch.study.report import ArmOutcome, Outcome, read_outcome
from symdist.routing.recipes import Recipe, load_recipe, parse_overrides, parse_value

RECORD = "study-run.json"
# Of a run's options, those that arms, grid and seeds decide, and those on which no measure depends.
_DECIDED = ("model", "recipe", "override", "seed", "output", "resume", "validate_every")
_IRRELEVANT = ("output", "resume", "log_every", "checkpoint_every", "keep")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model under a stack: a recipe and settings over it."""

    model: str
    name: str
    recipe: str
    label: str
    override: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Model and name, as the folder of its runs."""
        return f"{Path(self.model).stem}/{self.name}"

    def tuned(self) -> Recipe:
        """The recipe with the settings; ValueError where it is unknown or has rates that settings cannot reach."""
        recipe = load_recipe(self.recipe).overridden(parse_overrides(self.override, option=f"arm {self.key}: override"))
        if any("lr" in pattern for pattern in recipe.patterns):
            raise ValueError(
                f"arm {self.key}: recipe {self.recipe} has a rate in a pattern; give it in a role's section"
            )
        return recipe

    def settings(self, multiplier: float) -> tuple[str, ...]:
        """The settings with every learning rate of the stack given, `multiplier` times as high."""
        sections = self.tuned().multiplied("lr", multiplier).sections
        return (
            *self.override,
            *(f"{role}.lr={options['lr']!r}" for role, options in sections.items() if "lr" in options),
        )


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of arms, which stand in the file as [[arms]] tables: model, name, recipe, label, override."""

    output: Path = Path("runs/study")
    """The folder of runs, tables and picture."""
    multipliers: tuple[float, ...] = (0.5, 1.0, 2.0)
    """The grid of the sweep: factors of all learning rates of an arm at once."""
    sweep_seed: int = 42
    """The seed of the sweep."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """The further seeds, each run at an arm's best multiplier; the table is about these."""
    jobs: int = 2
    """Runs at a time."""
    nproc: int = 1
    """Ranks of a run."""
    dry_run: bool = False
    """List the runs, start none."""
    report: bool = False
    """Tables and picture of what is there, start nothing."""
    run: Config = field(default_factory=lambda: Config(steps=200, log_every=20))
    """Options of every run, as of launch.pretrain."""
    arms: Suppress[tuple[Arm, ...]] = ()
    """From the file."""

    def check(self) -> None:
        """ValueError, naming what is wrong and the remedy, for what cannot run."""
        if not self.arms:
            raise ValueError("the study has no arms; give [[arms]] tables in the file of --config")
        if self.jobs < 1 or self.nproc < 1:
            raise ValueError(f"--jobs {self.jobs} and --nproc {self.nproc} must be at least 1")
        if not self.multipliers or not all(0 < multiplier < float("inf") for multiplier in self.multipliers):
            raise ValueError(f"multipliers {self.multipliers} must be positive numbers, at least one")
        if not self.seeds or self.sweep_seed in self.seeds:
            raise ValueError(f"seeds {self.seeds} must be at least one, none of them the sweep's {self.sweep_seed}")
        for name, values in (("multipliers", self.multipliers), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {values} has one twice")
        keys = [arm.key for arm in self.arms]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"there are several arms {', '.join(twice)}; give each a name of its own")
        for name in _DECIDED:
            if getattr(self.run, name) != getattr(Config(), name):
                raise ValueError(f"run.{name} is for the study to decide: by arms, multipliers, seeds and output")
        for arm in self.arms:
            if not re.fullmatch(r"[\w.+-]+", arm.name):
                raise ValueError(f"arm {arm.key}: the name is a folder's; use letters, digits and . + - _")
            try:
                self.config(Run(arm=arm, multiplier=1.0, seed=self.sweep_seed)).check(ranks=self.nproc)
            except ValueError as error:
                raise ValueError(f"arm {arm.key}: {error}") from None

    def check_stacks(self) -> None:
        """ValueError, naming the arm, for a model there is not and a stack that does not fit the model."""
        from symdist import route
        from symdist.param_groups import with_defaults
        from symdist.tools.models import build

        overrides = {key: parse_value(text) for key, text in self.run.model_overrides.items()}
        for arm in self.arms:
            try:
                vocabulary = self.run.data.vocabulary
                model = build(arm.model, vocabulary=vocabulary, device="meta", overrides=overrides)
                for group in route(model, arm.tuned()):
                    with_defaults(group)
            except ValueError as error:
                raise ValueError(f"arm {arm.key}: {error}") from None

    def sweep(self, arm: Arm) -> "list[Run]":
        """The arm's runs over the grid."""
        return [Run(arm=arm, multiplier=multiplier, seed=self.sweep_seed) for multiplier in self.multipliers]

    def further(self, arm: Arm, multiplier: float) -> "list[Run]":
        """The arm's runs of further seeds."""
        return [Run(arm=arm, multiplier=multiplier, seed=seed) for seed in self.seeds]

    def folder(self, run: "Run") -> Path:
        """Where a run's logs and checkpoints are."""
        return self.output / "runs" / run.name

    def config(self, run: "Run") -> Config:
        """The whole configuration of a run."""
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
        """What must be the same for a folder to hold this run, the recipe's contents among it."""
        config = dataclasses.asdict(self.config(run))
        config["data"].pop("cache")
        recipe = dataclasses.asdict(load_recipe(run.arm.recipe).overridden(self.config(run).overrides()))
        kept = {key: value for key, value in config.items() if key not in _IRRELEVANT}
        return json.loads(json.dumps(kept | {"recipe": recipe, "ranks": self.nproc}))

    def finished(self, run: "Run") -> bool:
        """Whether the run has come to its end."""
        return already_finished(self.folder(run), steps=self.run.steps)

    def check_folder(self, run: "Run") -> None:
        """ValueError where the run's folder holds a run of another configuration."""
        folder = self.folder(run)
        if not (folder / RECORD).exists():
            if (folder / LOG).exists():
                raise ValueError(f"{folder} holds a run that no study started; remove it or give another --output")
            return
        found, wanted = json.loads((folder / RECORD).read_text()), self.record(run)
        if changed := sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)):
            told = "; ".join(f"{key} was {found.get(key)}, is {wanted.get(key)}" for key in changed)
            raise ValueError(
                f"{folder} holds a run of another configuration ({told}); remove it or give another --output"
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of an arm's runs."""

    arm: Arm
    multiplier: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder under the study's runs."""
        return f"{self.arm.key}/x{self.multiplier:g}-seed{self.seed}"


def parse(arguments: list[str], *, description: str | None) -> Study:
    """The study of `--config FILE.toml` and of options over it; ValueError for a file that is none."""
    given: list[str] = []
    arms: list[Arm] = []
    for word in split_configs(arguments):
        if not isinstance(word, Path):
            given.append(word)
            continue
        content = load_toml(word)
        arms = [_arm(table) for table in content.pop("arms", [])]
        given = [*words(content, prefix="--"), *given]
    study = tyro.cli(Study, args=given, prog="study.py", description=description)
    return dataclasses.replace(study, arms=tuple(arms))


def _arm(table: dict[str, Any]) -> Arm:
    given = {**table, "override": tuple(table.get("override", ()))}
    given.setdefault("label", given.get("name"))
    known = {each.name for each in dataclasses.fields(Arm)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"arm {table}: {', '.join(unknown)} is unknown; an arm has {', '.join(sorted(known))}")
    if missing := sorted(known - set(given)):
        raise ValueError(f"arm {table} has no {', '.join(missing)}")
    if wrong := sorted(key for key in known - {"override"} if not isinstance(given[key], str)):
        raise ValueError(f"arm {table}: {', '.join(wrong)} must be text")
    return Arm(**given)


def outcomes(study: Study) -> list[ArmOutcome]:
    """What there is of every arm; ValueError where a folder holds a run of another configuration."""

    def read(runs: list[Run]) -> tuple[Outcome, ...]:
        for run in runs:
            study.check_folder(run)
        done = [run for run in runs if study.finished(run)]
        return tuple(read_outcome(study.folder(run), multiplier=run.multiplier, seed=run.seed) for run in done)

    found = []
    for arm in study.arms:
        swept = ArmOutcome(
            model=arm.model,
            name=arm.name,
            label=arm.label,
            grid=study.multipliers,
            seeds=study.seeds,
            sweep=read(study.sweep(arm)),
            further=(),
        )
        further = () if swept.best is None else read(study.further(arm, swept.best))
        found.append(dataclasses.replace(swept, further=further))
    return found
