// SPDX-License-Identifier: BSD-3-Clause
//
// Brings the next row's tensors into the second-level cache while this row is computed, spread evenly over its tiles: where
// they come from memory, the hardware prefetcher sees each stream too late (triangle attention, forward: a prototype on
// Zen 5 140 -> 175 GF/s, an Intel server core 5 %). Where they stay in the last-level cache it sees them in time, and the
// instructions cost 2 to 4 %.
template <class T>
static inline bool comes_from_memory(const Problem& p) {
  constexpr int64_t kCacheBytes = 32 << 20;  // what two cores can expect of it
  const int64_t queries = p.heads * p.q_len * (p.head_dim + p.value_dim);
  const int64_t keys = p.kv_heads * p.k_len * (p.head_dim + p.value_dim);
  return p.outer * p.rows * (queries + keys) * static_cast<int64_t>(sizeof(T)) > kCacheBytes;
}

class Prefetch {
 public:
  // No step at all where no key is attended.
  explicit Prefetch(int steps) : steps_(steps > 0 ? steps : 1) {}

  template <class T>
  void keys(const T* base, const View& v, int64_t rows, int64_t dim) {
    add(base, rows, v.row * static_cast<int64_t>(sizeof(T)), dim * static_cast<int64_t>(sizeof(T)));
  }
  // Lanes of the first head only: with grouped queries the others follow at a stride of their own.
  template <class T>
  void lanes(const T* base, const View& v, const Lanes& lanes, int64_t dim) {
    if (!base || v.col == 0) return;
    add(base + lanes.lane[0].offset(v), lanes.count, v.row * static_cast<int64_t>(sizeof(T)),
        dim * static_cast<int64_t>(sizeof(T)));
  }

  void step() {
    for (int i = 0; i < count_; ++i) {
      Stream& s = streams_[i];
      for (int64_t n = s.rows_per_step; n > 0 && s.rows > 0; --n, --s.rows, s.next += s.stride)
        for (int64_t line = 0; line < s.bytes; line += kLine) __builtin_prefetch(s.next + line, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Stream {
    const char* next;
    int64_t rows, rows_per_step, stride, bytes;
  };

  void add(const void* base, int64_t rows, int64_t stride, int64_t bytes) {
    // Dense rows are one stream of lines, else short rows would fetch each line several times.
    if (stride == bytes) {
      rows = (rows * bytes + kLine - 1) / kLine;
      stride = bytes = kLine;
    }
    streams_[count_++] = {static_cast<const char*>(base), rows, (rows + steps_ - 1) / steps_, stride, bytes};
  }

  int steps_, count_ = 0;
  Stream streams_[6];  // key, value, query, gate, out, grad_out
};
