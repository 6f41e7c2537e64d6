"""A CUDA device for machines that have none, made of the host's memory: what is written for a GPU runs there, slowly.

    PYTHONPATH=tests pytest -p simulated_gpu -m gpu tests/test_tracker_gpu.py

Tensors of the device are real ones, with memory and a place in autograd. Operators come to `_run`, which shows their
arguments to the CPU's kernel as tensors of the CPU, in the same memory. As on a GPU, tensors of two devices do not mix;
under `torch.cuda.set_sync_debug_mode("error")` reads, copies and `WAITS`, which wait for a device, are errors; and a
Triton kernel, interpreted here, takes no tensor of the host. Fresh memory is NaN. Streams are one, and done with at
once; but what is copied to pinned memory arrives there when something waits for it, or the GPU takes it back. Random
numbers are the CPU's; compilers have no code for it. Torch must be a build for the CPU alone.

Must be imported before torch, which asks for its devices once: as a pytest plugin, by `-p`.
"""

# ruff: noqa: E402
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"


def _built() -> Path:
    """The library beside this file, compiled for this torch."""
    source = Path(__file__).with_suffix(".cpp")
    name = f"inrun_simulated_gpu-{metadata.version('torch')}-{source.stat().st_mtime_ns}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.origin is not None
        torch_at = Path(spec.origin).parent
        made = library.with_suffix(f".{os.getpid()}")
        headers = [f"-I{torch_at}/include", f"-I{torch_at}/include/torch/csrc/api/include"]
        libraries = [f"-L{torch_at}/lib", f"-Wl,-rpath,{torch_at}/lib", "-lc10", "-ltorch_cpu"]
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", *headers, str(source), *libraries]
        subprocess.run([*command, "-o", str(made)], check=True)
        made.replace(library)
    return library


assert "torch" not in sys.modules, "expected the simulated GPU before torch"
ctypes.CDLL(str(_built()))

import torch
from torch import Tensor

gpu = torch.ops.inrun_simulated_gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
MIXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # take indices of the host as well
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")
WAITS = {f"aten::{name}" for name in (*WAITS, "unique_consecutive", "repeat_interleave", "bincount", "histc")}
debug_mode = "default"
_late: list[tuple[Tensor, Any]] = []  # what is on its way to the host: where to, and the storage that it comes from


def _arrive() -> None:
    while _late:
        there, sent = _late.pop(0)
        there.untyped_storage().copy_(sent)


def _send(there: Tensor) -> None:
    """What a copy has put there is on its way still; until it arrives all of its bits are set: NaN, or -1, or true."""
    memory = there.untyped_storage()
    _late.append((there, memory.clone()))
    torch.empty(0, dtype=torch.uint8).set_(memory, 0, (memory.nbytes(),), (1,)).fill_(0xFF)


def _wait(what: str) -> None:
    _arrive()
    if debug_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator with a tensor or the device of the GPU among its arguments."""
    name, schema = op._schema.name, op._schema.arguments
    args = tuple(
        torch.tensor(x, dtype=torch.float64 if type(x) is float else None)
        if type(x) in (int, float) and str(a.type) == "Tensor"
        else x
        for x, a in zip(args, schema, strict=False)
    )
    if name == "aten::set_":
        return _set(*args)
    if op in (torch.ops.aten.mm.dtype, torch.ops.aten.bmm.dtype):  # of a GPU alone
        return op.overloadpacket(*(x.to(args[2]) for x in args[:2]))
    if name in _CELLS:
        return _CELLS[name](*args)
    if name == "aten::histc" and not args[0].is_floating_point():  # of a GPU alone
        return op(args[0].float(), *args[1:]).to(args[0].dtype)
    leaves = list(_leaves((args, kwargs)))
    ours = [x for x in leaves if isinstance(x, Tensor) and x.is_cuda]
    if any(isinstance(x, Tensor) and x.is_cpu for x in leaves):
        _arrive()
    to = kwargs.get("device")
    if name in COPIES:
        kinds = {x.device.type for x in leaves if isinstance(x, Tensor)} | ({to.type} if to is not None else set())
        if len(kinds) > 1 and not any(x is True for x in leaves):  # non_blocking
            _wait(f"{name} between devices")
    elif name not in MIXED and ours and any(isinstance(x, Tensor) and not x.is_cuda and x.dim() for x in leaves):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda and cpu")
    by_mask = name in MIXED and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in _leaves(args[1]))
    if by_mask or (name in WAITS and not (name == "aten::repeat_interleave" and "output_size" in kwargs)):
        _wait(name)
    shown = {id(x): _shown(x, whole=name == "aten::resize_") for x in ours}
    args, kwargs = _changed((args, kwargs), lambda x: shown.get(id(x), CPU if isinstance(x, torch.device) else x))
    kwargs.pop("pin_memory", None)
    with torch._C._AutoDispatchBelowAutograd():
        result = op(*args, **kwargs)
    if name == "aten::copy_" and leaves[0].is_cpu and any(x is True for x in leaves):  # non_blocking
        _send(leaves[0])
    for x in ours:  # an operator may have given its output another size
        seen = shown[id(x)]
        if seen.untyped_storage().nbytes() > x.untyped_storage().nbytes():
            gpu.set_storage(x, gpu.to_gpu(seen).untyped_storage())
        if seen.shape != x.shape or seen.stride() != x.stride():
            gpu.reshape(x, seen.shape, seen.stride(), seen.storage_offset())
    stays = to.type == "cuda" if to is not None and (name == "aten::_to_copy" or not ours) else bool(ours)
    if not stays or name == "aten::_local_scalar_dense":
        return result
    memory = {shown[id(x)].untyped_storage()._cdata: x for x in ours}

    def of_gpu(y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        if (same := next((x for x in ours if shown[id(x)] is y), None)) is not None:
            return same
        base = memory.get(y.untyped_storage()._cdata)
        return gpu.to_gpu(y) if base is None else gpu.within(base, y)

    return _changed(result, of_gpu)


def _lstm_cell(inner: Tensor, hidden: Tensor, c: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As a GPU has it where cuDNN is not: of derivatives the backward alone."""
    i, f, g, o = sum((b for b in biases if b is not None), inner + hidden).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    return o * (f * c + i * g).tanh(), f * c + i * g, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(hy: Any, cy: Any, c: Tensor, new: Tensor, gates: Tensor, has_bias: bool) -> tuple:
    (i, f, g, o), t = gates.chunk(4, 1), new.tanh()
    of_new = (0 if hy is None else hy * o * (1 - t * t)) + (0 if cy is None else cy)
    of_o = torch.zeros_like(o) if hy is None else hy * t * o * (1 - o)
    of_gates = torch.cat([of_new * g * i * (1 - i), of_new * c * f * (1 - f), of_new * i * (1 - g * g), of_o], 1)
    return of_gates, of_new * f, of_gates.sum(0) if has_bias else None


def _gru_cell(inner: Tensor, hidden: Tensor, h: Tensor, b: Any = None, hb: Any = None) -> tuple[Tensor, Tensor]:
    (r, z, n), (hr, hz, hn) = ((x if y is None else x + y).chunk(3, 1) for x, y in ((inner, b), (hidden, hb)))
    r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
    n = (n + r * hn).tanh()
    return n + z * (h - n), torch.cat([r, z, n, h, hn], 1)


def _gru_cell_backward(grad: Tensor, seen: Tensor, has_bias: bool) -> tuple:
    r, z, n, h, hn = seen.chunk(5, 1)
    of_n, of_z = grad * (1 - z) * (1 - n * n), grad * (h - n) * z * (1 - z)
    of_r = of_n * hn * r * (1 - r)
    inner, hidden = torch.cat([of_r, of_z, of_n], 1), torch.cat([of_r, of_z, of_n * r], 1)
    return inner, hidden, grad * z, *((x.sum(0) if has_bias else None) for x in (inner, hidden))


_CELLS = {
    "aten::_thnn_fused_lstm_cell": _lstm_cell,
    "aten::_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
    "aten::_thnn_fused_gru_cell": _gru_cell,
    "aten::_thnn_fused_gru_cell_backward": _gru_cell_backward,
}


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _leaves(part)
    else:
        yield x


def _changed(x: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(x, dict):
        return {key: _changed(part, change) for key, part in x.items()}
    return type(x)(_changed(part, change) for part in x) if isinstance(x, (list, tuple)) else change(x)


def _shown(x: Tensor, whole: bool) -> Tensor:
    """A tensor of the GPU as the CPU sees it; with `whole`, or empty, in memory that can grow."""
    if x.untyped_storage().nbytes() and not whole:
        return gpu.to_cpu(x)
    with torch._C._AutoDispatchBelowAutograd():
        elements = x.untyped_storage().nbytes() // x.element_size()
        copy = torch.empty(elements, dtype=x.dtype)
        if elements:
            copy.copy_(gpu.to_cpu(x).as_strided((elements,), (1,), 0))
    gpu.reshape(copy, x.shape, x.stride(), x.storage_offset())
    return copy


def _set(x: Tensor, source: Any = None, offset: int = 0, size: Any = None, stride: Any = None) -> Tensor:
    if source is None:
        source = torch.empty(0, dtype=x.dtype, device=GPU)
    if isinstance(source, Tensor):
        offset, size, stride = source.storage_offset(), source.shape, source.stride()
        source = source.untyped_storage()
    size = (source.nbytes() // x.element_size(),) if size is None else size
    if not stride:
        stride = [math.prod(size[i + 1 :]) for i in range(len(size))]
    gpu.set_storage(x, source)
    gpu.reshape(x, list(size), list(stride), offset)
    return x


_LIBRARIES = [torch.library.Library("_", "IMPL", "CUDA"), torch.library.Library("aten", "IMPL", "CUDA")]
_LIBRARIES[0].fallback(_run, "CUDA")
for _op in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):  # torch has these for all devices together
    _LIBRARIES[1].impl(_op, lambda *args, _op=_op, **kwargs: _run(_op, *args, **kwargs))
_LIBRARIES[1].impl(
    "_efficientzerotensor",
    lambda size, dtype=None, layout=None, device=None, pin_memory=None: torch.zeros(size, dtype=dtype, device=device),
)


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        _arrive()
        return True

    def synchronize(self) -> None:
        _wait("Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _set_debug_mode(mode: str) -> None:
    global debug_mode
    debug_mode = mode


_cpu_clone = torch.UntypedStorage.clone


def _clone(storage: Any) -> Any:
    if storage.device.type != "cuda":
        return _cpu_clone(storage)
    flat = torch.empty(0, dtype=torch.uint8, device=GPU).set_(storage, 0, (storage.nbytes(),), (1,))
    return flat.clone().untyped_storage()


def _for_interpreter(x: Any) -> Any:
    """A kernel's argument in the memory that it is in."""
    if isinstance(x, tuple):
        return tuple(map(_for_interpreter, x))
    if isinstance(x, TensorDescriptor):
        return TensorDescriptor(
            _for_interpreter(x.base), x.shape, x.strides, x.block_shape, x.padding, x.round_f32_to_tf32
        )
    if not isinstance(x, Tensor):
        return x
    if not x.is_cuda:
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    return gpu.to_cpu(x)


_H100 = SimpleNamespace(
    name="simulated", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
)
_STREAM = SimpleNamespace(device=GPU, cuda_stream=0, wait_stream=lambda s: None, wait_event=lambda e: None,
                          synchronize=lambda: _wait("Stream.synchronize"))  # fmt: skip
for _name, _value in {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "is_current_stream_capturing": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": type("device", (contextlib.nullcontext,), {}),
    "set_device": lambda device: None,
    "device_of": lambda tensor: contextlib.nullcontext(),
    "get_device_name": lambda device=None: _H100.name,
    "get_device_capability": lambda device=None: (_H100.major, _H100.minor),
    "get_device_properties": lambda device=None: _H100,
    "current_stream": lambda device=None: _STREAM,
    "Event": _Event,
    "_sleep": lambda cycles: None,
    "synchronize": lambda device=None: _wait("synchronize"),
    "set_sync_debug_mode": _set_debug_mode,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "get_rng_state_all": lambda: [torch.get_rng_state()],
    "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
}.items():
    setattr(torch.cuda, _name, _value)
torch.UntypedStorage.clone = _clone
Tensor.pin_memory = lambda self, device=None: self

torch.use_deterministic_algorithms(True, warn_only=True)  # by which torch fills fresh memory

from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (
    [_for_interpreter(x) for x in args],
    {name: _for_interpreter(x) for name, x in kwargs.items()},
)
interpreter.GridExecutor._restore_args_dev = lambda *args: None
