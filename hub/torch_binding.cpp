// The operators register themselves (csrc/). This is what lets Python import the library; registration.h is
// kernel-builder's.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
