"""The command line: `inrun train` and `inrun report`. Heavy imports are inside, so that `--help` is quick."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

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


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand; what the user can put right ends as one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = tyro.cli(
            Annotated[TrainConfig, tyro.conf.subcommand("train", default=_settings(argv))]  # pyright: ignore
            | Annotated[Report, tyro.conf.subcommand("report")],
            prog="inrun",
            description="In-Run Data Shapley: what each training sample did to the validation loss.",
            args=argv,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        if isinstance(command, TrainConfig):
            _train(command)
        else:
            _report(command)
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
