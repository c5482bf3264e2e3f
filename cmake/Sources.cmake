# SPDX-License-Identifier: BSD-3-Clause
#
# Reads the lists in csrc/ that setup.py reads too.

# The lines of csrc/<name> that are not comments.
function(library_lines result name)
  file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/${name} lines REGEX "^[^#]")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/${name})
  set(${result} ${lines} PARENT_SCOPE)
endfunction()

# The files that csrc/sources.txt lists for one part of the library.
function(library_sources result part)
  library_lines(lines sources.txt)
  list(FILTER lines INCLUDE REGEX "^${part} ")
  set(files)
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "^[a-z]+ +" "" pattern "${line}")
    file(GLOB found CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/${pattern})
    list(APPEND files ${found})
  endforeach()
  set(${result} ${files} PARENT_SCOPE)
endfunction()

# The flags that csrc/<name> lists for this compiler, system and TORCH_GATED_ATTN_BUILD.
function(library_flags result name)
  set(true always ${TORCH_GATED_ATTN_BUILD})
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    list(APPEND true clang)
  else()
    list(APPEND true gcc)
  endif()
  if(NOT APPLE)
    list(APPEND true elf)
  endif()
  library_lines(lines ${name})
  set(flags)
  foreach(line IN LISTS lines)
    string(REGEX REPLACE " .*" "" conditions "${line}")
    string(REGEX REPLACE "^[^ ]+ +" "" flag "${line}")
    string(REPLACE "," ";" conditions "${conditions}")
    list(REMOVE_ITEM conditions ${true})
    if(conditions STREQUAL "")
      list(APPEND flags ${flag})
    endif()
  endforeach()
  set(${result} ${flags} PARENT_SCOPE)
endfunction()
