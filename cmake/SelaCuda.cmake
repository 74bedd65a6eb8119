# Finds CUDA as SELA_CUDA asks, says which was chosen, and fixes the architectures.

# Architectures shipped as machine code; the newest is shipped as PTX too, for cards newer than the toolkit.
set(SELA_SHIPPED_ARCHS 75-real 80-real 86-real 90-real 100-real 120)

# Sets CMAKE_CUDA_ARCHITECTURES from SELA_CUDA_ARCHS, a list such as "80;90-real;120" with ; , or spaces between.
macro(sela_choose_archs)
  string(REGEX REPLACE "[ ,;]+" ";" CMAKE_CUDA_ARCHITECTURES "${SELA_CUDA_ARCHS}")
  if(CMAKE_CUDA_ARCHITECTURES STREQUAL "")
    set(CMAKE_CUDA_ARCHITECTURES "${SELA_SHIPPED_ARCHS}")
  endif()
  foreach(arch IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(NOT arch MATCHES "^[0-9]+[af]?(-real|-virtual)?$")
      message(FATAL_ERROR
        "SELA_CUDA_ARCHS: expected architectures such as \"80;90\" (machine code and PTX), \"90-real\" (machine code "
        "only) or \"90-virtual\" (PTX only), found \"${SELA_CUDA_ARCHS}\"")
    endif()
  endforeach()
endmacro()

macro(sela_find_cuda)
  string(TOUPPER "${SELA_CUDA}" SELA_CUDA_MODE)
  if(SELA_CUDA_MODE STREQUAL "")
    set(SELA_CUDA_MODE AUTO)
  endif()
  if(NOT SELA_CUDA_MODE MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "SELA_CUDA: expected AUTO, ON or OFF, found \"${SELA_CUDA}\"")
  endif()
  set(SELA_HAVE_CUDA FALSE)
  if(NOT SELA_CUDA_MODE STREQUAL "OFF")
    sela_choose_archs()
    # An earlier run in this folder may have found no nvcc, or one that has gone since: look again.
    if(NOT EXISTS "${CMAKE_CUDA_COMPILER}")
      unset(CMAKE_CUDA_COMPILER CACHE)
    endif()
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_STANDARD 17)
      set(CMAKE_CUDA_STANDARD_REQUIRED ON)
      set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
      enable_language(CUDA)
      set(SELA_HAVE_CUDA TRUE)
    elseif(SELA_CUDA_MODE STREQUAL "ON")
      message(FATAL_ERROR
        "SELA_CUDA=ON, but no CUDA compiler was found. Put nvcc on the PATH (or set CUDACXX), or build with SELA_CUDA=AUTO or OFF.")
    endif()
  endif()
  if(SELA_HAVE_CUDA)
    message(STATUS "sela_ext: CUDA kernels: yes (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES})")
  else()
    message(STATUS "sela_ext: CUDA kernels: no (SELA_CUDA=${SELA_CUDA_MODE})")
  endif()
endmacro()

# Compile options of CUDA sources and the definitions that build_info() reports (empty ones without CUDA).
function(sela_link_cuda target)
  if(NOT SELA_HAVE_CUDA)
    target_compile_definitions(${target} PRIVATE SELA_CUDA_VERSION="" SELA_CUDA_ARCHS="" SELA_CUDA_PTX="")
    return()
  endif()
  set(machine_code ${CMAKE_CUDA_ARCHITECTURES})
  list(FILTER machine_code EXCLUDE REGEX "-virtual$")
  list(TRANSFORM machine_code REPLACE "-real$" "")
  set(ptx ${CMAKE_CUDA_ARCHITECTURES})
  list(FILTER ptx EXCLUDE REGEX "-real$")
  list(TRANSFORM ptx REPLACE "-virtual$" "")
  list(JOIN machine_code " " machine_code)
  list(JOIN ptx " " ptx)
  target_compile_definitions(${target} PRIVATE
    SELA_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
    SELA_CUDA_ARCHS="${machine_code}"
    SELA_CUDA_PTX="${ptx}")
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Xcompiler=-Wall,-fvisibility=hidden>)
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endfunction()
