/* Stands in for CUDA's driver: a launch is written down instead of done, a descriptor is a hash of what it describes. */
#include "cuda.h"
#include <stdint.h>
#include <string.h>

int parameters = 0, sizes[64];  /* of the kernel that is launched next: how many, and the bytes of each to write down */
unsigned long long written[80];

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  unsigned long long head[] = {config->gridDimX,       config->gridDimY, config->gridDimZ, config->blockDimX,
                               config->sharedMemBytes, config->numAttrs, (uintptr_t)config->hStream, (uintptr_t)function};
  memset(written, 0, sizeof written);
  memcpy(written, head, sizeof head);
  for (int i = 0; i < parameters; i++) memcpy(written + 8 + i, arguments[i], sizes[i]);
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
ABSENT(cuGetErrorString) ABSENT(cuCtxGetLimit) ABSENT(cuCtxSetCurrent) ABSENT(cuCtxSetLimit) ABSENT(cuDeviceGet)
ABSENT(cuDeviceGetAttribute) ABSENT(cuDevicePrimaryCtxRetain) ABSENT(cuFuncGetAttribute) ABSENT(cuFuncSetAttribute)
ABSENT(cuFuncSetCacheConfig) ABSENT(cuModuleGetFunction) ABSENT(cuModuleLoadData) ABSENT(cuOccupancyMaxActiveClusters)
ABSENT(cuCtxGetDevice) ABSENT(cuStreamIsCapturing) ABSENT(cuTensorMapEncodeIm2col)
