"""The training stacks of bench_stacks, each as its users write it: a small Llama on one batch, plain or scored.

A stack is a function `(setup, turn)` that trains until it is stopped, and calls `turn(model, optimizer, tracker)` ahead
of each step; `Run` lets it make one step at a time, so that two of them can be timed side by side.
"""

import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import inrun
from bench.bench_step import Case
from bench.measure import SEED, Machine
from bench.peers import LR, held_by

EVERY = 4  # steps that a validation gradient serves
Turn = Callable[[nn.Module, torch.optim.Optimizer, Any], None]


@dataclass(frozen=True)
class Llama(Case):
    """As many weights as a `Case`'s GPT."""

    def model(self) -> Any:
        import transformers

        heads = self.width // 64 or 1
        config = transformers.LlamaConfig(
            hidden_size=self.width, intermediate_size=8 * self.width // 3, num_hidden_layers=self.layers,
            num_attention_heads=heads, num_key_value_heads=heads, vocab_size=self.vocab, use_cache=False,
            max_position_embeddings=self.tokens, tie_word_embeddings=self.tied, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(SEED)
        return transformers.LlamaForCausalLM(config)


@dataclass(frozen=True)
class Setup:
    """What every stack trains, and whether its samples are scored."""

    case: Case
    device: torch.device
    scored: bool

    def model(self) -> Any:
        return self.case.model().to(self.device)

    def batches(self) -> tuple[Tensor, Tensor]:
        """Training's and validation's, of one size."""
        drawn = torch.Generator().manual_seed(SEED)
        train, held_out = torch.randint(3, self.case.vocab, (2, self.case.batch, self.case.tokens), generator=drawn)
        return train.to(self.device), held_out.to(self.device)

    def examples(self, steps: int = 1000) -> list[dict[str, Any]]:
        """The batch's rows over and over, each with an id of its own."""
        rows = self.batches()[0].tolist()
        return [{"sample_id": i, "input_ids": rows[i % len(rows)]} for i in range(steps * len(rows))]


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def loss_of(model: Any, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


def loop(
    setup: Setup,
    turn: Turn,
    wrapped: Callable[[Any], Any] = lambda model: model,
    autocast: bool = False,
    parts: int = 1,
    rows: slice = slice(None),
    **options: Any,
) -> None:
    """A loop of one's own; the variants differ in how the model is wrapped, run, fed and tracked (`options`)."""
    x, held_out = setup.batches()
    x = x[rows]
    model = setup.model()
    called, optimizer = wrapped(model), optimizer_of(model)

    def context() -> Any:
        return torch.autocast(setup.device.type, torch.bfloat16) if autocast else nullcontext()

    def validation() -> Tensor:
        with context():
            return loss_of(getattr(called, "module", called), held_out)  # of DDP, as the README has it

    tracker = None
    if setup.scored:
        tracker = inrun.track(called, optimizer, validation=validation, validate_every=EVERY, **options)
    while True:
        turn(model, optimizer, tracker)
        with tracker.step() if tracker else nullcontext() as step:
            for ids in torch.arange(len(x)).chunk(parts):
                if step is not None:
                    step.batch(ids.tolist())
                with context():
                    loss = loss_of(called, x[ids]) / parts
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def compiled(setup: Setup, turn: Turn) -> None:
    def wrapped(model: Any) -> Any:
        model.compile(dynamic=False)  # in place, as `torch.compile(model)` with no wrapper
        return model

    loop(setup, turn, wrapped, check=False)  # the check of the first step would be a graph of its own


def checkpointed(setup: Setup, turn: Turn) -> None:
    def wrapped(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    loop(setup, turn, wrapped)


def accelerate(setup: Setup, turn: Turn) -> None:
    from accelerate import Accelerator

    from inrun.adapters import Loop

    accelerator = Accelerator(cpu=setup.device.type == "cpu")
    rows = [{"sample_id": e["sample_id"], "input_ids": torch.tensor(e["input_ids"])} for e in setup.examples()]
    loader: Any = torch.utils.data.DataLoader(rows, setup.case.batch)  # pyright: ignore[reportArgumentType]
    model = setup.model()
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    held_out = setup.batches()[1]
    values = None
    if setup.scored:
        values = Loop(wrapped, optimizer, lambda: loss_of(model, held_out), validate_every=EVERY)
    for batch in loader:
        turn(model, optimizer, values and values.tracker)
        with values.batch(batch["sample_id"], last=accelerator.sync_gradients) if values else nullcontext():
            accelerator.backward(loss_of(wrapped, batch["input_ids"]))
            optimizer.step()
            optimizer.zero_grad()


def trainer(setup: Setup, turn: Turn, trl: bool = False) -> None:
    """The Trainer, or TRL's SFTTrainer: without clipping, and a learning rate that stays."""
    import datasets
    import transformers

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turn(kwargs["model"], kwargs["optimizer"], values.loop.tracker if values and values.loop else None)

    settings = {
        "per_device_train_batch_size": setup.case.batch, "learning_rate": LR, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "report_to": "none", "disable_tqdm": True,
        "use_cpu": setup.device.type == "cpu", "save_strategy": "no", "logging_strategy": "no",
        "optim": "adamw_torch_fused",
    }  # fmt: skip
    model, held_out = setup.model(), setup.batches()[1]
    rows = datasets.Dataset.from_list([e | {"labels": e["input_ids"]} for e in setup.examples()])
    with tempfile.TemporaryDirectory() as folder:
        if trl:
            from trl.trainer.sft_config import SFTConfig
            from trl.trainer.sft_trainer import SFTTrainer

            from inrun.adapters.trl import attach

            more = {"gradient_checkpointing": False, "bf16": False, "max_length": None}
            ready = {"skip_prepare_dataset": True}
            args = SFTConfig(folder, **settings, **more, dataset_kwargs=ready)
            made: Any = SFTTrainer(model, args, train_dataset=rows, processing_class=_tokenizer(setup.case.vocab))
        else:
            from inrun.adapters.huggingface import attach

            args = transformers.TrainingArguments(folder, **settings)
            made = transformers.Trainer(model, args, transformers.default_data_collator, rows)
        values = None
        if setup.scored:
            values = attach(made, lambda: loss_of(model, held_out), validate_every=EVERY)
        made.add_callback(Turns())
        made.train()


def sft(setup: Setup, turn: Turn) -> None:
    trainer(setup, turn, trl=True)


def _tokenizer(vocab: int) -> Any:
    import tokenizers
    import transformers

    words = {f"t{i}": i for i in range(vocab)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t1"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="t2", pad_token="t0")


def lightning(setup: Setup, turn: Turn) -> None:
    import lightning.pytorch as L

    from inrun.adapters.lightning import InRun

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = setup.model()

        def training_step(self, batch, batch_idx):
            return loss_of(self.net, batch["input_ids"])

        def configure_optimizers(self):
            return optimizer_of(self)

    class Turns(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            turn(net, trainer.optimizers[0], values.loop.tracker if values and values.loop else None)

    net, held_out = Net(), setup.batches()[1]
    values = InRun(lambda: loss_of(net.net, held_out), validate_every=EVERY) if setup.scored else None
    rows = [{"sample_id": e["sample_id"], "input_ids": torch.tensor(e["input_ids"])} for e in setup.examples()]
    callbacks: list[Any] = [Turns(), *([values] if values else [])]
    fit = L.Trainer(
        accelerator="cpu" if setup.device.type == "cpu" else "gpu", devices=1, logger=False, callbacks=callbacks,
        max_epochs=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    fit.fit(net, torch.utils.data.DataLoader(rows, setup.case.batch))  # pyright: ignore[reportArgumentType]


STACKS: dict[str, Callable[[Setup, Turn], None]] = {
    "torch": loop,
    "torch.compile": compiled,
    "bf16 autocast": lambda setup, turn: loop(setup, turn, autocast=True),
    "accumulation of 2": lambda setup, turn: loop(setup, turn, parts=2),
    "activation checkpointing": checkpointed,
    "accelerate": accelerate,
    "Trainer": trainer,
    "SFTTrainer": sft,
    "Lightning": lightning,
}


class Run:
    """A stack's training, one step for each call; it waits in a thread of its own before every step.

    Attributes:
        model, optimizer, tracker: as the stack made them; no tracker where it is not scored.
    """

    def __init__(self, stack: Callable[[Setup, Turn], None], setup: Setup, machine: Machine) -> None:
        self.model: Any = None
        self.optimizer: Any = None
        self.tracker: Any = None
        self._machine, self._recording = machine, ExitStack()
        self._peak: list[int] | None = None
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, args=(stack, setup), daemon=True)
        self._thread.start()
        self._wait()

    def __call__(self) -> None:
        self._go.release()
        self._wait()

    def peak_bytes(self) -> int:
        """The most that is held in one step: weights, optimizer and all else that is torch's."""
        state = [t for each in self.optimizer.state.values() for t in each.values() if isinstance(t, Tensor)]
        held = [*held_by(self.model), *(p.grad for p in self.model.parameters()), *state]
        if self.tracker is not None:
            held += [g for grads in self.tracker.validations.gradients.values() for g in grads]
        storages = [t.untyped_storage() for t in held if t is not None]
        self._peak = found = []
        self()
        self._peak = None
        return found[0] + sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def close(self) -> None:
        self._stopping = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _train(self, stack: Callable[[Setup, Turn], None], setup: Setup) -> None:
        try:
            stack(setup, self._turn)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._done.release()

    def _turn(self, model: nn.Module, optimizer: torch.optim.Optimizer, tracker: Any) -> None:
        self._recording.close()
        self.model, self.optimizer, self.tracker = model, optimizer, tracker
        self._done.release()
        self._go.acquire()
        if self._stopping:
            raise _Stopped
        if self._peak is not None:
            self._recording.enter_context(self._machine.recording(self._peak))


class _Stopped(BaseException):
    """Ends a stack's training from within."""
