// SPDX-License-Identifier: BSD-3-Clause
//
// Which of the listed keys each lane attends to, where that differs between queries: by position (causal, window) and by a
// mask. It is found tile by tile, a bit to a key. A tile in which nothing is attended is skipped, one in which everything
// is takes its logits from the table as they are, and only the others get a copy with -inf where a lane does not attend.

static_assert(kTileKeys == 32, "a tile's keys are the bits of a word");

// Bit i: whether byte i of `count`, at most 32, is not 0.
TGA_INLINE uint32_t bits_of_set(const uint8_t* bytes, int64_t stride, int count) {
  if (stride == 0) return bytes[0] != 0 ? ~0u : 0;
#if defined(TGA_AVX512)
  if (stride == 1) {
    const __m256i x = _mm256_maskz_loadu_epi8(lane_mask(count), bytes);
    return _mm256_test_epi8_mask(x, x);
  }
#elif defined(TGA_AVX2)
  if (stride == 1 && count == 32)
    return ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)bytes), _mm256_setzero_si256()));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < count; ++i) bits |= static_cast<uint32_t>(bytes[i * stride] != 0) << i;
  return bits;
}

template <class A>
class Attended {
 public:
  Attended(const Problem& p, int block, int max_lanes, Carver& c)
      : p_(p), block_(block), by_mask_(p.mask.data && !masks_keys(p)) {
    if (p.is_causal) {
      begin_ = c.take<int32_t>(max_lanes);
      end_ = c.take<int32_t>(max_lanes);
      some_ = c.take<Range<int32_t>>(max_lanes / block);
      all_ = c.take<Range<int32_t>>(max_lanes / block);
    }
    if (!p.is_causal && !by_mask_) return;
    bits_ = c.take<uint32_t>(block);
    tile_ = c.take<A>(kTileKeys * block);
    for (int i = 0; i < kTileKeys; ++i) tile_row_[i] = i;
  }

  // For the listed keys of one row. `mask` points at the first key of query 0 of the group's first head.
  void start(const Visibility<int64_t>& visibility, const Lanes& lanes, const int32_t* key, int count,
             const uint8_t* mask) {
    lanes_ = &lanes, key_ = key, count_ = count, mask_ = by_mask_ ? mask : nullptr;
    if (!p_.is_causal) return;
    int first = 0, end = 0;
    for (int i = 0; i < lanes.padded; ++i) {
      const Range<int64_t> seen = visibility.keys_of(lanes.lane[i].row);
      begin_[i] = first = index_of(seen.begin, first);
      end_[i] = end = index_of(seen.end, end);
      Range<int32_t>&some = some_[i / block_], &all = all_[i / block_];
      if (i % block_ == 0) some = {count, 0}, all = {0, count};
      all = {first < all.begin ? all.begin : first, end < all.end ? end : all.end};
      if (first < end) some = {first < some.begin ? first : some.begin, end < some.end ? some.end : end};
    }
  }

  // What sub-block s attends to of the kTileKeys listed keys from `first` on, or of those that are left.
  Cover tile(int s, int first) {
    const int keys = count_ - first < kTileKeys ? count_ - first : kTileKeys;
    bool all = true;
    if (p_.is_causal) {
      if (some_[s].end <= first || some_[s].begin >= first + keys) return Cover::kEmpty;
      all = all_[s].begin <= first && first + keys <= all_[s].end;
    }
    if (!mask_) {
      if (all) return Cover::kFull;
      for (int i = 0; i < block_; ++i) bits_[i] = seen_bits(s * block_ + i, first);
      return Cover::kMixed;
    }
    const uint32_t exist = low_bits(keys);
    uint32_t some_attended = 0, all_attended = exist;
    for (int i = 0; i < block_; ++i) {
      const int lane = s * block_ + i;
      uint32_t bits =
          exist & bits_of_set(mask_ + lanes_->lane[lane].offset(p_.mask) + key_[first] * p_.mask.col, p_.mask.col, keys);
      if (!all) bits &= seen_bits(lane, first);
      bits_[i] = bits;
      some_attended |= bits, all_attended &= bits;
    }
    if (some_attended == 0) return Cover::kEmpty;
    return all_attended == exist ? Cover::kFull : Cover::kMixed;
  }

  // The logits of the tile that was asked for last, which is mixed, for `count` keys with their padding.
  LogitTile<A> hide(const LogitTile<A>& logits, int count) {
    constexpr int W = kLanes<A>;
    for (int u = 0; u < block_; u += W) {
      VecBits<A> bits{};
      for (int i = 0; i < W; ++i) bits[i] = bits_[u + i];
      for (int i = 0; i < count; ++i) {
        const Vec<A> x = load(logits.data + static_cast<int64_t>(logits.row[i]) * block_ + u);
        store(tile_ + i * block_ + u, (bits & 1) != 0 ? x : set1<A>(-kInf<A>));
        bits >>= 1;
      }
    }
    return {tile_, tile_row_};
  }

 private:
  static uint32_t low_bits(int n) { return static_cast<uint32_t>((uint64_t{1} << n) - 1); }
  static int within_tile(int i) { return i < 0 ? 0 : i < kTileKeys ? i : kTileKeys; }
  uint32_t seen_bits(int lane, int first) const {
    return low_bits(within_tile(end_[lane] - first)) & ~low_bits(within_tile(begin_[lane] - first));
  }

  // How many listed keys stand before `position`. `near` is a guess: neighbouring lanes stand side by side.
  int index_of(int64_t position, int near) const {
    while (near < count_ && key_[near] < position) ++near;
    while (near > 0 && key_[near - 1] >= position) --near;
    return near;
  }

  const Problem& p_;
  const int block_;
  const bool by_mask_;
  const Lanes* lanes_ = nullptr;
  const int32_t* key_ = nullptr;
  int count_ = 0;
  const uint8_t* mask_ = nullptr;
  int32_t *begin_ = nullptr, *end_ = nullptr;       // [lane] listed keys that it sees
  Range<int32_t>*some_ = nullptr, *all_ = nullptr;  // [sub-block] that some lane, that every lane sees
  uint32_t* bits_ = nullptr;                        // [block] of the last tile
  A* tile_ = nullptr;                               // [kTileKeys][block]
  int32_t tile_row_[kTileKeys];
};
