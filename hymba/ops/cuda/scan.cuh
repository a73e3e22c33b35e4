// The selective scan of Mamba-1 for NVIDIA GPUs, compiled at run time (scan_cuda.py).
//
//     h_t = 2^(delta_t A log2 e) h_{t-1} + (delta_t u_t) B_t,   y_t = (<C_t, h_t> + D u_t) silu(z_t)
//
// What bounds it. A row and channel has NS = 16 exponentials, and 4 for softplus and gate; a
// multiprocessor makes 16 a clock: 1.25 clocks. Its other instructions, 5 a state and some 45 for
// the rest, go out 128 lanes a clock: 1.2 clocks. Shared memory hands out 32 floats a clock whoever
// asks for the same ones. Device memory needs a third of that (8 bytes of bfloat16 a row and
// channel). So each exponential is paid once forward where sequences fill the chip, twice backward,
// and everything else must be few instructions:
//
//  * A thread owns JN states of each of JE channels: what it reads of B and C serves JE channels.
//  * What a channel needs once a row (softplus, gate, D) is done by all threads of a block on tiles
//    of 32 rows in shared memory, before and after the recurrence, while the next tile's rows are on
//    their way. Rows are read as they lie, channels last; nothing is transposed.
//  * Sums over states (y) and, backward, over channels (dB, dC) run over several lanes. Lanes that
//    hold several sums halve them at each exchange ("transposing" reduction): V sums over V lanes
//    cost V - 1 shuffles, not V log V.
//  * Few sequences are cut in time into pieces that run side by side: a first launch learns what
//    each piece adds to the state (forward) or hands back (`scan_adjoint`), the second starts right.
//  * Backward knows the state before every 32 rows (forward saves it: 2 bytes a row and channel).
//    It walks a tile forward once to learn the state before every 4 rows, and then, from the last 4
//    rows to the first, forward once more with decays and states kept in registers, and back.
//
// How far from it, on one H200 (docs/log.md, 2026-11-22): forward of 8 x 2048 rows takes 0.45 ms,
// where the exponentials alone take 0.25; backward 1.7 ms, where they take 0.5 and its instructions,
// some 440 lanes a row and channel, 0.7.

typedef unsigned int u32;
typedef long long i64;
constexpr int TILE = 32;  // rows; also the distance of saved states
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Rows hold T; two neighbours are one access.
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
template <class T> struct Two { typedef u32 raw; };
template <> struct Two<float> { typedef float2 raw; };

template <class T> __device__ __forceinline__ float2 wide(typename Two<T>::raw v);
template <> __device__ __forceinline__ float2 wide<float>(float2 v) { return v; }
template <> __device__ __forceinline__ float2 wide<bf16>(u32 v) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
template <> __device__ __forceinline__ float2 wide<f16>(u32 v) {
    float2 y;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(y.x), "=f"(y.y) : "r"(v));
    return y;
}
template <class T> __device__ __forceinline__ typename Two<T>::raw narrow(float2 v);
template <> __device__ __forceinline__ float2 narrow<float>(float2 v) { return v; }
template <> __device__ __forceinline__ u32 narrow<bf16>(float2 v) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(v.y), "f"(v.x));
    return y;
}
template <> __device__ __forceinline__ u32 narrow<f16>(float2 v) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(v.y), "f"(v.x));
    return y;
}
template <class T> __device__ __forceinline__ typename Two<T>::raw fetch(const T* p, bool there) {
    typename Two<T>::raw v{};
    if (there) v = *reinterpret_cast<const typename Two<T>::raw*>(p);
    return v;
}
template <class T> __device__ __forceinline__ float2 load(const T* p, bool there) {
    return wide<T>(fetch(p, there));
}
template <class T> __device__ __forceinline__ void put(T* p, float2 v) {
    *reinterpret_cast<typename Two<T>::raw*>(p) = narrow<T>(v);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// log(1 + e^x). Near zero the logarithm of 1 + e is inexact; there the series is not.
__device__ __forceinline__ float softplus(float x) {
    float e = exp2_fast(x * LOG2E);
    float series = e * (1.f + e * (-0.5f + e * (1.f / 3 + e * (-0.25f + e * 0.2f))));
    float y = e < 0.0625f ? series : LN2 * log2_fast(1.f + e);
    return x > 20.f ? x : y;
}
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-x * LOG2E)); }

// v[0 .. N) summed over W lanes that differ in the bits of `lane` worth STEP, 2 STEP, ...; lane l of
// them keeps sums l N/W .. (l+1) N/W - 1 in v[0 ..] (where N < W, several lanes keep the same one).
template <int N, int W, int STEP> __device__ __forceinline__ void sum_lanes(float* v, int lane) {
    if constexpr (W > 1) {
        constexpr int far = STEP * W / 2;
        if constexpr (N > 1) {
            bool up = lane & far;
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                float give = up ? v[i] : v[i + N / 2], keep = up ? v[i + N / 2] : v[i];
                v[i] = keep + __shfl_xor_sync(~0u, give, far);
            }
            sum_lanes<N / 2, W / 2, STEP>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(~0u, v[0], far);
            sum_lanes<1, W / 2, STEP>(v, lane);
        }
    }
}

// K neighbours, as wide as one access can be.
template <int K> __device__ __forceinline__ void read(float* to, const float* from) {
    if constexpr (K % 4 == 0) {
#pragma unroll
        for (int k = 0; k < K; k += 4) *(float4*)(to + k) = *(const float4*)(from + k);
    } else if constexpr (K == 2) {
        *(float2*)to = *(const float2*)from;
    } else {
        *to = *from;
    }
}
template <int K> __device__ __forceinline__ void write(float* to, const float* from) {
    if constexpr (K % 4 == 0) {
#pragma unroll
        for (int k = 0; k < K; k += 4) *(float4*)(to + k) = *(const float4*)(from + k);
    } else if constexpr (K == 2) {
        *(float2*)to = *(const float2*)from;
    } else {
        *to = *from;
    }
}
// A = -inf is allowed, but 0 times it is not.
template <int J> __device__ __forceinline__ void load_rates(float* a, const float* A) {
#pragma unroll
    for (int j = 0; j < J; j++) a[j] = fmaxf(A[j] * LOG2E, -3.4e38f);
}

// Copies that pass by the registers and are waited for later: 16 bytes at a time where rows allow it
// (`aligned`), else pairs; what lies outside becomes zero.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    int some = there ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(some));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(at), "l"(from),
                     "r"(some), "n"(BYTES));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// A tile of COLS columns: rows under `rows` and columns under `cols` are there.
template <class T, int COLS, int THREADS, int BYTES>
__device__ __forceinline__ void copy_tile(T* to, const T* from, i64 stride, int rows, int cols) {
    constexpr int N = BYTES / sizeof(T), ACROSS = COLS / N;
#pragma unroll
    for (int i0 = 0; i0 < TILE * ACROSS; i0 += THREADS) {
        int i = i0 + threadIdx.x, r = i / ACROSS, c = i % ACROSS * N;
        if (TILE * ACROSS % THREADS != 0 && i >= TILE * ACROSS) break;
        bool there = r < rows && c < cols;
        copy_async<BYTES>(to + r * COLS + c, there ? from + r * stride + c : from, there);
    }
}
template <class T, int COLS, int THREADS>
__device__ __forceinline__ void copy_tile(T* to, const T* from, i64 stride, int rows, int cols,
                                          bool aligned) {
    if (aligned) copy_tile<T, COLS, THREADS, 16>(to, from, stride, rows, cols);
    else copy_tile<T, COLS, THREADS, 2 * sizeof(T)>(to, from, stride, rows, cols);
}

// Rows of a segment [first, end); their tiles; and the tables made by scan_cuda.py.
struct Rows {
    int first, end;
    __device__ Rows(const int* offsets, int s) : first(offsets[s]), end(offsets[s + 1]) {}
    __device__ int tiles() const { return (end - first + TILE - 1) / TILE; }
};

template <class T> struct Inputs {
    const T *u, *dt, *z, *B, *C;
    i64 su, sdt, sz, sB, sC;  // from row to row, in elements
    const float* A;
    const void *D, *bias;  // as wide as the rows, or float
    int E, N, flags;  // 1: D and bias are float; 2: rows allow 16 bytes at a time
    __device__ __forceinline__ float2 params(const void* p, int e, bool there) const {
        return flags & 1 ? load((const float*)p + e, there) : load((const T*)p + e, there);
    }
};

// A kernel's parameters are plain, as the launcher passes them; `in` and `out` gather them.
#define INPUT_PARAMETERS                                                                      \
    const T *u_, const T *dt_, const T *z_, const T *B_, const T *C_, i64 su_, i64 sdt_,      \
        i64 sz_, i64 sB_, i64 sC_, const float *A_, const void *D_, const void *bias_, int E_, \
        int N_, int flags_
#define INPUTS {u_, dt_, z_, B_, C_, su_, sdt_, sz_, sB_, sC_, A_, D_, bias_, E_, N_, flags_}

// A block is WARPS warps; a thread owns JN states of each of JE neighbouring channels, so that what
// it reads of B and C (a channel has none of its own) serves JE of them: shared memory hands out 32
// floats a clock, and would be the bound.
template <int NS, int JN, int JE, int WARPS> struct Shape {
    static constexpr int NL = NS / JN, EL = 32 / NL;  // lanes over states, over channels
    static constexpr int CH = WARPS * EL * JE, THREADS = WARPS * 32;
    // Elementwise work goes by pairs of channels: a thread keeps one column, every RSTEP-th row.
    static constexpr int COLS = CH / 2, RSTEP = THREADS / COLS, ITEMS = TILE / RSTEP;
    static constexpr int PAIRS = TILE * NS / 2, BC = (PAIRS + THREADS - 1) / THREADS;  // of B, of C
    static_assert(THREADS % COLS == 0 && TILE % RSTEP == 0);
};
