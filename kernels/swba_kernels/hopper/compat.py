"""What differs between Triton 3.6.0, 3.7.1 and 3.9.0 in Gluon, and the PTX instructions that Gluon has no name for.

The kernels take these names from here: everything else they use of Gluon is the same in all three versions.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = [
    "allow_dependents",
    "await_prerequisites",
    "box",
    "box_layout",
    "cta_barrier",
    "named_arrive",
    "named_sync",
    "tma_add",
    "tma_load",
    "tma_store",
    "view",
]

# 3.9 renamed the copies; 3.7 renamed the barrier of all threads (of a partition, inside warp_specialize).
tma_load: Any = tma.async_load if hasattr(tma, "async_load") else getattr(tma, "async_copy_global_to_shared")  # noqa: B009
tma_store: Any = tma.async_store if hasattr(tma, "async_store") else getattr(tma, "async_copy_shared_to_global")  # noqa: B009
cta_barrier: Any = gl.barrier if hasattr(gl, "barrier") else getattr(gl, "thread_barrier")  # noqa: B009


@builtin
def tma_add(desc, coord, src, _semantic=None):
    """Add a float32 box in shared memory to global memory; the copy engine does it (only 3.9 has a name for it)."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


def box_layout(rank: int, bits: int = 16) -> gl.NVMMASharedLayout:
    """Return the shared layout of a TMA box: rows of 128 bytes, swizzled as the tensor cores read them."""
    return gl.NVMMASharedLayout(128, bits, rank=rank)


if hasattr(gl.shared_memory_descriptor, "reinterpret"):  # 3.9 made it public

    @gluon.jit
    def view(buffer, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Return a buffer of shared memory under another shape and layout."""
        return buffer.reinterpret(buffer.dtype, SHAPE, LAYOUT)

else:

    @gluon.jit
    def view(buffer, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Return a buffer of shared memory under another shape and layout."""
        return buffer._reinterpret(buffer.dtype, SHAPE, LAYOUT)


@gluon.jit
def box(buffer, ROWS: gl.constexpr, D: gl.constexpr):
    """Return a 16-bit buffer [ROWS, D] as the box [1, 1, ROWS, D] that the 4-D descriptors copy."""
    return view(buffer, [1, 1, ROWS, D], gl.NVMMASharedLayout(128, 16, rank=4))


@gluon.constexpr_function
def _barrier_asm(op, index, threads):
    return f"{op} {index}, {threads}; mov.u32 $0, 0;"


@gluon.jit
def named_sync(INDEX: gl.constexpr, THREADS: gl.constexpr):
    """Wait at hardware barrier INDEX (0 to 15) until THREADS threads have come, arrivals included.

    Triton numbers its own barriers from 0 (one for each partition and two for warp specialisation): use 8 to 15.
    """
    ASM: gl.constexpr = _barrier_asm("bar.sync", INDEX, THREADS)
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def named_arrive(INDEX: gl.constexpr, THREADS: gl.constexpr):
    """Count this thread at hardware barrier INDEX without waiting."""
    ASM: gl.constexpr = _barrier_asm("bar.arrive", INDEX, THREADS)
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_prerequisites():
    """Wait until the kernels before this one in the stream have ended and their writes are visible.

    Needed before the first access to global memory in a kernel launched with `launch_pdl=True`.
    """
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def allow_dependents():
    """Let the next kernel of the stream, if launched with `launch_pdl=True`, start once all CTAs came here."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
