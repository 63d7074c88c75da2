// All kernels for one instruction set. CMake compiles this file once for each, with its flags and its name as
// SKINK_ISA.
#include "skink/kernels/attention/cpu.h"
#include "skink/kernels/low_rank_linear/cpu.h"
#include "skink/kernels/pivoted_linear/cpu.h"
#include "skink/kernels/rms_norm/cpu.h"
#include "skink/kernels/rotary/cpu.h"

namespace skink::SKINK_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    rms_norm,        rotary,
    attention,       attention_scratch,
    low_rank_linear, low_rank_linear_scratch,
    pivoted_linear,  pivoted_linear_scratch,
};

}  // namespace skink::SKINK_ISA
