"""What kernels share on the device: the addresses of a map, and which program finishes last.

Names in all kernels: `X_ptr` points to the first element of X; lower-case letters are indices of a tile (`n` samples,
`c` channels, `p` pixels, `j` hidden units, `o` gates); `X_at` are element offsets into X and `X_inside` is their mask
(plain `at` and `inside` where there is only one); upper-case names are compile-time sizes (`C`, `HW`), tiles
(`BLOCK_C`) and switches. A sample's first element is found in 64 bits, what lies within a sample in 32.
"""

import triton
import triton.language as tl


@triton.jit
def map_offsets(c, p, C: tl.constexpr, HW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Element offsets within one sample of channels c [BC] and pixels p [BP], as [BC, BP]."""
    if CHANNELS_LAST:
        return p[None, :] * C + c[:, None]
    return c[:, None] * HW + p[None, :]


@triton.jit
def last_to_finish(counter_ptr, programs):
    """Whether all other programs of the launch have finished their stores; makes the counter 0 again if so.

    What they stored is to be loaded with `cache_modifier=".cg"`, past this multiprocessor's L1.
    """
    # every thread's store before the count: Triton up to 3.8 does not order them by itself
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
