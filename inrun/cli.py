"""The command line: `inrun train`, `report`, `fidelity`, `experiment`. Heavy imports are inside: `--help` is quick."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

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


@dataclass(frozen=True)
class Fidelity:
    """Compare every method's values with the Shapley value of the real optimizer step (some 15 minutes, on the CPU).

    inrun fidelity
    """

    out: Path = Path("runs/fidelity")
    """Folder for fidelity.json and its pictures."""
    seeds: int = 3
    """Runs for each optimizer and learning rate."""


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


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand; what the user can put right ends as one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = tyro.cli(
            Annotated[TrainConfig, tyro.conf.subcommand("train", default=_settings(argv))]  # pyright: ignore
            | Annotated[Report, tyro.conf.subcommand("report")]
            | Annotated[Fidelity, tyro.conf.subcommand("fidelity")]
            | Annotated[Experiment, tyro.conf.subcommand("experiment")],
            prog="inrun",
            description="In-Run Data Shapley: what each training sample did to the validation loss.",
            args=argv,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        if isinstance(command, TrainConfig):
            _train(command)
        elif isinstance(command, Report):
            _report(command)
        elif isinstance(command, Fidelity):
            from inrun import fidelity

            fidelity.main(command.out, command.seeds)
        else:
            from inrun import experiments

            experiments.run(command.name, command.out, command.seed)
    except (InRunError, ValueError, OSError) as error:
        print(f"inrun: {error}", file=sys.stderr)
        sys.exit(2)


def _settings(argv: list[str]) -> TrainConfig:
    """The settings that arguments change: the defaults, or those of the run that is to be resumed."""
    from inrun import runfolder

    if argv[:1] != ["train"] or "--resume" not in argv:
        return TrainConfig()
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    given = [after for word, after in pairwise(words) if word == "--out"]
    folder = runfolder.choose(TrainConfig(out=Path(given[-1]) if given else None, resume=True))
    path = folder / "config.json"
    return TrainConfig.from_json(json.loads(path.read_text())["config"]) if path.exists() else TrainConfig()


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


def _report(command: Report) -> None:
    from inrun import report

    found = report.write(command.run)
    print(report.findings(found))
    _say_where(found["report"], command.run)


def _say_where(page: str | None, folder: Path) -> None:
    if page is None:
        print(f"Figures: {folder / 'report.json'} (the page with pictures needs: pip install 'inrun[report]')")
    else:
        print(f"Report: {page}")
