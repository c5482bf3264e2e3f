// SPDX-License-Identifier: BSD-3-Clause
//
// Cuts one block of scratch memory into cache-line aligned arrays. With a null base it only measures.

class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kLine = 64;
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};
