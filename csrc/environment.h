// The environment variables that the library reads by itself, as there may be no Python: the counterpart of
// condense_kernels/_dispatch/environment.py. One that is empty is not set; any other wrong value throws.
#pragma once

#include <cstdint>
#include <optional>

namespace condense {

enum class InstructionSet { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// CONDENSE_CPU_CAPABILITY: the best instruction set that may be used. AMX has to be asked for by name: its code has run
// in emulation, but not yet on a processor that has it.
InstructionSet allowed_instruction_set();

// CONDENSE_STORED_TOKENS: up to how many tokens an image's similarities are stored; else costs decide (storing.h).
std::optional<int64_t> stored_tokens();

}  // namespace condense
