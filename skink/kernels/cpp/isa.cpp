#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace skink {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(SKINK_WITH_X86)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

struct InstructionSet {
    const char* name;
    const Kernels* kernels;
    bool (*runs)();
};

#if defined(SKINK_WITH_X86)
// __builtin_cpu_supports also asks whether the operating system saves the registers; older compilers do not know f16c.
bool has_avx2() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C) != 0;
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const InstructionSet kSets[] = {
    {"baseline", &baseline::kKernels, [] { return true; }},
#if defined(SKINK_WITH_X86)
    {"avx2", &avx2::kKernels, has_avx2},
    {"avx512", &avx512::kKernels, has_avx512},
#endif
};

const InstructionSet* best() {
    const InstructionSet* found = &kSets[0];
    for (const InstructionSet& set : kSets)
        if (set.runs()) found = &set;
    return found;
}

std::atomic<const InstructionSet*>& selected() {
    static std::atomic<const InstructionSet*> set{best()};
    return set;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed)->kernels; }

bool select_instruction_set(const char* name) {
    for (const InstructionSet& set : kSets)
        if (std::strcmp(set.name, name) == 0 && set.runs()) {
            selected().store(&set);
            return true;
        }
    return false;
}

const char* instruction_set(int index) {
    for (const InstructionSet& set : kSets)
        if (set.runs() && index-- == 0) return set.name;
    return nullptr;
}

const char* selected_instruction_set() { return selected().load()->name; }

}  // namespace skink

extern "C" {

// For ctypes; see library.py.
__attribute__((visibility("default"))) int skink_select_instruction_set(const char* name) {
    return skink::select_instruction_set(name) ? 1 : 0;
}
__attribute__((visibility("default"))) const char* skink_instruction_set(int index) {
    return skink::instruction_set(index);
}
__attribute__((visibility("default"))) const char* skink_selected_instruction_set() {
    return skink::selected_instruction_set();
}
}
