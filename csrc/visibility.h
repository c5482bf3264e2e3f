// SPDX-License-Identifier: BSD-3-Clause
//
// Which keys a query sees by position, for every kernel of every device: causal order, a sliding window, and the number of
// keys that exist. Query i stands at key position p = K - Q + i, so the last query stands at the last key. It sees the keys
//
//     j <= p  if causal        j > p - window  if there is a window        j < length
//
// which are one range, whose ends grow with i. A mask may hide more of them. Int is the type of a position.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TGA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TGA_HOST_DEVICE
#endif

namespace torch_gated_attn {

template <class Int>
struct Range {
  Int begin = 0, end = 0;
  TGA_HOST_DEVICE bool empty() const { return begin >= end; }
  TGA_HOST_DEVICE Int size() const { return begin < end ? end - begin : 0; }
  TGA_HOST_DEVICE Range within(const Range& other) const {
    return {begin < other.begin ? other.begin : begin, end < other.end ? end : other.end};
  }
};

// What of a tile of queries x keys is seen.
enum class Cover : uint8_t { kEmpty, kMixed, kFull };

template <class Int>
struct Visibility {
  Int q_len = 0, k_len = 0;
  Int length = 0;  // keys that exist, at most k_len
  Int window = 0;  // keys that a query sees, its own position included; 0: all up to it. Only where causal
  bool causal = false;

  // The keys that query i sees.
  TGA_HOST_DEVICE Range<Int> keys_of(Int i) const { return {first_key(i), end_key(i)}; }

  // The keys that some query of a range sees.
  TGA_HOST_DEVICE Range<Int> keys_of(Range<Int> queries) const {
    return queries.empty() ? Range<Int>{} : Range<Int>{first_key(queries.begin), end_key(queries.end - 1)};
  }

  // The keys that all queries of a range see.
  TGA_HOST_DEVICE Range<Int> keys_of_all(Range<Int> queries) const {
    return queries.empty() ? Range<Int>{} : Range<Int>{first_key(queries.end - 1), end_key(queries.begin)};
  }

  // The queries that see some key of a range.
  TGA_HOST_DEVICE Range<Int> queries_of(Range<Int> keys) const {
    keys.end = least(keys.end, length);
    if (keys.empty()) return {};
    if (!causal) return {0, q_len};
    const Int first = k_len - q_len;  // position of query 0; negative where there are more queries than keys
    Range<Int> queries = {greatest(keys.begin - first, 0), q_len};
    // Query i sees key j while p < j + window; no sum here is larger than a length.
    const Int behind = k_len - window - (keys.end - 1);  // that many of the last queries do not see the last key
    if (window > 0 && behind > 0) queries.end = greatest(q_len - behind, 0);
    return queries;
  }

  TGA_HOST_DEVICE bool sees(Int i, Int j) const { return j >= first_key(i) && j < end_key(i); }

  TGA_HOST_DEVICE Cover cover(Range<Int> queries, Range<Int> keys) const {
    const Range<Int> some = keys_of(queries), all = keys_of_all(queries);
    if (some.begin >= keys.end || some.end <= keys.begin || some.empty()) return Cover::kEmpty;
    return all.begin <= keys.begin && keys.end <= all.end ? Cover::kFull : Cover::kMixed;
  }

 private:
  TGA_HOST_DEVICE static Int least(Int a, Int b) { return a < b ? a : b; }
  TGA_HOST_DEVICE static Int greatest(Int a, Int b) { return a < b ? b : a; }
  TGA_HOST_DEVICE Int first_key(Int i) const {
    // A window of K keys or more hides nothing; the sum below stays small.
    return window > 0 && window < k_len ? greatest(k_len - q_len + i + 1 - window, 0) : 0;
  }
  TGA_HOST_DEVICE Int end_key(Int i) const { return causal ? least(length, greatest(k_len - q_len + i + 1, 0)) : length; }
};

}  // namespace torch_gated_attn
