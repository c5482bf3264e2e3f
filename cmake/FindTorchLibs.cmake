# SPDX-License-Identifier: BSD-3-Clause
#
# The headers and libraries of any torch, a pip wheel or a libtorch archive, with or without CUDA, as the target torch::core.
# TORCH_ROOT names the folder with include/ and lib/; without it, the torch that python3 imports is taken.
#
# Sets TORCH_C10_CUDA_LIBRARY where torch is a CUDA build.
if(NOT TORCH_ROOT)
  find_package(Python3 COMPONENTS Interpreter QUIET)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
      "import importlib.util as util; print(util.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(TORCH_INCLUDE_DIR torch/library.h HINTS ${TORCH_ROOT}/include)
foreach(name torch torch_cpu c10 c10_cuda)
  string(TOUPPER TORCH_${name}_LIBRARY variable)
  string(REPLACE TORCH_TORCH_ TORCH_ variable ${variable})
  find_library(${variable} ${name} HINTS ${TORCH_ROOT}/lib)
  mark_as_advanced(${variable})
endforeach()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchLibs
  REQUIRED_VARS TORCH_LIBRARY TORCH_CPU_LIBRARY TORCH_C10_LIBRARY TORCH_INCLUDE_DIR
  FAIL_MESSAGE "torch was not found: set TORCH_ROOT to the folder that holds its include/ and lib/")
if(TorchLibs_FOUND AND NOT TARGET torch::core)
  add_library(torch::core INTERFACE IMPORTED)
  target_include_directories(torch::core INTERFACE ${TORCH_INCLUDE_DIR} ${TORCH_INCLUDE_DIR}/torch/csrc/api/include)
  target_link_libraries(torch::core INTERFACE ${TORCH_LIBRARY} ${TORCH_CPU_LIBRARY} ${TORCH_C10_LIBRARY})
  target_compile_features(torch::core INTERFACE cxx_std_20)
endif()
