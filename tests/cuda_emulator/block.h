// SPDX-License-Identifier: BSD-3-Clause
//
// One thread block: fibers, warps that meet in collectives, block barriers, copies in flight, and the scheduler, which
// runs the warps in an order drawn anew from the seed at every turn.
#pragma once

#include <deque>
#include <functional>
#include <random>
#include <stdexcept>

#include "fibers.h"
#include "memory.h"

namespace emulator {

enum class State { kRunning, kInCollective, kAtBarrier, kDone };

struct Copy {
  uint32_t shared;
  uint8_t data[16];
};

struct Thread {
  void* stack_pointer = nullptr;
  int index = 0;
  State state = State::kRunning;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> committed_copies;
};

// Where the lanes of a warp put what they bring to a collective and take what they get.
struct Warp {
  int arrived = 0;
  int operation = 0;
  uint32_t in[32][6];
  float in_float[32][4];
  double in_double[32];
  uint32_t out[32][4];
  float out_float[32][4];
  double out_double[32];
};

struct Block {
  Block(int index, int threads, size_t shared_bytes)
      : index(index), threads(threads), warps(threads / 32), shared(shared_bytes, epoch) {}
  int index;
  int epoch = 1;
  bool any_thread = false;  // of sync_block_any()
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  SharedMemory shared;
};

inline Block* block = nullptr;
inline Thread* current = nullptr;
inline void* scheduler_stack = nullptr;
inline const std::function<void()>* kernel_body = nullptr;
inline StackPool stacks;

inline void suspend(State state) {
  current->state = state;
  tga_emulator_switch(&current->stack_pointer, scheduler_stack);
}

inline void enter_kernel() {
  (*kernel_body)();
  suspend(State::kDone);
}

// The last lane to arrive runs `action(warp)` for all 32.
template <class Action>
void collective(int operation, Action action) {
  Warp& warp = block->warps[current->index / 32];
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation) {
    note(report.divergent, "lanes meet in different collectives", operation, current->index);
  }
  if (++warp.arrived < 32) {
    suspend(State::kInCollective);
    return;
  }
  action(warp);
  warp.arrived = 0;
  for (int lane = 0; lane < 32; ++lane) {
    Thread& thread = block->threads[current->index / 32 * 32 + lane];
    if (thread.state == State::kInCollective) {
      thread.state = State::kRunning;
    }
  }
}

// Runs one warp until every lane waits, finishes, or its share of the turn is used up.
inline bool run_warp(Block& running, int warp, int turns) {
  bool progress = false, again = true;
  while (again && turns-- > 0) {
    again = false;
    for (int lane = 0; lane < 32; ++lane) {
      Thread& thread = running.threads[warp * 32 + lane];
      if (thread.state == State::kRunning) {
        current = &thread;
        tga_emulator_switch(&scheduler_stack, thread.stack_pointer);
        again = progress = true;
      }
    }
  }
  return progress;
}

inline void run_block(int index, int threads, size_t shared_bytes, const std::function<void()>& body,
                      std::mt19937& random) {
  Block running(index, threads, shared_bytes);
  block = &running;
  kernel_body = &body;
  for (int t = 0; t < threads; ++t) {
    running.threads[t].index = t;
    running.threads[t].stack_pointer = stacks.prepare(t, enter_kernel);
  }
  std::vector<int> order(threads / 32);
  for (size_t w = 0; w < order.size(); ++w) {
    order[w] = static_cast<int>(w);
  }
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (int warp : order) {
      progress |= run_warp(running, warp, 1 + static_cast<int>(random() % 64));
    }
    int done = 0, waiting = 0;
    for (const Thread& thread : running.threads) {
      done += thread.state == State::kDone;
      waiting += thread.state == State::kAtBarrier;
    }
    if (done == threads) {
      break;
    }
    if (waiting > 0 && waiting + done == threads) {
      ++running.epoch;
      for (Thread& thread : running.threads) {
        if (thread.state == State::kAtBarrier) {
          thread.state = State::kRunning;
        }
      }
      progress = true;
    }
    if (!progress) {
      throw std::runtime_error("deadlock: threads wait for one another");
    }
  }
  block = nullptr;
  current = nullptr;
}

}  // namespace emulator
