"""`inrun train`: training is untouched, values add up, and a run survives interruption to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

import inrun
from inrun import data, runfolder
from inrun import train as training
from inrun.cli import main
from inrun.config import GPTConfig, TrainConfig
from inrun.gpt import GPT
from inrun.train import Stopped, lr_at, train

ROOT = Path(__file__).parents[1]
TINY = GPTConfig(block_size=16, layers=1, heads=2, width=16)


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrainConfig:
    """A run of a second: two sources of words and validation text of the first one."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def words(alphabet: str, n: int) -> str:
        return " ".join("".join(rng.choice(list(alphabet), 3)) for _ in range(n))

    for source, alphabet in (("left", "abc"), ("right", "xyz")):
        (tmp_path / "text" / source).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "text" / source / f"{i}.txt").write_text(words(alphabet, 30 + i))
    (tmp_path / "validation.txt").write_text(words("abc", 40))
    return TrainConfig(
        text=(tmp_path / "text",),
        validation=(tmp_path / "validation.txt",),
        out=tmp_path / "run",
        steps=8,
        batch_size=8,
        warmup=2,
        model=TINY,
        checkpoint_every=3,
        measure_every=2,
    )


def arguments(config: TrainConfig) -> list[str]:
    """The same run as command-line arguments."""
    flags = {
        "text": config.text[0], "validation": config.validation[0], "out": config.out, "steps": config.steps,
        "batch-size": config.batch_size, "warmup": config.warmup, "checkpoint-every": config.checkpoint_every,
        "measure-every": config.measure_every, "block-size": TINY.block_size, "layers": TINY.layers,
        "heads": TINY.heads, "width": TINY.width, "dropout": config.model.dropout,
    }  # fmt: skip
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(runfolder.checkpoints(folder)[-1], weights_only=True)["model"]


def outcome(folder: Path) -> tuple[list, list]:
    """Every row of the ledger, and the metrics without their timings."""
    rows = inrun.Ledger(folder / "ledger").rows().sort_by([("step", "ascending"), ("sample_id", "ascending")])
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timings = ("samples_per_second", "scoring_share", "validation_share")
    return rows.to_pylist(), [{k: v for k, v in row.items() if k not in timings} for row in metrics]


def assert_same_run(a: Path, b: Path) -> None:
    assert outcome(a) == outcome(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def interrupt_after(monkeypatch, steps: int, signum: int) -> None:
    take = training._Run.train_step

    def step(self):
        row = take(self)
        if self.step == steps:
            signal.raise_signal(signum)
        return row

    monkeypatch.setattr(training._Run, "train_step", step)


def test_gpt_is_causal_and_the_tracker_covers_every_parameter():
    torch.manual_seed(0)
    for config in (TINY, replace(TINY, bias=True, norm="layer", tied=False, layers=2)):
        model = GPT(config, vocab_size=32)
        assert (model.head.weight is model.tokens.weight) == config.tied
        x = torch.randint(32, (2, 16))
        changed = x.clone()
        changed[:, 9] = (x[:, 9] + 1) % 32
        same = (model(x) == model(changed)).all(-1)
        assert same[:, :9].all() and not same[:, 9:].any()
        tracker = inrun.track(model, torch.optim.AdamW(model.parameters()))
        assert not tracker.coverage["excluded"] and not tracker.coverage["frozen"]
        assert set(tracker.coverage["tracked"]) == {n for n, p in model.named_parameters() if p.requires_grad}
        tracker.close()


def test_gpt_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="width: expected a multiple of heads=3, got 16"):
        GPT(replace(TINY, heads=3))
    with pytest.raises(ValueError, match="at most block_size=16 tokens, got 17"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.long))


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = TrainConfig(lr=1.0, warmup=4, steps=104)
    assert [lr_at(step, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    rates = [lr_at(step, config) for step in range(4, 105)]
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1) and rates == sorted(rates, reverse=True)
    assert lr_at(100, replace(config, schedule="constant")) == 1.0


def test_training_is_what_it_would_be_without_tracking_and_measuring(config):
    train(replace(config, measure_every=1, clip=0.5))
    samples, _ = training.load_samples(config)
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        betas=config.betas,
    )
    for step in range(config.steps):
        x, y = samples.batch(data.batch_at(step, config.batch_size, len(samples), config.seed))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=data.IGNORE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    trained = weights(config.out)
    assert trained.keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer", [{"optimizer": "sgd", "lr": 0.02, "momentum": 0.9}, {"optimizer": "adam", "betas": (0.5, 0.99)}]
)
def test_values_sum_to_what_the_batch_took_off_the_validation_loss(config, optimizer):
    small = replace(config, **{"lr": 1e-5, "steps": 30, "measure_every": 1, **optimizer})
    found = train(small)["efficiency"]
    # Adam's first moments are too fresh to be frozen; later, at a small rate, first order is all there is.
    values, drops = (np.array(found[name])[15:] for name in ("value_sum", "batch_drop"))
    assert np.abs(values).sum() > 0
    assert values.sum() == pytest.approx(drops.sum(), rel=0.1, abs=2e-6)


def test_ledger_holds_every_sample_of_every_step_and_metrics_its_sums(config):
    found = train(config)
    rows, metrics = outcome(config.out)
    samples, validation = training.load_samples(config)
    assert len(rows) == config.steps * config.batch_size
    for step in range(config.steps):
        mine = [row for row in rows if row["step"] == step]
        order = data.batch_at(step, config.batch_size, len(samples), config.seed)
        assert sorted(row["sample_id"] for row in mine) == sorted(samples.ids[i] for i in order)
        assert sum(row["value"] for row in mine) == pytest.approx(metrics[step]["value_sum"], rel=1e-4)
        assert (metrics[step]["batch_drop"] is not None) == (step % 2 == 1)
    assert metrics[-1].keys() == {"step", "validation_loss"} and metrics[-1]["step"] == config.steps
    assert found["samples"] == len(samples) and not set(samples.ids) & set(validation.ids)
    assert sum(row["value"] for row in found["sources"]) == pytest.approx(
        found["efficiency"]["run_value_sum"], rel=1e-4
    )
    assert {row["source"] for row in found["sources"]} == {"left", "right"}
    assert 0 < found["validation_share"] < found["scoring_share"] < 1


def test_accumulation_changes_neither_values_nor_weights(config):
    train(config)
    train(replace(config, out=Path("parts"), accumulation=3))  # 8 = 3 + 3 + 2, and short samples are padded
    (whole, _), (parts, _) = outcome(config.out), outcome(Path("parts"))
    assert [(r["step"], r["sample_id"]) for r in whole] == [(r["step"], r["sample_id"]) for r in parts]
    a, b = (np.array([row["value"] for row in rows]) for rows in (whole, parts))
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3 * np.abs(a).max())
    for name, expected in weights(config.out).items():
        torch.testing.assert_close(weights(Path("parts"))[name], expected, rtol=1e-4, atol=1e-5)


def test_bf16_autocast_trains_and_scores(config):
    found = train(replace(config, bf16=True))
    assert np.isfinite(found["efficiency"]["run_value_sum"]) and len(outcome(config.out)[0]) == 64
    train(replace(config, out=Path("whole"), steps=1))
    rounded, whole = (outcome(folder)[1][0]["loss"] for folder in (config.out, Path("whole")))
    assert rounded != whole and rounded == pytest.approx(whole, rel=0.02)


def test_every_so_many_steps_are_validated_in_eval_mode_and_the_others_have_no_loss(config, monkeypatch):
    config = replace(config, validate_every=3, measure_every=0, model=replace(TINY, dropout=0.5))
    taken, loss = [], training._Run.validation_loss
    monkeypatch.setattr(training._Run, "validation_loss", lambda self: (taken.append(self.step), loss(self))[1])
    train(config)
    found = {row["step"]: row["validation_loss"] for row in outcome(config.out)[1]}
    assert taken == [step for step, known in found.items() if known is not None] == [0, 3, 6, 8]
    _, validation = training.load_samples(config)
    torch.manual_seed(config.seed)
    x, y = validation.batch(range(len(validation)))
    first = F.cross_entropy(GPT(config.model).eval()(x).flatten(0, 1), y.flatten(), ignore_index=data.IGNORE)
    assert found[0] == pytest.approx(first.item(), rel=1e-5)


def test_to_time_the_passes_untracked_changes_nothing(config, monkeypatch):
    config = replace(config, steps=4, model=replace(TINY, dropout=0.1))
    for out, due in (("never", False), ("always", True)):
        monkeypatch.setattr(training.Clock, "due", lambda self, step, due=due: due)
        train(replace(config, out=Path(out)))
    assert_same_run(Path("never"), Path("always"))


def test_a_second_signal_and_one_after_the_run_act_as_usual():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

    def quiet() -> list[int]:
        with training._stop_signals() as stop:
            return stop

    usual = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    assert quiet() == []
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == usual
    with training._stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop == [signal.SIGTERM]
    with ThreadPoolExecutor() as pool:  # where signals never arrive, nor may be asked for
        assert pool.submit(quiet).result() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_resumes_to_the_bit(config, monkeypatch, signum):
    config = replace(config, validate_every=3, model=replace(TINY, dropout=0.1))
    train(replace(config, out=Path("whole")))
    handler = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, signum)
        with pytest.raises(Stopped, match=r"after 6 steps; continue with: inrun train --resume --out") as stopped:
            train(config)
    assert stopped.value.signum == signum and signal.getsignal(signum) == handler
    train(replace(config, resume=True))
    assert_same_run(config.out, Path("whole"))
    assert [path.name for path in runfolder.checkpoints(config.out)] == ["step-00000006.pt", "step-00000008.pt"]


def test_a_resumed_run_makes_the_checks_that_were_to_come_and_no_other(config, monkeypatch):
    checked, check = [], inrun.Tracker.check
    monkeypatch.setattr(inrun.Tracker, "check", lambda self, *args: (checked.append(self.steps), check(self, *args)))
    config = replace(config, steps=10)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        interrupt_after(patch, 4, signal.SIGINT)
        train(config)
    assert checked == [0]
    train(replace(config, resume=True))
    assert checked == [0, 8]


def test_kill_in_mid_run_then_resume_is_to_the_bit(config):
    config = replace(config, steps=150, checkpoint_every=10, model=replace(TINY, dropout=0.1))
    whole = replace(config, out=Path("whole"))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

    def start(*args: str) -> subprocess.Popen[bytes]:
        code = "from inrun.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *args], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    killed, reference = start(*arguments(config)), start(*arguments(whole))
    deadline = time.monotonic() + 120
    while not (config.out / "checkpoints" / "step-00000020.pt").exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[1].decode()
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    assert not (config.out / "report.json").exists()
    # What a kill in the middle of a write leaves behind.
    (config.out / "checkpoints" / "step-00000999.pt.tmp").write_bytes(b"half a checkpoint")
    with (config.out / "metrics.jsonl").open("a") as f:
        f.write('{"step": 41, "lo')
    resumed = start("train", "--resume", "--out", str(config.out))
    for process in (resumed, reference):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert_same_run(config.out, Path("whole"))


@pytest.mark.parametrize(("validate_every", "steps"), [(1, [3, 6, 8]), (2, [4, 8])])
def test_a_checkpoint_is_made_at_a_validation_and_stands_on_what_is_on_disk(config, monkeypatch, validate_every, steps):
    save, saved = runfolder.save_checkpoint, []

    def noted(folder: Path, step: int, state: dict[str, Any]) -> None:
        shards = pq.read_table(folder / "ledger", columns=["step"])  # to open a Ledger would write what another holds
        metrics = runfolder.metrics_of(folder / "metrics.jsonl")
        assert set(shards["step"].to_pylist()) == set(range(step)) <= {row["step"] for _, row in metrics}
        save(folder, step, state)
        saved.append(step)

    monkeypatch.setattr(runfolder, "save_checkpoint", noted)
    train(replace(config, validate_every=validate_every))
    assert saved == steps


def test_resuming_a_finished_run_changes_nothing(config):
    train(config)
    before = outcome(config.out)
    train(replace(config, resume=True))
    assert outcome(config.out) == before
    main(["train", "--resume", f"--out={config.out}"])
    assert outcome(config.out) == before


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    for step in (3, 6):
        runfolder.save_checkpoint(tmp_path, step, {"step": step})
    before = {path: path.read_bytes() for path in runfolder.checkpoints(tmp_path)}
    save = torch.save

    def cut(state: dict[str, Any], file: Any) -> None:
        save(state, file)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", cut)
    for step in (6, 9):
        with pytest.raises(OSError, match="No space left"):
            runfolder.save_checkpoint(tmp_path, step, {"step": step, "more": 1})
    assert {path: path.read_bytes() for path in runfolder.checkpoints(tmp_path)} == before


def test_a_checkpoint_that_was_cut_short_gives_way_to_the_one_before(config, capsys):
    train(config)
    before = outcome(config.out)
    first, last = runfolder.checkpoints(config.out)
    (config.out / "checkpoints" / "step-last.pt").write_bytes(b"of someone else")
    last.write_bytes(last.read_bytes()[:1000])
    train(replace(config, resume=True))
    assert outcome(config.out) == before
    assert f"going on from {first}; {last} cannot be read: RuntimeError" in capsys.readouterr().err
    assert last.with_suffix(".damaged").exists() and last in runfolder.checkpoints(config.out)  # made again
    for path in runfolder.checkpoints(config.out):
        path.write_bytes(b"")
    with pytest.raises(inrun.InRunError, match=r"resume: expected a checkpoint that can be read, got .*step-00000008"):
        train(replace(config, resume=True))


def test_a_damaged_run_folder_is_told_of(config, capsys):
    train(config)

    def refused(*command: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*command])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    resume = ("train", "--resume", "--out", str(config.out))
    settings, metrics = config.out / "config.json", config.out / "metrics.jsonl"
    whole, lines = settings.read_text(), metrics.read_text()
    for text in ("{}", whole[:50], "[]", ""):
        settings.write_text(text)
        for command in (("report", str(config.out)), resume):
            assert f"inrun: run: expected the settings of a run in {settings}, which lacks them" in refused(*command)
    settings.write_text(whole)
    metrics.write_text(lines[:20] + "\n" + lines)
    for command in (("report", str(config.out)), resume):
        assert f"inrun: run: expected a step's figures in line 1 of {metrics}" in refused(*command)
    metrics.unlink()
    assert f"expected at least one checkpointed step in {metrics}" in refused("report", str(config.out))
    assert f"expected at least one checkpointed step in {metrics}" in refused(*resume)  # a finished run's
    metrics.write_text(lines)
    for shard in (config.out / "ledger").iterdir():
        shard.unlink()
    assert f"run: expected values in {config.out / 'ledger'}, found none" in refused("report", str(config.out))


def test_a_folder_that_holds_a_run_is_not_overwritten(config):
    train(config)
    with pytest.raises(inrun.InRunError, match=r"holds a run already; continue it with --resume"):
        train(config)


def test_a_folder_that_holds_the_values_of_another_training_is_not_written_into(config):
    """`inrun.track(..., ledger="runs/1/ledger")` makes it, and samples.parquet beside it is the user's own."""
    folder = Path("runs/1")
    with inrun.Ledger(folder / "ledger") as ledger:
        ledger.append(0, ["mine"], [1.0])
    (folder / "samples.parquet").write_bytes(b"mine")
    with pytest.raises(inrun.InRunError, match="out: expected a new folder, got runs/1, which holds ledger already"):
        train(replace(config, out=folder))
    assert sorted(path.name for path in folder.iterdir()) == ["ledger", "samples.parquet"]
    other = Path("runs/0")
    other.mkdir()
    (other / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(inrun.InRunError, match="out: expected a new folder, got runs/0, which holds metrics"):
        train(replace(config, out=other))
    assert (folder / "samples.parquet").read_bytes() == b"mine"
    (Path("runs") / "²").mkdir()
    (Path("runs") / "²" / "config.json").write_text("{}")
    assert runfolder.choose(replace(config, out=None)) == Path("runs/2")
    with pytest.raises(inrun.InRunError, match="expected a run under runs/, found none"):
        runfolder.choose(replace(config, out=None, resume=True))
    (Path("runs") / "7").mkdir()
    (Path("runs") / "7" / "config.json").write_text("{}")
    assert [runfolder.choose(replace(config, out=None, resume=resume)).name for resume in (False, True)] == ["8", "7"]


def test_resume_needs_the_same_run(config):
    again = replace(config, resume=True)
    with pytest.raises(inrun.InRunError, match=r"expected a run in .*run, found none"):
        train(again)
    train(config)
    changed = replace(again, lr=0.5, model=replace(TINY, width=32))
    with pytest.raises(inrun.InRunError, match=r"lr was 0.002, is 0.5; model.width was 16, is 32"):
        train(changed)
    for path in (config.text[0] / "left" / "0.txt", config.validation[0]):
        path = next(each for each in (path, *sorted(path.rglob("*.txt"))) if each.is_file())
        before = path.read_text()
        path.write_text("other text")
        with pytest.raises(inrun.InRunError, match="the text has changed"):
            train(again)
        path.write_text(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"accumulation": 9}, "accumulation: expected at most batch_size=8, got 9"),
        ({"validation": ()}, "either --validation PATHS or --holdout SOURCE with it, got neither"),
        ({"holdout": "left"}, "either --validation PATHS or --holdout SOURCE with it, got both"),
        ({"betas": (0.9, 1.0)}, r"betas: expected each at least 0 and less than 1, got \(0.9, 1.0\)"),
        ({"device": "gpu"}, "device: expected one that torch finds here, got 'gpu': "),
        ({"device": "cuda:99"}, "device: expected one that torch finds here, got 'cuda:99': "),
        ({"text": ()}, "expected --text PATHS with --validation or --holdout, got none"),
        ({"model": replace(TINY, dropout=1.0)}, "dropout: expected 0 <= dropout < 1, got 1.0"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(config, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(config, **change))
    assert not config.out.exists()


def test_held_out_part_of_a_source_is_the_target(config):
    held = replace(config, validation=(), holdout="left", holdout_fraction=0.3, validation_samples=4)
    samples, validation = training.load_samples(held)
    assert len(validation) == 4 and set(validation.sources) == {"left"}
    assert not set(samples.keys()) & set(validation.keys())


def test_what_is_validated_on_is_not_trained_on(config):
    (config.text[0] / "left" / "copied.txt").write_text(config.validation[0].read_text())
    samples, validation = training.load_samples(config)
    assert len(samples) and not set(samples.keys()) & set(validation.keys())


def test_config_survives_json(config):
    for one in (config, TrainConfig(tokenizer=Path("t.json"), betas=(0.8, 0.9), bf16=False)):
        saved = TrainConfig.from_json(json.loads(json.dumps(one.to_json())))
        assert saved == replace(one, out=None)


def test_command_line_numbers_runs_and_resumes_the_last(config, monkeypatch, capsys):
    args = arguments(config)
    del args[args.index("--out") : args.index("--out") + 2]
    main(args)
    printed = capsys.readouterr().out
    assert "Whole run: the values sum to" in printed and "Report: runs/1/report.html" in printed
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_after(patch, 5, signal.SIGINT)
        main(args)
    assert stopped.value.code == 130
    assert "stopped after 5 steps; continue with: inrun train --resume --out runs/2" in capsys.readouterr().err
    main(["train", "--resume"])
    assert_same_run(Path("runs/1"), Path("runs/2"))
    assert not Path("runs/3").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--resume"], "inrun: resume: expected a run under runs/, found none"),
        (["train", "--text", "nowhere", "--holdout", "x"], "inrun: text: no such file or folder: nowhere"),
        (["train", "--width", "65"], "inrun: width: expected a multiple of heads=4, got 65"),
        (
            ["report", "nowhere"],
            "inrun: run: expected the folder of a run, got nowhere, which does not exist; `inrun train` makes one",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "inrun train --text" in shown and "--validate-every" in shown and "nats" in shown


def test_the_demo_runs_without_arguments_but_for_its_length(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["train", "--steps", "3", "--layers", "1", "--block-size", "32", "--measure-every", "1"])
    printed = capsys.readouterr().out
    assert all(source in printed for source in ("python", "docs", "cpp", "licenses"))
    assert (tmp_path / "runs" / "1" / "report.json").exists()
