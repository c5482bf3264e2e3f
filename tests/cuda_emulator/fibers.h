// SPDX-License-Identifier: BSD-3-Clause
//
// Every emulated CUDA thread is a fiber: a stack of its own and a switch that saves the callee-saved registers.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace emulator {

extern "C" void tga_emulator_switch(void** save_stack_pointer, void* load_stack_pointer);

// System V x86-64: rdi = where to save, rsi = what to load.
asm(R"(
.text
.weak tga_emulator_switch
tga_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

// Sanitizers pad every local array, hence the generous stacks; untouched pages cost nothing.
constexpr size_t kStackBytes = 512 * 1024;

// Stacks are kept from block to block.
class StackPool {
 public:
  // A stack whose first switch enters `entry`.
  void* prepare(size_t index, void (*entry)()) {
    while (stacks_.size() <= index) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        throw std::bad_alloc();
      }
      stacks_.push_back(static_cast<char*>(memory));
    }
    void** top = reinterpret_cast<void**>(stacks_[index] + kStackBytes);
    *--top = nullptr;  // keeps the stack 16-byte aligned where `entry` begins
    *--top = reinterpret_cast<void*>(entry);
    for (int callee_saved = 0; callee_saved < 6; ++callee_saved) {
      *--top = nullptr;
    }
    return top;
  }

 private:
  std::vector<char*> stacks_;
};

}  // namespace emulator
