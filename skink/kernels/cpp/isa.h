// The instruction sets that the kernels are compiled for, and which of them this process uses.
#pragma once

#include "problem.h"

namespace skink {

// The kernels in use: the best that the processor runs, unless select_instruction_set chose another.
const Kernels& kernels();

// Uses the instruction set of this name from now on; false where it is unknown, not compiled in, or not of this
// processor. Not for use while kernels run.
bool select_instruction_set(const char* name);

// The name of instruction set `index` that this processor runs, from the plainest up, or null past the last.
const char* instruction_set(int index);

const char* selected_instruction_set();

}  // namespace skink
