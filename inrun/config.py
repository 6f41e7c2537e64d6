"""What a training run is made of. Imports no torch, so that `inrun --help` is quick."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


def _require(config: Any, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)}")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model."""

    block_size: int = 256
    """Tokens per sample, and the model's longest context."""
    layers: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block; `width` must be a multiple of it."""
    width: int = 64
    """Size of the residual stream."""
    dropout: float = 0.0
    """Dropout on embeddings, attention and block outputs."""
    bias: bool = False
    """Give linear and layer-norm layers a bias."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    tied: bool = True
    """Share one weight between the token embedding and the output head."""

    def require_valid(self) -> None:
        """Raise `ValueError` for a setting out of its range."""
        for name in ("block_size", "layers", "heads", "width"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "width", self.width % self.heads == 0, f"a multiple of heads={self.heads}")
        _require(self, "dropout", 0 <= self.dropout < 1, "0 <= dropout < 1")


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on text while every training sample gets its In-Run Data Shapley value.

    Without arguments it trains on text this machine already holds, with corrupted and duplicated samples
    planted in it, and prints what the values found. On your own text, say which text is the target:

        inrun train --text books/ code.jsonl --validation chosen.txt
        inrun train --text corpus/ --holdout medicine --steps 5000 --out runs/medicine
        inrun train --resume --out runs/medicine

    A sample's value is > 0 where it lowered the validation loss, and is in nats. `--text` takes folders
    (each sub-folder is a source), text files and JSONL files ("text", optional "id" and "source").
    """

    text: tuple[Path, ...] = ()
    """Training text: folders, text files, JSONL files. Without it: the demo corpus."""
    validation: tuple[Path, ...] = ()
    """Validation text, in the same forms; what is in it is never trained on."""
    holdout: str | None = None
    """Instead of `validation`: hold out a part of this source."""
    holdout_fraction: float = 0.05
    """The part of `holdout` to hold out."""
    validation_samples: int = 16
    """Validation samples, drawn once; every step is valued against all of them."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; a token is a byte without it."""

    out: Path | None = None
    """Run folder. None: the next free runs/N (with --resume: the last one)."""
    resume: bool = False
    """Continue the run in `out`; its settings are kept and need not be repeated."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last two are kept."""

    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 16
    """Samples per optimizer step."""
    accumulation: int = 1
    """Forward and backward passes the samples of a step are spread over."""
    model: GPTConfig = GPTConfig()
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """What steps the weights; the values are those of its update, to first order."""
    lr: float = 2e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to a tenth of `lr` along a cosine, or constant."""
    warmup: int = 100
    """Steps of linear warm-up."""
    momentum: float = 0.0
    """Of sgd."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of adam and adamw."""
    weight_decay: float = 0.1
    """On matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    seed: int = 0
    """Seeds the initial weights, the data order and what is drawn or planted."""

    validate_every: int = 1
    """Steps between validation passes; in between, values use the last validation gradient."""
    measure_every: int = 10
    """Steps between measurements of what a batch did to the validation loss; 0 turns them off."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    bf16: bool | None = None
    """Run the model under bfloat16 autocast. None: on a GPU only."""
    compile: bool = False
    """torch.compile the model."""

    def require_valid(self) -> None:
        """Raise `ValueError` for a setting out of its range, or text and validation text that do not fit."""
        self.model.require_valid()
        counts = ("steps", "batch_size", "accumulation", "validation_samples", "validate_every", "checkpoint_every")
        for name in counts:
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "warmup", "measure_every", "clip", "weight_decay", "momentum"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        _require(self, "lr", self.lr > 0, "more than 0")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "each at least 0 and less than 1")
        fits = self.accumulation <= self.batch_size
        _require(self, "accumulation", fits, f"at most batch_size={self.batch_size}")
        chosen = bool(self.validation) + (self.holdout is not None)
        if self.text and chosen != 1:
            raise ValueError("text: expected either --validation PATHS or --holdout SOURCE with it, got "
                             + ("both" if chosen else "neither"))  # fmt: skip
        if chosen and not self.text:
            raise ValueError("text: expected --text PATHS with --validation or --holdout, got none")

    def to_json(self) -> dict[str, Any]:
        """Every setting that decides the outcome, as JSON holds it (so without `out` and `resume`)."""
        settings = dataclasses.asdict(self)
        del settings["out"], settings["resume"]
        for name in ("text", "validation"):
            settings[name] = [str(path) for path in settings[name]]
        settings["tokenizer"] = None if self.tokenizer is None else str(self.tokenizer)
        return settings | {"betas": list(self.betas)}

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = dict(settings)
        for name in ("text", "validation"):
            fields[name] = tuple(Path(path) for path in fields[name])
        if fields["tokenizer"] is not None:
            fields["tokenizer"] = Path(fields["tokenizer"])
        return cls(**fields | {"betas": tuple(fields["betas"]), "model": GPTConfig(**fields["model"])})
