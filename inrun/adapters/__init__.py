"""inrun in the training stacks that people use: `huggingface` (its Trainer), `trl` (its trainers), `lightning`, and
`Loop` for loops one writes oneself, as with accelerate. Importing this package imports none of theirs."""

from .loggers import Logger, TensorBoard
from .loop import Loop

__all__ = ["Logger", "Loop", "TensorBoard"]
