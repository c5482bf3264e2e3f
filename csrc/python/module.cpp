// SPDX-License-Identifier: BSD-3-Clause
//
// The extension module _C. Loading it registers the operators; what Python can ask it are facts of the build, never
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "explain.h"

// Passed by setup.py: torch/version.h lacks the local part of the version (+cpu, +cu130).
#ifndef TORCH_GATED_ATTN_TORCH_VERSION
#error "define TORCH_GATED_ATTN_TORCH_VERSION, the version of the torch that is built against"
#endif

namespace py = pybind11;

namespace {

// The loader looks for this text in the file when the library cannot be loaded into the torch at hand.
[[gnu::used]] constexpr char kBuiltWith[] = "torch_gated_attn built with torch " TORCH_GATED_ATTN_TORCH_VERSION;

#ifdef __clang__
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

py::tuple cpu_capabilities() { return py::tuple(py::cast(torch_gated_attn::cpu_capabilities())); }

py::object cuda_version() {
#ifdef TORCH_GATED_ATTN_WITH_CUDA
  return py::str(TORCH_GATED_ATTN_WITH_CUDA);
#else
  return py::none();
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts of the build of torch_gated_attn.";
  m.attr("torch_version") = TORCH_GATED_ATTN_TORCH_VERSION;
  m.attr("cuda_version") = cuda_version();  // of the toolkit; None: built without CUDA kernels
  m.attr("compiler") = kCompiler;
  m.attr("cpu_capabilities") = cpu_capabilities();
  m.def("cpu_capability", &torch_gated_attn::cpu_capability,
        "The instruction set this process uses: the best of the machine, or TORCH_GATED_ATTN_CPU_CAPABILITY.");
  m.def(
      "explain",
      [](std::array<std::optional<torch_gated_attn::Layout>, 7> tensors, std::optional<double> scale,
         std::string masked_rows, bool is_causal, std::optional<int64_t> window, bool bias_requires_grad,
         std::array<bool, 5> grad_mask, std::optional<int> arch) {
        return torch_gated_attn::explain(
            {std::move(tensors), scale, std::move(masked_rows), is_causal, window, bias_requires_grad, grad_mask}, arch);
      },
      "Kernel, reason and details of a call whose tensors have these layouts; arch None: on the CPU.");
}
