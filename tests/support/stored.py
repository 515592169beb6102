"""A case of ``sparse_linear`` as one of ``quantized_linear``, and weights under scales of all kinds."""

import torch

from larosa_fx.kernels.quantization import dequantize, quantize


def quantized_case(args, bits, group, adapter_group=None):
    """(the op's arguments but ``early``, those of ``sparse_linear`` over what is stored, in float64)."""
    x, k, weight, bias, residual, eps, gate, _, gain, *threshold = args
    channels = x.shape[-1]
    own = quantize(weight[:channels], bits, group, x.dtype)
    adapter = quantize(weight[channels:], 8, adapter_group or group, x.dtype) if len(weight) > channels else (None, None)
    exact = [exact_of(*part) for part in (own, adapter) if part[0] is not None]
    quantized = x, k, *own, *adapter, bias, residual, eps, gate, gain, *(threshold or [None])
    return quantized, (x, k, torch.cat(exact), bias, residual, eps, gate, False, gain, *threshold)


def exact_of(weight, scales):
    return dequantize(weight, scales.double())


def every_scale(bits, dtype):
    """(weight, scales): every stored number under scales of all magnitudes, denormals, Inf and NaN too."""
    if dtype == torch.float32:
        scales = torch.arange(-(2**31), 2**31, 1500450).int().view(dtype)
    else:
        scales = torch.arange(-(2**15), 2**15, 23).short().view(dtype)
    numbers = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    if bits == 4:
        scales = torch.stack([scales, scales.flip(0).roll(1)], -1)
    return numbers.view(torch.int8 if bits == 8 else torch.uint8), scales[:, None]
