"""Device functions shared by the kernels: offsets within a feature map, and detection of the last program to finish.

Names in all kernels: `X_ptr` points to the first element of X; lower-case letters are indices of a tile (`n` samples,
`c` channels, `p` pixels, `j` hidden units, `o` gates); `X_at` are element offsets into X and `X_inside` is their mask
(plain `at` and `inside` if there is only one); upper-case names are compile-time sizes (`C`, `HW`), tiles (`BLOCK_C`)
and switches. Offsets of samples are 64-bit, offsets within a sample 32-bit.
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
    """Whether all other programs of the launch have finished their stores; if so, resets the counter to 0.

    Load their results with `cache_modifier=".cg"`, which bypasses this multiprocessor's L1.
    """
    # orders every thread's stores before the count, which Triton up to 3.8 does not do by itself
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
