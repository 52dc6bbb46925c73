// Runs a package of AOTInductor that uses the operators of condense_kernels. No Python here.
//
//   condense_aot LIBRARY PACKAGE INPUTS RESULTS
//
// LIBRARY   condense_kernels/_C.abi3.so, which registers the operators in the process that loads it
// PACKAGE   what torch._inductor.aoti_compile_and_package wrote
// INPUTS    torch.save of a list of calls, each a list of tensors
// RESULTS   will hold a tuple of the calls' results, each a tuple of tensors; torch.load reads it

#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void load_operators(const std::string& library) {
  if (dlopen(library.c_str(), RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
}

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("cannot write " + path);
}

// pickle leaves open what a list holds.
std::vector<at::Tensor> tensors_of(const c10::IValue& list) {
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

template <typename Value>
c10::IValue as_tuple(const std::vector<Value>& values) {
  return c10::ivalue::Tuple::create(std::vector<c10::IValue>(values.begin(), values.end()));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) throw std::invalid_argument("expected LIBRARY PACKAGE INPUTS RESULTS");
  const c10::InferenceMode no_gradients;
  load_operators(argv[1]);  // before the package, which looks them up
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const c10::IValue inputs = torch::jit::pickle_load(read(argv[3]));
  std::vector<c10::IValue> results;
  for (const c10::IValue& call : inputs.toListRef()) {
    results.push_back(as_tuple(model.run(tensors_of(call))));
  }
  write(argv[4], torch::jit::pickle_save(as_tuple(results)));
} catch (const std::exception& error) {
  std::cerr << "condense_aot: " << error.what() << '\n';
  return 1;
}
