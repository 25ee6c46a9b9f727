"""The configuration of a pretraining run: read from a TOML file and the command line, and checked before it starts."""

import json
import math
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from tyro.conf import UseAppendAction

from launch.data import DataConfig
from symdist.routing.recipes import Recipe, load_recipe, parse_overrides, parse_value
from symdist.tools.models import build


@dataclass(frozen=True, kw_only=True)
class Config:
    """A pretraining run; every value can be set in the TOML file or on the command line, which wins."""

    model: str = "olmoe-tiny"
    """A preset of symdist.tools.models, or a TOML file of the same form."""
    model_overrides: dict[str, str] = field(default_factory=dict)
    """Settings that replace the model's, as pairs of name and value: --model-overrides num_hidden_layers 8."""
    recipe: str = "small-moe"
    """A recipe of symdist.routing.recipes, or a TOML file of the same form."""
    lr: float | None = None
    """Learning rate of the recipe's matrices, by default the recipe's; all others are scaled by the same factor."""
    override: UseAppendAction[tuple[str, ...]] = ()
    """Option of a role that replaces the recipe's, as in router.lr=0.02, which --lr does not scale; may be repeated."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 16
    """Sequences per step, over all ranks and micro-batches."""
    sequence: int = 128
    """Tokens per sequence."""
    accumulation: int = 1
    """Micro-batches per step."""
    clip: float = 1.0
    """Global norm that gradients are clipped to; 0 for no clipping."""
    aux_loss: float = 0.0
    """Weight of the routers' load-balance loss."""
    z_loss: float = 0.0
    """Weight of the routers' z-loss."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of forward and backward; "auto" is bfloat16 on GPUs that support it. Weights and state are float32."""
    initialize: Literal["auto", "whole", "sharded"] = "auto"
    """"whole": every rank draws all weights, so that they are the same at any number of ranks. "sharded": each rank
    draws only its shards. "auto": whole up to 200 million weights, then sharded."""
    nonfinite: Literal["raise", "skip", "zero"] = "skip"
    """What to do if a gradient is inf or NaN: end the run, skip the step, or set such elements to zero."""
    seed: int = 42
    """Seed of weights and data order."""
    validate_every: int = 50
    """Steps between validations; the last step is always validated."""
    validation_sequences: int = 512
    """Sequences per validation, over all ranks."""
    log_every: int = 10
    """Steps between log lines."""
    spike_sigma: float = 0.0
    """Skip a step if its loss is so many standard deviations above the mean of the last 128 losses; 0 for never."""
    rollback_after: int = 0
    """Skipped steps in a row, for spikes or non-finite gradients, after which the run returns to its newest checkpoint
    and continues with other data; 0 for never."""
    rollbacks: int = 3
    """Number of such returns after which the run gives up."""
    timeout: float = 600.0
    """Seconds without progress, in a collective or elsewhere, after which the run ends with an error."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves only at the end, and on SIGTERM, SIGUSR1 or SIGINT."""
    keep: int = 3
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 for none."""
    peak_tflops: float | None = None
    """Peak Tflop/s of a rank, for the model flop utilization; left out, it is known for common GPUs."""
    output: Path = Path("runs/default")
    """Folder of logs and checkpoints."""
    resume: str | None = None
    """Path of a checkpoint to continue from. Or "auto": the newest checkpoint of this run that is not damaged, or the
    beginning if there is none; ranks that torchrun restarts always do this."""
    dry_run: bool = False
    """Check everything, show routing and plan, and stop. Needs no torchrun; set the environment variables NNODES and
    NPROC to the number of nodes and of ranks per node."""

    def overrides(self) -> dict[str, dict[str, Any]]:
        """Return `override` by role and option.

        Raises:
            ValueError: If a word is not role.option=value.
        """
        return parse_overrides(self.override)

    def adjusted_recipe(self) -> Recipe:
        """Return the recipe with its learning rates scaled to `lr`, and then `override` in place of its options.

        Raises:
            ValueError: If `lr` is not positive, or there is no such recipe, role or rule.
        """
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"--lr is {self.lr}; it must be a positive number")
        return load_recipe(self.recipe).adjusted(lr=self.lr, overrides=self.overrides())

    def data_ranks(self, ranks: int) -> int:
        """Return how many of the ranks read different sequences.

        Args:
            ranks: Number of ranks of the run.
        """
        return ranks

    def simulated(self, ranks: int) -> dict[str, Any] | None:
        """Return the `mesh`, and the ZeRO stage as `zero`, by which `symdist plan` can simulate this run.

        Args:
            ranks: Number of ranks of the run.

        Returns:
            Keyword arguments of `symdist.tools.plan.plan_step`; None if it cannot simulate the engine.
        """
        return {"mesh": {"dp_shard": ranks}}

    def model_settings(self) -> dict[str, Any]:
        """Return `model_overrides` with their values as TOML reads them."""
        return {key: parse_value(text) for key, text in self.model_overrides.items()}

    def outline(self) -> Any:
        """Return the model on meta tensors.

        Raises:
            ValueError: If the model or one of `model_overrides` is unknown.
        """
        return build(self.model, device="meta", vocabulary=self.data.vocabulary, overrides=self.model_settings())

    def check(self, *, ranks: int) -> None:
        """Check that the run can start; engines add checks of their own.

        Args:
            ranks: Number of ranks of the run.

        Raises:
            ValueError: If it cannot; the message names the option, its value and the remedy.
        """
        for name in ("steps", "batch", "sequence", "accumulation", "validate_every", "validation_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.log_every < 1 or self.keep < 1 or self.checkpoint_every < 0:
            raise ValueError(
                f"--log-every {self.log_every} and --keep {self.keep} must be at least 1, "
                f"--checkpoint-every {self.checkpoint_every} at least 0"
            )
        for name in ("clip", "aux_loss", "z_loss", "spike_sigma", "rollback_after", "rollbacks", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        for name in ("timeout", "peak_tflops"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be positive")
        if self.rollback_after and not self.checkpoint_every:
            raise ValueError(
                f"--rollback-after {self.rollback_after} returns to checkpoints; give --checkpoint-every as well"
            )
        data_ranks = self.data_ranks(ranks)
        if self.batch % (data_ranks * self.accumulation):
            kind = "ranks" if data_ranks == ranks else "data-parallel ranks"
            raise ValueError(
                f"--batch {self.batch} does not split over {data_ranks} {kind} × {self.accumulation} micro-batches; "
                f"take a multiple of {data_ranks * self.accumulation}"
            )
        self.adjusted_recipe()


C = TypeVar("C", bound=Config)


def parse_as(kind: type[C], arguments: list[str]) -> C:
    """Parse a run's configuration from `--config FILE.toml` and the options that override it.

    For an unknown option or a value of the wrong kind, in the file or on the command line, tyro prints a message and
    ends the process with code 2.

    Args:
        kind: `Config`, or an engine's subclass with further options.
        arguments: The command line, without the program's name.

    Returns:
        The configuration, not checked yet.

    Raises:
        ValueError: If the file cannot be read or is not valid TOML.

    Example:
        >>> config = parse_as(Config, ["--config", "launch/configs/olmoe-tiny.toml", "--lr", "0.01"])
        >>> config.check(ranks=2)
    """
    options: list[str] = []
    for word in split_configs(arguments):
        options = [*read_toml(word), *options] if isinstance(word, Path) else [*options, word]
    description = f"{kind.__doc__}\n\n--config FILE.toml reads values from a file; the command line wins."
    return tyro.cli(kind, args=options, prog=Path(sys.argv[0]).name, description=description)


def split_configs(arguments: list[str]) -> Iterator[str | Path]:
    """Yield the words of a command line, with a path in place of `--config FILE`.

    Raises:
        ValueError: If no file follows `--config`.
    """
    remaining = iter(arguments)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != "--config":
            yield word
            continue
        path = value if equals else next(remaining, None)
        if not path:
            raise ValueError("--config needs a file, as in --config launch/configs/olmoe-tiny.toml")
        yield Path(path)


def load_toml(path: Path) -> dict[str, Any]:
    """Return the contents of a TOML file.

    Raises:
        ValueError: If the file cannot be read or is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path} is not valid TOML: {error}") from None


def read_toml(path: Path) -> list[str]:
    """Return the values of a TOML file as command-line words, so that the same parser checks both.

    Raises:
        ValueError: As `load_toml` does.
    """
    return words(load_toml(path), prefix="--")


def words(content: dict[str, Any], *, prefix: str) -> list[str]:
    """Return values as command-line words.

    Args:
        content: A TOML table, or a configuration as a dict. Values that are None are left out.
        prefix: What the options begin with, such as "--".

    Returns:
        The words.
    """
    options: list[str] = []
    for name, value in content.items():
        option = prefix + name.replace("_", "-")
        if name == "model_overrides" and isinstance(value, dict):
            options += [option, *(_text(word) for pair in value.items() for word in pair)] if value else []
        elif name == "override":
            options += [word for item in value for word in (option, _text(item))]
        elif isinstance(value, dict):
            options += words(value, prefix=f"{option}.")
        elif isinstance(value, list | tuple):
            options += [option, *map(_text, value)]
        elif isinstance(value, bool):
            options.append(option if value else f"{prefix}no-{name.replace('_', '-')}")
        elif value is not None:
            options += [option, _text(value)]
    return options


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
