# SPDX-License-Identifier: BSD-3-Clause
list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR})
include(CMakeFindDependencyMacro)
find_dependency(TorchLibs)
include(${CMAKE_CURRENT_LIST_DIR}/TorchGatedAttnTargets.cmake)
