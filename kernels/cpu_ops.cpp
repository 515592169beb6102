// The ops of a decoding step, and what its weights are for a prompt, as torch's dispatcher calls them on a CPU, without
// Python: what is around a kernel takes two microseconds, where Python takes ten, and twice that between products that empty
// the caches.
//
// Plain cases alone are served here: contiguous tensors of one dtype whose shapes fit. Everything else, a wrong call and
// one that ran out of memory included, goes to the op of the same name in larosa_python, which says what is wrong.
//
// The kernels are a library of their own, which needs no torch headers and so any compiler builds it: cpu_kernels.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string_view>

#include "cpu_entries.h"

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeDouble = std::optional<double>;

constexpr int64_t MOST_ROWS = 16, MOST_CHANNELS = INT32_MAX, DIM = 64;  // MAX_ROWS, MAX_CHANNELS and _DIM in Python

// Read as one by threads that call while another binds.
const Entries none = {};
std::atomic<const Entries*> bound = &none;

// The op of the same name that Python serves.
template <class Function, class... Arguments>
Tensor in_python(Function*, const char* name, const Arguments&... arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
  return op.call(arguments...);
}

// As the kernels count them; -1 for others.
int64_t code_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? 0 : dtype == at::kHalf ? 1 : dtype == at::kFloat ? 2 : -1;
}

int64_t code_of(std::string_view gate) {
  constexpr std::string_view gates[] = {"", "silu", "gelu", "gelu_tanh", "relu"};
  for (int64_t code = 0; code < 5; code++)
    if (gate == gates[code]) return code;
  return -1;
}

bool is_plain(const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
  return tensor.scalar_type() == dtype && tensor.sizes() == shape && tensor.is_cpu() && tensor.is_contiguous();
}

bool is_plain(const MaybeTensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
  return !tensor || is_plain(*tensor, dtype, shape);
}

const void* data_of(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

at::DimVector with_last(at::IntArrayRef shape, int64_t last) {
  at::DimVector changed(shape.begin(), shape.end());
  changed.back() = last;
  return changed;
}

// What stands around a site's product.
struct Site {
  const Tensor& x;
  const int64_t k;
  const MaybeTensor &bias, &residual, &gain;
  const MaybeDouble &eps, &threshold;
  const int64_t gate;
  const int64_t dtype = code_of(x.scalar_type());
  const int64_t channels = x.dim() ? x.size(-1) : 0, rows = channels ? x.numel() / channels : 0;
  const double least = threshold.value_or(-1), norm = eps.value_or(-1);

  // Whether it is plain around a weight of so many columns and an adapter of so many rows, which the residual, of width
  // ``stream``, belongs to.
  bool fits(int64_t columns, int64_t adapted, int64_t stream) const {
    if (dtype < 0 || gate < 0 || rows < 1 || rows > MOST_ROWS || k < 1 || k > channels || columns < 1) return false;
    if (adapted < 0 || channels + adapted > MOST_CHANNELS || (adapted && !residual)) return false;
    if ((eps && !(norm >= 0)) || (threshold && !(least >= 0 && k == channels))) return false;
    if (gate && (adapted || columns % 2)) return false;
    const auto type = x.scalar_type();
    return is_plain(x, type, x.sizes()) && is_plain(bias, type, {columns}) && is_plain(gain, type, {channels}) &&
           is_plain(residual, type, with_last(x.sizes(), adapted ? stream : out(columns)));
  }

  int64_t out(int64_t columns) const { return gate ? columns / 2 : columns; }
  Tensor result(int64_t columns) const { return at::empty(with_last(x.sizes(), out(columns)), x.options()); }
};

Tensor sparse_linear(const Tensor& x, int64_t k, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                     MaybeDouble eps, std::string_view gate, bool early, const MaybeTensor& gain, MaybeDouble threshold) {
  const Entries& entries = *bound.load(std::memory_order_acquire);
  const Site site = {x, k, bias, residual, gain, eps, threshold, code_of(gate)};
  if (entries.linear && weight.dim() == 2 && is_plain(weight, x.scalar_type(), weight.sizes())) {
    const int64_t columns = weight.size(1), adapted = weight.size(0) - site.channels;
    if (site.fits(columns, adapted, adapted)) {
      Tensor out = site.result(columns);
      if (!entries.linear(x.const_data_ptr(), weight.const_data_ptr(), data_of(bias), data_of(residual), data_of(gain),
                          out.mutable_data_ptr(), site.rows, site.channels, adapted, columns, k, site.least, site.norm,
                          site.gate, site.dtype, at::get_num_threads()))
        return out;
    }
  }
  return in_python(sparse_linear, "larosa_python::sparse_linear", x, k, weight, bias, residual, eps, gate, early, gain,
                   threshold);
}

// Columns that share a scale, where a weight [rows, columns] of 8 or 4 bits and its scales are plain; else 0.
int64_t share_of(const Tensor& weight, const Tensor& scales, int64_t rows, int64_t columns, int64_t bits,
                 at::ScalarType type, int64_t fewest) {
  const int64_t groups = scales.dim() > 1 ? scales.size(1) : 0;
  if (!groups || columns % groups || columns / groups % fewest) return 0;
  const at::DimVector shape = bits == 4 ? at::DimVector{rows, groups, 2} : at::DimVector{rows, groups};
  const bool plain = is_plain(weight, bits == 4 ? at::kByte : at::kChar, {rows, columns * bits / 8}) &&
                     is_plain(scales, type, shape);
  return plain ? columns / groups : 0;
}

Tensor quantized_linear(const Tensor& x, int64_t k, const Tensor& weight, const Tensor& scales, const MaybeTensor& adapter,
                        const MaybeTensor& adapter_scales, const MaybeTensor& bias, const MaybeTensor& residual,
                        MaybeDouble eps, std::string_view gate, bool early, const MaybeTensor& gain,
                        MaybeDouble threshold, const MaybeTensor& chosen) {
  const Entries& entries = *bound.load(std::memory_order_acquire);
  const Site site = {x, k, bias, residual, gain, eps, threshold, code_of(gate)};
  const bool adapts = adapter && adapter_scales && adapter->dim() == 2 && adapter->size(0);
  const int64_t picked = chosen ? chosen->numel() : 0;
  const int64_t stream = adapts && residual && residual->dim() ? residual->size(-1) : 0;
  if (entries.quantized && weight.dim() == 2 && !adapter == !adapter_scales && adapts == adapter.has_value() &&
      (adapts || !chosen) && is_plain(chosen, at::kLong, {picked})) {
    const auto type = x.scalar_type();
    const int64_t bits = weight.scalar_type() == at::kByte ? 4 : 8, columns = weight.size(1) * 8 / bits;
    const int64_t adapted = adapts ? adapter->size(0) : 0;
    const int64_t share = share_of(weight, scales, site.channels, columns, bits, type, entries.fewest);
    const int64_t adapter_share =
        adapts ? share_of(*adapter, *adapter_scales, adapted, columns, 8, type, entries.fewest) : entries.fewest;
    const bool carries = !adapts || (stream > 0 && adapted - picked >= stream && adapted - picked <= 2 * stream);
    if (share && adapter_share && carries && site.out(columns) % entries.fewest == 0 &&
        site.fits(columns, adapted, stream)) {
      Tensor out = site.result(columns);
      if (!entries.quantized(x.const_data_ptr(), weight.const_data_ptr(), scales.const_data_ptr(), data_of(adapter),
                             data_of(adapter_scales), data_of(bias), data_of(residual), data_of(gain),
                             (const int64_t*)data_of(chosen), out.mutable_data_ptr(), site.rows, site.channels, adapted,
                             stream, picked, columns, bits, share, adapter_share, k, site.least, site.norm, site.gate,
                             site.dtype, at::get_num_threads()))
        return out;
    }
  }
  return in_python(quantized_linear, "larosa_python::quantized_linear", x, k, weight, scales, adapter, adapter_scales, bias,
                   residual, eps, gate, early, gain, threshold, chosen);
}

Tensor dequantized(const Tensor& weight, const Tensor& scales) {
  const Entries& entries = *bound.load(std::memory_order_acquire);
  const auto type = scales.scalar_type();
  const int64_t dtype = code_of(type);
  if (entries.dequantized && dtype >= 0 && weight.dim() == 2) {
    const int64_t bits = weight.scalar_type() == at::kByte ? 4 : 8, rows = weight.size(0);
    const int64_t columns = weight.size(1) * 8 / bits;
    if (const int64_t share = share_of(weight, scales, rows, columns, bits, type, entries.fewest)) {
      Tensor out = at::empty({rows, columns}, scales.options());
      entries.dequantized(weight.const_data_ptr(), scales.const_data_ptr(), out.mutable_data_ptr(), rows, columns, bits,
                          share, dtype, at::get_num_threads());
      return out;
    }
  }
  return in_python(dequantized, "larosa_python::dequantized", weight, scales);
}

// Of one new token a sequence, q [B, H, 1, d]. More are Python's, which lays them out anew.
Tensor decode_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const MaybeTensor& mask, double scale,
                        const MaybeTensor& k, const MaybeTensor& v, const MaybeTensor& position, const MaybeTensor& cosine,
                        const MaybeTensor& sine) {
  const Entries& entries = *bound.load(std::memory_order_acquire);
  const auto type = q.scalar_type();
  const int64_t dtype = code_of(type);
  if (entries.attention && dtype >= 0 && q.is_cpu() && q.numel() && q.dim() == 4 && q.size(2) == 1 && keys.dim() == 4) {
    const int64_t batch = q.size(0), heads = q.size(1), dim = q.size(3), shared = keys.size(1), length = keys.size(2);
    // A mask, or an embedding, of one row serves all sequences.
    const int64_t masks = mask && mask->dim() ? mask->size(0) : 1, turns = cosine && cosine->dim() ? cosine->size(0) : 1;
    const MaybeTensor new_key = k ? MaybeTensor(k->contiguous()) : k, new_value = v ? MaybeTensor(v->contiguous()) : v;
    const bool whole = dim % DIM == 0 && shared > 0 && heads % shared == 0 && 0 < length && length <= MOST_CHANNELS &&
                       (masks == 1 || masks == batch) && (turns == 1 || turns == batch);
    const bool together = !k == !v && !k == !position && !cosine == !sine && (!cosine || k);
    if (whole && together && is_plain(keys, type, {batch, shared, length, dim}) &&
        is_plain(values, type, keys.sizes()) && is_plain(mask, at::kBool, {masks, 1, 1, length}) &&
        is_plain(new_key, type, {batch, shared, 1, dim}) && is_plain(new_value, type, {batch, shared, 1, dim}) &&
        is_plain(cosine, type, {turns, 1, 1, dim}) && is_plain(sine, type, {turns, 1, 1, dim}) &&
        (!position || (position->dim() < 2 && position->numel() == 1 && is_plain(*position, at::kLong, position->sizes())))) {
      const Tensor query = q.contiguous();
      Tensor out = at::empty(q.sizes(), q.options());
      if (!entries.attention(query.const_data_ptr(), keys.mutable_data_ptr(), values.mutable_data_ptr(), data_of(mask),
                             data_of(new_key), data_of(new_value), (const int64_t*)data_of(position), data_of(cosine),
                             data_of(sine), out.mutable_data_ptr(), batch, shared, heads / shared, 1, length, dim,
                             masks == 1 ? 0 : length, turns == 1 ? 0 : dim, scale, dtype, at::get_num_threads()))
        return out;
    }
  }
  return in_python(decode_attention, "larosa_python::decode_attention", q, keys, values, mask, scale, k, v, position,
                   cosine, sine);
}

}  // namespace

// What the ops call from now on; null for nothing, so that Python serves them.
extern "C" void larosa_bind(const Entries* given) { bound = given ? given : &none; }

TORCH_LIBRARY_IMPL(larosa, CPU, ops) {
  ops.impl("sparse_linear", sparse_linear);
  ops.impl("quantized_linear", quantized_linear);
  ops.impl("dequantized", dequantized);
  ops.impl("decode_attention", decode_attention);
}
