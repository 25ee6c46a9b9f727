"""What a pretraining run is told: a TOML file, the command line over it, checked before anything starts."""

import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from tyro.conf import UseAppendAction

from launch.data import DataConfig
from symdist.routing.recipes import load_recipe, parse_overrides, parse_value
from symdist.tools.models import build


@dataclass(frozen=True, kw_only=True)
class Config:
    """A pretraining run. Every value can stand in the TOML file and on the command line, which wins."""

    model: str = "olmoe-tiny"
    """A preset of symdist.tools.models, or a TOML file of the same form."""
    model_overrides: dict[str, str] = field(default_factory=dict)
    """Values of the model's configuration, as pairs: --model-overrides num_hidden_layers 8."""
    recipe: str = "small-moe"
    """A recipe of symdist.routing.recipes, or a TOML file of the same form."""
    override: UseAppendAction[tuple[str, ...]] = ()
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
    spike_sigma: float = 0.0
    """Leave out a step whose loss is so many standard deviations above the mean of the last 128; 0 for never."""
    rollback_after: int = 0
    """Steps left out in a row, for spikes or gradients that are not finite, after which the run goes back to its newest
    checkpoint and on with other data; 0 for never."""
    rollbacks: int = 3
    """How often it does so before it gives up."""
    timeout: float = 600.0
    """Seconds that a collective, or anything else, may stand still before the run ends with an error."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end, on SIGTERM and SIGUSR1, and nowhere else."""
    keep: int = 3
    """Checkpoints kept: the newest."""
    keep_every: int = 0
    """Of checkpoints whose step is a multiple of this, all are kept; 0 for none."""
    peak_tflops: float | None = None
    """What a rank can do, for the model flops utilisation; left out, it is known of common GPUs."""
    output: Path = Path("runs/default")
    """The folder of logs and checkpoints."""
    resume: str | None = None
    """"auto" continues from the newest checkpoint of the run, the one before where it is damaged, or starts where there
    is none; or a checkpoint's path. Ranks that torchrun starts again go on as by "auto"."""
    dry_run: bool = False
    """Check everything, show routing and plan, and stop; needs no torchrun, but NNODES and NPROC in the environment."""

    def overrides(self) -> dict[str, dict[str, Any]]:
        """`override` by role and option; ValueError for a word that is not role.option=value."""
        return parse_overrides(self.override)

    def data_ranks(self, ranks: int) -> int:
        """How many of the ranks see other sequences."""
        return ranks

    def simulated(self, ranks: int) -> dict[str, Any] | None:
        """The `mesh`, or the stage of `zero`, on which `symdist plan` sees this run; None where it cannot."""
        return {"mesh": {"dp_shard": ranks}}

    def model_settings(self) -> dict[str, Any]:
        """`model_overrides` with their values as TOML reads them."""
        return {key: parse_value(text) for key, text in self.model_overrides.items()}

    def outline(self) -> Any:
        """The model on meta tensors; ValueError where there is none such."""
        return build(self.model, device="meta", vocabulary=self.data.vocabulary, overrides=self.model_settings())

    def check(self, *, ranks: int) -> None:
        """ValueError, naming the value and the remedy, for what cannot run on so many ranks."""
        for name in ("steps", "batch", "sequence", "accumulation", "validate_every", "validation_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.log_every < 1 or self.keep < 1 or self.checkpoint_every < 0:
            raise ValueError("--log-every and --keep must be at least 1, --checkpoint-every at least 0")
        for name in ("clip", "aux_loss", "z_loss", "spike_sigma", "rollback_after", "rollbacks", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        for name in ("timeout", "peak_tflops"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be positive")
        if self.rollback_after and not self.checkpoint_every:
            raise ValueError("--rollback-after goes back to checkpoints; give --checkpoint-every as well")
        data = self.data_ranks(ranks)
        if self.batch % (data * self.accumulation):
            kind = "ranks" if data == ranks else "data-parallel ranks"
            raise ValueError(
                f"--batch {self.batch} does not split over {data} {kind} × {self.accumulation} micro-batches; "
                f"take a multiple of {data * self.accumulation}"
            )
        load_recipe(self.recipe).overridden(self.overrides())


C = TypeVar("C", bound=Config)


def parse_as(kind: type[C], arguments: list[str]) -> C:
    """The configuration, of a kind that may add options, from `--config FILE.toml` and options over it.

    Raises ValueError for a file that is missing or no TOML; for an unknown option or a value of the wrong kind, in the
    file or on the command line, tyro says so and ends the process with code 2.
    """
    given: list[str] = []
    for word in split_configs(arguments):
        given = [*read_toml(word), *given] if isinstance(word, Path) else [*given, word]
    description = f"{kind.__doc__}\n\n--config FILE.toml reads values from a file; the command line wins."
    return tyro.cli(kind, args=given, prog=Path(sys.argv[0]).name, description=description)


def split_configs(arguments: list[str]) -> Iterator[str | Path]:
    """The words of a command line, with the file in place of `--config FILE`; ValueError where none is named."""
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--config":
            yield word
            continue
        path = value if equals else next(rest, None)
        if not path:
            raise ValueError("--config needs a file")
        yield Path(path)


def load_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says; ValueError for one that is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path} is not valid TOML: {error}") from None


def read_toml(path: Path) -> list[str]:
    """The values of a TOML file as command-line words, so that both are checked alike."""
    return words(load_toml(path), prefix="--")


def words(content: dict[str, Any], *, prefix: str) -> list[str]:
    """Values of a TOML table, or of a configuration, as command-line words; None is left out."""
    found: list[str] = []
    for name, value in content.items():
        option = prefix + name.replace("_", "-")
        if name == "model_overrides" and isinstance(value, dict):
            found += [option, *(_text(word) for pair in value.items() for word in pair)] if value else []
        elif name == "override":
            found += [word for item in value for word in (option, _text(item))]
        elif isinstance(value, dict):
            found += words(value, prefix=f"{option}.")
        elif isinstance(value, list | tuple):
            found += [option, *map(_text, value)]
        elif isinstance(value, bool):
            found.append(option if value else f"{prefix}no-{name.replace('_', '-')}")
        elif value is not None:
            found += [option, _text(value)]
    return found


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
