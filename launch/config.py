"""What a pretraining run is told: a TOML file, the command line over it, checked before anything starts."""

import json
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from tyro.conf import UseAppendAction

from launch.data import DataConfig
from symdist.recipes import load_recipe, parse_overrides


@dataclass(frozen=True, kw_only=True)
class Config:
    """A pretraining run. Every value can stand in the TOML file and on the command line, which wins."""

    model: str = "olmoe-tiny"
    """A preset of symdist.models, or a TOML file of the same form."""
    model_overrides: dict[str, str] = field(default_factory=dict)
    """Values of the model's configuration, as pairs: --model-overrides num_hidden_layers 8."""
    recipe: str = "small-moe"
    """A recipe of symdist.recipes, or a TOML file of the same form."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """An option of a role in place of the recipe's, as in router.lr=0.02; may be given again."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 16
    """Sequences a step, over all ranks and micro-batches."""
    sequence: int = 128
    """Tokens a sequence."""
    accumulation: int = 1
    """Micro-batches a step."""
    clip: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    aux_loss: float = 0.0
    """Weight of the routers' load-balance loss."""
    z_loss: float = 0.0
    """Weight of the routers' z-loss."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward and backward; "auto" is bfloat16 on a GPU that has it. Weights and state are always float32."""
    initialize: Literal["auto", "whole", "sharded"] = "auto"
    """Draw all weights on every rank, alike at any world size, or each rank its shards; "auto" goes by size."""
    nonfinite: Literal["raise", "skip", "zero"] = "skip"
    """What to do where a gradient is inf or NaN."""
    seed: int = 42
    """Of weights and data order."""
    validate_every: int = 50
    """Steps between validations; the last step is always validated."""
    validation_sequences: int = 512
    """Sequences of a validation, over all ranks."""
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end, on SIGTERM, and nowhere else."""
    keep: int = 3
    """Checkpoints kept."""
    output: Path = Path("runs/default")
    """The folder of logs and checkpoints."""
    resume: str | None = None
    """"auto" continues from the newest checkpoint of the run, or starts where there is none; or a checkpoint's path."""

    def overrides(self) -> dict[str, dict[str, Any]]:
        """`set` by role and option; ValueError for a word that is not role.option=value."""
        return parse_overrides(self.set)

    def check(self, *, ranks: int) -> None:
        """ValueError, naming the value and the remedy, for what cannot run on so many ranks."""
        for name in ("steps", "batch", "sequence", "accumulation", "validate_every", "validation_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.log_every < 1 or self.keep < 1 or self.checkpoint_every < 0:
            raise ValueError("--log-every and --keep must be at least 1, --checkpoint-every at least 0")
        if self.batch % (ranks * self.accumulation):
            raise ValueError(
                f"--batch {self.batch} does not split over {ranks} ranks × {self.accumulation} micro-batches; "
                f"take a multiple of {ranks * self.accumulation}"
            )
        if self.clip < 0 or self.aux_loss < 0 or self.z_loss < 0:
            raise ValueError("--clip, --aux-loss and --z-loss must not be negative")
        load_recipe(self.recipe).overridden(self.overrides())


C = TypeVar("C", bound=Config)


def parse_command_line(arguments: list[str]) -> Config:
    """`parse_as` for a run without options of its own."""
    return parse_as(Config, arguments)


def parse_as(kind: type[C], arguments: list[str]) -> C:
    """The configuration, of a kind that may add options, from `--config FILE.toml` and options over it.

    Raises ValueError for a file that is missing or no TOML; for an unknown option or a value of the wrong kind, in the
    file or on the command line, tyro says so and ends the process with code 2.
    """
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--config":
            words.append(word)
            continue
        path = value if equals else next(rest, None)
        if not path:
            raise ValueError("--config needs a file")
        words = [*read_toml(Path(path)), *words]
    description = f"{kind.__doc__}\n\n--config FILE.toml reads values from a file; the command line wins."
    return tyro.cli(kind, args=words, prog=Path(sys.argv[0]).name, description=description)


def read_toml(path: Path) -> list[str]:
    """The values of a TOML file as command-line words, so that both are checked alike."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path} is not valid TOML: {error}") from None
    return _words(content, prefix="--")


def _words(content: dict[str, Any], *, prefix: str) -> list[str]:
    words = []
    for name, value in content.items():
        option = prefix + name.replace("_", "-")
        if name == "model_overrides" and isinstance(value, dict):
            words += [option, *(word for key, item in value.items() for word in (key, _text(item)))]
        elif isinstance(value, dict):
            words += _words(value, prefix=f"{option}.")
        elif name == "set" and isinstance(value, list):
            words += [word for item in value for word in (option, _text(item))]
        elif isinstance(value, bool):
            words.append(option if value else f"{prefix}no-{name.replace('_', '-')}")
        else:
            words += [option, _text(value)]
    return words


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
