"""The command line: `inrun train`, `report`, `top`, `compare`, `export`, `compact`, `doctor`, `fidelity`, `experiment`.

Heavy imports are inside: `--help` is quick.
"""

from __future__ import annotations

import difflib
import functools
import io
import operator
import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from inrun.config import TrainConfig
from inrun.errors import InRunError


@dataclass(frozen=True)
class Report:
    """Make the report of a run again and print its findings.

    inrun report runs/1
    """

    run: tyro.conf.Positional[Path]
    """Run folder; report.html, report.png and report.json are written into it."""

    def do(self) -> None:
        from inrun import report

        found = report.write(self.run)
        print(report.findings(found))
        _say_where(found["report"], self.run)


@dataclass(frozen=True)
class Top:
    """The samples that helped the most over a run, or harmed the most, as a table.

    inrun top runs/1 -k 20 --worst --source python
    """

    run: tyro.conf.Positional[Path]
    """Run folder, or a folder of ledger shards."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many samples."""
    worst: bool = False
    """The lowest values in place of the highest."""
    source: str | None = None
    """Only samples of this source."""
    target: str | None = None
    """By this validation target; needed where there are several."""

    def do(self) -> None:
        from inrun import runs

        run = runs.Run.open(self.run)
        print(runs.top(run, self.k, worst=self.worst, source=self.source, target=self.target))


@dataclass(frozen=True)
class Compare:
    """Two runs side by side: rank correlation, sums per source, and the samples whose value changed most.

    inrun compare runs/1 runs/2
    """

    a: tyro.conf.Positional[Path]
    """Run folder, or a folder of ledger shards."""
    b: tyro.conf.Positional[Path]
    """The other one; samples are matched by their ids."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many of the samples that changed."""
    target: str | None = None
    """By this validation target, of both runs; needed where either has several."""

    def do(self) -> None:
        from inrun import runs

        a, b = runs.Run.open(self.a), runs.Run.open(self.b)
        print(runs.compare(a, b, self.k, target=self.target))


@dataclass(frozen=True)
class Export:
    """Every sample's value over the run, to standard output or a file: a row for each sample and target.

    A row is sample_id, target, value, count and, of a run folder, source.

    inrun export runs/1 --keep-positive -o keep.csv
    """

    run: tyro.conf.Positional[Path]
    """Run folder, or a folder of ledger shards."""
    format: Literal["jsonl", "csv", "parquet"] | None = None
    """Of the rows; None: by the suffix of the file (.jsonl, .csv, .parquet), else jsonl."""
    keep_positive: bool = False
    """Only rows with a value above 0: samples that lowered the validation loss (by the row's target)."""
    target: str | None = None
    """Only this validation target."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file; None: standard output."""

    def do(self) -> None:
        from inrun import runs

        options = {"form": self.format, "keep_positive": self.keep_positive, "target": self.target}
        wrote = runs.export(runs.Run.open(self.run), self.out, **options)
        print(f"inrun: {wrote}" + (f" in {self.out}" if self.out else ""), file=sys.stderr)


@dataclass(frozen=True)
class Compact:
    """Make of a ledger's many shards few large ones, sorted by sample: smaller, and asked faster. The rows stay.

    inrun compact runs/1
    """

    run: tyro.conf.Positional[Path]
    """Run folder, or a folder of ledger shards; not while the run is going on."""

    def do(self) -> None:
        from inrun import runs

        runs.Run.open(self.run).ledger.compact(progress=True)


@dataclass(frozen=True)
class Doctor:
    """This machine's device, backends and versions, and a test of every kernel on it; exit code 1 where one fails.

    inrun doctor
    """

    def do(self) -> None:
        from inrun import doctor

        sys.exit(0 if doctor.main() else 1)


@dataclass(frozen=True)
class Fidelity:
    """Compare every method's values with the Shapley value of the real optimizer step (some minutes, on the CPU).

    inrun fidelity
    """

    out: Path = Path("runs/fidelity")
    """Folder for fidelity.json and its pictures."""
    seeds: int = 2
    """Runs for each optimizer and learning rate."""

    def do(self) -> None:
        from inrun import fidelity

        fidelity.main(self.out, self.seeds)


@dataclass(frozen=True)
class Experiment:
    """What the values are for: run one small experiment, print its table, draw its picture.

    inrun experiment duplicates
    """

    name: tyro.conf.Positional[Literal["mislabel", "duplicates", "stages", "curation", "paraphrase"]]
    """Wrong labels found; copies that share; sources over training; training again without harmful samples;
    the rank of a text for its own rewriting."""
    out: Path = Path("runs/experiments")
    """Folder for experiment-NAME.json and .png."""
    seed: int = 0
    """Seeds everything that is drawn."""

    def do(self) -> None:
        from inrun import experiments

        experiments.run(self.name, self.out, self.seed)


COMMANDS = {
    "train": TrainConfig,
    "report": Report,
    "top": Top,
    "compare": Compare,
    "export": Export,
    "compact": Compact,
    "doctor": Doctor,
    "fidelity": Fidelity,
    "experiment": Experiment,
}


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand; what the user can put right ends as one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names and texts hold what a terminal's encoding may lack
    try:
        try:
            _run(sys.argv[1:] if argv is None else argv)
        finally:
            _flush()
    except BrokenPipeError:  # `| head` has seen enough
        pass
    except (InRunError, ValueError, OSError) as error:
        print(f"inrun: {error}", file=sys.stderr)
        sys.exit(2)


def _flush() -> None:
    """Write what was printed while an error can still be told; where that fails, drop it."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _run(argv: list[str]) -> None:
    if near := difflib.get_close_matches(argv[0], COMMANDS) if argv and argv[0] not in COMMANDS else None:
        raise InRunError(f"expected a command, got {argv[0]!r}; perhaps `inrun {near[0]}`? All: inrun --help")
    default: Any = {"train": _settings(argv)}
    commands: Any = [
        Annotated[kind, tyro.conf.subcommand(name, default=default.get(name, tyro.MISSING_NONPROP))]
        for name, kind in COMMANDS.items()
    ]
    command: Any = tyro.cli(
        functools.reduce(operator.or_, commands),
        prog="inrun",
        description="In-Run Data Shapley: what each training sample did to the validation loss.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if isinstance(command, TrainConfig):
        _train(command)
    else:
        command.do()


def _settings(argv: list[str]) -> TrainConfig:
    """The settings that arguments change: the defaults, or those of the run that is to be resumed."""
    from inrun import runfolder

    if argv[:1] != ["train"] or "--resume" not in argv:
        return TrainConfig()
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    given = [after for word, after in pairwise(words) if word == "--out"]
    folder = runfolder.choose(TrainConfig(out=Path(given[-1]) if given else None, resume=True))
    known = (folder / "config.json").exists()
    return TrainConfig.from_json(runfolder.settings(folder)["config"]) if known else TrainConfig()


def _train(config: TrainConfig) -> None:
    from inrun import report
    from inrun.train import Stopped, train

    try:
        found = train(config)
    except Stopped as stopped:
        print(f"inrun: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    print(report.findings(found))
    _say_where(found["report"], Path(found["run"]))


def _say_where(page: str | None, folder: Path) -> None:
    if page is None:
        print(f"Figures: {folder / 'report.json'} (the page with pictures needs: pip install 'inrun[report]')")
    else:
        print(f"Report: {page}")
