"""The error of this library for what a single argument cannot explain."""


class InRunError(RuntimeError):
    """A training run, model or ledger is in a state in which a score would be wrong or lost.

    A wrong argument is a ``ValueError`` or a ``TypeError``; this is for what depends on what came before: a
    parameter that no rule covers, a validation pass that is missing, a step that was recorded already.
    """
