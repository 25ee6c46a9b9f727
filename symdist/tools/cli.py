"""The command `symdist`: shows what a recipe does to a model, measures what it costs, and reports on runs.

Each subcommand is a dataclass of its arguments with a method `run`, listed in `_COMMANDS`. The docstrings of these
classes and of their fields are the help texts of the command.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, cast

from symdist.tools.baselines import NAMES, Name
from symdist.tools.texts import printable, printable_errors

# The exit code if a weight has no role, for scripts; what is refused otherwise exits with 2.
_UNPLACED = 3
_EXTRA = ("bokeh", "matplotlib", "pydantic", "rich", "tyro")


@dataclass(frozen=True, kw_only=True)
class Route:
    """Show the role, rule, view and strategy of every parameter of a model, without creating weights."""

    model: str | None = None
    """A preset, or a TOML file of the same form."""
    hf: str | None = None
    """In place of a preset, a model of transformers: a config.json or its folder, a model type, or a cached name."""
    recipe: str = "small-moe"
    """A recipe, or a TOML file of the same form."""
    ranks: int = 2
    """Number of ranks to shard over by FSDP2."""
    lr: float | None = None
    """Learning rate of the recipe's matrices; all others are scaled by the same factor."""
    override: tuple[str, ...] = ()
    """Option of a role that replaces the recipe's, as in router.rule=left_spectral; may be repeated."""
    strict: bool = False
    """Refuse linear layers of which no more is known than that they are matrices."""
    check: bool = False
    """Only say whether everything has a role; if not, print a pattern for each of the rest and exit with code 3."""
    all: bool = False
    """Show every parameter, instead of one row for parameters that differ only in the layer."""

    def run(self) -> None:
        """Print the table and a line of totals; with `check`, a TOML file of patterns instead."""
        from symdist.routing.recipes import load_recipe, parse_overrides
        from symdist.tools.models import build
        from symdist.tools.models.outlines import outline
        from symdist.tools.preview import preview
        from symdist.tools.tables import route_table, show, totals

        recipe = load_recipe(self.recipe).adjusted(lr=self.lr, overrides=parse_overrides(self.override))
        recipe = replace(recipe, strict=recipe.strict or self.strict)
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks} must be 1 or more")
        if (self.model is None) == (self.hf is None):
            raise ValueError("give either --model with a preset or --hf with a model of transformers")
        name = self.model or str(self.hf)
        model = build(name, device="meta") if self.hf is None else outline(self.hf)
        if self.check:
            _check_roles(model, recipe, name=name)
            return
        routing = preview(model, recipe, mesh={"dp_shard": self.ranks})
        show(
            route_table(routing, title=f"{name}, recipe {recipe.name}, {self.ranks} ranks", fold=not self.all),
            totals(routing),
        )


def _check_roles(model: Any, recipe: Any, *, name: str) -> None:
    """Print patterns for what has no role and exit, or say that there is nothing; what is printed is TOML."""
    from symdist.routing.route import UnroutedError, route
    from symdist.tools.texts import printable

    try:
        groups = route(model, recipe)
    except UnroutedError as error:
        print("\n".join(map(printable, error.snippet.splitlines())))
        _refuse(_reason(error), code=_UNPLACED)
    count = sum(len(group["params"]) for group in groups)
    print(printable(f"# recipe {recipe.name} has a rule for each of the {count:,} parameters of {name}"))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show what a step sends, computes and needs in memory on a mesh of any size, without creating weights."""

    model: str
    """A preset, or a TOML file of the same form."""
    mesh: str | None = None
    """Sizes of dp_replicate, dp_shard (or dp), ep and tp, as in dp=64,tp=8."""
    megatron: str | None = None
    """In place of a mesh, the sizes of a Megatron job: tp, pp, ep, etp and dp, as in tp=8,pp=4,ep=8,dp=64."""
    distributed_optimizer: bool = True
    """Whether Megatron's distributed optimizer divides the state among data-parallel ranks."""
    zero: Literal[1, 2, 3] | None = None
    """ZeRO stage whose partitions hold the weights instead of FSDP2 shards; the mesh then has dp only."""
    recipe: str = "small-moe"
    """A recipe, or a TOML file of the same form."""
    lr: float | None = None
    """Learning rate of the recipe's matrices; all others are scaled by the same factor."""
    override: tuple[str, ...] = ()
    """Option of a role that replaces the recipe's, as in router.rule=left_spectral; may be repeated."""
    communication_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which matrices are sent to their owners and back."""
    bucket_mb: float = 1000.0
    """Megabytes of communication buffers in use at a time."""
    hardware: Literal["h100", "h200", "b200", "mi300x", "cpu"] = "h100"
    """What a rank can do, by which strategies are chosen and times estimated."""
    bandwidth: float | None = None
    """Network bandwidth per rank, in GB/s, if not the hardware's."""
    tflops: float | None = None
    """Achieved speed of the optimizer's float32 matrix products, in Tflop/s, if not the hardware's."""
    half_tflops: float | None = None
    """Achieved speed of the optimizer's products in float16 and bfloat16, in Tflop/s, if not the hardware's."""
    model_tflops: float | None = None
    """Achieved speed of forward and backward, in Tflop/s, if not the hardware's."""
    tokens: int = 16384
    """Tokens per data-parallel rank and step."""
    compare: bool = False
    """Also show what other ways of stepping the same matrices would cost."""
    json: Path | None = None
    """JSON file to write the same numbers to."""
    picture: Path | None = None
    """File for a chart of bytes by role, for numbers of ranks up to that of the mesh."""

    def run(self) -> None:
        """Print the tables, and write the requested files."""
        from symdist.exchange import ExchangeOptions, Hardware
        from symdist.routing.recipes import load_recipe, parse_overrides
        from symdist.tools.megatron import MegatronMesh
        from symdist.tools.output import check_output, check_picture
        from symdist.tools.plan import StepPlan, parse_mesh, plan_step, smaller_meshes
        from symdist.tools.plan_tables import alternatives_table, draw, plan_table, summary
        from symdist.tools.tables import show

        check_output(self.json, option="--json")
        check_picture(self.picture, option="--picture")
        recipe = load_recipe(self.recipe).adjusted(lr=self.lr, overrides=parse_overrides(self.override))
        given = {
            name: value * scale
            for name, value, scale in (
                ("bandwidth", self.bandwidth, 1e9),
                ("flops", self.tflops, 1e12),
                ("half_flops", self.half_tflops, 1e12),
                ("model_flops", self.model_tflops, 1e12),
            )
            if value is not None
        }
        hardware = replace(Hardware.of(self.hardware), **given)
        if not 0 < self.bucket_mb < 1e9:
            raise ValueError(f"bucket_mb={self.bucket_mb} must be positive, and less than 1e9")
        exchange = ExchangeOptions(
            communication_dtype=self.communication_dtype,
            bucket_bytes=max(1, int(self.bucket_mb * 1e6)),
            hardware=hardware,
        )

        def planned(mesh: dict[str, int] | MegatronMesh) -> StepPlan:
            return plan_step(
                self.model,
                recipe,
                mesh=mesh,
                zero=self.zero,
                tokens=self.tokens,
                exchange=exchange,
                alternatives=self.compare,
            )

        if (self.mesh is None) == (self.megatron is None):
            raise ValueError("give either --mesh dp=… or --megatron tp=…,dp=…")
        if self.megatron is not None and (self.zero is not None or self.picture is not None):
            raise ValueError("--megatron goes with neither --zero nor --picture; leave these out")
        if self.megatron is None and not self.distributed_optimizer:
            raise ValueError("--no-distributed-optimizer is for --megatron; give that too, or leave this out")
        mesh: dict[str, int] | MegatronMesh
        if self.megatron is not None:
            mesh = MegatronMesh.parse(self.megatron, distributed=self.distributed_optimizer)
        else:
            mesh = parse_mesh(str(self.mesh))
        plan = planned(mesh)
        show(plan_table(plan), *summary(plan), *([alternatives_table(plan)] if self.compare else []))
        if self.json is not None:
            plan.write(self.json)
        if self.picture is not None and isinstance(mesh, dict):
            draw([*map(planned, smaller_meshes(mesh)), plan], self.picture)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train a model on random tokens with recipes and other optimizers, and compare time, traffic and memory."""

    model: str = "olmoe-tiny"
    """A preset, or a TOML file of the same form."""
    recipes: tuple[str, ...] = ("small-moe", "muon", "adamw")
    """Recipes, or TOML files of the same form."""
    against: tuple[Name, ...] = NAMES
    """Other optimizers to measure; torch.optim.AdamW always is. muon-fsdp2 and dion need packages of these names."""
    ranks: tuple[int, ...] = (2,)
    """Numbers of processes, one table for each."""
    steps: int = 12
    """Number of measured steps, after two steps of warm-up."""
    batch: int = 8
    """Sequences per rank and step."""
    sequence: int = 128
    """Tokens per sequence."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the processes run: cuda for GPUs, one each, cpu, or auto for GPUs if there are enough, else the CPU."""
    json: Path | None = None
    """JSON file to write the same numbers to."""

    def run(self) -> None:
        """Run the comparison, print a table for each number of ranks, and write the JSON file if requested."""
        from symdist.tools.compare import compare, write
        from symdist.tools.output import check_output
        from symdist.tools.tables import compare_notes, compare_table, show

        check_output(self.json, option="--json")
        comparisons = []
        for comparison in compare(
            self.model,
            self.recipes,
            against=self.against,
            ranks=self.ranks,
            steps=self.steps,
            batch=self.batch,
            sequence=self.sequence,
            device=self.device,
        ):
            comparisons.append(comparison)
            show(compare_table(comparison), *compare_notes(comparison))
        if self.json is not None:
            write(self.json, comparisons)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Compare training runs in a table and in a web page with curves, routing and plan."""

    runs: tuple[Path, ...]
    """Folders of runs, finished or not."""
    output: Path = Path("report.html")
    """HTML file to write."""
    picture: Path | None = None
    """File for a picture of losses and router load."""
    live: bool = False
    """Update until all runs are finished, or until Ctrl-C."""
    every: float = 5.0
    """Seconds between two updates with --live."""

    def run(self) -> None:
        """Print the table, and write the page and the picture."""
        from symdist.tools.report import follow, report
        from symdist.tools.tables import show

        if self.live:
            lines = follow(self.runs, output=self.output, picture=self.picture, every=self.every)
        else:
            lines = report(self.runs, output=self.output, picture=self.picture)
        show(*lines)


_COMMANDS = {"route": Route, "plan": Plan, "compare": Compare, "report": Report}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the subcommand given on the command line.

    Exits with code 2 and one line on stderr if a name, option or layout is refused, or an optional dependency is
    missing; `route --check` with code 3 if a weight has no role.

    Args:
        arguments: The arguments without the program's name; those of the process by default.

    Example:
        >>> main(["route", "--model", "olmoe-tiny", "--recipe", "small-moe"])
    """
    try:
        _parse(arguments).run()
    except ValueError as error:
        _refuse(_reason(error))
    except OSError as error:
        _refuse(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}")
    except ImportError as error:
        if error.name in _EXTRA:
            _refuse(f"this needs {error.name}: pip install symdist[tools]")
        if error.name is not None:
            raise
        # Raised by symdist itself, with a message that says what to install.
        _refuse(str(error))


def _parse(arguments: Sequence[str] | None) -> Route | Plan | Compare | Report:
    import tyro

    # --override may be repeated. Lists of other subcommands are given at once, and the runs of a report are positional.
    marks: dict[str, Any] = dict.fromkeys(("route", "plan"), tyro.conf.UseAppendAction)
    marks["report"] = tyro.conf.PositionalRequiredArgs
    commands = tuple(
        Annotated[command, tyro.conf.subcommand(name), *filter(None, [marks.get(name)])]
        for name, command in _COMMANDS.items()
    )
    kinds = cast(Any, Union[commands])  # noqa: UP007
    with printable_errors():
        return tyro.cli(kinds, prog="symdist", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def _reason(error: ValueError) -> str:
    """Return an error's message, without the patterns that it may have."""
    from symdist.routing.route import UnroutedError

    if isinstance(error, UnroutedError):
        return f"{error.reason}; symdist route --check prints a pattern for each"
    return str(error)


def _refuse(message: str, *, code: int = 2) -> NoReturn:
    print(f"symdist: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
