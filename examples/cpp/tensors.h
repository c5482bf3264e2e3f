// SPDX-License-Identifier: BSD-3-Clause
//
// Tensors from Python and back: reads a list that torch.save wrote, prints numbers that Python's float.fromhex reads.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

inline std::vector<at::Tensor> load_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const auto& item : list.toListRef()) tensors.push_back(item.toTensor());
  return tensors;
}

// One line: the name, then every element in full precision.
inline void print(const std::string& name, const at::Tensor& tensor) {
  std::printf("%s", name.c_str());
  const at::Tensor flat = tensor.detach().flatten().to(at::kDouble).contiguous();
  for (int64_t i = 0; i < flat.numel(); ++i) std::printf(" %a", flat.data_ptr<double>()[i]);
  std::printf("\n");
}
