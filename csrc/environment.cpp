#include "environment.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <optional>
#include <string>

#include "checks.h"

namespace condense {
namespace {

std::string text_of(const char* name) {
  const char* text = std::getenv(name);
  return text ? text : "";
}

[[noreturn]] void refuse(const char* name, const char* expected, const std::string& text) {
  fail(name, ": expected ", expected, ", got '", text, "'. Remedy: unset ", name, ", or see docs/environment.md.");
}

}  // namespace

InstructionSet allowed_instruction_set() {
  static constexpr char kName[] = "CONDENSE_CPU_CAPABILITY";
  static constexpr const char* kSets[] = {"default", "avx2", "avx512", "avx512_bf16", "amx"};
  const std::string text = text_of(kName);
  if (text.empty()) return InstructionSet::kAvx512Bf16;
  std::string lower = text;
  std::transform(text.begin(), text.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  const auto set = std::find(std::begin(kSets), std::end(kSets), lower);
  if (set == std::end(kSets)) refuse(kName, "one of default, avx2, avx512, avx512_bf16, amx", text);
  return static_cast<InstructionSet>(set - std::begin(kSets));
}

std::optional<int64_t> stored_tokens() {
  static const std::optional<int64_t> tokens = []() -> std::optional<int64_t> {
    static constexpr char kName[] = "CONDENSE_STORED_TOKENS";
    const std::string text = text_of(kName);
    if (text.empty()) return std::nullopt;
    const bool digits = text.find_first_not_of("0123456789") == std::string::npos;
    if (!digits || text.size() > 18) refuse(kName, "a number of 1 to 18 digits", text);
    return static_cast<int64_t>(std::stoll(text));
  }();
  return tokens;
}

}  // namespace condense
