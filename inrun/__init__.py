"""In-Run Data Shapley: what each training sample did to the validation loss, at every step of your own loop.

    tracker = inrun.track(model, optimizer)

`track` is the way in; `Ledger` reads what it wrote; `functional` holds the layers one at a time; the kernels alone
are `ghost_dot`, `ghost_wgrad_dot` and `ghost_dot_pairwise` (and the rest of `inrun_kernels`).
"""

from inrun_kernels import ghost_dot, ghost_dot_pairwise, ghost_wgrad_dot

from . import functional
from .errors import InRunError
from .ledger import Ledger
from .tracker import Tracker, track

__version__ = "0.1.0"

__all__ = [
    "InRunError",
    "Ledger",
    "Tracker",
    "functional",
    "ghost_dot",
    "ghost_dot_pairwise",
    "ghost_wgrad_dot",
    "track",
]
