// SPDX-License-Identifier: BSD-3-Clause
//
// train MODULE INPUTS LEARNING_RATE
//
// Loads a scripted or traced GatedAttention and the tensors (q_data, bias, mask) that Python saved, takes one step of
// gradient descent on the mean square of the result, and prints every gradient and the loss before and after. Then the
// functions of the C++ interface attend q_data to itself, with a gradient.
#include <gated_attention.h>
#include <torch/optim/sgd.h>
#include <torch/script.h>

#include "tensors.h"

namespace {

void train(const std::string& path, const std::vector<at::Tensor>& inputs, double learning_rate) {
  torch::jit::Module module = torch::jit::load(path);
  const auto &q_data = inputs.at(0), &bias = inputs.at(1), &mask = inputs.at(2);
  std::vector<at::Tensor> parameters;
  for (const at::Tensor& parameter : module.parameters()) parameters.push_back(parameter);
  torch::optim::SGD optimizer(parameters, learning_rate);
  const auto loss = [&] { return module.forward({q_data, q_data, mask, bias}).toTensor().square().mean(); };

  const at::Tensor before = loss();
  before.backward();
  print("loss", before);
  for (const auto& parameter : module.named_parameters()) print(parameter.name, parameter.value.grad());
  optimizer.step();
  print("loss_after", loss());
}

void attend(const at::Tensor& q_data) {
  const at::Tensor query = q_data.unsqueeze(-3).detach().requires_grad_();  // [*, 1, Q, D]
  const auto [out, lse] = torch_gated_attn::gated_attention_with_lse(query, query, query, /*gate=*/query);
  (out.sum() + lse.sum()).backward();
  print("out", out);
  print("lse", lse);
  print("d_query", query.grad());
  print("mean_rows", torch_gated_attn::gated_attention(query, query, query, /*gate=*/{}, /*bias=*/{},
                                                       /*mask=*/at::zeros({1}, at::kBool), /*scale=*/1.0, "mean"));
  print("causal", torch_gated_attn::gated_attention(query, query, query, /*gate=*/{}, /*bias=*/{}, /*mask=*/{},
                                                    /*scale=*/{}, "zero", /*is_causal=*/true, /*window=*/2,
                                                    /*key_lengths=*/at::full({query.size(0)}, 4, at::kLong)));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s MODULE INPUTS LEARNING_RATE\n", argv[0]);
    return 2;
  }
  const auto inputs = load_tensors(argv[2]);
  train(argv[1], inputs, std::stod(argv[3]));
  attend(inputs.at(0));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
