# Compiles the loop bodies once per instruction set. Every source is compiled with SELA_ISA set to the name of the
# namespace it must put all of its code into, so that no inline function of one build can be linked into another.
include(CheckCXXCompilerFlag)

set(SELA_ISAS generic)
set(SELA_ISA_OPTIONS_generic "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND SELA_ISAS avx2 avx512)
  set(SELA_ISA_OPTIONS_avx2 -mavx2 -mfma -mf16c)
  set(SELA_ISA_OPTIONS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mfma -mf16c -mprefer-vector-width=512)
endif()

# Compiled at the first call, shared by all targets.
function(sela_add_loops target)
  if(NOT ARGN)
    return()
  endif()
  foreach(isa IN LISTS SELA_ISAS)
    set(loops sela_loops_${isa})
    if(NOT TARGET ${loops})
      add_library(${loops} OBJECT ${ARGN})
      target_link_libraries(${loops} PRIVATE sela_settings)
      target_compile_definitions(${loops} PRIVATE SELA_ISA=${isa} SELA_ISA_${isa}=1)
      target_compile_options(${loops} PRIVATE -O3 -fno-math-errno -fno-trapping-math ${SELA_ISA_OPTIONS_${isa}})
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${loops}>)
  endforeach()
endfunction()
