"""The subcommands that read a run: what they print is what its ledger holds, and their errors say what to do."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

import inrun_kernels
from inrun import Ledger, doctor, results, runs
from inrun.cli import main
from inrun_kernels import grouped, native

VALUES = {"a": [0.5, 0.25], "b": [-0.5, 0.125], "c": [0.25, 0.0], "d": [-0.25, -0.5]}
TOTALS = {name: sum(values) for name, values in VALUES.items()}  # 0.75, -0.375, 0.25, -0.75


def make(folder: Path, values: dict[str, list[float]] = VALUES) -> Path:
    sources = {"sample_id": list(values), "source": ["web", "web", "book", "book"][: len(values)]}
    sources |= {"planted": ["", "", "", "shuffled"][: len(values)], "text": [f"text\tof {each}" for each in values]}
    folder.mkdir()
    pq.write_table(pa.table(sources), folder / "samples.parquet")
    with Ledger(folder / "ledger", flush_rows=1) as ledger:
        for step in range(2):
            ledger.append(step, list(values), [each[step] for each in values.values()])
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make(tmp_path / "run")


def said(capsys, *arguments: object) -> str:
    main(list(map(str, arguments)))
    return capsys.readouterr().out


def failed(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_samples_that_are_described_nowhere_are_shown_without(run, capsys):
    with Ledger(run / "ledger") as ledger:
        ledger.append(2, ["x"], [2.0])
    lines = [line.split() for line in said(capsys, "top", run, "-k", 2).splitlines()[3:]]
    assert lines == [["+2.000e+00", "1", "x"], ["+7.500e-01", "2", "a", "web", "text", "of", "a"]]
    assert "x" in [line.split()[-1] for line in said(capsys, "compare", run, run, "-k", 5).splitlines() if line]


def test_top_shows_the_extremes_with_source_and_text(run, capsys):
    best = said(capsys, "top", run, "-k", 2).splitlines()
    assert best[0].startswith("The 2 highest values, in nats; above 0")
    assert [line.split() for line in best[3:]] == [
        ["+7.500e-01", "2", "a", "web", "text", "of", "a"],
        ["+2.500e-01", "2", "c", "book", "text", "of", "c"],
    ]
    worst = said(capsys, "top", run, "--worst", "--source", "web").splitlines()
    assert [line.split()[2] for line in worst[3:]] == ["b", "a"]
    ids_alone = said(capsys, "top", run / "ledger").splitlines()
    assert [line.split() for line in ids_alone[3:]] == [[f"{TOTALS[n]:+.3e}", "2", n] for n in "acbd"]


def test_compare_ranks_sums_and_finds_what_changed(run, tmp_path, capsys):
    other = make(tmp_path / "other", {**VALUES, "d": [1.0, 0.25]})  # d: from last to first
    printed = said(capsys, "compare", run, other, "-k", 1)
    assert "in both: 4" in printed and "75% have the same sign" in printed
    assert "-0.200 of ranks" in printed  # ranks 3 1 2 0 and 2 0 1 3
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("book, shuffled")]
    assert row[2:] == ["-0.7500", "+1.2500", "-3.75e-01", "+6.25e-01"]
    last = printed.splitlines()[-1].split()
    assert last[:4] == ["+2.000e+00", "-7.500e-01", "+1.250e+00", "d"]
    assert "Target: validation." in printed
    apart = make(tmp_path / "apart", {"x": [1.0, 1.0]})
    assert "got 4 and 1 with none in common" in failed(capsys, "compare", run, apart)
    with Ledger(tmp_path / "numbers") as ledger:
        ledger.append(0, [1], [1.0])
    assert "integer ids, the other strings" in failed(capsys, "compare", run, tmp_path / "numbers")


def test_compare_takes_one_of_several_targets_and_shows_what_either_run_knows(tmp_path, capsys):
    b = make(tmp_path / "b", {"x": [0.0, 0.0], "y": [0.0, 0.0], "z": [0.0, 0.0]})  # x and y of the web, z of a book
    Ledger(b / "ledger").resume(0)
    for path, code in ((tmp_path / "a", [1.0, 0.5, -1.0]), (b / "ledger", [0.5, 0.75, -3.0])):
        with Ledger(path) as ledger:
            ledger.append(0, ["x", "y", "z"], [[value, 8.0] for value in code], ("code", "prose"))
    lines = [line.split() for line in said(capsys, "compare", tmp_path / "a", b, "--target", "code").splitlines()]
    assert lines[0][-3:] == ["in", "both:", "3"]
    assert ["web", "-", "+1.2500", "-", "+6.25e-01"] in lines and ["book", "-", "-3.0000", "-", "-3.00e+00"] in lines
    assert [(line[0], *line[3:]) for line in lines[-3:]] == [
        ("-2.000e+00", "z", "book", "text", "of", "z"),
        ("-5.000e-01", "x", "web", "text", "of", "x"),
        ("+2.500e-01", "y", "web", "text", "of", "y"),
    ]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_export_gives_every_total_to_a_file_or_the_output(run, tmp_path, capfdbinary, form):
    readers = {
        "jsonl": lambda data: [json.loads(line) for line in data.decode().splitlines()],
        "csv": lambda data: pyarrow.csv.read_csv(io.BytesIO(data)).to_pylist(),
        "parquet": lambda data: pq.read_table(io.BytesIO(data)).to_pylist(),
    }
    rows = [
        {"sample_id": name, "target": "validation", "value": TOTALS[name], "count": 2, "source": source}
        for name, source in zip("abcd", ["web", "web", "book", "book, shuffled"], strict=True)
    ]
    main(["export", str(run), "--format", form])
    sys.stdout.flush()
    assert readers[form](capfdbinary.readouterr().out) == rows
    out = tmp_path / "out"
    main(["export", str(run), "--format", form, "--keep-positive", "-o", str(out)])
    assert readers[form](out.read_bytes()) == [rows[0], rows[2]]


def test_export_of_parquet_to_a_terminal_is_refused(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "name a file with -o" in failed(capsys, "export", run, "--format", "parquet")


def test_export_into_a_pipe_that_closes_is_no_error(run):
    with Ledger(run / "ledger") as ledger:
        ledger.append(2, [f"sample {i}" for i in range(20000)], [1.0] * 20000)
    script = "import sys; from inrun.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", script, "export", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""


def test_an_output_that_takes_nothing_ends_a_command_in_order(run, monkeypatch, capsys):
    """A short table waits in the buffer until the end: a closed pipe is no error, a full disk is one."""
    reader, pipe = os.pipe()
    os.close(reader)
    with open(pipe, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        main(["top", str(run)])
    if Path("/dev/full").exists():
        with open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert "No space left" in failed(capsys, "top", run)


def test_a_terminal_that_lacks_a_character_shows_another(run, monkeypatch):
    with Ledger(run / "ledger") as ledger:
        ledger.append(2, ["é"], [2.0])
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    main(["top", str(run), "-k", "1"])
    assert printed.getvalue().splitlines()[-1].split() == [b"+2.000e+00", b"1", b"?"]


def test_compact_leaves_the_rows_and_fewer_shards(run, capsys):
    before = Ledger(run / "ledger").totals()
    said(capsys, "compact", run)
    assert len(list((run / "ledger").iterdir())) == 1 and Ledger(run / "ledger").totals() == before


def test_errors_say_what_to_do(run, tmp_path, capsys):
    assert "which does not exist; `inrun train` makes one" in failed(capsys, "top", tmp_path / "missing")
    assert "samples.parquet, which is a file" in failed(capsys, "top", run / "samples.parquet")
    assert "which holds neither" in failed(capsys, "export", tmp_path)
    known = "expected one of ['book', 'book, shuffled', 'web'], got 'wed'"
    assert known in failed(capsys, "top", run, "--source", "wed")
    assert "run folder with samples.parquet" in failed(capsys, "top", run / "ledger", "--source", "web")
    for command in (("top", run), ("compare", run, run)):
        assert "expected k >= 0, received -2" in failed(capsys, *command, "-k", -2)
    assert "expected k to be an integer of 64 bits" in failed(capsys, "top", run, "-k", 2**63)
    assert f"got {tmp_path / 'no/x.csv'}; {tmp_path / 'no'} does not exist" in (
        failed(capsys, "export", run, "-o", tmp_path / "no/x.csv")
    )


def test_report_says_what_a_folder_without_a_run_is(run, tmp_path, capsys):
    of_file = failed(capsys, "report", run / "samples.parquet")
    assert "which is a file; `inrun train` makes one" in of_file
    ledger = "but a ledger: `inrun top` and `inrun export` answer it"
    assert f"which holds no config.json and no samples.parquet {ledger}" in failed(capsys, "report", run / "ledger")
    assert f"which holds no config.json {ledger}" in failed(capsys, "report", run)
    (tmp_path / "empty").mkdir()
    assert "no samples.parquet; `inrun train` makes one" in failed(capsys, "report", tmp_path / "empty")


@pytest.fixture
def two_targets(tmp_path) -> Path:
    """Three samples by code and prose; below 0: a by prose, c by both."""
    with Ledger(tmp_path / "two") as ledger:
        ledger.append(0, ["a", "b", "c"], [[1.0, -3.0], [0.5, 0.25], [-1.0, -2.0]], ("code", "prose"))
    return tmp_path / "two"


def test_several_targets_are_asked_for_by_name(run, two_targets, tmp_path, capsys):
    named = "expected one of ['code', 'prose'], named with --target, got"
    for command in (("top", two_targets), ("compare", two_targets, two_targets)):
        assert f"{named} none; {two_targets} has" in failed(capsys, *command)
    for command in (("top", two_targets), ("export", two_targets), ("compare", two_targets, two_targets)):
        assert f"{named} 'cod'" in failed(capsys, *command, "--target", "cod")
    assert said(capsys, "top", two_targets, "--target", "prose").splitlines()[3].split()[::2] == ["+2.500e-01", "b"]

    with Ledger(tmp_path / "code") as ledger:
        ledger.append(0, ["a", "b"], [2.0, 1.0], ["code"])
    each = f"{two_targets} has ['code', 'prose']; {tmp_path / 'code'} has ['code']"
    for of, got in ((), "none"), (("--target", "prose"), "'prose'"):
        message = failed(capsys, "compare", two_targets, tmp_path / "code", *of)
        assert f"expected one of ['code'], named with --target, got {got}; {each}" in message
    printed = said(capsys, "compare", two_targets, tmp_path / "code", "--target", "code")
    assert "Target: code." in printed and printed.splitlines()[-2].split() == [
        "+1.000e+00",
        "+1.000e+00",
        "+2.000e+00",
        "a",
    ]
    for of in ((), ("--target", "code"), ("--target", "validation")):
        message = failed(capsys, "compare", run, tmp_path / "code", *of)
        assert f"got none: {run / 'ledger'} has ['validation']; {tmp_path / 'code'} has ['code']" in message


def test_export_counts_samples_and_says_what_a_row_is(run, two_targets, capsys):
    main(["export", str(two_targets)])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 6
    assert printed.err == "inrun: 6 rows, one for each sample and target: 3 samples, targets code, prose\n"
    main(["export", str(two_targets), "--keep-positive"])
    assert "3 rows, one for each sample and target: 2 samples, targets" in capsys.readouterr().err
    main(["export", str(two_targets), "--target", "code", "--keep-positive"])
    assert capsys.readouterr().err == "inrun: 2 samples\n"


def test_export_takes_the_format_of_the_suffix_where_none_is_given(run, tmp_path):
    for name in ("o.csv", "o.parquet", "o.jsonl", "o.txt"):
        main(["export", str(run), "-o", str(tmp_path / name)])
    main(["export", str(run), "--format", "jsonl", "-o", str(tmp_path / "other.csv")])
    assert pyarrow.csv.read_csv(tmp_path / "o.csv")["value"].to_pylist() == list(TOTALS.values())
    assert pq.read_table(tmp_path / "o.parquet")["value"].to_pylist() == list(TOTALS.values())
    for name in ("o.jsonl", "o.txt", "other.csv"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [row["value"] for row in rows] == list(TOTALS.values())


def test_export_is_in_order_of_samples_and_writes_them_as_they_are(run, tmp_path):
    with Ledger(run / "ledger") as ledger:
        ledger.append(2, ["aé", "b"], [2.0, 0.375])  # aé is described nowhere; b is then worth 0
    main(["export", str(run), "-o", str(tmp_path / "all.CSV")])
    assert pyarrow.csv.read_csv(tmp_path / "all.CSV")["sample_id"].to_pylist() == ["a", "aé", "b", "c", "d"]
    main(["export", str(run), "--keep-positive", "-o", str(tmp_path / "kept")])
    lines = (tmp_path / "kept").read_text(encoding="utf-8").splitlines()
    assert [line[15:].split('"')[0] for line in lines] == ["a", "aé", "c"]


@pytest.mark.parametrize(
    "place", ["ledger/more.parquet", "samples.parquet", "config.json", "metrics.jsonl", "report.json", "ledger/x.csv"]
)
def test_export_into_the_run_itself_is_refused(run, place, capsys):
    before = len(Ledger(run / "ledger"))
    for named in (run, run / "ledger"):
        assert "no part of the run" in failed(capsys, "export", named, "-o", str(run / place))
    assert len(Ledger(run / "ledger")) == before


def test_an_export_that_fails_leaves_the_one_before(run, monkeypatch, capsys):
    out = run / "values.csv"
    main(["export", str(run), "-o", str(out)])
    before = out.read_bytes()

    def full(table, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(pyarrow.csv, "write_csv", full)
    assert "no space left" in failed(capsys, "export", run, "-o", out)
    assert out.read_bytes() == before and sorted(p.name for p in run.iterdir()) == sorted(
        ["ledger", "samples.parquet", "values.csv"]
    )


def test_an_export_goes_through_links_and_pipes(run, tmp_path):
    target, link, pipe = tmp_path / "target.csv", tmp_path / "link.csv", tmp_path / "pipe.csv"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    main(["export", str(run), "-o", str(link)])
    assert link.is_symlink() and pyarrow.csv.read_csv(target)["value"].to_pylist() == list(TOTALS.values())
    command = f"from inrun.cli import main; main(['export', {str(run)!r}, '-o', {str(pipe)!r}])"
    writer = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL)
    assert pipe.read_text() == target.read_text()
    assert writer.wait(60) == 0 and pipe.is_fifo()


def test_samples_of_ones_own_need_no_more_than_ids(run, capsys):
    """Source and text are shown where they are known."""
    ids = pq.read_table(run / "samples.parquet")["sample_id"]
    pq.write_table(pa.table({"sample_id": ids, "source": ["web", None, *["web"] * (len(ids) - 2)]}),
                   run / "samples.parquet")  # fmt: skip
    assert "(unknown)" in said(capsys, "top", run, "-k", len(ids))
    assert "(unknown)" in said(capsys, "export", run)
    pq.write_table(pa.table({"sample_id": ids}), run / "samples.parquet")
    assert "(unknown)" in said(capsys, "top", run)
    pq.write_table(pa.table({"sample_id": pa.chunked_array([*ids.chunks, ids.chunk(0)[:1]])}), run / "samples.parquet")
    for command in ("top", "export"):
        assert f"expected each sample once in {run / 'samples.parquet'}, got 1 twice" in failed(capsys, command, run)
    pq.write_table(pa.table({"name": ids}), run / "samples.parquet")
    assert "expected a column sample_id in" in failed(capsys, "export", run)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.int32()])
def test_samples_written_by_other_libraries_have_ids_of_other_types(tmp_path, capsys, kind):
    """pandas and polars write large strings."""
    run, numbers = make(tmp_path / "run"), pa.types.is_integer(kind)
    if numbers:
        Ledger(run / "ledger").resume(0)
        with Ledger(run / "ledger") as ledger:
            ledger.append(0, [1, 2], [0.5, -0.5])
    ids = pa.array([1, 2] if numbers else list(VALUES), kind)
    pq.write_table(pa.table({"sample_id": ids, "source": ids, "text": ids}), run / "samples.parquet")
    best = str(ids[0])
    assert said(capsys, "top", run, "-k", 1, "--source", best).splitlines()[-1].split()[2:] == [best] * 3
    assert said(capsys, "compare", run, run, "-k", 1).splitlines()[-1].split()[3:] == [best] * 3
    rows = [json.loads(line) for line in said(capsys, "export", run).splitlines()]
    assert [row["source"] for row in rows] == [str(row["sample_id"]) for row in rows] == list(map(str, ids.to_pylist()))


def test_samples_with_ids_of_the_other_kind_are_an_error(run, capsys):
    path = run / "samples.parquet"
    for ids in (pa.array([1, 2]), pa.array([0.5])):
        pq.write_table(pa.table({"sample_id": ids}), path)
        for command in (("top", run), ("top", run, "--source", "a"), ("compare", run, run), ("export", run)):
            got = f"samples: expected string ids in {path}, as in the ledger, got {ids.type}"
            assert got in failed(capsys, *command)


def test_a_damaged_shard_is_named(run, capsys):
    shard = sorted((run / "ledger").glob("*.parquet"))[0]
    content = bytearray(shard.read_bytes())
    content[40:400] = bytes(360)  # of its pages
    shard.write_bytes(content)
    for command in (("top", run), ("export", run), ("compare", run, run), ("compact", run)):
        assert f"received {shard}, which is damaged" in failed(capsys, *command)


def test_export_into_a_suffix_that_says_nothing_is_refused(run, tmp_path, capsys):
    said = failed(capsys, "export", run, "-o", str(tmp_path / "o.xlsx"))
    assert "a name that ends in one of .jsonl, .ndjson, .json, .txt, .csv, .parquet, or --format; got" in said
    assert not (tmp_path / "o.xlsx").exists()
    main(["export", str(run), "--format", "csv", "-o", str(tmp_path / "o.tsv")])
    assert pyarrow.csv.read_csv(tmp_path / "o.tsv")["value"].to_pylist() == list(TOTALS.values())


def test_a_misspelled_command_is_answered_by_the_nearest(capsys):
    assert "got 'tpo'; perhaps `inrun top`?" in failed(capsys, "tpo", "led")
    assert "got 'expotr'; perhaps `inrun export`?" in failed(capsys, "expotr")
    assert "Available subcommands" in failed(capsys, "xyz")  # tyro's


@pytest.mark.parametrize("command", ["top", "compare", "export", "compact", "doctor", "report"])
def test_help_teaches_by_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"inrun {command}" in capsys.readouterr().out.split("╭")[0].split("usage", 1)[1].split("\n\n", 1)[1]


def test_doctor_passes_where_the_numbers_are_right_and_only_there(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PRODUCTS", ["bias_dot", "grouped_wgrad"])
    monkeypatch.setattr(doctor, "STACKS", ("pytest", "no-such-package"))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    printed = capsys.readouterr().out
    backends = 1 + ("triton" in printed.split("Self-test")[1])
    assert backends == 1 + (importlib.util.find_spec("triton") is not None)
    total = 3 * (backends + 1)  # grouped products have no Triton kernel
    built = len(native.DTYPES) if native.library() else 0
    total += built
    assert stopped.value.code == 0 and f"All {total} passed." in printed
    assert (
        f"torch {torch.__version__.partition('+')[0]}" in printed
        and f"stacks      pytest {pytest.__version__}\n" in printed
    )
    if not torch.cuda.is_available() and backends == 2:
        assert "interpreted only: no CUDA device here" in printed

    right = inrun_kernels.bias_dot
    wrong = {"wrong": lambda *a, **kw: right(*a, **kw) * 1.05, "nan": lambda *a, **kw: right(*a, **kw) * torch.nan}
    for broken in wrong.values():
        monkeypatch.setattr(inrun_kernels, "bias_dot", broken)
        with pytest.raises(SystemExit) as stopped:
            main(["doctor"])
        printed = capsys.readouterr().out
        assert stopped.value.code == 1 and f"{3 * backends + built} of {total} FAILED" in printed

    def raises(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(inrun_kernels, "bias_dot", raises)
    assert not doctor.main()
    assert "bias_dot, torch, float32: RuntimeError: no such instruction" in capsys.readouterr().out


@pytest.mark.parametrize("name", doctor.PRODUCTS)
def test_the_self_test_knows_every_product(name):
    for form in doctor.FORMS.get(name, (None,)):
        assert doctor.worst_error(name, "torch", "float32", "cpu", form) < 1e-5
        if (name, form) in doctor.BUILT:
            assert doctor.worst_error(name, "C", "float32", "cpu", form) < 1e-5


def test_the_self_test_sees_two_directions_forms_and_groups(monkeypatch):
    dots, layer, groups = inrun_kernels.ghost_dot, inrun_kernels.linear_wgrad_dot, grouped.grouped_mm

    def swapped(*args, **options):
        found = dots(*args, **options)
        return found.flip(-1) if args[-1].dim() == 3 else found

    def one_form(*args, form, **options):
        weight_grad, bias_grad, values = layer(*args, form=form, **options)
        return weight_grad, bias_grad * (2 if form == "prefix" else 1), values

    monkeypatch.setattr(inrun_kernels, "ghost_dot", swapped)
    monkeypatch.setattr(inrun_kernels, "linear_wgrad_dot", one_form)
    monkeypatch.setattr(grouped, "grouped_mm", lambda x, w, ends: groups(x, w, ends - torch.tensor([1, 1, 0]).int()))
    assert doctor.worst_error("ghost_dot", "torch", "float32", "cpu") > 0.1
    assert doctor.worst_error("linear_wgrad_dot", "torch", "float32", "cpu", "prefix") > 0.1
    assert doctor.worst_error("linear_wgrad_dot", "torch", "float32", "cpu", "two") < 1e-5
    assert doctor.worst_error("grouped_mm", "torch", "float32", "cpu") > 0.1


@pytest.mark.parametrize("grouping", ["segments", "per_token"])
def test_the_self_test_sees_what_is_no_number_for_documents_or_tokens_alone(monkeypatch, grouping):
    right = inrun_kernels.bias_dot
    monkeypatch.setattr(
        inrun_kernels, "bias_dot", lambda *a, **kw: right(*a, **kw) * (math.nan if grouping in kw else 1)
    )
    assert math.isnan(doctor.worst_error("bias_dot", "torch", "float32", "cpu"))


def test_the_self_test_sees_one_backend_and_what_is_too_small_everywhere(monkeypatch):
    right = inrun_kernels.bias_dot

    def too_small(*args, backend, **options):
        return right(*args, **options) - int(backend == "triton")

    monkeypatch.setattr(inrun_kernels, "bias_dot", too_small)
    assert doctor.worst_error("bias_dot", "torch", "float32", "cpu") < 1e-5
    assert doctor.worst_error("bias_dot", "triton", "float32", "cpu") > 0.01


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [["a", "1.5"], ["longer", "10"]]
    assert results.table(["name", "value"], rows).splitlines() == [
        "name    value",
        "-------------",
        "a         1.5",
        "longer     10",
    ]
    assert results.table(["name", "value"], []).splitlines() == ["name  value", "-----------"]


@pytest.mark.parametrize(("changed", "commit"), [("", "abc"), (" M ledger.py", "abc+")])
def test_a_figure_says_whether_files_were_changed_since_its_commit(monkeypatch, changed, commit):
    said = {"rev-parse": "abc\n", "status": f"{changed}\n"}
    monkeypatch.setattr(results.subprocess, "run", lambda words, **_: SimpleNamespace(stdout=said[words[1]]))
    assert results.provenance(0)["commit"] == commit


def test_ids_are_shown_in_one_line(tmp_path, capsys):
    folder = make(tmp_path / "run", {"a\nb\x1b[31m": [1.0, 1.0]})
    assert said(capsys, "top", folder / "ledger").splitlines()[3].split()[-1] == r"a\nb\x1b[31m"


def test_text_is_shown_in_one_line(tmp_path):
    folder = make(tmp_path / "run", {"a": [1.0, 1.0]})
    table = pa.table({"sample_id": ["a"], "source": ["s"], "planted": [""], "text": ["x\n\x1b[31m" + "y" * 100]})
    pq.write_table(table, folder / "samples.parquet")
    (shown,) = runs.Run.open(folder).describe(["a"]).values()
    assert shown[1].startswith("x  [31my") and len(shown[1]) == runs.TEXT and shown[1].endswith("…")
    pq.write_table(pa.table({"sample_id": ["a"], "text": ["y" * runs.TEXT]}), folder / "samples.parquet")
    assert runs.Run.open(folder).describe(["a"])["a"][1] == "y" * runs.TEXT
