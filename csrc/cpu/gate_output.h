// SPDX-License-Identifier: BSD-3-Clause
//
// out * sigmoid(gate) over `n` elements, and its gradients, for attention that another library computed. Data and strides
// (in bytes, as PyTorch's iterators count them) are in the order of kernels.h.

// One vector of elements that lie `stride` bytes apart: together, the same one for all (a gate per head), or scattered.
template <class T, class A>
TGA_INLINE Vec<A> load_strided(const char* data, int64_t stride, int64_t i, int n) {
  if (stride == sizeof(T)) return load_n(reinterpret_cast<const T*>(data) + i, n);
  if (stride == 0) return set1<A>(load_one(reinterpret_cast<const T*>(data)));
  Vec<A> x{};
  for (int lane = 0; lane < n; ++lane) x[lane] = load_one(reinterpret_cast<const T*>(data + (i + lane) * stride));
  return x;
}
template <class T, class A>
TGA_INLINE void store_strided(char* data, int64_t stride, int64_t i, Vec<A> x, int n) {
  if (stride == sizeof(T)) return store_n(reinterpret_cast<T*>(data) + i, x, n);
  for (int lane = 0; lane < n; ++lane) store_n(reinterpret_cast<T*>(data + (i + lane) * stride), set1<A>(x[lane]), 1);
}

template <class T, class A>
void gate_elements(char* const* data, const int64_t* strides, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int n = static_cast<int>(count - i < kLanes<A> ? count - i : kLanes<A>);
    const Vec<A> out = load_strided<T, A>(data[1], strides[1], i, n), gate = load_strided<T, A>(data[2], strides[2], i, n);
    store_strided<T, A>(data[0], strides[0], i, out * sigmoid<A>(gate).value, n);
  }
}

// d_out = grad * g and d_gate = grad * out * g * (1 - g), with g = sigmoid(gate).
template <class T, class A>
void gate_gradients(char* const* data, const int64_t* strides, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int n = static_cast<int>(count - i < kLanes<A> ? count - i : kLanes<A>);
    const Vec<A> grad = load_strided<T, A>(data[2], strides[2], i, n), out = load_strided<T, A>(data[3], strides[3], i, n);
    const Sigmoid<A> g = sigmoid<A>(load_strided<T, A>(data[4], strides[4], i, n));
    store_strided<T, A>(data[0], strides[0], i, grad * g.value, n);
    store_strided<T, A>(data[1], strides[1], i, grad * out * (g.value * g.complement), n);
  }
}
