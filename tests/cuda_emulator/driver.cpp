// SPDX-License-Identifier: BSD-3-Clause
//
// The C functions through which tests/test_cuda_emulator.py runs the CUDA kernels on the host.
#include <cxxabi.h>
#include <dlfcn.h>

#include <string>

#include "device.cuh"
#include "emulated_memory.h"
#include "run.h"

namespace {

using namespace torch_gated_attn;

std::string text;
int64_t scratch_bytes;  // of the last backward

std::string name_of(void* kernel) {
  Dl_info info = {};
  dladdr(kernel, &info);
  char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string result = name == nullptr ? "?" : name;
  std::free(name);
  return result;
}

template <class Run>
const char* guarded(Run run) {
  text.clear();
  emulator::report = {};
  emulator::first_finding.clear();
  emulator::launched.clear();
  emulator::tiles.clear();
  try {
    run();
    text = emulator::first_finding;
  } catch (const std::exception& error) {
    text = error.what();
  }
  emulator::global_memory.clear();
  return text.c_str();
}

}  // namespace

extern "C" {

const emulator::Report* emulator_report() { return &emulator::report; }

// A range the next kernels may touch; forgotten after one call.
void emulator_allow(const void* data, size_t bytes, int writable) {
  emulator::global_memory.allow(data, bytes, writable != 0);
}

// As if the device had this much shared memory for a block; 0: as much as its architecture has.
void emulator_limit_shared_bytes(int bytes) { emulator::shared_bytes_limit = bytes; }

// The kernels of the last call, one to a line.
const char* emulator_launched() {
  text.clear();
  for (void* kernel : emulator::launched) text += name_of(kernel) + '\n';
  return text.c_str();
}

// The tiles that they computed, one to a line: batch entry, head, first query, queries, first key, keys, whether with a
// look at each pair, and the kernel.
const char* emulator_tiles() {
  text.clear();
  for (const emulator::Tile& t : emulator::tiles) {
    for (const int64_t n : {t.entry, int64_t{t.head}, int64_t{t.query}, int64_t{t.queries}, int64_t{t.key}, int64_t{t.keys},
                            int64_t{t.masked}}) {
      text += std::to_string(n) + ' ';
    }
    text += name_of(t.kernel) + '\n';
  }
  return text.c_str();
}

// Both return the first finding, empty if there is none.
const char* emulator_forward(const Problem* problem, int arch, unsigned seed) {
  return guarded([&] {
    emulator::schedule_seed = seed;
    emulator::Scratch scratch;
    cuda::run_forward(*problem, cuda::choose_forward(*problem, arch), emulator::emulated_device(arch, scratch));
  });
}

const char* emulator_backward(const Problem* problem, int arch, unsigned seed, int d_gate_is_float) {
  return guarded([&] {
    emulator::schedule_seed = seed;
    emulator::Scratch scratch;
    cuda::run_backward(*problem, cuda::choose_backward(*problem, arch), emulator::emulated_device(arch, scratch),
                       d_gate_is_float != 0);
    scratch_bytes = static_cast<int64_t>(scratch.total);
  });
}

const char* emulator_explain(const Problem* problem, int arch, int backward) {
  text = (backward != 0 ? cuda::choose_backward(*problem, arch) : cuda::choose_forward(*problem, arch)).reason;
  return text.c_str();
}

int64_t emulator_scratch_bytes() { return scratch_bytes; }

size_t emulator_problem_bytes() { return sizeof(Problem); }
}
