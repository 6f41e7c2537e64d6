"""The Hugging Face Trainer: every score has the id of the sample that earned it, in the stacks that people train in."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import types
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from real_models import CASES, VOCAB, Case, decoder, with_one_block

import inrun
from inrun import InRunError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from inrun.adapters import huggingface  # noqa: E402
from inrun.adapters.huggingface import attach  # noqa: E402

TIED = Case(decoder("Llama", tie_word_embeddings=True))
LR, CLIP = 0.5, 0.05  # so small that every step is clipped


def samples(count=11, longest=9):
    """Sequences of all lengths, each unlike the others; the first token has no label of its own."""
    draw = random.Random(0)
    rows = [[draw.randrange(3, VOCAB) for _ in range(3 + i % (longest - 2))] for i in range(count)]
    return [{"sample_id": f"s{i}", "input_ids": row, "extra": 1.0} for i, row in enumerate(rows)]


def pad(examples):
    longest = max(len(e["input_ids"]) for e in examples)
    rows = [torch.tensor(e["input_ids"]) for e in examples]
    grow = [torch.nn.functional.pad(r, (0, longest - len(r))) for r in rows]
    kept = [torch.arange(longest) < len(r) for r in rows]
    labels = [torch.where(k, g, -100) for g, k in zip(grow, kept, strict=True)]
    stacked = (torch.stack(grow), torch.stack(labels), torch.stack(kept).long())
    return dict(zip(("input_ids", "labels", "attention_mask"), stacked, strict=True))


HELD_OUT = pad([{"input_ids": [5, 6, 7, 8, 9, 10]}, {"input_ids": [3, 9, 4, 4, 11, 5]}])


class Figures:
    """A logger that keeps what it takes, by step."""

    def __init__(self):
        self.logged = {}

    def log(self, values, step):
        self.logged[step] = values


class Weights(transformers.TrainerCallback):
    """The weights that each step began with."""

    def __init__(self):
        self.before = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}


def build(folder, trainset=None, evaluation=None, options=MappingProxyType({}), case=CASES["Llama"], **settings):
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2} | settings
    args = transformers.TrainingArguments(
        output_dir=folder, optim="sgd", learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=CLIP, seed=3,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy=settings.pop("save_strategy", "no"),
        logging_strategy="no", **settings,
    )  # fmt: skip
    model, weights = case.built(), Weights()
    trainer = transformers.Trainer(
        model,
        args,
        data_collator=pad,
        train_dataset=trainset or samples(),
        eval_dataset=evaluation,
        callbacks=[weights],
    )
    if options is None:
        return trainer, None, weights.before
    return trainer, attach(trainer, **{"validation": lambda: model(**HELD_OUT).loss} | options), weights.before


def share(model, row, tokens):
    """One sample alone: the part of the step's mean over labelled tokens that it has."""
    ids = torch.tensor([row])
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / tokens


def gradients(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def oracle(case, trainset, weights, members, autocast=None, held=None):
    """Values of a step's samples, one at a time, by id: in float64, or as plain training in half precision has them.

    `held`: the samples of the validation loss, a mean over all their labels; `HELD_OUT`'s by default.
    """
    model = case.built()
    model.load_state_dict(weights, strict=False)  # a tied head is stored once
    model.config._experts_implementation = "eager"  # the grouped products have no float64
    model = model.double() if autocast is None else model
    rows = {s["sample_id"]: s["input_ids"] for s in trainset}
    held = [s["input_ids"] for s in held] if held else HELD_OUT["input_ids"].tolist()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        tokens = sum(len(r) - 1 for r in held)
        target = [sum(g) for g in zip(*(gradients(share(model, r, tokens), model) for r in held), strict=True)]
        tokens = sum(len(rows[i]) - 1 for i in members)
        each = {i: gradients(share(model, rows[i], tokens), model) for i in members}
    norm = torch.stack([sum(g).square().sum() for g in zip(*each.values(), strict=True)]).sum().sqrt()
    assert norm > CLIP
    return {i: LR * CLIP / norm * sum((a * b).sum() for a, b in zip(target, g, strict=True)) for i, g in each.items()}


def error(found, expected):
    return max(abs(float(found[i] - expected[i])) for i in expected) / max(abs(float(v)) for v in expected.values())


def by_step(ledger):
    steps = {}
    for row in ledger.rows().to_pylist():
        assert row["sample_id"] not in steps.setdefault(row["step"], {})
        steps[row["step"]][row["sample_id"]] = row["value"]
    return steps


def compare(values, before, trainset=None, autocast=None, case=CASES["Llama"], held=None):
    """Every score of the run beside the oracle's; in half precision the plain computation's own error doubles."""
    trainset, found = trainset or samples(), by_step(values.ledger)
    assert sorted(found) == sorted(before)
    for step, scored in found.items():
        expected, allowed = oracle(case, trainset, before[step], list(scored), held=held), 2e-4
        if autocast is not None:
            plain = oracle(case, trainset, before[step], list(scored), autocast)
            allowed = torch.finfo(autocast).eps + 2 * error(plain, expected)
        assert error(scored, expected) <= allowed, step
    return found


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_every_score_has_the_id_of_its_sample(kind, tmp_path):
    """Shuffled, grouped by length, accumulated, clipped, evaluated in between; the last step of an epoch is short."""
    trainset = samples()
    if kind == "datasets":
        trainset = pytest.importorskip("datasets").Dataset.from_list(trainset)
    figures = Figures()
    trainer, values, before = build(
        tmp_path, trainset, evaluation=samples(5), train_sampling_strategy="group_by_length",
        eval_strategy="steps", eval_steps=1, options={"logger": figures, "log_every": 2},
    )  # fmt: skip
    classes = [type(m) for m in trainer.model.modules()]
    trainer.train()
    found = compare(values, before)
    ids = {s["sample_id"] for s in samples()}
    assert [len(found[i]) for i in range(4)] == [6, 5, 6, 5]
    for epoch in (0, 2):
        assert {*found[epoch], *found[epoch + 1]} == ids
    assert list(found[0]) != list(found[2]), "expected two orders"
    assert [type(m) for m in trainer.model.modules()] == classes
    assert all("eval_loss" in log for log in trainer.state.log_history[:4])
    means = {i: sum(v for t in (i - 1, i) for v in found[t].values()) / len(ids) for i in (1, 3)}
    assert {i: logged["inrun/value"] for i, logged in figures.logged.items()} == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"remove_unused_columns": False, "dataloader_drop_last": True},
    ],
    ids=["checkpointing", "reentrant", "bf16", "keeping every column"],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_stacks(settings, tmp_path):
    trainset = samples()
    if "remove_unused_columns" in settings:
        trainset = [{k: v for k, v in s.items() if k != "extra"} for s in trainset]
    trainer, values, before = build(tmp_path, trainset, **settings)
    trainer.train()
    compare(values, before, autocast=torch.bfloat16 if "bf16" in settings else None)


def test_a_mixture_of_experts(tmp_path):
    trainer, values, before = build(tmp_path, case=CASES["Mixtral"], num_train_epochs=1)
    trainer.train()
    compare(values, before, case=CASES["Mixtral"])


def test_a_batch_size_that_is_found(tmp_path):
    """Memory runs out in the middle of the second step; the attempt that takes its place has the ledger to itself."""
    trainer, values, before = build(tmp_path, auto_find_batch_size=True, num_train_epochs=1)
    plain, refused = trainer.compute_loss, []

    def compute_loss(model, inputs, **kwargs):
        if trainer.state.global_step == 1 and len(inputs["input_ids"]) == 3:
            refused.append(len(before))
            raise RuntimeError("CUDA out of memory.")
        return plain(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert refused == [2]
    found = compare(values, before)
    assert [len(scored) for scored in found.values()] == [4, 4, 3]


def test_a_streamed_set(tmp_path):
    """Without a length, shuffled by a buffer."""
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(samples()).to_iterable_dataset().shuffle(seed=1, buffer_size=5)
    trainer, values, before = build(tmp_path, stream, max_steps=2)
    trainer.train()
    found = compare(values, before)
    assert {*found[0], *found[1]} == {s["sample_id"] for s in samples()}


def test_compiled(tmp_path):
    """Batches of many lengths in two graphs, without the check on the first step, which would be a graph of its own."""
    torch._dynamo.utils.counters.clear()
    case = with_one_block(CASES["Llama"])
    trainer, values, before = build(
        tmp_path, options={"check": False}, case=case, torch_compile=True, torch_compile_backend="aot_eager",
        dataloader_drop_last=True, max_steps=3,
    )  # fmt: skip
    trainer.train()
    compare(values, before, case=case)
    stats, breaks = (torch._dynamo.utils.counters[name] for name in ("stats", "graph_break"))
    assert stats["unique_graphs"] == 2 and not breaks


@pytest.mark.parametrize("kind", ["list", "datasets", "streamed"])
def test_a_validation_set(kind, tmp_path):
    """The loss of samples of all lengths, batched by the trainer, is the mean over all their labels."""
    held = samples(5)[::-1]
    given = held
    if kind != "list":
        given = pytest.importorskip("datasets").Dataset.from_list(held)
        given = given.to_iterable_dataset() if kind == "streamed" else given
    trainer, values, before = build(
        tmp_path, options={"validation": given}, per_device_eval_batch_size=2, num_train_epochs=1
    )
    trainer.train()
    compare(values, before, held=held)


def test_several_validation_sets(tmp_path):
    held = {"short": samples(3), "long": samples(6)[4:]}
    trainer, values, before = build(
        tmp_path, options={"validation": held}, per_device_eval_batch_size=2, num_train_epochs=1, max_steps=1
    )
    trainer.train()
    rows = values.ledger.rows().to_pylist()
    for target, samples_of in held.items():
        found = {r["sample_id"]: r["value"] for r in rows if r["target"] == target}
        assert error(found, oracle(CASES["Llama"], samples(), before[0], list(found), held=samples_of)) <= 2e-4


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_validation_set_weighs_its_batches_by_the_tokens_they_predict(name, tmp_path):
    """Rows of one batch are fewer and longer; the first token of each predicts nothing, whoever counts it."""
    held = [
        {"sample_id": i, "input_ids": [3 + (i * k) % 9 for k in range(size)]} for i, size in enumerate((2, 2, 3, 9))
    ]
    trainer, values, _ = build(tmp_path, case=CASES[name], per_device_eval_batch_size=3, options={"validation": held})
    assert values is not None
    loss = values.options["validation"]["validation"]
    tokens = sum(len(row["input_ids"]) - 1 for row in held)
    expected = sum(share(trainer.model, row["input_ids"], tokens) for row in held)
    torch.testing.assert_close(loss(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["T5", "an adapter"])
def test_a_validation_set_is_weighed_as_the_model_inside_counts(kind, tmp_path):
    """The first label of a row is predicted by what has an encoder; and not by a GPT-2, whatever is wrapped around."""

    def adapted():
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
        return peft.get_peft_model(CASES["GPT-2"].make(), config)  # by its class for no task

    case = CASES["T5"] if kind == "T5" else Case(adapted)
    trainer, _, _ = build(tmp_path, options=None, case=case, per_device_eval_batch_size=2)
    held = [{"input_ids": row} for row in ([3, 4], [5, 6], [7, 8, 9, 10, 11, 12, 13, 3, 4])]
    loss = attach(trainer, held).options["validation"]["validation"]
    trainer.model.eval()
    torch.testing.assert_close(loss(), trainer.model(**pad(held)).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("counted", [True, False])
def test_labels_that_a_collator_has_shifted_are_those_that_weigh(counted, tmp_path):
    def collate(examples):
        batch = pad(examples)
        shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        shifted[:, 0] = -100
        return {**batch, "shift_labels": shifted}

    trainer, _, _ = build(tmp_path, options=None, per_device_eval_batch_size=2)
    trainer.data_collator, trainer.model_accepts_loss_kwargs = collate, counted
    held = [{"input_ids": row} for row in ([3, 4, 5], [5, 6, 7], [7, 8, 9, 10, 11, 12, 13, 3, 4])]
    loss = attach(trainer, held).options["validation"]["validation"]
    torch.testing.assert_close(loss(), trainer.model(**collate(held)).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("drops", [True, False])
def test_the_collator_sees_of_a_validation_set_what_it_sees_of_training(drops, tmp_path):
    """Without the ids, and without the columns that the trainer drops."""
    trainer, _, _ = build(tmp_path, options=None, remove_unused_columns=drops)
    seen = set()
    trainer.data_collator = lambda examples: pad([seen.update(e) or e for e in examples])
    attach(trainer, samples(2))
    assert seen == {"input_ids"} | (set() if drops else {"extra"})
    assert "sample_id" in trainer.data_collator(samples(2)) and "sample_id" not in seen


SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA, BERT = ({"intermediate_size": 16, **SMALL, **more} for more in ({}, {"is_decoder": True}))
GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT),
        ("CTRLLMHeadModel", "CTRLConfig", {"dff": 16, **GPT}),
        ("BertLMHeadModel", "BertConfig", BERT),
        ("LlavaForConditionalGeneration", "LlavaConfig", {"text_config": {"model_type": "llama", **LLAMA}}),
        ("BertForMaskedLM", "BertConfig", LLAMA),
    ],
)
def test_models_shift_labels_where_their_losses_do(model, config, settings):
    if model.startswith("Llava"):
        sight = {"model_type": "clip_vision_model", "image_size": 4, "patch_size": 2, "intermediate_size": 8}
        settings = settings | {"vision_config": {**SMALL, **sight}}
    plain = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    ids = HELD_OUT["input_ids"]
    labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], 1)
    shifts = torch.equal(plain(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=labels).loss)
    trainer = SimpleNamespace(model=plain, accelerator=SimpleNamespace(unwrap_model=lambda model: plain))
    assert huggingface._shifts_labels(trainer) == shifts == (model != "BertForMaskedLM")


class Policy(transformers.GPT2LMHeadModel):
    pass


class Plain(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def as_class(model, kind):
    model.__class__ = kind
    return model


class Chat(torch.nn.Module):
    loss_type = "ForCausalLM"

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize(
    "kind",
    [Policy, Plain, Chat, None],
    ids=["a GPT-2", "without **kwargs", "by its loss", "a trainer that counts none"],
)
def test_a_validation_set_is_weighed_by_what_is_predicted_whatever_the_class_is_called(kind, tmp_path):
    """Two short rows in the first batch, a long one in the second, and nothing counted by the trainer."""

    def make():
        model = CASES["GPT-2" if kind is Policy else "Llama"].make()
        if kind is Chat:
            return Chat(model)
        return as_class(model, kind or type(model))

    trainer, _, _ = build(tmp_path, case=Case(make), options=None, per_device_eval_batch_size=2)
    trainer.model_accepts_loss_kwargs = kind is Policy
    rows = [[3, 4], [5, 6], [7, 8, 9, 10, 11, 12, 13, 3, 4]]
    loss = attach(trainer, [{"input_ids": row} for row in rows]).options["validation"]["validation"]
    tokens = sum(len(row) - 1 for row in rows)
    expected = sum(share(trainer.model, row, tokens) for row in rows)
    torch.testing.assert_close(loss(), expected, rtol=1e-5, atol=0)


def test_a_validation_batch_without_a_label_is_left_out(tmp_path):
    """As prompts that fill max_length have none, nor rows of one token; the mean of no terms is NaN."""
    good, empty = [{"input_ids": [3, 4, 5, 6]}, {"input_ids": [9, 4]}], [{"input_ids": [3]}, {"input_ids": [7]}]
    settings = {"per_device_eval_batch_size": 2, "num_train_epochs": 1}
    kept = []
    for held in (good, empty + good + empty):
        trainer, values, _ = build(tmp_path, options={"validation": held, "method": "path_secant"}, **settings)
        trainer.train()
        kept.append(torch.tensor(values.ledger.rows()["value"].to_pylist()))
    assert torch.equal(*kept)
    expected = r"validation\['validation'\]: expected labels to predict .*, got none"
    with pytest.raises(ValueError, match=expected):
        build(tmp_path, options={"validation": empty})


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_validation_set_is_checkpointed_batch_by_batch_where_training_is(tmp_path):
    """In eval mode, where transformers' layers keep everything, without dropout when it is computed again."""

    def make():
        model = CASES["Llama"].make()
        drop = torch.nn.functional.dropout
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: drop(out, 0.5, module.training))
        return model

    def counted(tensor):
        saved[-1] += tensor.numel()
        return tensor

    found, saved = [], []
    for checkpointing in (False, True):
        trainer, values, _ = build(
            tmp_path, case=Case(make), per_device_eval_batch_size=2, options={"validation": samples(5)},
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        model, loss = trainer.model, values.options["validation"]["validation"]
        if checkpointing:
            model.gradient_checkpointing_enable()
            trainer.args.gradient_checkpointing = False  # whoever has turned it on
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(counted, lambda tensor: tensor):
            total = loss()
        assert model.training
        found.append([total, *gradients(total, model)])
        assert model.training
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain)
    assert saved[1] < 100 < saved[0]
    model.eval()
    torch.testing.assert_close(total, model(**pad(samples(5))).loss)


def test_a_validation_set_without_labels_to_count_is_weighed_by_rows(tmp_path):
    """A loss that the trainer does not count for, of batches of two sizes."""
    trainer, _, _ = build(tmp_path, options=None, per_device_eval_batch_size=3)
    trainer.model_accepts_loss_kwargs = False
    trainer.compute_loss = lambda model, inputs: model(input_ids=inputs["rows"]).logits.square().mean()
    trainer.data_collator = lambda examples: {"rows": torch.tensor([e["input_ids"] for e in examples])}
    rows = [{"input_ids": [i + 3, 4, 5 + i]} for i in range(4)]
    values = attach(trainer, validation=rows)
    every = trainer.data_collator(rows)["rows"]
    expected = trainer.model(input_ids=every).logits.square().mean()
    torch.testing.assert_close(values.options["validation"]["validation"](), expected)


def test_training_is_untouched(tmp_path):
    trained = []
    for options in ({"validation": samples(4)}, None):
        trainset = [{k: v for k, v in s.items() if options is not None or k != "sample_id"} for s in samples()]
        trainer, _, _ = build(tmp_path, trainset, options=options)
        trainer.train()
        trained.append(list(trainer.model.parameters()))
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_is_over_for_the_callbacks_that_hear_of_its_end(tmp_path):
    """Whichever come first, and before the schedule has moved on."""
    trainer, values, _ = build(tmp_path, options={"method": "path_secant"}, num_train_epochs=1)
    trainer.args.learning_rate, trainer.args.lr_scheduler_type = 0.1, "linear"
    steps, still_open = [], []

    class Notes(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            steps.append(values.loop.last)
            still_open.append(values.loop.step)

    trainer.callback_handler.callbacks.insert(0, Notes())
    trainer.train()
    assert still_open == [None, None] and values.loop is None
    for step in steps:
        assert float(step.drop["validation"]) == pytest.approx(float(step.values.sum()), rel=1e-2)


def test_a_run_after_one_that_failed_drops_nothing(tmp_path):
    trainer, values, _ = build(tmp_path)
    plain = trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        assert trainer.state.global_step < 2, "failed"
        return plain(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(AssertionError, match="failed"):
        trainer.train()
    with pytest.raises(InRunError, match="expected an empty one"):
        trainer.train()
    assert sorted(by_step(values.ledger)) == [0, 1]


def test_a_model_that_takes_nothing_else_is_evaluated_on_samples_with_ids(tmp_path):
    trainer, _, _ = build(tmp_path, case=Case(lambda: as_class(CASES["Llama"].make(), Plain)))
    assert "eval_loss" in trainer.evaluate(samples(3))


class Killed(transformers.TrainerCallback):
    """Ends the run before its fourth step, the third on disk and of no checkpoint."""

    def __init__(self, values):
        self.values = values

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.values.ledger.flush()
            raise KeyboardInterrupt


def test_a_resumed_run_neither_loses_nor_doubles_a_step(tmp_path):
    whole, values, _ = build(tmp_path / "whole")
    whole.train()
    expected = by_step(values.ledger)

    saving = {"save_strategy": "steps", "save_steps": 2, "options": {"ledger": tmp_path / "ledger"}}
    first, values, _ = build(tmp_path / "run", **saving)
    first.add_callback(Killed(values))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert sorted(by_step(inrun.Ledger(tmp_path / "ledger"))) == [0, 1, 2]
    again, values, before = build(tmp_path / "run", **saving)
    with pytest.raises(InRunError, match="expected an empty one"):
        again.train()
    again.train(resume_from_checkpoint=True)
    assert sorted(before) == [2, 3]
    found = by_step(inrun.Ledger(tmp_path / "ledger"))
    assert {step: list(scored) for step, scored in found.items()} == {s: list(v) for s, v in expected.items()}
    for step, scored in found.items():
        assert list(scored.values()) == pytest.approx(list(expected[step].values()), rel=1e-5, abs=1e-7)

    # A checkpoint that a callback asks for after this library's is not ahead of the ledger either.
    class Asks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2

        def on_save(self, args, state, control, **kwargs):
            assert waited == [["rank00000-step000000000000.parquet"]]  # not asked of a ledger, which would write it
            raise KeyboardInterrupt

    asked, _, _ = build(tmp_path / "run of its own", options={"ledger": tmp_path / "asked"})
    asked.add_callback(Asks())
    waited = []
    folder = tmp_path / "asked"
    asked.accelerator.wait_for_everyone = lambda: waited.append([p.name for p in folder.glob("*")])  # every process
    with pytest.raises(KeyboardInterrupt):
        asked.train()
    assert sorted(by_step(inrun.Ledger(folder))) == [0, 1]

    # The same trainer, after an exception.
    first.pop_callback(Killed)
    first.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert sorted(by_step(inrun.Ledger(tmp_path / "ledger"))) == [0, 1, 2, 3]


def sft(folder, trainset, attached=True, validation=None, case=TIED, evaluation=None, peft=None, **settings):
    """An SFTTrainer over token rows, its checkpointing on as is its default, and the head tied to the embedding."""
    trl, tokenizers = pytest.importorskip("trl"), pytest.importorskip("tokenizers")
    vocab = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocab, eos_token="t2", pad_token="t0")
    config = trl.SFTConfig(
        output_dir=folder, optim="sgd", learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=CLIP, seed=3,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no", bf16=False,
        **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2, **settings},
    )  # fmt: skip
    model, weights = case.built(), Weights()
    trainer = trl.SFTTrainer(
        model, config, train_dataset=trainset, eval_dataset=evaluation, processing_class=tokenizer, callbacks=[weights],
        peft_config=peft,
    )  # fmt: skip
    attach_sft = pytest.importorskip("inrun.adapters.trl").attach
    loss = validation or (lambda: model(**HELD_OUT).loss)
    return trainer, attach_sft(trainer, loss) if attached else None, weights.before


@pytest.mark.parametrize("rows", ["padded", "padding_free", "padding_free and padded", "packed"])
@pytest.mark.filterwarnings("ignore")
def test_sft(rows, tmp_path):
    """Each document has its value, whether it has a row of its own or not; TRL's fused output layer is scored."""
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    trainset, settings = datasets.Dataset.from_list(samples()).remove_columns("extra"), {"max_length": 20}
    if rows.startswith("padding_free"):
        settings = {"max_length": None, "padding_free": True}
    if rows == "padding_free and padded":
        settings["pad_to_multiple_of"] = 8
    if rows == "packed":
        trainset = adapter.pack(trainset, 20)
        assert len(trainset) < 5
        settings |= {"packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}, "eval_packing": False,
                     "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}  # fmt: skip
    held = samples(5)[::-1]
    validation = datasets.Dataset.from_list(held)
    trainer, values, before = sft(tmp_path, trainset, validation=validation, per_device_eval_batch_size=2, **settings)
    trainer.train()
    found = compare(values, before, case=TIED, held=held)
    assert sum(map(len, found.values())) == 22


@pytest.mark.filterwarnings("ignore")
def test_the_head_that_is_called_says_what_trls_says(tmp_path):
    """Of tokens with a label and of others; and the model's own forward what it said."""
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    trainset = datasets.Dataset.from_list(samples()).remove_columns("extra")
    for trainer in (sft(tmp_path, trainset, attached=False)[0], of_preferences("dpo", tmp_path, use_weighting=True)):
        model, labels, found = trainer.model, HELD_OUT["input_ids"].clone(), []
        labels[0, :3] = labels[1, 4] = -100
        for attached in (False, True):
            if attached:
                adapter.attach(trainer, functools.partial(lambda model: model(**HELD_OUT).loss, model))
            for more in ({}, {"num_items_in_batch": 3}):
                for fused in (True, False):
                    found.append(model(HELD_OUT["input_ids"], labels=labels, fused_lm_head=fused, **more))
        for own, called in zip(found[:4], found[4:], strict=True):
            tensors = {name: expected for name, expected in own.items() if isinstance(expected, torch.Tensor)}
            assert "loss" in tensors and ("log_probs" in tensors) != ("logits" in tensors)
            for name, expected in tensors.items():
                torch.testing.assert_close(called[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_sft_of_adapters(tmp_path):
    """What TRL adds to a model (LoRA) is what is scored."""
    datasets, peft = pytest.importorskip("datasets"), pytest.importorskip("peft")
    trainset, lora = datasets.Dataset.from_list(samples()).remove_columns("extra"), CASES["Llama + PEFT LoRA"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    trainer, values, before = sft(tmp_path, trainset, case=CASES["Llama"], peft=config, max_length=20)
    trainer.train()
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert values.ledger.metadata["tracked_parameters"] == len(trained) == 12 and all("lora" in n for n in trained)
    found = compare(values, before, case=lora)
    assert [len(scored) for scored in found.values()] == [6, 5, 6, 5]


@pytest.mark.filterwarnings("ignore")
def test_sft_training_and_its_metrics_are_untouched(tmp_path):
    datasets = pytest.importorskip("datasets")
    trained, logs = [], []
    for attached in (True, False):
        trainset = datasets.Dataset.from_list(samples()).remove_columns("extra")
        trainer, _, _ = sft(
            tmp_path, trainset, attached, validation=trainset.select(range(4)), evaluation=trainset.select(range(7)),
            eval_strategy="steps", eval_steps=1, max_length=20, num_train_epochs=1,
        )  # fmt: skip
        trainer.args.logging_strategy, trainer.args.logging_steps = "steps", 1
        trainer.train()
        trained.append(list(trainer.model.parameters()))
        names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
        names += tuple(f"eval_{name}" for name in names)
        logs.append([log[name] for log in trainer.state.log_history for name in names if name in log])
    assert len(logs[0]) == 16
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_sft_on_labels_that_a_collator_has_shifted_is_untouched(alone, tmp_path):
    datasets, trained = pytest.importorskip("datasets"), []

    def collate(examples):
        batch = pad(examples)
        shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        shifted[:, 0] = -100
        batch = {k: v for k, v in batch.items() if k != "labels"} if alone else batch
        return {**batch, "shift_labels": shifted}

    for attached in (True, False):
        trainset = datasets.Dataset.from_list(samples()).remove_columns("extra")
        trainer, _, _ = sft(tmp_path, trainset, False, max_length=20, max_steps=1)
        trainer.data_collator = collate
        if attached:
            loss = functools.partial(lambda model: model(**HELD_OUT).loss, trainer.model)
            pytest.importorskip("inrun.adapters.trl").attach(trainer, loss)
        trainer.train()
        trained.append(list(trainer.model.parameters()))
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
def test_sft_of_experts_is_untouched(tmp_path):
    """With the loss that balances them."""
    datasets, trained = pytest.importorskip("datasets"), []
    for attached in (True, False):
        trainset = datasets.Dataset.from_list(samples()).remove_columns("extra")
        trainer, _, _ = sft(tmp_path, trainset, attached, case=CASES["Mixtral"], max_length=20, max_steps=1)
        trainer.train()
        assert trainer.aux_loss_enabled
        trained.append(list(trainer.model.parameters()))
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b)


def preferences(count, seed):
    draw = random.Random(seed)
    text = lambda n: " ".join(f"t{draw.randrange(3, VOCAB)}" for _ in range(n))  # noqa: E731
    return [{"sample_id": f"p{i}", "prompt": text(3), "chosen": text(3 + i % 3), "rejected": text(4)}
            for i in range(count)]  # fmt: skip


def of_preferences(kind, folder, callbacks=(), collator=None, **settings):
    """A trainer of six pairs ("kto": of what was chosen or rejected of each) on a small Llama, with a reference model
    of other weights where it takes one."""
    datasets, trl, tokenizers = (pytest.importorskip(name) for name in ("datasets", "trl", "tokenizers"))
    vocab = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    vocab.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocab, eos_token="t2", pad_token="t0")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCAB, pad_token_id=0, num_labels=1, initializer_range=0.3, **size)
    model_class = transformers.LlamaForSequenceClassification if kind == "reward" else transformers.LlamaForCausalLM
    model, reference = model_class(config), model_class(config)
    name = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}[kind]
    args = getattr(trl, f"{name}Config")(
        output_dir=folder, optim="sgd", learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=0.0, seed=3,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no", bf16=False,
        per_device_train_batch_size=3, num_train_epochs=1, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    trainset = datasets.Dataset.from_list(unpaired(6, 0) if kind == "kto" else preferences(6, 0))
    return getattr(trl, f"{name}Trainer")(
        model, args=args, train_dataset=trainset, processing_class=tokenizer, callbacks=[*callbacks],
        data_collator=collator, **({} if kind == "reward" else {"ref_model": reference}),
    )  # fmt: skip


def unpaired(count, seed):
    rows = preferences(count, seed)
    return [{"sample_id": row["sample_id"], "prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0}
            for i, row in enumerate(rows)]  # fmt: skip


@pytest.mark.parametrize(
    "kind, loss, said",
    [("dpo", ["sigmoid", "sft"], True), ("dpo", ["aot"], True), ("dpo", ["aot_unpaired"], True),
     ("dpo", ["sigmoid"], False), ("kto", "kto", True)],
)  # fmt: skip
def test_a_loss_that_couples_a_batch_is_told_of_where_validation_has_several(kind, loss, said, tmp_path, recwarn):
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    held = datasets.Dataset.from_list((unpaired if kind == "kto" else preferences)(3, 1))
    for size, count in ((2, 2), (3, 1)):
        settings = {"loss_type": loss, "per_device_eval_batch_size": size}
        adapter.attach(of_preferences(kind, tmp_path, **settings), held)
        found = [str(w.message) for w in recwarn if "couples the samples" in str(w.message)]
        assert len(found) == (said and count == 2) and all("there are 2" in each for each in found)
        recwarn.clear()


@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.filterwarnings("ignore")
def test_a_pair_of_preferences_has_the_value_of_its_two_rows(kind, tmp_path):
    """The rows' values add up to the gradient of the pair's loss, the head's part included."""
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    dpo, weights = kind == "dpo", Weights()
    trainer = of_preferences(kind, tmp_path, [weights])
    model, reference = trainer.model, trainer.ref_model if dpo else None
    model_class, config, args = type(model), model.config, trainer.args
    values = adapter.attach(trainer, datasets.Dataset.from_list(preferences(3, 1)))
    held = values.options["validation"]["validation"]
    trainer.train()

    def loss_of(model, pair):
        """Of one pair, written out."""
        if not dpo:
            better, worse = (
                model(input_ids=torch.tensor([pair[n]])).logits[0, 0] for n in ("chosen_ids", "rejected_ids")
            )
            return -torch.nn.functional.logsigmoid(better - worse)
        margins = []
        for each in (model, reference):
            of_each = []
            for name in ("chosen_ids", "rejected_ids"):
                ids = torch.tensor(pair["prompt_ids"] + pair[name])
                logp = each(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
                of_each.append(logp[torch.arange(len(ids) - 1), ids[1:]][len(pair["prompt_ids"]) - 1 :].sum())
            margins.append(of_each[0] - of_each[1])
        return -torch.nn.functional.logsigmoid(args.beta * (margins[0] - margins[1].detach()))

    pairs = {row["sample_id"]: row for row in trainer.train_dataset}
    table = values.ledger.rows().to_pandas()
    assert len(table) == 12 and held is not None
    found = table.groupby(["step", "sample_id"])["value"].sum()
    prepared = adapter._prepared(trainer, datasets.Dataset.from_list(preferences(3, 1)), "again")
    for (step, sample), value in found.items():
        plain = model_class(config)
        plain.load_state_dict(weights.before[step], strict=False)
        params = list(plain.parameters())
        direction = torch.autograd.grad(sum(loss_of(plain, pair) for pair in prepared) / 3, params)
        gradient = torch.autograd.grad(loss_of(plain, pairs[sample]) / 3, params)
        expected = LR * sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        assert value == pytest.approx(expected.item(), rel=2e-3, abs=1e-6 * float(found.abs().max()))
    with pytest.raises(TypeError, match=r"TRL's SFTTrainer, DPOTrainer, KTOTrainer, .* or RLOOTrainer, got Trai"):
        adapter.attach(build(tmp_path / "other", options=None)[0], [])


@pytest.mark.parametrize("before", [False, True], ids=["", "reference beforehand"])
@pytest.mark.filterwarnings("ignore")
def test_kto(before, tmp_path):
    """Of rows alone, the head's part included; the batch's KL term is a constant."""
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    weights = Weights()
    trainer = of_preferences("kto", tmp_path, [weights], precompute_ref_log_probs=before)
    reference, beta, config = trainer.ref_model, trainer.args.beta, trainer.model.config
    held = datasets.Dataset.from_list(unpaired(4, 1))
    values = adapter.attach(trainer, held)
    trainer.train()

    def ratio(model, row, name="completion_ids"):
        ids = torch.tensor(row["prompt_ids"] + row[name])
        both = [m(input_ids=ids[None]).logits[0, :-1].log_softmax(-1) for m in (model, reference)]
        of_each = [p[torch.arange(len(ids) - 1), ids[1:]][len(row["prompt_ids"]) - 1 :].sum() for p in both]
        return of_each[0] - of_each[1].detach()

    def losses_of(model, rows):
        kl = sum(ratio(model, row, "KL_completion_ids").detach() for row in rows) / len(rows)
        signs = [1 if row["label"] else -1 for row in rows]
        ratios = [ratio(model, row) for row in rows]
        return [
            (1 - torch.sigmoid(s * beta * (r - kl.clamp(min=0)))) / len(rows)
            for s, r in zip(signs, ratios, strict=True)
        ]

    rows, steps = {row["sample_id"]: row for row in trainer.train_dataset}, by_step(values.ledger)
    assert [len(found) for found in steps.values()] == [3, 3]
    for step, found in steps.items():
        plain = type(trainer.model)(config)
        plain.load_state_dict(weights.before[step], strict=False)
        target = gradients(sum(losses_of(plain, list(adapter._prepared(trainer, held, "again")))), plain)
        each = [gradients(loss, plain) for loss in losses_of(plain, [rows[i] for i in found])]
        dots = [LR * sum((a * b).sum() for a, b in zip(target, g, strict=True)) for g in each]
        assert error(found, dict(zip(found, dots, strict=True))) <= 2e-4


def generating(kind, folder, spied=None, eval_data=None, **settings):
    """A trainer that draws completions to six prompts, rewarded by their tokens, from a small Llama whose head is tied
    to its embedding; with its model and the inputs of every training batch in the list `spied`."""
    datasets, trl, tokenizers = (pytest.importorskip(name) for name in ("datasets", "trl", "tokenizers"))
    vocab = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    vocab.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocab, eos_token="t2", pad_token="t0", padding_side="left"
    )
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "save_strategy": "no",
                "gradient_checkpointing": False, "learning_rate": LR} | settings  # fmt: skip
    args = getattr(trl, f"{kind.upper()}Config")(
        output_dir=folder, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, seed=3,
        report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no", bf16=False, num_train_epochs=1,
        num_generations=3, max_completion_length=5, temperature=0.8,
        per_device_eval_batch_size=3, **settings,
    )  # fmt: skip

    class Spied(getattr(trl, f"{kind.upper()}Trainer")):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if spied is not None and model.training:
                copied = copy.deepcopy(model)
                copied.forward = types.MethodType(self.own_forward, copied)
                spied.append((self.state.global_step, copied, dict(inputs)))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def reward(completions, **_):
        return [sum(len(token) for token in text.split()) + text.count("7") for text in completions]

    rows = [{"sample_id": f"p{i}", "prompt": f"t{i + 3} t{2 * i + 5}"} for i in range(6)]
    trainer = Spied(
        TIED.built(), reward, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        eval_dataset=eval_data,
    )  # fmt: skip
    trainer.own_forward = trainer.model.forward.__func__  # TRL's, with the head that is not called
    return trainer


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {}),
        ("grpo", {"steps_per_generation": 1, "loss_type": "grpo"}),  # generates within a step
        (
            "grpo",
            {"num_iterations": 2, "loss_type": "grpo", "gradient_checkpointing": True},
        ),  # every completion in two steps
        ("rloo", {"beta": 0.0}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_completion_has_the_value_of_its_row(kind, settings, tmp_path):
    """Under its prompt's id, in every step it is used in: its part of the trainer's own loss, the head's part included,
    for a validation loss that is the trainer's of other rollouts."""
    adapter = pytest.importorskip("inrun.adapters.trl")
    trainer = generating(kind, tmp_path, spied := [], **settings)
    rollouts = adapter.rollouts(trainer, [{"prompt": f"t{i + 20}"} for i in range(2)])
    assert len(rollouts["prompt_ids"]) == 6 and not trainer._metrics["eval"] and not trainer._logs["prompt"]
    values = adapter.attach(trainer, lambda: trainer.compute_loss(trainer.model, rollouts))
    trainer.train()
    assert not trainer._metrics["eval"]
    prompts = {row["sample_id"]: row["prompt"] for row in trainer.train_dataset}
    found = values.ledger.rows().to_pandas()
    assert trainer.state.global_step == (6 if settings.get("num_iterations") else 3) and len(found) == 3 * len(spied)
    assert found["value"].abs().max() > 1e-3
    at = dict.fromkeys(range(trainer.state.global_step), 0)
    for step, model, inputs in spied:
        trainer.model.eval()  # which the trainer asks whether its losses are divided
        target = gradients(trainer.compute_loss(model.eval(), rollouts), model)
        rows = found[found["step"] == step].iloc[at[step] : at[step] + 3]
        at[step] += 3
        trainer.model.train()
        model.train()
        loss = trainer._compute_loss(model, inputs) / (2 if kind == "rloo" else 1)  # which the Trainer divides itself
        whole = sum((g * t).sum() for g, t in zip(gradients(loss, model), target, strict=True))
        assert rows["value"].sum() == pytest.approx(LR * float(whole), rel=1e-4, abs=1e-6)
        for row, (sample, value) in enumerate(zip(rows["sample_id"], rows["value"], strict=True)):
            prompt = trainer.processing_class.decode(inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()])
            assert prompts[sample].split() == prompt.split()
            masked = (torch.arange(3) == row).long()[:, None] * inputs["completion_mask"]
            if settings.get("loss_type") == "grpo":  # the mean over rows of what each has
                alone = trainer._compute_loss(model, {**inputs, "completion_mask": masked})
            else:
                only = {**inputs, "advantages": inputs["advantages"] * (torch.arange(3) == row)}
                alone = trainer._compute_loss(model, only) / (2 if kind == "rloo" else 1)
            dot = sum((g * t).sum() for g, t in zip(gradients(alone, model), target, strict=True))
            assert value == pytest.approx(LR * float(dot), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("kind", "settings"), [("grpo", {"entropy_coef": 0.5}), ("rloo", {"beta": 0.0})])
@pytest.mark.filterwarnings("ignore")
def test_training_on_completions_is_untouched(kind, settings, tmp_path):
    """The entropy's gradient included."""
    adapter, trained = pytest.importorskip("inrun.adapters.trl"), []
    for attached in (False, True):
        trainer = generating(kind, tmp_path, **settings)
        model = trainer.model
        if attached:
            adapter.attach(trainer, functools.partial(lambda model: model(**HELD_OUT).loss, model))
        trainer.train()
        trained.append(list(model.parameters()))
    for plain, scored in zip(*trained, strict=True):
        torch.testing.assert_close(plain, scored, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_held_out_rollouts_measure_a_step(tmp_path):
    """As they have the log-probabilities of the model that drew them."""
    adapter, drops = pytest.importorskip("inrun.adapters.trl"), []
    for fixed in (True, False):
        trainer = generating("grpo", tmp_path, learning_rate=0.01)
        trainer.model.get_input_embeddings().padding_idx = None  # it is drawn, and would have no gradient
        held = adapter.rollouts(trainer, [{"prompt": f"t{i + 20}"} for i in range(2)])
        if not fixed:  # a loss that is the same for every model, whose gradient still says what raises the reward
            del held["old_per_token_logps"]
        values = adapter.attach(trainer, functools.partial(trainer.compute_loss, trainer.model, held),
                                method="path_secant")  # fmt: skip
        steps = []
        trainer.add_callback(of_steps(values, steps))
        trainer.train()
        drops.append([(float(step.drop["validation"]), float(step.values.sum())) for step in steps])
    measured, constant = drops
    assert all(drop == pytest.approx(total, rel=0.05, abs=1e-6) and abs(drop) > 1e-5 for drop, total in measured)
    assert all(drop == 0 and abs(total) > 1e-5 for drop, total in constant)


@pytest.mark.filterwarnings("ignore")
def test_rollouts_are_an_evaluations(tmp_path):
    adapter, trainer = pytest.importorskip("inrun.adapters.trl"), generating("grpo", tmp_path)
    trainer.num_generations_eval = 2
    held = adapter.rollouts(trainer, [{"prompt": f"t{i + 20}"} for i in range(2)])
    assert len(held["prompt_ids"]) == 4 and not trainer._metrics["train"] and trainer.model.training


def of_steps(values, found):
    """A callback that puts the steps of an attached trainer into the list, as they end."""

    class Noted(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            found.append(values.loop.last)

    return Noted()


@pytest.mark.filterwarnings("ignore")
def test_completions_are_resumed_and_evaluated_and_need_a_loss_of_ones_own(tmp_path):
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    held = datasets.Dataset.from_list([{"prompt": "t9 t4"}, {"prompt": "t8 t4"}])
    with pytest.raises(TypeError, match=r"validation\['validation'\]: expected a callable with Spied, .* got Dataset"):
        adapter.attach(generating("grpo", tmp_path), held)
    for resume in (False, True):
        trainer = generating(
            "grpo", tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=1, eval_data=held
        )
        loss = functools.partial(lambda model: model(**HELD_OUT).loss, trainer.model)
        values = adapter.attach(trainer, loss, ledger=tmp_path / "ledger")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        assert any("eval_reward" in logged for logged in trainer.state.log_history)
        counts = values.ledger.rows().to_pandas().groupby("step").size()
        assert dict(counts) == {0: 6, 1: 6, 2: 6}


def test_trainers_of_trl_that_are_not_scored_are_refused(tmp_path):
    orpo = pytest.importorskip("trl.experimental.orpo")
    adapter = pytest.importorskip("inrun.adapters.trl")
    kept = r"inrun.adapters.trl.attach, which takes the SFT, DPO, KTO, reward, GRPO and RLOO trainers; TRL's others are"
    for kind in (orpo.ORPOTrainer, adapter.KTOTrainer, type("Mine", (adapter.KTOTrainer,), {})):
        trainer = object.__new__(kind)
        with pytest.raises(TypeError, match=f"expected a Trainer that is not TRL's, got {kind.__name__}; take {kept}"):
            attach(trainer, [])
    with pytest.raises(TypeError, match="GRPOTrainer or RLOOTrainer, got ORPOTrainer; TRL's others are not scored"):
        adapter.attach(object.__new__(orpo.ORPOTrainer), [])


@pytest.mark.filterwarnings("ignore")
def test_a_validation_set_of_preferences_goes_through_the_reference_model_where_pairs_do(tmp_path):
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    held, found = datasets.Dataset.from_list(preferences(3, 1)), []
    for before in (False, True):
        trainer = of_preferences("dpo", tmp_path, precompute_ref_log_probs=before)
        values = adapter.attach(trainer, held)
        trainer.train()
        found.append(torch.tensor(values.ledger.rows()["value"].to_pylist()))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore")
def test_pairs_are_those_of_a_collator_made_from_trls_too(tmp_path):
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    base = pytest.importorskip("trl.trainer.dpo_trainer").DataCollatorForPreference
    collator = type("Mine", (base,), {})(pad_token_id=0)
    values = adapter.attach(
        trainer := of_preferences("dpo", tmp_path, collator=collator), datasets.Dataset.from_list(preferences(3, 1))
    )
    trainer.train()
    counts = values.ledger.rows().to_pandas().groupby("sample_id").size()
    assert dict(counts) == {f"p{i}": 2 for i in range(6)}


@pytest.mark.filterwarnings("ignore")
def test_sft_refuses_ids_lost_in_packing(tmp_path):
    datasets = pytest.importorskip("datasets")
    adapter = pytest.importorskip("inrun.adapters.trl")
    trainset = datasets.Dataset.from_list(samples()).remove_columns("extra")
    for strategy in ("bfd", "wrapped"):
        with pytest.raises(InRunError, match=r"which lost it in packing; pack it with inrun.adapters.trl.pack"):
            sft(tmp_path, trainset, packing=True, packing_strategy=strategy, max_length=20)
    with pytest.raises(ValueError, match="expected the columns input_ids, of tokens, and sample_id, got input_ids"):
        adapter.pack(trainset.remove_columns("sample_id"), 20)
    with pytest.raises(ValueError, match="expected 'bfd' or 'bfd_split', got 'wrapped'"):
        adapter.pack(trainset, 20, strategy="wrapped")
    lost = adapter.pack_dataset(trainset.select_columns("input_ids"), 20)
    with pytest.raises(InRunError, match="which lost it in packing"):
        sft(tmp_path, lost, packing=True, dataset_kwargs={"skip_prepare_dataset": True}, max_length=20)


def test_labels_are_packed_with_their_tokens():
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    rows = [{"labels": [-100, *s["input_ids"][1:]], **s} for s in samples()]
    packed = adapter.pack(datasets.Dataset.from_list(rows), 20)
    found = [t for row in packed for t in zip(row["sample_id"], row["input_ids"], row["labels"], strict=True)]
    expected = [(r["sample_id"], *t) for r in rows for t in zip(r["input_ids"], r["labels"], strict=True)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward", "sft"])
@pytest.mark.filterwarnings("ignore")
def test_a_validation_set_may_be_a_list_of_what_the_training_set_has(kind, tmp_path):
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    held = samples(7) if kind == "sft" else (unpaired if kind == "kto" else preferences)(3, 1)
    losses = []
    for given in (held, datasets.Dataset.from_list(held)):
        if kind == "sft":
            trainset = datasets.Dataset.from_list(samples()).remove_columns("extra")
            trainer, _, _ = sft(tmp_path, trainset, attached=False, max_length=5)
        else:
            trainer = of_preferences(kind, tmp_path)
        losses.append(adapter.attach(trainer, given).options["validation"]["validation"]().detach())
    assert torch.equal(*losses)


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
@pytest.mark.filterwarnings("ignore")
def test_a_mask_without_labels_is_refused(mask, tmp_path):
    """As TRL itself refuses it where it prepares nothing: it would train, or validate, on every token."""
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    rows = [{mask: [0, *[1] * (len(s["input_ids"]) - 1)], **s} for s in samples()]
    masked = datasets.Dataset.from_list(rows).remove_columns("extra")
    with pytest.raises(ValueError, match=rf"expected labels \(-100 where a mask is 0\) beside {mask}, got none"):
        adapter.pack(masked, 20)
    labelled = masked.add_column("labels", [[-100, *row["input_ids"][1:]] for row in rows])
    packed = adapter.pack(labelled, 20)
    assert mask not in packed.column_names and sum(row.count(-100) for row in packed["labels"]) == len(rows)
    settings = {"attached": False, "packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 20}
    trainer, _, _ = sft(tmp_path, packed, **settings)
    with pytest.raises(ValueError, match="The held dataset has mask columns but no 'labels'"):
        adapter.attach(trainer, {"held": masked})
    adapter.attach(trainer, {"held": labelled})


@pytest.mark.filterwarnings("ignore")
def test_a_validation_set_is_formatted_as_the_training_set_is(tmp_path):
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    trainset = datasets.Dataset.from_list(samples()).remove_columns("extra")
    trainer, _, _ = sft(tmp_path, trainset, attached=False, packing=True, max_length=20)
    trainer._formatting_func = lambda row: row["said"]
    held = datasets.Dataset.from_list([{"said": "t5"}, {"said": "t6"}])
    assert adapter._prepared(trainer, held, "validation")["input_ids"] == [[5, 2], [6, 2]]
    trainer._skip_prepare_dataset = True
    assert adapter._prepared(trainer, held, "validation") is held


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_has_run_is_refused(tmp_path):
    """As accelerate has wrapped its model's forward by then, or it holds completions without ids."""
    datasets, adapter = pytest.importorskip("datasets"), pytest.importorskip("inrun.adapters.trl")
    ran = sft(tmp_path, datasets.Dataset.from_list(samples()).remove_columns("extra"), attached=False)[0]
    ran.model._original_forward = ran.model.forward
    generated = generating("grpo", tmp_path)
    generated._buffered_inputs = []
    for trainer in (ran, generated):
        with pytest.raises(InRunError, match=r"expected a trainer before its first train\(\) or evaluate\(\)"):
            adapter.attach(trainer, lambda: None)


def test_pairs_want_the_validation_set_in_one_batch(tmp_path):
    options = {"validation": samples(3), "pairwise": ["a", "b", "c"]}
    with pytest.raises(
        ValueError, match="expected one batch of samples with pairwise, got 2 of per_device_eval_batch_"
    ):
        build(tmp_path, options=options, per_device_eval_batch_size=2)
    with pytest.raises(ValueError, match="got 2 of"):  # the second without a label
        unlabelled = [*samples(2), {"input_ids": [3]}]
        build(tmp_path, options=options | {"validation": unlabelled}, per_device_eval_batch_size=2)
    trainer, values, _ = build(tmp_path, options=options, per_device_eval_batch_size=3, max_steps=1)
    trainer.train()
    assert len(values.ledger) == 6 * 3


def test_several_gpus_of_one_process_are_refused(tmp_path, monkeypatch):
    trainer, _, _ = build(tmp_path, options=None)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(InRunError, match=r"expected one GPU for each process, got 2 .* CUDA_VISIBLE_DEVICES"):
        attach(trainer, samples(2))


def test_a_validation_set_leaves_random_numbers_as_they_were(tmp_path):
    trainer, _, _ = build(tmp_path, options=None)
    before = torch.get_rng_state()
    attach(trainer, samples(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_run_in_memory_takes_a_ledger_of_its_own(tmp_path):
    trainer, values, _ = build(tmp_path, num_train_epochs=1)
    trainer.train()
    with pytest.raises(InRunError, match=r"of an earlier run, in memory; .*values.ledger = inrun.Ledger\(\)"):
        trainer.train()
    values.ledger = inrun.Ledger()
    trainer.train()
    assert sorted(by_step(values.ledger)) == [0, 1]


def test_bad_input_is_one_clear_error(tmp_path):
    trainer = build(tmp_path)[0]
    with pytest.raises(InRunError, match="without inrun"):
        attach(trainer, validation=lambda: torch.ones(()))
    with pytest.raises(TypeError, match=r"validation\['validation'\]: expected a dataset or a callable, got 'batch'"):
        build(tmp_path, options={"validation": "batch"})
    with pytest.raises(TypeError, match=r"validation\['validation'\]: expected a dataset or a callable, got <torch"):
        build(tmp_path, options={"validation": torch.utils.data.DataLoader(samples())})
    with pytest.raises(ValueError, match=r"validation\['a'\]: expected a dataset of at least one sample, got none"):
        build(tmp_path, options={"validation": {"a": []}})
    with pytest.raises(TypeError, match=r"validation\['validation'\]: expected samples with named columns, got 1"):
        build(tmp_path, options={"validation": [1, 2]})
    nameless = [{"input_ids": s["input_ids"]} for s in samples()]
    trainer, _, _ = build(tmp_path, nameless)
    with pytest.raises(InRunError, match="sample_id: expected in every example"):
        trainer.train()
    trainer, _, _ = build(tmp_path, [*samples(1), *nameless[:1]])
    with pytest.raises(InRunError, match="sample_id: expected in every example"):
        trainer.train()
    datasets = pytest.importorskip("datasets")
    with pytest.raises(InRunError, match=r"id_column: expected a column of the training set \(input_ids\)"):
        build(tmp_path, datasets.Dataset.from_list(nameless))


def test_a_tracked_root_is_called_what_it_is(tmp_path):
    """The trainer goes by a model's class name: whether smoothed labels are shifted, and what a checkpoint is of."""
    found = {}
    for name, options in (("plain", None), ("root", {"through": {"model.embed_tokens.weight": ""}})):
        trainer, _, _ = build(
            tmp_path / name, options=options, case=TIED, label_smoothing_factor=0.1, max_steps=2, save_strategy="steps",
            save_steps=1,
        )  # fmt: skip
        trainer.train()
        config = transformers.AutoConfig.from_pretrained(tmp_path / name / "checkpoint-1")
        assert config.architectures == ["LlamaForCausalLM"]
        found[name] = trainer.model.state_dict()
        assert len(trainer.model(**HELD_OUT, output_hidden_states=True).hidden_states) > 1
    for key, expected in found["plain"].items():
        torch.testing.assert_close(found["root"][key], expected)


@pytest.mark.parametrize("order", ["longest first", "backwards", "as they come"])
def test_a_collator_that_orders_its_examples_is_refused(order, tmp_path):
    def collate(examples):
        if order == "longest first":
            examples.sort(key=lambda e: -len(e["input_ids"]))
        return pad(examples[::-1] if order == "backwards" else examples)

    trainer, values, before = build(tmp_path)
    trainer.data_collator.collator = collate
    if order == "as they come":
        trainer.train()
        compare(values, before)
    else:
        with pytest.raises(InRunError, match="leaves its examples in their order, got 'input_ids' with those of exam"):
            trainer.train()


def test_a_collator_is_asked_for_what_the_trainers_own_holds():
    """By sentence-transformers' trainers, say; and it is copied and pickled as ever."""
    own = transformers.DefaultDataCollator(return_tensors="pt")
    collator = huggingface.CarryIds(own, "sample_id")
    for each in (collator, copy.deepcopy(collator), pickle.loads(pickle.dumps(collator))):
        assert each.return_tensors == "pt"
        assert isinstance(each, huggingface.CarryIds)
        assert not hasattr(each, "valid_label_columns")


def test_examples_without_names_have_no_ids(tmp_path):
    """A set of tuples: the refusal of a batch without ids, where it trains; an evaluation on one needs none."""
    tuples = [(s["sample_id"], s["input_ids"]) for s in samples(6)]
    trainer, _, _ = build(tmp_path, tuples)
    trainer.data_collator.collator = lambda examples: pad([{"input_ids": e[1]} for e in examples])
    assert "eval_loss" in trainer.evaluate(tuples)
    with pytest.raises(InRunError, match="expected in every example of the training set"):
        trainer.train()


def test_ids_are_those_of_the_rows_of_tokens():
    """Not of what comes before them in a batch, as the patches of all images do."""
    collate = huggingface.CarryIds(lambda examples: {"pixel_values": torch.zeros(7, 2), **pad(examples)}, "sample_id")
    assert collate(samples(3))["sample_id"] == {"ids": ["s0", "s1", "s2"], "segments": None}
    collate = huggingface.CarryIds(lambda examples: {"scale": torch.ones(()), "x": torch.zeros(3, 2)}, "sample_id")
    assert collate(samples(3))["sample_id"] == {"ids": ["s0", "s1", "s2"], "segments": None}
    collate = huggingface.CarryIds(lambda examples: {"scale": torch.ones(1), "x": torch.zeros(3, 2)}, "sample_id")
    assert collate(samples(3))["sample_id"] == {"ids": ["s0", "s1", "s2"], "segments": None}
    collate = huggingface.CarryIds(lambda _: {"input_ids": None, "inputs_embeds": torch.zeros(3, 2, 4)}, "sample_id")
    assert collate(samples(3))["sample_id"] == {"ids": ["s0", "s1", "s2"], "segments": None}


def test_a_collator_is_not_trls_by_its_name():
    kind = type("DataCollatorForPreference", (), {"__call__": lambda _, examples: {"x": torch.zeros(3, 2)}})
    collate = huggingface.CarryIds(kind(), "sample_id")
    assert collate(samples(3))["sample_id"] == {"ids": ["s0", "s1", "s2"], "segments": None}


@pytest.mark.parametrize("held", [list, torch.tensor, np.array])
def test_ids_of_tokens_are_runs_of_each_example(held):
    """As a dataset of any format gives them, also of one example; what is left of the row is padding."""
    carry = huggingface.CarryIds(lambda examples: {"input_ids": torch.zeros(rows, 6)}, "id")
    rows, examples = 1, [{"id": held([7, 7, 8])}, {"id": held([8, 9])}]
    assert carry(examples)["id"] == {"ids": [7, 8, 8, 9], "segments": [0, 2, 3, 4, 6]}
    assert carry(examples[:1])["id"] == {"ids": [7, 8], "segments": [0, 2, 6]}
    rows = 3
    with pytest.raises(InRunError, match=r"one row of documents \(padding_free\); got one id per token in 3 rows"):
        carry(examples)


@pytest.mark.parametrize("ids", [["a", "b"], [["a", "a", "a"], ["b", "b", "c", "c"]]])
def test_a_row_that_is_left_of_several_is_not_taken_for_their_documents(ids):
    """By a collator that leaves an example out, or cuts it, and pads to a fixed length."""
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    examples = [{"id": i, "input_ids": row} for i, row in zip(ids, rows, strict=True)]

    def carried(*row, **more):
        return huggingface.CarryIds(lambda _: {"input_ids": torch.tensor([[*row, 0, 0]]), **more}, "id")(examples)["id"]

    assert carried(5, 6, 7, 8, 9, 10, 11)["segments"] == ([0, 3, 9] if ids == ["a", "b"] else [0, 3, 5, 9])
    for row in ((8, 9, 10, 11, 0, 0, 0), (5, 6, 7, 0, 0, 0, 0), (5, 6, 8, 9, 10, 11, 0)):
        for positions in ({}, {"position_ids": torch.arange(9)[None]}):
            with pytest.raises(InRunError, match="1 rows, which is not the examples one after another"):
                carried(*row, **positions)
    masked = carried(5, 1, 7, 8, 9, 1, 11, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0]]))
    assert masked["ids"][:2] == ["a", "b"]


@pytest.mark.parametrize("two_rows", [False, True])
@pytest.mark.parametrize(
    ("name", "tells", "others"),
    [
        ("position_ids", [[2, 3, 4, 2, 3, 4, 5, 1, 1]], [[2, 3, 2, 3, 4, 5, 2, 3, 1]]),
        ("cu_seqlens", [0, 3, 7], [0, 2, 6]),
    ],
)
def test_documents_of_masked_tokens_are_found_where_something_tells(name, tells, others, two_rows):
    """By positions of RoBERTa's, which begin at 2, or offsets; examples may have a dimension more."""
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    examples = [{"id": i, "input_ids": torch.tensor([row] if two_rows else row)} for i, row in enumerate(rows)]

    def carried(tokens, **more):
        return huggingface.CarryIds(lambda _: {"input_ids": torch.tensor([tokens]), **more}, "id")(examples)["id"]

    masked = [5, 1, 7, 8, 9, 1, 11, 0, 0]
    assert carried(masked, **{name: torch.tensor(tells)}) == {"ids": [0, 1], "segments": [0, 3, 9]}
    for more in ({}, {name: torch.tensor(others)}):
        with pytest.raises(InRunError, match="1 rows, which is not the examples one after another"):
            carried(masked, **more)


@pytest.mark.parametrize("in_front", [False, True])
def test_rows_are_held_to_their_examples(in_front):
    """Wherever they are padded; of single numbers, as labels are, another order says nothing."""

    def collate(examples):
        rows = [torch.tensor(e["x"]) for e in examples]
        padding = [(3 - len(r), 0) if in_front else (0, 3 - len(r)) for r in rows]
        x = torch.stack([torch.nn.functional.pad(r, p) for r, p in zip(rows, padding, strict=True)])
        turned = examples[0]["x"] == [9, 9]
        return {"x": x.flip(0) if turned else x, "labels": torch.tensor([1 - e["labels"] for e in examples])}

    carry = huggingface.CarryIds(collate, "id")
    rows = ([5, 6, 7], [8], [9, 9])
    examples = [{"id": str(i), "x": x, "labels": i % 2} for i, x in enumerate(rows)]
    assert carry(examples)["id"]["ids"] == ["0", "1", "2"]
    with pytest.raises(InRunError, match="got 'x' with those of examples 2, 1, 0"):
        carry(examples[::-1])


def loss_over_items(outputs, labels, num_items_in_batch):
    flat = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_loss_function_that_divides_by_the_items_has_them_weigh_its_batches(name, tmp_path):
    """Of a GPT-2 the trainer counts the first tokens too."""
    trainer, _, _ = build(tmp_path, case=CASES[name], options=None, per_device_eval_batch_size=2)
    trainer.compute_loss_func = loss_over_items
    held = [{"input_ids": row} for row in ([3, 4], [5, 6], [7, 8, 9, 10, 11, 12, 13, 3, 4])]
    loss, batch = attach(trainer, held).options["validation"]["validation"], pad(held)
    _, count = trainer.get_batch_samples(iter([batch]), 1, "cpu")
    outputs = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(loss(), loss_over_items(outputs, batch["labels"], count), rtol=1e-5, atol=0)


def test_a_loss_function_that_divides_by_the_items_has_their_count_in_validation(tmp_path):
    loss = loss_over_items

    def values(validation):
        trainer, values, _ = build(tmp_path, options=None, max_steps=1)
        trainer.compute_loss_func = loss
        values = attach(trainer, **validation(trainer.model))
        trainer.train()
        return torch.tensor(values.ledger.rows()["value"].to_pylist())

    held = samples(4)
    every = sum(len(s["input_ids"]) - 1 for s in held)
    expected = values(lambda model: {"validation": lambda: loss(model(**pad(held)), pad(held)["labels"], every)})
    torch.testing.assert_close(values(lambda model: {"validation": held}), expected, rtol=1e-4, atol=1e-7)


def test_a_loss_that_writes_into_its_batch_leaves_the_validation_set_as_it_was(tmp_path):
    def shifting(outputs, labels, num_items_in_batch):
        labels[:, :-1] = labels[:, 1:].clone()
        labels[:, -1] = -100
        flat = outputs.logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, labels.flatten(), reduction="sum") / num_items_in_batch

    trainer, _, _ = build(tmp_path, options=None, per_device_eval_batch_size=2)
    trainer.compute_loss_func = shifting
    loss = attach(trainer, samples(5)).options["validation"]["validation"]
    assert torch.equal(loss(), loss())


def test_batches_that_one_process_sends_the_others_have_no_ids(tmp_path, monkeypatch):
    """As accelerate does with an iterable dataset, unless it is told not to."""
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    datasets = pytest.importorskip("datasets")
    streamed = datasets.Dataset.from_list(samples()).to_iterable_dataset()
    with pytest.raises(InRunError, match=r"got dispatch_batches .* set TrainingArguments\(accelerator_config="):
        build(tmp_path, streamed, max_steps=1)
    build(tmp_path, streamed, max_steps=1, accelerator_config={"dispatch_batches": False})


def test_the_norm_that_a_trainer_clips_to_is_known_to_the_methods_that_ask_for_it(tmp_path):
    def values(**options):
        values = attach_and_train(tmp_path / str(len(options)), {"method": "path", **options})
        return torch.tensor(values.ledger.rows()["value"].to_pylist())

    def attach_and_train(folder, options):
        trainer, values, _ = build(folder, options=options, num_train_epochs=1)
        trainer.train()
        return values

    found = values()
    assert torch.equal(found, values(clip=CLIP))
    with pytest.warns(UserWarning, match="say to which"):
        unsaid = values(clip=None, check=True)
    assert not torch.allclose(unsaid, found, rtol=1e-2)
    assert len(values(exclude=["lm_head.weight"], check=True, keep="device")) == len(found)  # of which it is not known


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_scaler_leaves_the_norm_unsaid(scaled, tmp_path, monkeypatch):
    _, values, _ = build(tmp_path, options={"method": "path"})
    monkeypatch.setattr(huggingface, "Loop", lambda *_, **options: options)
    state = transformers.TrainerState(global_step=2)
    args = SimpleNamespace(fp16=scaled, max_grad_norm=CLIP)
    values.on_train_begin(args, state, None, model=None, optimizer=None)
    assert values.loop["start"] == 2 and values.loop.get("clip") == (None if scaled else CLIP)
