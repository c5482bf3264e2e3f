// SPDX-License-Identifier: BSD-3-Clause
//
// Shared memory with a shadow word per 4 bytes, and the list of global ranges a kernel may touch.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "report.h"

namespace emulator {

// Shared addresses start here, so that a null or forgotten base is out of bounds.
constexpr uint32_t kSharedBase = 0x1000;

class SharedMemory {
 public:
  SharedMemory(size_t bytes, const int& epoch) : data_(bytes, 0xff), words_(bytes / 4 + 1), epoch_(epoch) {}

  void read(uint32_t address, void* to, int bytes, int thread) {
    if (touch(address, bytes, thread, false)) {
      std::memcpy(to, &data_[address - kSharedBase], bytes);
    } else {
      std::memset(to, 0xff, bytes);
    }
  }

  void write(uint32_t address, const void* from, int bytes, int thread) {
    if (touch(address, bytes, thread, true)) {
      std::memcpy(&data_[address - kSharedBase], from, bytes);
    }
  }

  // Marks an access without moving data: the destination of a copy in flight, the rows ldmatrix will read.
  bool touch(uint32_t address, int bytes, int thread, bool write) {
    if (address % bytes != 0) {
      note(report.misaligned, "misaligned shared access", address, thread);
    }
    if (address < kSharedBase || address - kSharedBase + bytes > data_.size()) {
      note(report.out_of_bounds, "shared access out of bounds", address, thread);
      return false;
    }
    const uint32_t first = (address - kSharedBase) / 4, last = (address - kSharedBase + bytes + 3) / 4;
    for (uint32_t i = first; i < last; ++i) {
      Word& word = words_[i];
      if (!write && !word.written) {
        note(report.uninitialised, "uninitialised shared read", address, thread);
      }
      const bool other_wrote = word.write_epoch == epoch_ && word.writer / 32 != thread / 32;
      const bool other_read = word.read_epoch == epoch_ && word.reader / 32 != thread / 32;
      if (other_wrote || (write && other_read)) {
        note(report.races, "shared memory race", address, thread);
      }
      if (write) {
        word.writer = thread;
        word.write_epoch = epoch_;
        word.written = true;
      } else if (word.read_epoch != epoch_ || word.reader / 32 == thread / 32) {
        word.reader = thread;
        word.read_epoch = epoch_;
      }
    }
    return true;
  }

  // Without the shadow: ldmatrix reads rows that the lanes have touched already.
  uint16_t peek16(uint32_t address) const {
    uint16_t value = 0xffff;
    if (address >= kSharedBase && address - kSharedBase + 2 <= data_.size()) {
      std::memcpy(&value, &data_[address - kSharedBase], 2);
    }
    return value;
  }

 private:
  struct Word {
    int writer = 0, reader = 0, write_epoch = 0, read_epoch = 0;
    bool written = false;
  };
  std::vector<uint8_t> data_;
  std::vector<Word> words_;
  const int& epoch_;  // counts the barriers of the block
};

class GlobalMemory {
 public:
  void allow(const void* begin, size_t bytes, bool writable) {
    ranges_.push_back({reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes, writable});
  }
  void clear() { ranges_.clear(); }

  bool touch(const void* pointer, int bytes, int alignment, int thread, bool write) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (address % alignment != 0) {
      note(report.misaligned, "misaligned global access", address, thread);
    }
    for (size_t i = 0; i < ranges_.size(); ++i) {
      const Range range = ranges_[i];
      if (address >= range.begin && address + bytes <= range.end && (range.writable || !write)) {
        // Kernels walk one operand at a time: the next access is likely in the same range.
        std::swap(ranges_[i], ranges_[i / 2]);
        return true;
      }
    }
    note(report.out_of_bounds, write ? "global write out of bounds" : "global read out of bounds", address, thread);
    return false;
  }

 private:
  struct Range {
    uintptr_t begin, end;
    bool writable;
  };
  std::vector<Range> ranges_;
};

inline GlobalMemory global_memory;

}  // namespace emulator
