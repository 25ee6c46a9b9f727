"""The configuration of a pretraining run: read from a TOML file and the command line, and checked before it starts."""

import argparse
import dataclasses
import json
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from tyro.conf import UseAppendAction

from launch.data import DataConfig
from symdist.routing.recipes import Recipe, load_recipe, parse_overrides, parse_value
from symdist.toml_file import read_toml
from symdist.tools.models import build
from symdist.tools.texts import printable_errors

# The checkpoint's identity holds the values as the command line gives them, so those of a file become such texts.
_Text = Annotated[str, BeforeValidator(lambda value: value if isinstance(value, str) else json.dumps(value))]
_MOST = 2**31 - 1
_DAYS = 24 * 3600.0
# How many there are of something; where zero turns something off, it says so.
Count = Annotated[int, Field(ge=1, le=_MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=_MOST)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""For dataclasses of options: none is inf or NaN, and no other option is known."""


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class Config:
    """A pretraining run; every value can be set in the TOML file or on the command line, which wins."""

    model: str = "olmoe-tiny"
    """A preset of symdist.tools.models, or a TOML file of the same form."""
    # MutableMapping and not dict, whose keys tyro would fix to those of the file.
    model_overrides: MutableMapping[str, _Text] = field(default_factory=dict)
    """Settings that replace the model's, as pairs of name and value: --model-overrides num_hidden_layers 8."""
    recipe: str = "small-moe"
    """A recipe of symdist.routing.recipes, or a TOML file of the same form."""
    lr: Positive | None = None
    """Learning rate of the recipe's matrices, by default the recipe's; all others are scaled by the same factor."""
    override: UseAppendAction[tuple[str, ...]] = ()
    """Option of a role that replaces the recipe's, as in router.lr=0.02, which --lr does not scale; may be repeated."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""
    steps: Count = 300
    """Optimizer steps."""
    batch: Count = 16
    """Sequences per step, over all ranks and micro-batches."""
    sequence: Count = 128
    """Tokens per sequence."""
    accumulation: Count = 1
    """Micro-batches per step."""
    clip: NotNegative = 1.0
    """Global norm that gradients are clipped to; 0 for no clipping."""
    aux_loss: NotNegative = 0.0
    """Weight of the routers' load-balance loss."""
    z_loss: NotNegative = 0.0
    """Weight of the routers' z-loss."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of forward and backward; "auto" is bfloat16 on GPUs that support it. Weights and state are float32."""
    initialize: Literal["auto", "whole", "sharded"] = "auto"
    """"whole": every rank draws all weights, so that they are the same at any number of ranks. "sharded": each rank
    draws only its shards. "auto": whole up to 200 million weights, then sharded."""
    nonfinite: Literal["raise", "skip", "zero"] = "skip"
    """What to do if a gradient is inf or NaN: end the run, skip the step, or set such elements to zero."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of weights and data order."""
    validate_every: Count = 50
    """Steps between validations; the last step is always validated."""
    validation_sequences: Count = 512
    """Sequences per validation, over all ranks."""
    log_every: Count = 10
    """Steps between log lines."""
    spike_sigma: NotNegative = 0.0
    """Skip a step if its loss is so many standard deviations above the mean of the last 128 losses; 0 for never."""
    rollback_after: CountOrNone = 0
    """Skipped steps in a row, for spikes or non-finite gradients, after which the run returns to its newest checkpoint
    and continues with other data; 0 for never."""
    rollbacks: CountOrNone = 3
    """Number of such returns after which the run gives up."""
    timeout: Annotated[float, Field(gt=0, le=30 * _DAYS)] = 600.0
    """Seconds without progress, in a collective or elsewhere, after which the run ends with an error."""
    checkpoint_every: CountOrNone = 0
    """Steps between checkpoints; 0 saves only at the end, and on SIGTERM, SIGUSR1, SIGINT or SIGHUP."""
    keep: Count = 3
    """Number of newest checkpoints to keep."""
    keep_every: CountOrNone = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 for none."""
    checksums: bool | None = None
    """Checksums of all files of a checkpoint, or of none; left out, of files up to 4 GiB, a few seconds each."""
    peak_tflops: Positive | None = None
    """Peak Tflop/s of a rank, for the model flop utilization; left out, it is known for common GPUs."""
    output: Path = Path("runs/default")
    """Folder of logs and checkpoints."""
    resume: Annotated[str, Field(min_length=1)] | None = None
    """Path of a checkpoint to continue from. Or "auto": the newest checkpoint of this run that is not damaged, or the
    beginning if there is none; ranks that torchrun restarts always do this. Rates, schedules, batch and other numbers
    may differ from those of the checkpoint, and each that does is logged."""
    start_over: bool = False
    """Begin at step 0 although the run saved checkpoints, if none of them is whole."""
    from_weights: Path | None = None
    """Path of a checkpoint, of any run of this model, whose weights a run that begins at step 0 takes."""
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
            ValueError: If there is no such recipe, role or rule.
        """
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

    def check_values(self) -> None:
        """Check the type and range of every value, but nothing that needs other values, the model or the data.

        Raises:
            ValueError: If one is wrong; the message names the option and its value.
        """
        try:
            TypeAdapter(type(self)).validate_python(dataclasses.asdict(self))
        except ValidationError as error:
            raise ValueError(problems(error, option=True)) from None

    def check(self, *, ranks: int) -> None:
        """Check that the run can start; engines add checks of their own.

        Args:
            ranks: Number of ranks of the run.

        Raises:
            ValueError: If it cannot; the message names the option, its value and the remedy.
        """
        self.check_values()
        if self.output == Path():
            raise ValueError("--output is empty; give the folder of the run")
        if self.from_weights is not None and self.resume not in (None, "auto"):
            raise ValueError("--from-weights starts a run and --resume continues one; leave one of them out")
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


T = TypeVar("T")


def parse_as(kind: type[T], arguments: list[str], *, program: str | None = None, description: str | None = None) -> T:
    """Parse a configuration from `--config FILE.toml` and the options that override it.

    For an unknown option or a value of the wrong kind on the command line, tyro prints a message and ends the process
    with code 2.

    Args:
        kind: A dataclass with a default for every field: `Config`, or an engine's subclass with further options.
        arguments: The command line, without the program's name.
        program: The program's name in `--help`, by default that of its file.
        description: The text at the top of `--help`, by default the docstring of `kind`.

    Returns:
        The configuration, not checked yet.

    Raises:
        ValueError: As `load_config` does.

    Example:
        >>> config = parse_as(Config, ["--config", "launch/configs/olmoe-tiny.toml", "--lr", "0.01"])
        >>> config.check(ranks=2)
    """
    program = program or Path(sys.argv[0]).name
    text = f"{description or kind.__doc__}\n\n--config FILE.toml reads values from a file; the command line wins."
    parser = argparse.ArgumentParser(
        prog=program, usage=f"{program} --config FILE.toml", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path)
    known, options = parser.parse_known_args(arguments)
    default = kind() if known.config is None else load_config(kind, known.config)
    with printable_errors():
        return tyro.cli(kind, args=options, prog=program, description=text, default=default)


def load_config(kind: type[T], path: Path) -> T:
    """Read a configuration from a TOML file, or from a `.json` file of the same form.

    Raises:
        ValueError: If the file cannot be read or is not valid, or has an unknown key or a value of the wrong kind.
    """
    try:
        return TypeAdapter(kind).validate_python(read_toml(path, what="config"))
    except ValidationError as error:
        raise ValueError(f"config {path}: {problems(error, option=False)}; --help lists the options") from None


def problems(error: ValidationError, *, option: bool) -> str:
    """Describe what pydantic found, in one line.

    Args:
        error: What pydantic raised.
        option: Whether to name values as options of the command line, and not as keys of a file.
    """
    texts = []
    for at in error.errors():
        # What follows the fields are the alternatives that a value was tried as.
        name = ".".join(str(part) for part in at["loc"] if str(part).isidentifier() or isinstance(part, int))
        name = f"--{name.replace('_', '-')}" if option else name
        texts.append(f"{name} is {at['input']!r}: {at['msg'].lower().removeprefix('value error, ')}")
    return "; ".join(dict.fromkeys(texts))
