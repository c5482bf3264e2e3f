// SPDX-License-Identifier: BSD-3-Clause
//
// serve PACKAGE INPUTS
//
// Runs a package that torch._inductor.aoti_compile_and_package made on the tensors that Python saved, and prints the
// results. The package calls the operator by name: this program needs nothing of the library but to be linked with it.
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "tensors.h"

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s PACKAGE INPUTS\n", argv[0]);
    return 2;
  }
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  const auto inputs = load_tensors(argv[2]);
  for (const at::Tensor& result : package.run(inputs)) print("result", result);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
