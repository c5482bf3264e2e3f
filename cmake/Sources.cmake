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
