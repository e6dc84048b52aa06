"""GGUF's blocks: a weight matrix [O, I] as its file keeps it, each row in blocks of bytes that hold their own scales.

    format        weights  bytes  a block's bytes                                a weight
    "Q8_0"        32       34     d f16; 32 int8                                 d * q
    "Q4_0"        32       18     d f16; 16 bytes of nibbles                     d * (q - 8)
    "gguf_mxfp4"  32       17     e uint8; 16 bytes of nibbles                   2^(e - 127) * e2m1(q)
    "Q4_K"        256      144    d, m f16; 8 scales and 8 minima of 6 bits,     d * scale * q - m * minimum
                                  in 12 bytes; 128 bytes of nibbles
    "Q5_K"        256      176    as Q4_K, with 32 bytes of fifth bits           the same
                                  before the nibbles
    "Q6_K"        256      210    128 bytes of nibbles; 64 bytes of two more     d * scale * (q - 32)
                                  bits; 16 int8 scales; d f16

A scale serves 32 weights ("Q6_K": 16). Nibbles are the low halves of 16 (K: 32) bytes, then the high ones.
"gguf_mxfp4" is GGUF's MXFP4, with the exponent beside its numbers; "mxfp4" keeps the two in tensors of their own.
Plain torch, any device. `dequantize_blocks` gives what the gguf package gives, to the bit.
Source: ggml's block structures, https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = {  # weights and bytes of a block
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "gguf_mxfp4": (32, 17),
}
_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)  # e2m1, twice as large
_HALF_MOST, _HALF_LEAST = 65504.0, 2.0**-20  # fp16 holds what is between the two to one part in 32
_STEPS = {"Q8_0": 127, "Q4_0": 8, "Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 128}  # d in a block's largest weight
_CHUNK = 1 << 18  # weights quantised together


def dequantize_blocks(data: Tensor, format: str) -> Tensor:
    """fp32 weights [..., I] of rows of blocks, uint8 [..., bytes of a row]."""
    weights, size = BLOCKS[format]
    w = _READ[format](data.reshape(-1, size))
    return w.reshape(*data.shape[:-1], data.shape[-1] // size * weights)


def quantize_blocks(w: Tensor, format: str) -> Tensor:
    """uint8 [..., bytes of a row] from fp32 weights [..., I], I a multiple of the block's. Raises ValueError where a
    scale is too large for fp16, or all are too small."""
    weights, size = BLOCKS[format]
    if w.is_meta:
        return w.new_empty(*w.shape[:-1], w.shape[-1] // weights * size, dtype=torch.uint8)
    if format in _STEPS:
        least, largest = _HALF_LEAST * _STEPS[format], w.abs().amax().item()
        if torch.finfo(torch.float32).tiny <= largest < least:
            rule = f"w must have a weight of at least {least:.1e} for the fp16 scales of {format!r}"
            raise ValueError(f"quantize: {rule}, got a largest of {largest:.1e}")
    blocks = torch.cat([_WRITE[format](part) for part in w.reshape(-1, weights).split(_CHUNK // weights)])
    return blocks.reshape(*w.shape[:-1], w.shape[-1] // weights * size)


# ---- from bytes to weights ------------------------------------------------------------------------------------------


def _halves(b: Tensor) -> Tensor:
    """fp32 [n, bytes / 2] from those of fp16 [n, bytes]."""
    return b.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _nibbles(b: Tensor, at_once: int) -> Tensor:
    """[n, 2 * bytes]: of every `at_once` bytes the low halves, then the high ones."""
    b = b.reshape(len(b), -1, 1, at_once)
    return torch.cat((b & 15, b >> 4), 2).reshape(len(b), -1)


def _read_q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _halves(b[:, :2])


def _read_q4_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * (_nibbles(b[:, 2:], 16).float() - 8)


def _half_powers(e: Tensor) -> Tensor:
    """2^(e - 128); 255 is no NaN here."""
    e = e.int()
    return torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23).view(torch.float32)


def _read_mxfp4(b: Tensor) -> Tensor:
    table = torch.tensor([*_DOUBLED, *(-v for v in _DOUBLED)], dtype=torch.float32, device=b.device)
    return _half_powers(b[:, :1]) * table[_nibbles(b[:, 1:], 16).int()]


def _six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima in 12 bytes: of the first four of each, 6 bits of a byte; of the last four, the low
    half or the high half of a byte and the two bits that the first four leave free."""
    first, second, third = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | (first >> 2 & 48)), 1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 2 & 48)), 1)
    return scales, minima


def _read_q4_k(b: Tensor) -> Tensor:
    return _with_minima(b, _nibbles(b[:, 16:], 32))


def _read_q5_k(b: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=b.device).view(8, 1)
    fifth = (b[:, 16:48].unsqueeze(1) >> places & 1).flatten(1)
    return _with_minima(b, _nibbles(b[:, 48:], 32) | fifth << 4)


def _with_minima(b: Tensor, q: Tensor) -> Tensor:
    d = _halves(b[:, :4])
    scales, minima = _six_bits(b[:, 4:16])
    by, less = (d[:, i : i + 1] * t.float() for i, t in enumerate((scales, minima)))
    return (by.unsqueeze(2) * q.view(-1, 8, 32).float() - less.unsqueeze(2)).flatten(1)


def _read_q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128], 64)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=b.device).view(4, 1)
    high = (b[:, 128:192].view(-1, 2, 1, 32) >> places & 3).flatten(1)
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    q = (low | high << 4).float() - 32
    return ((_halves(b[:, 208:]) * scales).unsqueeze(2) * q.view(-1, 16, 16)).flatten(1)


_READ = {
    "Q8_0": _read_q8_0,
    "Q4_0": _read_q4_0,
    "Q4_K": _read_q4_k,
    "Q5_K": _read_q5_k,
    "Q6_K": _read_q6_k,
    "gguf_mxfp4": _read_mxfp4,
}


# ---- from weights to bytes ------------------------------------------------------------------------------------------


def _half_bytes(d: Tensor) -> Tensor:
    """The bytes [n, 2] of scales d [n, 1]."""
    most = d.abs().amax().item()
    if most > _HALF_MOST:
        raise ValueError(f"quantize: w must have weights whose scales fp16 can hold, got a scale of {most:.1e}")
    return d.half().view(torch.uint8)


def _reciprocal(d: Tensor) -> Tensor:
    """1 / d; 0 where there is none."""
    r = 1 / d
    return torch.where(r.isfinite(), r, 0.0)


def _two_in_a_byte(q: Tensor, at_once: int) -> Tensor:
    """The inverse of _nibbles."""
    low, high = q.to(torch.uint8).view(len(q), -1, 2, at_once).unbind(2)
    return (low | high << 4).flatten(1)


def _write_q8_0(x: Tensor) -> Tensor:
    largest = x.abs().amax(1, keepdim=True)
    d = largest / 127
    t = x * _reciprocal(d)
    q = t.sign() * (t.abs() + 0.5).floor()  # halves away from zero
    return torch.cat((_half_bytes(d), q.to(torch.int8).view(torch.uint8)), 1)


def _write_q4_0(x: Tensor) -> Tensor:
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))  # with its sign, which gets the code -8
    d = largest / -8
    q = (x * _reciprocal(d) + 8.5).trunc().clamp(0, 15)
    return torch.cat((_half_bytes(d), _two_in_a_byte(q, 16)), 1)


def _write_mxfp4(x: Tensor) -> Tensor:
    largest = x.abs().amax(1, keepdim=True)
    e = torch.where(largest > 0, largest.log2().floor() + 125, 0.0).clamp(0, 254).to(torch.uint8)
    between = torch.tensor([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0], device=x.device)
    code = torch.bucketize(x.abs() / _half_powers(e), between)  # of two equally near, the smaller
    q = torch.where((x < 0) & (code > 0), code + 8, code)
    return torch.cat((e, _two_in_a_byte(q, 16)), 1)


def _write_k(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Codes 0 .. most [n, 256] and the 16 bytes of d, m, scales and minima."""
    parts = x.view(-1, 8, 32)
    scale, minimum = _fit(parts, most)
    d, m = (t.amax(1, keepdim=True) / 63 for t in (scale, minimum))
    whole, less = ((t * _reciprocal(u)).round().clamp(0, 63) for t, u in ((scale, d), (minimum, m)))
    q = _codes(parts, whole, less, d, m, most)
    d, m = _refit(parts, whole, less, q, d, m)
    q = _codes(parts, whole, less, d, m, most)
    scales, minima = whole.to(torch.uint8), less.to(torch.uint8)
    packed = (
        scales[:, :4] | (scales[:, 4:] >> 4) << 6,
        minima[:, :4] | (minima[:, 4:] >> 4) << 6,
        (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4,
    )
    return q.flatten(1), torch.cat((_half_bytes(d), _half_bytes(m), *packed), 1)


def _codes(parts: Tensor, scales: Tensor, minima: Tensor, d: Tensor, m: Tensor, most: int) -> Tensor:
    """The nearest codes [n, 8, 32] once scales and minima [n, 8] are whole numbers, and d and m [n, 1] are in fp16."""
    by, less = (d.half().float() * scales).unsqueeze(2), (m.half().float() * minima).unsqueeze(2)
    return ((parts + less) * _reciprocal(by)).round().clamp(0, most)


def _refit(parts: Tensor, scales: Tensor, minima: Tensor, q: Tensor, d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """d and m [n, 1] anew, by least squares over a block, for given codes: rounding to whole scales moved the best."""
    a = scales.unsqueeze(2) * q
    aa, bb = a.square().sum((1, 2)), 32 * minima.square().sum(1)
    ab = (a.sum(2) * minima).sum(1)
    ax, bx = (a * parts).sum((1, 2)), (parts.sum(2) * minima).sum(1)
    of = aa * bb - ab * ab
    both = of > 1e-6 * aa * bb  # else minima are zero, or do nothing that scales do not
    new_d = torch.where(both, (ax * bb - bx * ab) * _reciprocal(of), ax * _reciprocal(aa)).unsqueeze(1)
    new_m = torch.where(both, (ax * ab - bx * aa) * _reciprocal(of), 0.0).unsqueeze(1)
    good = (new_d > 0) & (new_m >= 0) & (both.unsqueeze(1) | (m == 0))
    return torch.where(good, new_d, d), torch.where(good, new_m, m)


def _fit(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """scale >= 0 and minimum >= 0 [n, 8] for which scale * q - minimum is nearest to x [n, 8, 32] in least squares, q
    being rounded to 0 .. most: the best of several ways to round, each with the line that then fits best."""
    low, high = x.amin(2, keepdim=True).clamp(max=0), x.amax(2, keepdim=True)
    span = (high - low).clamp(min=0)
    n, sum_x = x.shape[2], x.sum(2, keepdim=True)
    best_scale, best_less = span / most, -low
    best = None
    for steps in torch.arange(-1.0, 1.05, 0.1).tolist():
        q = ((x - low) * ((most + steps) * _reciprocal(span))).round().clamp(0, most)
        sum_q, sum_qq, sum_qx = q.sum(2, keepdim=True), (q * q).sum(2, keepdim=True), (q * x).sum(2, keepdim=True)
        of = n * sum_qq - sum_q * sum_q
        scale = (n * sum_qx - sum_q * sum_x) * _reciprocal(of)
        less = (scale * sum_q - sum_x) / n
        through = less < 0  # no minimum above zero can be written: the line goes through zero
        scale = torch.where(through, sum_qx * _reciprocal(sum_qq), scale).clamp(min=0)
        less = less.clamp(min=0)
        error = (scale * q - less - x).square().sum(2, keepdim=True)
        if best is None:
            better = torch.ones_like(error, dtype=torch.bool)
            best = error
        else:
            better = error < best
            best = torch.where(better, error, best)
        best_scale, best_less = torch.where(better, scale, best_scale), torch.where(better, less, best_less)
    return best_scale.squeeze(2), best_less.squeeze(2)


def _write_q4_k(x: Tensor) -> Tensor:
    q, head = _write_k(x, 15)
    return torch.cat((head, _two_in_a_byte(q, 32)), 1)


def _write_q5_k(x: Tensor) -> Tensor:
    q, head = _write_k(x, 31)
    codes = q.to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=x.device).view(8, 1)
    fifth = ((codes.view(-1, 8, 32) >> 4) << places).sum(1, dtype=torch.uint8)
    return torch.cat((head, fifth, _two_in_a_byte(codes & 15, 32)), 1)


def _write_q6_k(x: Tensor) -> Tensor:
    parts = x.view(-1, 16, 16)
    scale = _fit_even(parts)
    at = scale.abs().argmax(1, keepdim=True)
    d = scale.gather(1, at) / -128
    scales = (scale * _reciprocal(d)).round().clamp(-128, 127)
    by = (d.half().float() * scales).unsqueeze(2)
    q = (parts * _reciprocal(by)).round().clamp(-32, 31)
    a = scales.unsqueeze(2) * q
    better = (a * parts).sum((1, 2)) * _reciprocal(a.square().sum((1, 2)))  # d anew, for these codes
    d = torch.where(better != 0, better, d.squeeze(1)).unsqueeze(1)
    q = ((parts * _reciprocal((d.half().float() * scales).unsqueeze(2))).round().clamp(-32, 31) + 32).to(torch.uint8)
    q = q.flatten(1)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=x.device).view(4, 1)
    high = ((q.view(-1, 2, 4, 32) >> 4) << places).sum(2, dtype=torch.uint8).flatten(1)
    return torch.cat((_two_in_a_byte(q & 15, 64), high, scales.to(torch.int8).view(torch.uint8), _half_bytes(d)), 1)


def _fit_even(x: Tensor) -> Tensor:
    """The scale [n, 16], of any sign, for which scale * q is nearest to x [n, 16, 16] in least squares, q being rounded
    to -32 .. 31: the best of several ways to round."""
    largest = x.gather(2, x.abs().argmax(2, keepdim=True))
    best, found = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    for steps in torch.arange(-0.9, 0.95, 0.1).tolist():
        q = (x * (-(32 + steps) * _reciprocal(largest))).round().clamp(-32, 31)
        qx, qq = (q * x).sum(2, keepdim=True), (q * q).sum(2, keepdim=True)
        gain = qx * qx * _reciprocal(qq)  # by how much the scale qx / qq lowers the error of zero
        found = torch.where(gain > best, qx * _reciprocal(qq), found)
        best = torch.maximum(gain, best)
    return found.squeeze(2)


_WRITE = {
    "Q8_0": _write_q8_0,
    "Q4_0": _write_q4_0,
    "Q4_K": _write_q4_k,
    "Q5_K": _write_q5_k,
    "Q6_K": _write_q6_k,
    "gguf_mxfp4": _write_mxfp4,
}
