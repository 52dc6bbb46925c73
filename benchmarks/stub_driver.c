// A CUDA driver without a GPU: modules load, launches are counted and recorded, nothing runs. See stub_driver.py.
//
// What Triton's driver.c and its launcher call, with the declarations of the cuda.h that Triton brings.

#include <cuda.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_ATTRIBUTES 256
#define MAX_PARAMS 128

typedef struct Function {
  char name[256];
  long long launches;
  int num_params, size[MAX_PARAMS], offset[MAX_PARAMS]; // as the cubin has them
  struct Function* next;
} Function;

typedef struct Module {
  const char* image;
  Function* functions;
} Module;

typedef struct Launch {
  Function* function;
  unsigned grid[3], threads, shared;
  uint64_t stream;
  int bytes;
  unsigned char params[4096];
  struct Launch* next;
} Launch;

static int attributes[MAX_ATTRIBUTES];
static int num_devices = 1;
static _Thread_local int current_device;
static Function* functions; // of all modules; they outlive them, as do their counts
static Launch *first_launch, *last_launch;
static int recording;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// ---- For stub_driver.py ----

void stub_set_attribute(int attribute, int value) { attributes[attribute] = value; }

void stub_set_devices(int count) { num_devices = count; }

void stub_record(int on) { recording = on; }

void* stub_functions(void) { return functions; }

void* stub_take_launches(void) {
  pthread_mutex_lock(&lock);
  Launch* taken = first_launch;
  first_launch = last_launch = NULL;
  pthread_mutex_unlock(&lock);
  return taken;
}

void stub_free_launches(Launch* launch) {
  while (launch) {
    Launch* next = launch->next;
    free(launch);
    launch = next;
  }
}

// ---- Devices and contexts: the context of device i is i + 1 ----

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = num_devices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < num_devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  if ((unsigned)attribute >= MAX_ATTRIBUTES) return CUDA_ERROR_INVALID_VALUE;
  *value = attributes[attribute];
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)(intptr_t)(device + 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, current_device); }

CUresult cuCtxSetCurrent(CUcontext context) {
  current_device = (int)(intptr_t)context - 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

// ---- Modules and functions ----

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  Module* loaded = calloc(1, sizeof(Module));
  loaded->image = image; // alive until the function is looked up, which Triton does at once
  *module = (CUmodule)loaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}

// Sizes and offsets of a kernel's parameters: of the section .nv.info.NAME of a cubin, a 64-bit ELF file, the
// attributes 0x17 (KPARAM_INFO): index, ordinal, offset, and the size from bit 18 of the last word.
static void read_params(Function* function, const char* image) {
  uint64_t start, offset, length;
  uint16_t count, names_at;
  if (memcmp(image, "\177ELF", 4) != 0) return;
  memcpy(&start, image + 40, 8);
  memcpy(&count, image + 60, 2);
  memcpy(&names_at, image + 62, 2);
  const char* names = image + start + 64 * names_at;
  memcpy(&offset, names + 24, 8);
  names = image + offset;
  for (int i = 0; i < count; i++) {
    const char* section = image + start + 64 * i;
    uint32_t name;
    memcpy(&name, section, 4);
    if (strncmp(names + name, ".nv.info.", 9) != 0 || strcmp(names + name + 9, function->name) != 0) continue;
    memcpy(&offset, section + 24, 8);
    memcpy(&length, section + 32, 8);
    for (const char *at = image + offset, *end = at + length; at < end;) {
      const int format = at[0], attribute = at[1];
      uint16_t bytes, ordinal, place;
      uint32_t packed;
      memcpy(&bytes, at + 2, 2);
      if (format == 4 && attribute == 0x17) {
        memcpy(&ordinal, at + 8, 2);
        memcpy(&place, at + 10, 2);
        memcpy(&packed, at + 12, 4);
        if (ordinal < MAX_PARAMS) {
          function->size[ordinal] = packed >> 18;
          function->offset[ordinal] = place;
          if (ordinal >= function->num_params) function->num_params = ordinal + 1;
        }
      }
      at += 4 + (format == 4 ? bytes : 0);
    }
  }
}

CUresult cuModuleGetFunction(CUfunction* result, CUmodule module, const char* name) {
  Function* function = calloc(1, sizeof(Function));
  strncpy(function->name, name, sizeof(function->name) - 1);
  read_params(function, ((Module*)module)->image);
  pthread_mutex_lock(&lock);
  function->next = functions;
  functions = function;
  pthread_mutex_unlock(&lock);
  *result = (CUfunction)function;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

// ---- Launches ----

static void record(const CUlaunchConfig* config, Function* function, void** params) {
  Launch* launch = calloc(1, sizeof(Launch));
  launch->function = function;
  memcpy(launch->grid, &config->gridDimX, sizeof(launch->grid));
  launch->threads = config->blockDimX;
  launch->shared = config->sharedMemBytes;
  launch->stream = (uint64_t)config->hStream;
  for (int i = 0; i < function->num_params; i++) {
    const int end = function->offset[i] + function->size[i];
    if (end > (int)sizeof(launch->params)) break;
    memcpy(launch->params + function->offset[i], params[i], function->size[i]);
    if (end > launch->bytes) launch->bytes = end;
  }
  pthread_mutex_lock(&lock);
  *(last_launch ? &last_launch->next : &first_launch) = launch;
  last_launch = launch;
  pthread_mutex_unlock(&lock);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** params, void** extra) {
  Function* function = (Function*)handle;
  __atomic_fetch_add(&function->launches, 1, __ATOMIC_RELAXED);
  if (recording) record(config, function, params);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer; // memory of the host is taken for the device's
  return CUDA_SUCCESS;
}

// ---- Named by Triton's driver, and never called by our kernels ----

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "of the stub of the driver";
  return CUDA_SUCCESS;
}
