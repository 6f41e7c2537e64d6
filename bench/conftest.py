"""The bench as a pytest run: one machine and one list of rows per run, printed as tables and written as JSON.

    python -m pytest bench                              # all of it; rows to runs/bench/<device>-<date>.json
    python -m pytest bench --save-results               # to bench/results/, which is committed
    python -m pytest bench --benchmark-disable          # the correctness gate alone, nothing is timed
    python -m pytest bench -k "kernels and T32"

On a machine that others use as well, OMP_NUM_THREADS=1 gives figures that can be trusted: of several threads every
operation waits for the slowest. `load` in the rows says how busy it was.
"""

import pytest

from bench import table
from bench.measure import Machine, Row

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", action="store_true", help="write the bench's JSON to bench/results, to commit")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    ignored = (
        "ignore:`torch.jit:DeprecationWarning",  # torch's own, at its first compile
        "ignore:There is a performance drop:UserWarning",  # vmap of attention on a CPU: that peer is what it is
    )
    for line in ignored:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine()


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return request.config.stash[ROWS]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Write what there is so far: a run may be cut short."""
    rows = item.config.stash[ROWS]
    if rows:
        table.write(rows, bool(item.config.getoption("--save-results")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    path = table.write(rows, bool(config.getoption("--save-results")))
    terminalreporter.write_line("")
    terminalreporter.write_line(table.as_text(rows))
    terminalreporter.write_line(
        f"\n{len(rows)} rows in {path.relative_to(table.ROOT)}; draw them: python -m bench.plot PATH"
    )
