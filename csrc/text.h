// A string that an operator is called with.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace condense {
struct Text : std::string {
  using std::string::string;
};
}  // namespace condense

// Torch's own conversion to std::string (2.10 to 2.13 at least) makes a copy with new and never deletes it: 32 bytes
// and more of each call, forever. This one does as torch documents it: the string behind the handle becomes ours.
template <>
struct torch::stable::detail::ToImpl<condense::Text> {
  static condense::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    condense::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
