"""The bench as a pytest run: one machine and one list of rows per run, printed as tables and written as JSON.

    python -m pytest bench                              # all of it; rows to runs/bench/<device>-<date>.json
    python -m pytest bench --save-results               # to bench/results/, which is committed
    python -m pytest bench --benchmark-disable          # the correctness gate alone, nothing is timed
    python -m pytest bench -k "kernels and T32"
    python -m pytest bench --dtype bfloat16             # the kernels in it, on a CPU

On a machine that others use as well, OMP_NUM_THREADS=1 gives figures that can be trusted: of several threads every
operation waits for the slowest. `load` in the rows says how busy it was.
"""

from pathlib import Path

import pytest
import torch

from bench import table
from bench.measure import Machine, Row

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", action="store_true", help="write the bench's JSON to bench/results, to commit")
    dtypes = ("float32", "bfloat16")
    parser.addoption("--dtype", choices=dtypes, help="of the kernels' operands (default: float32, on a GPU bfloat16)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    ignored = (
        "ignore:`torch.jit:DeprecationWarning",  # torch's own, at its first compile
        "ignore:There is a performance drop:UserWarning",  # vmap of attention on a CPU: that peer is what it is
    )
    for line in ignored:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    name = request.config.getoption("--dtype")
    return Machine(dtype=getattr(torch, name) if name else None)


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return request.config.stash[ROWS]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Write what there is so far: a run may be cut short."""
    rows = item.config.stash[ROWS]
    if rows:
        _write(rows, item.config)


def _write(rows: list[Row], config: pytest.Config) -> Path:
    dtype = config.getoption("--dtype")
    return table.write(rows, bool(config.getoption("--save-results")), f"-{dtype}" if dtype else "")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    path = _write(rows, config)
    terminalreporter.write_line("")
    terminalreporter.write_line(table.as_text(rows))
    terminalreporter.write_line(
        f"\n{len(rows)} rows in {path.relative_to(table.ROOT)}; draw them: python -m bench.plot PATH"
    )
