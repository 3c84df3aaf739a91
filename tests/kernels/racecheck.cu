// What racecheck makes of the ways in which the Hopper kernels pass words through shared memory, all of them in order:
// each word is written, then an event, then read, and the next one is written once the readers have said so.
//
//     nvcc -arch=sm_90 -o racecheck racecheck.cu && compute-sanitizer --tool racecheck ./racecheck 0

#include <cstdint>
#include <cstdio>
#include <cstdlib>

__device__ uint32_t address(void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(bar)), "r"(count));
}

__device__ void arrive(uint64_t* bar) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(address(bar)) : "memory");
}

__device__ void wait(uint64_t* bar, int phase) {
  asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra L; }" ::"r"(address(bar)),
               "r"(phase)
               : "memory");
}

// A warp passes eight words to four others. ELECTED: one thread arrives for its warps, which have met before.
template <bool ELECTED>
__global__ void by_mbarriers(int* out) {
  __shared__ int word;
  __shared__ uint64_t full, empty;
  const int thread = threadIdx.x;
  if (thread == 0) {
    init(&full, ELECTED ? 1 : 32);
    init(&empty, ELECTED ? 1 : 128);
  }
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < 8; i++) {
    if (thread >= 128) {
      wait(&empty, (i & 1) ^ 1);
      if (thread == 159) word = i;
      __syncwarp();
      if (!ELECTED || thread == 128) arrive(&full);
    } else {
      wait(&full, i & 1);
      sum += word;
      asm volatile("bar.sync 1, 128;" ::: "memory");
      if (!ELECTED || thread == 0) arrive(&empty);
    }
  }
  out[thread] = sum;
}

// A warp passes eight words to four others, which wait at the same hardware barriers elsewhere in the program.
__global__ void by_hardware_barriers(int* out) {
  __shared__ int word;
  const int thread = threadIdx.x;
  int sum = 0;
  if (thread >= 128) {
    for (int i = 0; i < 8; i++) {
      if (thread == 159) word = i;
      asm volatile("barrier.sync 1;" ::: "memory");
      asm volatile("barrier.sync 1;" ::: "memory");
    }
  } else {
    for (int i = 0; i < 8; i++) {
      asm volatile("barrier.sync 1;" ::: "memory");
      sum += word;
      asm volatile("barrier.sync 1;" ::: "memory");
    }
  }
  out[thread] = sum;
}

int main(int, char** arguments) {
  int* out;
  cudaMalloc(&out, 160 * sizeof(int));
  switch (std::atoi(arguments[1])) {
    case 0:
      by_mbarriers<false><<<1, 160>>>(out);
      break;
    case 1:
      by_mbarriers<true><<<1, 160>>>(out);
      break;
    case 2:
      by_hardware_barriers<<<1, 160>>>(out);
  }
  int sum;
  const cudaError_t error = cudaMemcpy(&sum, out, sizeof sum, cudaMemcpyDeviceToHost);
  std::printf("%s, sum %d\n", cudaGetErrorString(error), sum);
  return error != cudaSuccess || sum != 28;
}
