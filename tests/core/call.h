// SPDX-License-Identifier: BSD-3-Clause
//
// One call of the torch-free core, drawn from a string of bytes: shapes, strides, broadcasts, types and which arguments and
// gradients there are. What describe.cpp promises the kernels holds here too: a stride of 0 for every dimension of size 1,
// unit stride in the rows of everything but gate, bias and mask, and batch dimensions with a bias first.
#pragma once

#include <memory>
#include <vector>

#include "../../csrc/cpu/schedule.h"
#include "memory.h"

namespace core_test {

using torch_gated_attn::DType;
using torch_gated_attn::Problem;
using torch_gated_attn::View;

// At least what the longest call draws: what is drawn last, the gradients, would else be the same in every call.
constexpr size_t kBytesOfACall = 512;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  int64_t below(int64_t n) {  // in [0, n); 0 when the bytes run out
    uint64_t x = 0;
    for (int i = 0; i < 2; ++i, ++at_) x = x << 8 | (at_ < size_ ? data_[at_] : 0);
    return static_cast<int64_t>(x % static_cast<uint64_t>(n));
  }
  bool flip() { return below(2) == 1; }
  bool ran_out() const { return at_ > size_; }
  bool usually(int64_t n) { return below(n) != n - 1; }  // n - 1 times of n; when the bytes run out, too

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// Numbers of [-1, 1), the same for the same seed.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed) {}
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state_) >> 11) * 0x1p-52;
  }

 private:
  uint64_t state_;
};

inline size_t bytes_of(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }
inline DType sum_type(DType type) { return type == DType::kFloat64 ? type : DType::kFloat32; }

inline double get(DType type, const void* p, int64_t i) {
  if (type == DType::kFloat64) return static_cast<const double*>(p)[i];
  if (type == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  if (type == DType::kBFloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? __builtin_nan("") : sign * __builtin_inf();
  return sign * (exponent ? __builtin_ldexp(1024 + mantissa, exponent - 25) : __builtin_ldexp(mantissa, -24));
}
// Multiples of 1/128 in [-1, 1], which every type holds exactly.
inline void put(DType type, void* p, int64_t i, double x) {
  x = static_cast<double>(static_cast<int>(x * 128)) / 128;
  if (type == DType::kFloat64) {
    static_cast<double*>(p)[i] = x;
  } else if (type == DType::kFloat32) {
    static_cast<float*>(p)[i] = static_cast<float>(x);
  } else {
    const float value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (type == DType::kFloat16)
      half = x == 0
                 ? 0
                 : static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023)));
    static_cast<uint16_t*>(p)[i] = half;
  }
}

struct Sizes {
  int64_t batch[torch_gated_attn::kMaxBatchDims], heads, rows, cols;
};

// A tensor in memory of its own. Dimensions are batch 0..3, head, row, col.
struct Tensor {
  std::unique_ptr<Guarded> memory;
  View view;
  DType type = DType::kFloat32;
  Sizes sizes{};
  int64_t elements = 0;

  explicit operator bool() const { return view.data != nullptr; }
  int64_t offset(const int64_t* batch, int64_t head, int64_t row, int64_t col) const {
    int64_t sum = head * view.head + row * view.row + col * view.col;
    for (int d = 0; d < torch_gated_attn::kMaxBatchDims; ++d) sum += batch[d] * view.batch[d];
    return sum;
  }
  double operator()(const int64_t* batch, int64_t head, int64_t row, int64_t col) const {
    return get(type, view.data, offset(batch, head, row, col));
  }
};

// A tensor of these sizes (1 where it is broadcast). With `bytes`, its dimensions lie in memory in a drawn order and with
// drawn gaps; else contiguous. All of it, gaps too, is NaN.
inline Tensor make(DType type, size_t element, Sizes sizes, Bytes& bytes, bool contiguous) {
  constexpr int kDims = torch_gated_attn::kMaxBatchDims + 2;
  Tensor t;
  t.type = type;
  t.sizes = sizes;
  int64_t size[kDims], stride[kDims];
  int order[kDims];
  for (int d = 0; d < kDims; ++d) {
    size[d] = d < torch_gated_attn::kMaxBatchDims ? sizes.batch[d] : d == kDims - 2 ? sizes.heads : sizes.rows;
    order[d] = d;
  }
  if (!contiguous)
    for (int d = kDims - 1; d > 0; --d) std::swap(order[d], order[bytes.below(d + 1)]);
  int64_t next = sizes.cols + (contiguous ? 0 : bytes.below(3));
  for (int i = kDims; i-- > 0;) {
    const int d = order[i];
    stride[d] = size[d] == 1 ? 0 : next;
    if (size[d] != 1) next = next * size[d] + (contiguous ? 0 : bytes.below(3));
  }
  int64_t last = sizes.cols - 1;
  for (int d = 0; d < kDims; ++d) last += (size[d] - 1) * stride[d];
  t.elements = last + 1;
  t.memory = std::make_unique<Guarded>(static_cast<size_t>(t.elements) * element, bytes.flip());
  t.view.data = t.memory->data();
  for (int d = 0; d < torch_gated_attn::kMaxBatchDims; ++d) t.view.batch[d] = stride[d];
  t.view.head = stride[kDims - 2];
  t.view.row = stride[kDims - 1];
  t.view.col = sizes.cols == 1 ? 0 : 1;
  std::memset(t.view.data, 0xff, static_cast<size_t>(t.elements) * element);  // NaN in every type
  return t;
}

// f(batch, head, row, col) for every element.
template <class F>
void for_each(const Sizes& s, const F& f) {
  int64_t b[torch_gated_attn::kMaxBatchDims];
  for (b[0] = 0; b[0] < s.batch[0]; ++b[0])
    for (b[1] = 0; b[1] < s.batch[1]; ++b[1])
      for (b[2] = 0; b[2] < s.batch[2]; ++b[2])
        for (b[3] = 0; b[3] < s.batch[3]; ++b[3])
          for (int64_t h = 0; h < s.heads; ++h)
            for (int64_t r = 0; r < s.rows; ++r)
              for (int64_t c = 0; c < s.cols; ++c) f(b, h, r, c);
}

struct Call {
  Problem p;
  Tensor query, key, value, gate, bias, mask, out, lse, row_max, row_sum, grad_out, grad_lse;
  Tensor key_lengths;
  Tensor d_query, d_key, d_value, d_gate, d_bias;

  explicit Call(Bytes& bytes, int64_t largest);
  void draw_optional(Bytes& bytes, Numbers& numbers, const Sizes& batch);
  void draw_gradients(Bytes& bytes);
  void draw_visibility(Bytes& bytes, Numbers& numbers, Sizes batch);
};

}  // namespace core_test
