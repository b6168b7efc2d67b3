// What a GPU's parts cost by themselves: benchmarks/gpu/checklist.py runs these before anything else.

extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned value);

extern "C" __global__ void nothing(int* count) {
    asm volatile("griddepcontrol.wait;");
    asm volatile("griddepcontrol.launch_dependents;");
    if (count && threadIdx.x == 0 && blockIdx.x == 0) ++*count;
}

// A loop on the device: `limit` rounds.
extern "C" __global__ void again(int* count, int limit, unsigned long long handle) {
    asm volatile("griddepcontrol.wait;");
    if (threadIdx.x == 0) cudaGraphSetConditional(handle, ++*count < limit);
}

// Every block reads its share of a buffer, 16 bytes a thread, `rounds` times.
extern "C" __global__ void stream(const uint4* data, int chunks, int rounds, unsigned* sink) {
    unsigned total = 0;
    for (int round = 0; round < rounds; round++)
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < chunks; i += gridDim.x * blockDim.x) {
            uint4 x;
            asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                         : "l"(data + i));
            total += x.x ^ x.y ^ x.z ^ x.w;
        }
    if (total == 0x12345678) *sink = total;  // never; but the compiler cannot know
}

// All blocks wait for each other: one counter, one thread a block.
extern "C" __global__ void grid_barrier(unsigned* counter, int rounds) {
    for (unsigned round = 1; round <= (unsigned)rounds; round++) {
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned seen;
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
            while (seen < round * gridDim.x);
        }
        __syncthreads();
    }
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

extern "C" __global__ void cluster_barrier(int rounds) {
    for (int round = 0; round < rounds; round++) cluster_wait();
}

// Each block of a cluster reads 512 bytes of the shared memory of every other block.
extern "C" __global__ void cluster_gather(int rounds, unsigned* sink) {
    __shared__ unsigned slice[128];
    unsigned size, total = 0, here = (unsigned)__cvta_generic_to_shared(slice + threadIdx.x % 128);
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    slice[threadIdx.x % 128] = threadIdx.x;
    for (int round = 0; round < rounds; round++) {
        cluster_wait();
        for (unsigned rank = 0; rank < size; rank++) {
            unsigned there, x;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
            asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(there));
            total += x;
        }
    }
    cluster_wait();
    if (total == 0x12345678) *sink = total;
}

// Only to ask how many clusters of so many large blocks fit.
extern "C" __global__ void large(int* sink) {
    extern __shared__ int memory[];
    memory[threadIdx.x] = threadIdx.x;
    __syncthreads();
    if (sink) *sink = memory[blockDim.x - 1 - threadIdx.x];
}
