// SPDX-License-Identifier: BSD-3-Clause
//
// Brings into the second-level cache what follows a row's products, the next row's tensors and the lines of this row's
// results, while they are computed. A prefetch holds a line fill buffer for the latency of the last-level cache or memory,
// and the products need those for their own lines of the second level: so there are never many at once. One step serves one
// stream; the blocks take a step at each pause between two products (triangle attention, 16 rows, head_dim 64, on an Intel
// server core: forward 61 to 71 % of the peak, 65 with all streams at once before every tile; backward 64 to 69).
class Prefetch {
 public:
  template <class T>
  void keys(const T* base, const View& v, int64_t rows, int64_t dim) {
    if (base) add(base, rows, v.row * static_cast<int64_t>(sizeof(T)), dim * static_cast<int64_t>(sizeof(T)));
  }
  // Lanes of the first head only: with grouped queries the others follow at a stride of their own.
  template <class T>
  void lanes(const T* base, const View& v, const Lanes& lanes, int64_t dim) {
    if (!base || v.col == 0) return;
    add(base + lanes.lane[0].offset(v), lanes.count, v.row * static_cast<int64_t>(sizeof(T)),
        dim * static_cast<int64_t>(sizeof(T)));
  }

  // To be called when all are added: over the tiles of `keys` keys and `sub_blocks` sub-blocks, or over their micro-tiles.
  void spread(int64_t keys, int64_t sub_blocks, int64_t micro_keys) {
    const int64_t tiles = (keys + kTileKeys - 1) / kTileKeys * sub_blocks, micro_tiles = kTileKeys / micro_keys;
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += streams_[i].rows * ((streams_[i].bytes + kLine - 1) / kLine);
    fine_ = lines > tiles * kAtOnce;
    const int64_t steps = fine_ ? tiles * micro_tiles : tiles;
    for (int i = 0; i < count_ && steps > 0; ++i) streams_[i].rows_per_step = (streams_[i].rows + steps - 1) / steps;
  }

  // Before every tile: all streams, where few lines are enough.
  inline __attribute__((always_inline)) void tile() {
    if (fine_) return;
    for (int i = 0; i < count_; ++i) step(streams_[i]);
  }
  // Otherwise stream i, at a pause of every micro-tile. A block has a pause for each stream that its unit adds.
  inline __attribute__((always_inline)) void micro_tile(int i) {
    if (fine_) step(streams_[i]);
  }
  // Everything now.
  void all() {
    for (int i = 0; i < count_; ++i) streams_[i].rows_per_step = streams_[i].rows, step(streams_[i]);
  }

  static constexpr int kStreams = 10;

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kAtOnce = 16;  // line fill buffers of an Intel server core; others have 10 to 24
  struct Stream {
    const char* next = nullptr;
    int64_t rows = 0, rows_per_step = 0, stride = 0, bytes = 0;
  };

  void add(const void* base, int64_t rows, int64_t stride, int64_t bytes) {
    // Dense rows are one stream of lines, else short rows would fetch each line several times.
    if (stride == bytes) {
      rows = (rows * bytes + kLine - 1) / kLine;
      stride = bytes = kLine;
    }
    streams_[count_++] = {static_cast<const char*>(base), rows, 0, stride, bytes};
  }
  inline __attribute__((always_inline)) void step(Stream& s) const {
    const int64_t rows = s.rows < s.rows_per_step ? s.rows : s.rows_per_step;
    const char* next = s.next;
    for (int64_t n = 0; n < rows; ++n, next += s.stride) {
      __builtin_prefetch(next, 0, 2);
      for (int64_t line = kLine; line < s.bytes; line += kLine) __builtin_prefetch(next + line, 0, 2);
    }
    s.next = next;
    s.rows -= rows;
  }

  bool fine_ = false;
  int count_ = 0;
  Stream streams_[kStreams];  // key, value, query, gate, and out; backward also grad_out, d_gate, d_query, d_key, d_value
};
