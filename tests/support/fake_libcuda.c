/* Stands in for CUDA's driver: a launch is written down instead of done, a descriptor is a hash of what it describes. */
#include "cuda.h"
#include <stdint.h>
#include <string.h>

int parameters = 0, sizes[64];  /* of the kernel that is launched next: how many, and the bytes of each to write down */
unsigned long long written[80];
unsigned cluster, overlaps, allowed[16];  /* of the last launch; what functions were allowed, by attribute */
int answers[8];  /* what the next launches answer, the last one first */
int waiting = 0, entered = 0, cached = 0;

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  unsigned long long head[] = {config->gridDimX,       config->gridDimY, config->gridDimZ, config->blockDimX,
                               config->sharedMemBytes, config->numAttrs, (uintptr_t)config->hStream, (uintptr_t)function};
  memset(written, 0, sizeof written);
  memcpy(written, head, sizeof head);
  cluster = overlaps = 0;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const CUlaunchAttribute *attribute = config->attrs + i;
    if (attribute->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = attribute->value.clusterDim.x;
    if (attribute->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      overlaps = attribute->value.programmaticStreamSerializationAllowed;
  }
  for (int i = 0; arguments && i < parameters; i++) memcpy(written + 8 + i, arguments[i], sizes[i]);
  return waiting ? answers[--waiting] : CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)(uintptr_t)*(const unsigned char *)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)((uintptr_t)module + (unsigned char)*name);
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  allowed[attribute] = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  cached = config;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = "as the test wished";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = 40 + ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(uintptr_t)device;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  entered = (uintptr_t)context;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *shape,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  uint64_t hash = (uintptr_t)address * 31 + type * 7 + swizzle;
  for (unsigned i = 0; i < rank; i++) {
    hash = (hash * 1000003 + shape[i]) * 1000003 + box[i];
    if (i + 1 < rank) hash = hash * 1000003 + strides[i];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &hash, sizeof hash);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

/* Asked for by name only, never called. */
#define ABSENT(name) __asm__(".globl " #name "\n" #name ": ud2");
ABSENT(cuCtxGetLimit) ABSENT(cuCtxSetLimit) ABSENT(cuDeviceGetAttribute) ABSENT(cuFuncGetAttribute)
ABSENT(cuOccupancyMaxActiveClusters) ABSENT(cuCtxGetDevice) ABSENT(cuStreamIsCapturing)
ABSENT(cuTensorMapEncodeIm2col)
