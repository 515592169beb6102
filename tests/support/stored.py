"""A case of ``sparse_linear`` as one of ``quantized_linear``."""

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
