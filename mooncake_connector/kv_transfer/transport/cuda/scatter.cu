// Copies many ranges from this GPU's memory into another's (or its own), with few blocks.
//
// Ranges lie end to end in one long line of bytes; warps take shares of that line, one after the other as they
// get ready, and keep UNROLL independent loads in flight whatever the sizes of the ranges are. So the size of
// pages hardly matters, and multiprocessors that are farther from the link don't make others wait.

typedef unsigned long long u64;
typedef unsigned int u32;

constexpr u32 UNROLL = 4;
struct Gate {        // in memory of the target's process, which may close it at any time
    u64 closed;      // addresses; 0: there is no gate
    u64 grant;       // of the word that holds `key` while the grant lives
    u64 key;
    u64 entered;     // of one word per block: `ticket` while that block may be writing
    u64 ticket;
    u64 refused;     // of a word of the initiator: set if a block found the gate closed
};

struct Tiles {       // every range is n1 x n2 runs, set apart by strides on both sides
    u32 n2, run;
    long long src1, src2, dst1, dst2;
};

struct Job {
    u64 src, dst, end;  // addresses of arrays [n]; end: where each range ends in the line of bytes
    u64 next;           // address of the count of shares that were taken beyond the first of each warp
    u64 n, total, share;
    Gate gate;
    Tiles tiles;
};

__device__ u64 load_system(u64 address) {
    u64 value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ void store_system(u64 address, u64 value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// The block says that it is inside before it looks whether it may be. The target closes before it looks who
// is inside. Whatever the order, one of the two sees the other (Dekker), so nothing is written unseen.
__device__ bool enter(const Gate& gate) {
    __shared__ bool granted;
    if (!gate.closed) return true;
    if (threadIdx.x == 0) {
        const u64 slot = gate.entered + 8 * blockIdx.x;
        store_system(slot, gate.ticket);
        asm volatile("fence.sc.sys;" ::: "memory");
        granted = !load_system(gate.closed) && load_system(gate.grant) == gate.key;
        if (!granted) {
            store_system(gate.refused, 1);
            asm volatile("fence.sc.sys;" ::: "memory");
            store_system(slot, 0);
        }
    }
    __syncthreads();
    return granted;
}

__device__ void leave(const Gate& gate) {
    if (!gate.closed) return;
    asm volatile("fence.sc.sys;" ::: "memory");  // every thread: its own stores have landed
    __syncthreads();
    if (threadIdx.x == 0) store_system(gate.entered + 8 * blockIdx.x, 0);
}

template <typename V>
__device__ void copy_range(char* dst, const char* src, u64 nbytes, u32 lane) {
    constexpr u64 STEP = 32 * sizeof(V);
    u64 at = lane * sizeof(V);
    for (; at + (UNROLL - 1) * STEP < nbytes; at += UNROLL * STEP) {
        V held[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) held[i] = __ldcs(reinterpret_cast<const V*>(src + at + i * STEP));
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) *reinterpret_cast<V*>(dst + at + i * STEP) = held[i];
    }
    for (; at < nbytes; at += STEP)
        *reinterpret_cast<V*>(dst + at) = __ldcs(reinterpret_cast<const V*>(src + at));
}

// Bytes [from, from + nbytes) of one tile's payload.
template <typename V>
__device__ void copy_tile(char* dst, const char* src, const Tiles& t, u32 from, u32 nbytes, u32 lane) {
    constexpr u32 STEP = 32 * sizeof(V);
    for (u32 at = lane * sizeof(V); at < nbytes; at += UNROLL * STEP) {
        V held[UNROLL];
        char* to[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            if (at + i * STEP >= nbytes) break;
            const u32 byte = from + at + i * STEP, row = byte / t.run, column = byte - row * t.run;
            const u32 i1 = row / t.n2, i2 = row - i1 * t.n2;
            to[i] = dst + i1 * t.dst1 + i2 * t.dst2 + column;
            held[i] = __ldcs(reinterpret_cast<const V*>(src + i1 * t.src1 + i2 * t.src2 + column));
        }
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            if (at + i * STEP >= nbytes) break;
            *reinterpret_cast<V*>(to[i]) = held[i];
        }
    }
}

// The range that holds byte `at`. Pages are mostly of one size, so the first guess mostly is right.
__device__ u64 find(const u64* end, const Job& job, u64 at) {
    const u64 guess = u64(double(at) * double(job.n) / double(job.total));
    if (guess < job.n && end[guess] > at && (!guess || end[guess - 1] <= at)) return guess;
    u64 low = 0, high = job.n - 1;
    while (low < high) {
        const u64 middle = (low + high) / 2;
        if (end[middle] > at) high = middle; else low = middle + 1;
    }
    return low;
}

template <typename V, bool TILED>
__device__ void scatter(const Job& job) {
    if (!enter(job.gate)) return;
    const u64* src = reinterpret_cast<const u64*>(job.src);
    const u64* dst = reinterpret_cast<const u64*>(job.dst);
    const u64* end = reinterpret_cast<const u64*>(job.end);
    u64* next = reinterpret_cast<u64*>(job.next);
    const u32 lane = threadIdx.x % 32;
    u64 ticket = (threadIdx.x / 32) * gridDim.x + blockIdx.x;
    for (;;) {
        u64 at = ticket * job.share;
        if (at >= job.total) break;
        const u64 stop = at + job.share < job.total ? at + job.share : job.total;
        u64 r = find(end, job, at);
        u64 begin = r ? end[r - 1] : 0;
        for (; at < stop; ++r) {
            const u64 over = end[r], until = over < stop ? over : stop;
            char* to = reinterpret_cast<char*>(dst[r]);
            const char* from = reinterpret_cast<const char*>(src[r]);
            if (TILED)
                copy_tile<V>(to, from, job.tiles, u32(at - begin), u32(until - at), lane);
            else
                copy_range<V>(to + (at - begin), from + (at - begin), until - at, lane);
            at = until;
            begin = over;
        }
        if (lane == 0) ticket = atomicAdd(next, 1ull) + gridDim.x * (blockDim.x / 32);
        ticket = __shfl_sync(~0u, ticket, 0);
    }
    leave(job.gate);
}

#define KERNEL(name, type, tiled) \
    extern "C" __global__ void __launch_bounds__(1024) name(const __grid_constant__ Job job) { scatter<type, tiled>(job); }

KERNEL(ranges16, uint4, false)
KERNEL(ranges4, u32, false)
KERNEL(ranges1, unsigned char, false)
KERNEL(tiles16, uint4, true)
KERNEL(tiles4, u32, true)
KERNEL(tiles1, unsigned char, true)
