// A CUDA device that computes nothing. Preloaded, it replaces the CUDA runtime, driver and cuBLAS.
// Device memory is host memory (mapped when touched) and copies from the host are real. Kernels are counted but
// not run, and what is read back is zero. Every copy and every wait of the host is reported.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef void (*report_t)(const char *call, size_t bytes, int pinned);
static report_t report_to;
static atomic_long launches;
static __thread int reporting;
static int devices = 1, multiprocessors = 132, major = 9, minor = 0;
static const size_t total_memory = 80ull << 30;

__attribute__((constructor)) static void configure(void) {
  const char *count = getenv("NULLGPU_COUNT");
  if (count) devices = atoi(count);
}
void nullgpu_set_report(report_t function) { report_to = function; }
long nullgpu_launches(void) { return launches; }
static void report(const char *call, size_t bytes, int pinned) {
  if (!report_to || reporting) return;
  reporting = 1;
  report_to(call, bytes, pinned);
  reporting = 0;
}

// ---- memory ----
enum { UNKNOWN, HOST, DEVICE };
typedef struct { uintptr_t start; size_t size; int kind; } block_t;
static block_t *blocks;
static size_t used, capacity, device_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add_block(void *start, size_t size, int kind) {
  pthread_mutex_lock(&lock);
  if (used == capacity) {
    capacity = capacity ? 2 * capacity : 1024;
    blocks = realloc(blocks, capacity * sizeof(block_t));
  }
  blocks[used++] = (block_t){(uintptr_t)start, size, kind};
  if (kind == DEVICE) device_bytes += size;
  pthread_mutex_unlock(&lock);
}
static block_t find_block(const void *pointer, int forget) {
  block_t found = {0, 0, UNKNOWN};
  uintptr_t at = (uintptr_t)pointer;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < used; i++) {
    if (at < blocks[i].start || at >= blocks[i].start + blocks[i].size) continue;
    found = blocks[i];
    if (forget) {
      if (found.kind == DEVICE) device_bytes -= found.size;
      blocks[i] = blocks[--used];
    }
    break;
  }
  pthread_mutex_unlock(&lock);
  return found;
}
static int kind_of(const void *pointer) { return find_block(pointer, 0).kind; }
static cudaError_t allocate(void **pointer, size_t size, int kind) {
  size = size ? (size + 4095) & ~(size_t)4095 : 4096;
  void *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
  add_block(start, size, kind);
  *pointer = start;
  return 0;
}
static cudaError_t release(void *pointer) {
  block_t found = find_block(pointer, 1);
  if (found.kind) munmap(pointer, found.size);
  return 0;
}
cudaError_t cudaMalloc(void **p, size_t size) { return allocate(p, size, DEVICE); }
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t s) { return allocate(p, size, DEVICE); }
cudaError_t cudaFree(void *p) { if (p) report("cudaFree", 0, 0); return release(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return release(p); }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) { return allocate(p, size, HOST); }
cudaError_t cudaFreeHost(void *p) { return release(p); }
cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) { add_block(p, size, HOST); return 0; }
cudaError_t cudaHostUnregister(void *p) { find_block(p, 1); return 0; }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = total_memory;
  *unused = total_memory - device_bytes;
  return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  int kind = kind_of(p);
  memset(a, 0, sizeof *a);
  a->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == HOST ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->devicePointer = a->hostPointer = (void *)p;
  return 0;
}
static cudaError_t copy(void *to, const void *from, size_t bytes, const char *up, const char *down) {
  int target = kind_of(to), source = kind_of(from);
  if (source == DEVICE && target == DEVICE) return 0;
  if (source == DEVICE) memset(to, 0, bytes);
  else memcpy(to, from, bytes);
  report(source == DEVICE ? down : up, bytes, (source == DEVICE ? target : source) == HOST);
  return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind k, cudaStream_t s) {
  return copy(to, from, bytes, "cudaMemcpyAsync to device", "cudaMemcpyAsync to host");
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind k) {
  return copy(to, from, bytes, "cudaMemcpy to device", "cudaMemcpy to host");
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { // large memory stays unmapped
  if (bytes < 65536) memset(p, value, bytes);
  return 0;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s) { return cudaMemset(p, value, bytes); }

// ---- waits ----
cudaError_t cudaStreamSynchronize(cudaStream_t s) { report("cudaStreamSynchronize", 0, 0); return 0; }
cudaError_t cudaDeviceSynchronize(void) { report("cudaDeviceSynchronize", 0, 0); return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { report("cudaEventSynchronize", 0, 0); return 0; }

// ---- launches ----
static int launch(void) { launches++; return 0; }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { return launch(); }
cudaError_t __cudaLaunchKernel(void *k, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { return launch(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launch(); }
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) {
  return launch();
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) { f(data); return 0; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned flags) {
  f(s, 0, data);
  return 0;
}

// ---- device ----
static __thread int current;
cudaError_t cudaGetDeviceCount(int *n) { *n = devices; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = current; return 0; }
cudaError_t cudaSetDevice(int device) { current = device; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Null GPU");
  p->major = major, p->minor = minor, p->multiProcessorCount = multiprocessors, p->totalGlobalMem = total_memory;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = 50 << 20, p->memoryBusWidth = 5120, p->asyncEngineCount = 3, p->unifiedAddressing = 1;
  p->canMapHostMemory = 1, p->concurrentKernels = 1, p->textureAlignment = 512;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch ((int)attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerBlock; break;
    case cudaDevAttrClockRate: *value = 1755000; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    default: *value = 0;
  }
  return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) { snprintf(id, length, "0000:00:00.0"); return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; return 0; }
const char *cudaGetErrorString(cudaError_t error) { return error ? "null GPU error" : "no error"; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorNull" : "cudaSuccess"; }

static atomic_uintptr_t serial = 0x1000;
#define NEW(handle) (*(void **)(handle) = (void *)(serial += 16), 0)
cudaError_t cudaStreamCreate(cudaStream_t *s) { return NEW(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return NEW(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return NEW(s); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) { *status = 0; return 0; }
#if CUDART_VERSION >= 13000
#define EDGES const cudaGraphEdgeData **edges,
#else
#define EDGES
#endif
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **nodes, EDGES size_t *count) {
  *status = 0;
  if (id) *id = 0;
  if (count) *count = 0;
  return 0;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return NEW(e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return NEW(e); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 0.001f; return 0; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 10 * major + minor;
  a->maxDynamicSharedSizeBytes = 49152;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t m) { *n = 4; return 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t m, unsigned l) {
  *n = 4;
  return 0;
}
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { static char room[1 << 16]; *p = room; return 0; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { return NEW(pool); }

// ---- driver: called by torch and by Triton's launcher ----
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = devices; return 0; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return 0; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) { snprintf(name, length, "Null GPU"); return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return cudaDeviceGetAttribute(value, (int)attribute, device);
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)0x10; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)0x10; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = current; return 0; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute a, CUdeviceptr p) { memset(data, 0, 8); return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "null GPU error"; return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return NEW(module); }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) { return NEW(f); }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, CUstream s, void **parameters, void **extra) {
  return launch();
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) { return launch(); }
static int nothing(void) { return 0; }
static void *own_or_nothing(const char *name) {
  void *own = dlsym(RTLD_DEFAULT, name);
  return own ? own : (void *)nothing;
}
CUresult cuGetProcAddress_v2(const char *name, void **f, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *status) {
  *f = own_or_nothing(name);
  if (status) *status = 0;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *status) {
  *f = own_or_nothing(name);
  if (status) *status = 0;
  return 0;
}

// ---- cuBLAS ----
typedef void *handle_t;
typedef struct { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } heuristic_t;
int cublasCreate_v2(handle_t *h) { return NEW(h); }
int cublasGetMathMode(handle_t h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(handle_t h, int *mode) { *mode = 0; return 0; }
int cublasLtCreate(handle_t *h) { return NEW(h); }
size_t cublasLtGetVersion(void) { return 130101; }
int cublasLtMatmulDescCreate(handle_t *d, int compute, int scale) { return NEW(d); }
int cublasLtMatrixLayoutCreate(handle_t *l, int type, uint64_t rows, uint64_t columns, int64_t ld) { return NEW(l); }
int cublasLtMatmulPreferenceCreate(handle_t *p) { return NEW(p); }
int cublasLtMatmulAlgoGetHeuristic(handle_t h, handle_t d, handle_t a, handle_t b, handle_t c, handle_t e, handle_t p,
    int wanted, heuristic_t *result, int *found) {
  memset(result, 0, sizeof *result);
  *found = 1;
  return 0;
}
int cublasLtMatmulAlgoCheck(handle_t h, handle_t d, handle_t a, handle_t b, handle_t c, handle_t e, handle_t algorithm,
    heuristic_t *result) {
  memset(result, 0, sizeof *result);
  return 0;
}
#define PRODUCT(name) int name() { return launch(); }
PRODUCT(cublasLtMatmul) PRODUCT(cublasSgemm_v2) PRODUCT(cublasGemmEx) PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2) PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemv_v2)
