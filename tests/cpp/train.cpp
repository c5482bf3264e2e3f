// SPDX-License-Identifier: BSD-3-Clause
//
// train MODULE INPUTS LEARNING_RATE
//
// Loads a scripted GatedAttention and the tensors (q_data, bias, mask) that Python saved, takes one step of gradient
// descent on the mean square of the result, and prints every gradient, in full precision, and the loss before and after.
// Then the public C++ function attends q_data to itself. A line: a name, then its numbers.
#include <gated_attention.h>
#include <torch/optim/sgd.h>
#include <torch/script.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

void print(const std::string& name, const at::Tensor& tensor) {
  std::printf("%s", name.c_str());
  const at::Tensor flat = tensor.detach().flatten().to(at::kDouble).contiguous();
  for (int64_t i = 0; i < flat.numel(); ++i) std::printf(" %a", flat.data_ptr<double>()[i]);
  std::printf("\n");
}

std::vector<at::Tensor> load_tensors(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const torch::jit::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const auto& item : list.toListRef()) tensors.push_back(item.toTensor());
  return tensors;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s MODULE INPUTS LEARNING_RATE\n", argv[0]);
    return 2;
  }
  torch::jit::Module module = torch::jit::load(argv[1]);
  const auto inputs = load_tensors(argv[2]);
  const auto &q_data = inputs.at(0), &bias = inputs.at(1), &mask = inputs.at(2);

  std::vector<at::Tensor> parameters;
  for (const at::Tensor& parameter : module.parameters()) parameters.push_back(parameter);
  torch::optim::SGD optimizer(parameters, std::stod(argv[3]));
  const auto loss = [&] { return module.forward({q_data, torch::jit::IValue(), mask, bias}).toTensor().square().mean(); };

  const at::Tensor before = loss();
  before.backward();
  print("loss", before);
  for (const auto& parameter : module.named_parameters()) print(parameter.name, parameter.value.grad());
  optimizer.step();
  print("loss_after", loss());

  const at::Tensor heads = q_data.unsqueeze(-3);  // [*, 1, Q, D]
  print("function", torch_gated_attn::gated_attention(heads, heads, heads, /*gate=*/heads));
  return 0;
}
