// What a GPU's parts cost by themselves: benchmarks/gpu/checklist.py runs these before anything else.

#if __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS  // and kernels that overlap with their predecessors
#endif

__device__ __forceinline__ void wait_for_predecessor() {
#ifdef HAS_CLUSTERS
    asm volatile("griddepcontrol.wait;");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#ifdef LOOP  // by itself, because its symbol is resolved by the driver when it is loaded

extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned value);

// A loop on the device: `limit` rounds.
extern "C" __global__ void again(int* count, int limit, unsigned long long handle) {
    wait_for_predecessor();
    if (threadIdx.x == 0) cudaGraphSetConditional(handle, ++*count < limit);
}

#else

extern "C" __global__ void nothing(int* count) {
    wait_for_predecessor();
    if (count && threadIdx.x == 0 && blockIdx.x == 0) ++*count;
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

// All blocks wait for each other as grid.sync of cooperative groups has them wait: these are the instructions that it
// compiles to (CUDA 13.5), with a counter of our own. Block 0 adds what makes all additions flip the highest bit.
extern "C" __global__ void grid_sync(unsigned* counter, int rounds) {
    const unsigned mine = blockIdx.x ? 1 : 0x80000000u - (gridDim.x - 1);
    for (int round = 0; round < rounds; round++) {
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned before, now;
            asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(mine) : "memory");
            do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
            while (((before ^ now) & 0x80000000u) == 0);
        }
        __syncthreads();
    }
}

// A layer for 8 rows as a matrix-vector product on the tensor core: output (8, 16 blocks) = input (8, k) weight^T, all
// float16. A block has 16 outputs, and its 8 warps share out k, 32 numbers at a time: 16 bytes a thread, which are the
// fragments of two instructions, as in kernels/dense.cuh.
extern "C" __global__ void gemv(const uint4* weight, const uint4* input, float* output, int k, int rounds) {
    __shared__ float shares[8][128];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, chunks = k / 32;
    const uint4* top = weight + (long long)(16 * blockIdx.x + g) * (k / 8) + t;
    const uint4* bottom = top + 8 * (k / 8);
    auto load = [](const uint4* at) {  // from L2, every time
        uint4 x;
        asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "l"(at));
        return x;
    };
    for (int round = 0; round < rounds; round++) {
        float sums[4] = {};
        auto multiply = [&](unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                         "{%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
        };
        for (int chunk = warp; chunk < chunks; chunk += 8) {
            uint4 a = load(top + 4 * chunk), b = load(bottom + 4 * chunk);
            uint4 x = load(input + g * (k / 8) + 4 * chunk + t);
            multiply(a.x, b.x, a.y, b.y, x.x, x.y);
            multiply(a.z, b.z, a.w, b.w, x.z, x.w);
        }
        for (int i = 0; i < 4; i++) shares[warp][(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
        __syncthreads();
        if (threadIdx.x < 128) {
            float sum = 0;
            for (int i = 0; i < 8; i++) sum += shares[i][threadIdx.x];
            output[(threadIdx.x % 8 * gridDim.x + blockIdx.x) * 16 + threadIdx.x / 8] = sum;
        }
        __syncthreads();
    }
}

#ifdef HAS_CLUSTERS

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

// The processor that each block runs on. Blocks stay long enough that all of them have to be there at once.
extern "C" __global__ void whereabouts(unsigned* processor, int nanoseconds) {
    unsigned here;
    unsigned long long from, now;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(here));
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(from));
    if (threadIdx.x == 0) processor[blockIdx.x] = here;
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now - from < (unsigned long long)nanoseconds);
    cluster_wait();
}

#endif

#endif
