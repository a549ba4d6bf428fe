"""Functions of one number that the row kernels share, from exp2 alone, for NVIDIA and AMD alike.

``z`` is a logit after scale and softcap, ``raw`` before.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Few of these: Triton compares each with its first value at every launch, half a microsecond each.
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
# Under the interpreter a cast to bf16 truncates (Triton 3.6, 3.7); there it is rounded by hand.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def transform(raw, option):
    """``z`` and ``dz/draw`` for the numbers of ``LogitOptions``, None where one does nothing."""
    if option.softcap is None:
        if option.logit_scale is None:
            return raw, 1.0
        else:
            return raw * option.logit_scale, option.logit_scale
    else:
        squashed, slope = tanh(raw * (option.logit_scale / option.softcap))
        return option.softcap * squashed, option.logit_scale * slope


@triton.jit
def tanh(x):
    """The hyperbolic tangent and its derivative, from one exponential of a negative number."""
    size = tl.abs(x)
    e = exp(-2.0 * size)
    inverse = 1.0 / (1.0 + e)
    far = (1.0 - e) * inverse
    # 1 - e cancels near 0: there an odd polynomial, relative error below 2**-22 (Cephes, tanhf).
    small = tl.minimum(size, 1.0)
    square = small * small
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x * (square * series + 1.0)
    value = tl.where(size < 0.625, near, tl.where(x < 0, -far, far))
    return value, 4.0 * e * inverse * inverse


@triton.jit
def one_minus_exp(x):
    """``1 - exp(x)`` for x <= 0: Taylor near 0, where the difference cancels. One number a row."""
    series = x / 40320.0 + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(x > -0.5, -series * x, 1.0 - exp(x))


@triton.jit
def exp(x):
    """``exp(x)``, 0 below 2**-126: keeping those costs ``tl.exp`` three more instructions."""
    return tl.exp2(x * 1.4426950408889634)  # log2(e)


@triton.jit
def at_most_zero(x):
    """``min(x, 0)``, but a NaN stays NaN."""
    return tl.where(x > 0, 0.0, x)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return x.to(DTYPE)
