// SPDX-License-Identifier: BSD-3-Clause
//
// Memory whose every misuse shows: tensors that touch a protected page, and scratch of exactly the size that was asked for.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace core_test {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::abort();
}

// `bytes` bytes that start right after a protected page, or end right before one. The rest of their pages holds a pattern
// that must still be there at the end.
class Guarded {
 public:
  Guarded(size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    room_ = (bytes / page + 1) * page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, room_ + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) fail("mmap");
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + room_, page, PROT_NONE);
    pages_ = base_ + page;
    std::memset(pages_, kPattern, room_);
    data_ = at_end ? pages_ + room_ - bytes : pages_;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    for (unsigned char* p = pages_; p < pages_ + room_; ++p)
      if ((p < data_ || p >= data_ + bytes_) && *p != kPattern) fail("a byte beside a tensor was written");
    munmap(base_, room_ + 2 * static_cast<size_t>(pages_ - base_));
  }
  void* data() const { return data_; }

 private:
  static constexpr unsigned char kPattern = 0xa5;
  size_t bytes_, room_;
  unsigned char *base_, *pages_, *data_;
};

// A heap block of exactly this size, which the address sanitizer and valgrind watch; aligned as at::empty aligns.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, static_cast<size_t>(bytes > 0 ? bytes : 1))) fail("memory");
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
};

}  // namespace core_test
