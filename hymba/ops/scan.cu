// The selective scan of Mamba-1 for NVIDIA GPUs, compiled at run time (scan_cuda.py).
//
//     h_t = 2^(delta_t A log2 e) h_{t-1} + (delta_t u_t) B_t,   y_t = (<C_t, h_t> + D u_t) silu(z_t)
//
// What bounds it. A row and channel has NS = 16 exponentials, and a multiprocessor makes 16 a clock,
// so the exponential unit needs 1 clock, the rest (4 multiply-adds a state, 128 a clock) half of one.
// Memory needs 8 bytes of bfloat16, a fifth of that. So each exponential is paid once forward and
// twice backward, and everything else must be few instructions:
//
//  * A thread owns J states of a channel, so that NS / J threads share the channel: many threads a
//    channel fill the chip when sequences are few, few threads a channel need fewer instructions.
//  * What a channel needs once a row (softplus, gate, D) is done by all threads of a block on tiles
//    of 32 rows in shared memory, before and after the recurrence. Rows are read as they lie,
//    channels last; nothing is transposed.
//  * Sums over states (y) and, backward, over channels (dB, dC) run over several lanes. Lanes that
//    hold several sums halve them at each exchange ("transposing" reduction): V sums over V lanes
//    cost V - 1 shuffles, not V log V.
//  * Backward knows the state before every 32 rows (forward saves it: 2 bytes a row and channel).
//    It walks a tile forward once to learn the state before every 4 rows, and then, from the last 4
//    rows to the first, forward once more with decays and states kept in registers, and back.
//  * Backward is cut in time into pieces when there are few sequences; `adjoint`, a walk without
//    sums, finds what enters each piece from behind.

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
    static constexpr int BC = TILE * NS / 2 / THREADS;  // pairs of B, and of C, a thread fetches
    static_assert(THREADS % COLS == 0 && TILE % RSTEP == 0 && BC * THREADS == TILE * NS / 2);
};

// ---------------------------------------------------------------------------------------- forward

#ifndef UNROLL
#define UNROLL 2
#endif
constexpr int SAVE = 1, ENDS = 2;

// A block walks one piece of a segment. Cut in time, a first launch (ENDS) runs every piece but the
// last from zero and leaves its last state in `ends` (pieces, E, NS) and its sum of delta in `sums`
// (pieces, E); the second folds those of the pieces before its own.
template <class T, int NS, int JN, int JE, int WARPS, int BLOCKS, int MODE>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
scan_forward(INPUT_PARAMETERS, const float* state, i64 state_stride, const int* offsets,
             const int* first_tile, const int* first_piece, const int* owner, int piece_tiles,
             float* ends, float* sums, T* y, float* final, float* saved) {
    using W = Shape<NS, JN, JE, WARPS>;
    const Inputs<T> in INPUTS;
    constexpr int CH = W::CH, NL = W::NL, GROUP = NL > 4 * JE ? NL / JE : 4;
    __shared__ alignas(16) float sd[TILE * CH], sx[TILE * CH], sBC[TILE * 2 * NS];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, nl = lane % NL, el = lane / NL;
    const int piece = blockIdx.y, s = owner[piece], in_segment = piece - first_piece[s];
    const bool last = piece + 1 == first_piece[s + 1];
    if (MODE == ENDS && last) return;
    const int channel0 = blockIdx.x * CH, c = (warp * W::EL + el) * JE, channel = channel0 + c;
    const Rows rows(offsets, s);
    const int tile0 = in_segment * piece_tiles;
    const int tile1 = last ? rows.tiles() : tile0 + piece_tiles;

    float h[JE][JN] = {}, a2[JE][JN] = {};
#pragma unroll
    for (int e = 0; e < JE; e++) {
        if (channel + e >= in.E) continue;
        const i64 at = (i64)(channel + e) * NS + nl * JN;
        load_rates<JN>(a2[e], in.A + at);
        if (MODE == ENDS) continue;
        if (state) read<JN>(h[e], state + s * state_stride + at);
        for (int p = first_piece[s]; p < piece; p++) {
            float end[JN], sum = sums[(i64)p * in.E + channel + e];
            read<JN>(end, ends + (i64)p * in.E * NS + at);
#pragma unroll
            for (int j = 0; j < JN; j++) h[e][j] = exp2_fast(sum * a2[e][j]) * h[e][j] + end[j];
        }
    }
    const int col = tid % W::COLS * 2, row0 = tid / W::COLS, ee = channel0 + col;
    const bool there = ee < in.E;
    const float2 bias = in.params(in.bias, ee, there), D = in.params(in.D, ee, there);
    float2 total = {0.f, 0.f};

    __shared__ alignas(16) T ru[TILE * CH], rdt[TILE * CH], rz[MODE == ENDS ? 1 : TILE * CH];
    __shared__ alignas(16) T rB[TILE * NS], rC[MODE == ENDS ? 1 : TILE * NS];
    const bool aligned = in.flags & 2;
    const int cols = in.E - channel0;
    auto begin = [&](int first) {  // what the recurrence needs of a tile
        const int left = rows.end - first;
        const i64 r = first;
        copy_tile<T, CH, W::THREADS>(ru, in.u + r * in.su + channel0, in.su, left, cols, aligned);
        copy_tile<T, CH, W::THREADS>(rdt, in.dt + r * in.sdt + channel0, in.sdt, left, cols, aligned);
        copy_tile<T, NS, W::THREADS>(rB, in.B + r * in.sB, in.sB, left, NS, aligned);
        if constexpr (MODE != ENDS)
            copy_tile<T, NS, W::THREADS>(rC, in.C + r * in.sC, in.sC, left, NS, aligned);
        commit();
    };
    T* py = y + (i64)(rows.first + tile0 * TILE + row0) * in.E + ee;
    const int qy = W::RSTEP * in.E;
    begin(rows.first + tile0 * TILE);
    for (int tile = tile0; tile < tile1; tile++) {
        const int first = rows.first + tile * TILE, left = rows.end - first;
        typename Two<T>::raw u_now[W::ITEMS];
        wait<0>();
        __syncthreads();
        if constexpr (MODE != ENDS) {  // what is needed after it: it has until then to arrive
            copy_tile<T, CH, W::THREADS>(rz, in.z + (i64)first * in.sz + channel0, in.sz, left, cols,
                                         aligned);
            commit();
        }
#pragma unroll
        for (int k = 0; k < W::ITEMS; k++) {
            int t = row0 + k * W::RSTEP;
            float2 u = wide<T>(u_now[k] = fetch(ru + t * CH + col, true));
            float2 dt = load(rdt + t * CH + col, true);
            float2 d = {softplus(dt.x + bias.x), softplus(dt.y + bias.y)};
            d = {t < left ? d.x : 0.f, t < left ? d.y : 0.f};
            *(float2*)&sd[t * CH + col] = d;
            *(float2*)&sx[t * CH + col] = make_float2(d.x * u.x, d.y * u.y);
            if (MODE == ENDS) total.x += d.x, total.y += d.y;
        }
#pragma unroll
        for (int k = 0; k < W::BC; k++) {
            int i = tid + k * W::THREADS, t = i / (NS / 2), n = i % (NS / 2) * 2;
            *(float2*)&sBC[t * 2 * NS + n] = load(rB + 2 * i, true);
            if constexpr (MODE != ENDS) *(float2*)&sBC[t * 2 * NS + NS + n] = load(rC + 2 * i, true);
        }
        __syncthreads();
        if (tile + 1 < tile1) begin(first + TILE);
#pragma unroll
        for (int e = 0; e < JE; e++)
            if (MODE == SAVE && channel + e < in.E)
                write<JN>(saved + ((i64)(first_tile[s] + tile) * in.E + channel + e) * NS + nl * JN,
                          h[e]);
#pragma unroll UNROLL
        for (int t0 = 0; t0 < TILE; t0 += GROUP) {
            float out[GROUP * JE] = {};
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const int t = t0 + i;
                float d[JE], x[JE], b[JN], r[JN];
                read<JE>(d, sd + t * CH + c), read<JE>(x, sx + t * CH + c);
                read<JN>(b, sBC + t * 2 * NS + nl * JN);
                if (MODE != ENDS) read<JN>(r, sBC + t * 2 * NS + NS + nl * JN);
#pragma unroll
                for (int e = 0; e < JE; e++)
#pragma unroll
                    for (int j = 0; j < JN; j++) {
                        h[e][j] = exp2_fast(d[e] * a2[e][j]) * h[e][j] + x[e] * b[j];
                        if (MODE != ENDS) out[i * JE + e] += r[j] * h[e][j];
                    }
            }
            if (MODE == ENDS) continue;
            sum_lanes<GROUP * JE, NL, 1>(out, nl);
            __syncwarp();
            constexpr int OUT = GROUP * JE / NL;
#pragma unroll
            for (int k = 0; k < OUT; k++) {  // delta has been read: y takes its place
                int v = nl * OUT + k;
                sd[(t0 + v / JE) * CH + c + v % JE] = out[k];
            }
        }
        if constexpr (MODE != ENDS) {
            if (tile + 1 < tile1) wait<1>();
            else wait<0>();
            __syncthreads();
#pragma unroll
            for (int k = 0; k < W::ITEMS; k++) {
                int t = row0 + k * W::RSTEP;
                float2 u = wide<T>(u_now[k]), z = load(rz + t * CH + col, true);
                float2 v = *(float2*)&sd[t * CH + col];
                v.x = (v.x + D.x * u.x) * z.x * sigmoid(z.x);
                v.y = (v.y + D.y * u.y) * z.y * sigmoid(z.y);
                if (there && t < left) put(py + k * qy, v);
            }
            py += TILE * in.E;
        }
    }
    if (MODE == ENDS) {
        float2* totals = (float2*)sd;
        __syncthreads();
        totals[tid] = total;
        __syncthreads();
        if (tid < W::COLS && there) {
            for (int k = 1; k < W::RSTEP; k++) {
                float2 v = totals[tid + k * W::COLS];
                total.x += v.x, total.y += v.y;
            }
            *(float2*)&sums[(i64)piece * in.E + ee] = total;
        }
    }
    if (MODE == ENDS || last) {
        float* p = MODE == ENDS ? ends + (i64)piece * in.E * NS : final + (i64)s * in.E * NS;
#pragma unroll
        for (int e = 0; e < JE; e++)
            if (channel + e < in.E) write<JN>(p + (i64)(channel + e) * NS + nl * JN, h[e]);
    }
}

// ---------------------------------------------------------------------------------------- adjoint

// What enters each piece of a segment from behind: g_t = C_t dy_t + G, G = decay_t g_t, walked from
// the segment's last row; carry (pieces, E, NS). As ENDS above, a piece starts from zero (the last
// from dfinal), and backward folds.
template <class T, int NS, int JN, int JE, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
scan_adjoint(INPUT_PARAMETERS, const T* dy, i64 sdy, const float* dfinal, const int* offsets,
             const int* first_piece, const int* owner, int piece_tiles, float* starts,
             float* sums) {
    using W = Shape<NS, JN, JE, WARPS>;
    const Inputs<T> in INPUTS;
    constexpr int CH = W::CH, NL = W::NL;
    __shared__ alignas(16) float sd[TILE * CH], sg[TILE * CH], sC[TILE * NS];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, nl = lane % NL, el = lane / NL;
    const int piece = blockIdx.y, s = owner[piece], in_segment = piece - first_piece[s];
    if (in_segment == 0) return;  // it hands on to nobody
    const bool last = piece + 1 == first_piece[s + 1];
    const int channel0 = blockIdx.x * CH, c = (warp * W::EL + el) * JE, channel = channel0 + c;
    const Rows rows(offsets, s);
    const int tile0 = in_segment * piece_tiles;
    const int tile1 = last ? rows.tiles() : tile0 + piece_tiles;

    float G[JE][JN] = {}, a2[JE][JN] = {};
#pragma unroll
    for (int e = 0; e < JE; e++) {
        if (channel + e >= in.E) continue;
        const i64 at = (i64)(channel + e) * NS + nl * JN;
        load_rates<JN>(a2[e], in.A + at);
        if (last) read<JN>(G[e], dfinal + (i64)s * in.E * NS + at);
    }
    const int col = tid % W::COLS * 2, row0 = tid / W::COLS, ee = channel0 + col;
    const bool there = ee < in.E;
    const float2 bias = in.params(in.bias, ee, there);
    float2 total = {0.f, 0.f};

    const i64 origin = rows.first + (tile1 - 1) * TILE + row0;
    const T *pdt = in.dt + origin * in.sdt + ee, *pz = in.z + origin * in.sz + ee;
    const T* pdy = dy + origin * sdy + ee;
    const int qdt = W::RSTEP * in.sdt, qz = W::RSTEP * in.sz, qdy = W::RSTEP * sdy;
    typename Two<T>::raw dt_next[W::ITEMS], z_next[W::ITEMS], dy_next[W::ITEMS], C_next[W::BC];
    auto prefetch = [&](int first) {
#pragma unroll
        for (int k = 0; k < W::ITEMS; k++) {
            bool ok = there && first + row0 + k * W::RSTEP < rows.end;
            dt_next[k] = fetch(pdt + k * qdt, ok), z_next[k] = fetch(pz + k * qz, ok);
            dy_next[k] = fetch(pdy + k * qdy, ok);
        }
        pdt -= TILE * in.sdt, pz -= TILE * in.sz, pdy -= TILE * sdy;
#pragma unroll
        for (int k = 0; k < W::BC; k++) {
            int i = tid + k * W::THREADS, r = first + i / (NS / 2), n = i % (NS / 2) * 2;
            C_next[k] = fetch(in.C + r * in.sC + n, r < rows.end);
        }
    };
    prefetch(rows.first + (tile1 - 1) * TILE);
    for (int tile = tile1 - 1; tile >= tile0; tile--) {
        const int first = rows.first + tile * TILE;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < W::ITEMS; k++) {
            int t = row0 + k * W::RSTEP;
            float2 dt = wide<T>(dt_next[k]), z = wide<T>(z_next[k]), p = wide<T>(dy_next[k]);
            bool ok = first + t < rows.end;
            float2 d = {softplus(dt.x + bias.x), softplus(dt.y + bias.y)};
            d = {ok ? d.x : 0.f, ok ? d.y : 0.f};
            *(float2*)&sd[t * CH + col] = d;
            *(float2*)&sg[t * CH + col] =
                make_float2(p.x * z.x * sigmoid(z.x), p.y * z.y * sigmoid(z.y));
            total.x += d.x, total.y += d.y;
        }
#pragma unroll
        for (int k = 0; k < W::BC; k++)
            *(float2*)&sC[(tid + k * W::THREADS) * 2] = wide<T>(C_next[k]);
        __syncthreads();
        if (tile > tile0) prefetch(first - TILE);
#pragma unroll 4
        for (int t = TILE - 1; t >= 0; t--) {
            float d[JE], g[JE], r[JN];
            read<JE>(d, sd + t * CH + c), read<JE>(g, sg + t * CH + c);
            read<JN>(r, sC + t * NS + nl * JN);
#pragma unroll
            for (int e = 0; e < JE; e++)
#pragma unroll
                for (int j = 0; j < JN; j++)
                    G[e][j] = exp2_fast(d[e] * a2[e][j]) * (r[j] * g[e] + G[e][j]);
        }
    }
    float2* totals = (float2*)sd;
    __syncthreads();
    totals[tid] = total;
    __syncthreads();
    if (tid < W::COLS && there) {
        for (int k = 1; k < W::RSTEP; k++) {
            float2 v = totals[tid + k * W::COLS];
            total.x += v.x, total.y += v.y;
        }
        *(float2*)&sums[(i64)piece * in.E + ee] = total;
    }
#pragma unroll
    for (int e = 0; e < JE; e++)
        if (channel + e < in.E)
            write<JN>(starts + ((i64)piece * in.E + channel + e) * NS + nl * JN, G[e]);
}

// --------------------------------------------------------------------------------------- backward

template <class T> struct Outputs {
    T *du, *ddt, *dz;       // (N, E)
    float* dBC;             // (blocks of channels, N, 2 NS)
    float *dA, *dD, *dbias; // (pieces, E, NS), (pieces, E), (pieces, E)
    float* dstate;          // (S, E, NS) or null
};


template <class T, int NS, int JN, int JE, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
scan_backward(INPUT_PARAMETERS, const T* dy, i64 sdy, const float* dfinal, const float* saved,
              const float* starts, const float* sums, const int* offsets, const int* first_tile,
              const int* first_piece, const int* owner, int piece_tiles, T* du_, T* ddt_,
              T* dz_, float* dBC_, float* dA_, float* dD_, float* dbias_, float* dstate_) {
    using W = Shape<NS, JN, JE, WARPS>;
    const Inputs<T> in INPUTS;
    const Outputs<T> out{du_, ddt_, dz_, dBC_, dA_, dD_, dbias_, dstate_};
    static_assert(JN % 4 == 0 && W::CH % 2 == 0);
    constexpr int CH = W::CH, THREADS = W::THREADS, NL = W::NL, EL = W::EL;
    constexpr int SUB = 4, Q = JN * JE / 4;  // rows kept in registers; float4s of a thread's states
    constexpr int COLS = W::COLS, RSTEP = W::RSTEP, ITEMS = W::ITEMS;
    extern __shared__ float4 space[];
    float* shared = (float*)space;
    float* sd = shared;               // [TILE][CH] delta,     then sum_n A w (w below)
    float* sx = sd + TILE * CH;       // [TILE][CH] delta u,   then sum_n g B
    float* sg = sx + TILE * CH;       // [TILE][CH] dy silu z, then y before D and gate
    float* sBC = sg + TILE * CH;      // [TILE][2 NS]
    float4* sh = (float4*)(sBC + TILE * 2 * NS);  // [TILE/SUB][WARPS][Q][32]: states, then dB, dC

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int nl = lane % NL, el = lane / NL, piece = blockIdx.y, s = owner[piece];
    const int channel0 = blockIdx.x * CH, c = (warp * EL + el) * JE, channel = channel0 + c;
    const Rows rows(offsets, s);
    const int in_segment = piece - first_piece[s], tile0 = in_segment * piece_tiles;
    const bool last = piece + 1 == first_piece[s + 1];
    const int tile1 = last ? rows.tiles() : tile0 + piece_tiles;

    float a2[JE][JN] = {}, G[JE][JN] = {}, dA[JE][JN] = {};
#pragma unroll
    for (int e = 0; e < JE; e++) {
        if (channel + e >= in.E) continue;
        i64 at = (i64)(channel + e) * NS + nl * JN;
        load_rates<JN>(a2[e], in.A + at);
        if (last) read<JN>(G[e], dfinal + (i64)s * in.E * NS + at);
        for (int p = first_piece[s + 1] - 1; p > piece; p--) {
            float start[JN], sum = sums[(i64)p * in.E + channel + e];
            read<JN>(start, starts + (i64)p * in.E * NS + at);
#pragma unroll
            for (int j = 0; j < JN; j++) G[e][j] = exp2_fast(sum * a2[e][j]) * G[e][j] + start[j];
        }
    }
    const int col = tid % COLS * 2, row0 = tid / COLS, ee = channel0 + col;
    const bool there = ee < in.E;
    const float2 bias = in.params(in.bias, ee, there), D = in.params(in.D, ee, there);
    float2 dD = {0.f, 0.f}, dbias = {0.f, 0.f};
    const i64 origin = rows.first + (tile1 - 1) * TILE + row0;
    const T *pu = in.u + origin * in.su + ee, *pdt = in.dt + origin * in.sdt + ee;
    const T *pz = in.z + origin * in.sz + ee, *pdy = dy + origin * sdy + ee;
    const int qu = RSTEP * in.su, qdt = RSTEP * in.sdt, qz = RSTEP * in.sz, qdy = RSTEP * sdy;
    i64 to = origin * in.E + ee;  // in du, ddt, dz
    const int qto = RSTEP * in.E;

    for (int tile = tile1 - 1; tile >= tile0; tile--) {
        const int first = rows.first + tile * TILE;
        // Elementwise, before.
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int t = row0 + k * RSTEP;
            bool ok = there && first + t < rows.end;
            float2 u = load(pu + k * qu, ok), dt = load(pdt + k * qdt, ok);
            float2 z = load(pz + k * qz, ok), d = load(pdy + k * qdy, ok);
            float d0 = softplus(dt.x + bias.x), d1 = softplus(dt.y + bias.y);
            d0 = ok ? d0 : 0.f, d1 = ok ? d1 : 0.f;
            *(float2*)&sd[t * CH + col] = make_float2(d0, d1);
            *(float2*)&sx[t * CH + col] = make_float2(d0 * u.x, d1 * u.y);
            *(float2*)&sg[t * CH + col] =
                make_float2(d.x * z.x * sigmoid(z.x), d.y * z.y * sigmoid(z.y));
        }
        for (int i = tid; i < TILE * NS / 2; i += THREADS) {
            int t = i / (NS / 2), n = i % (NS / 2) * 2;
            i64 r = first + t;
            float2 b = load(in.B + r * in.sB + n, r < rows.end);
            float2 q = load(in.C + r * in.sC + n, r < rows.end);
            *(float2*)&sBC[t * 2 * NS + n] = b, *(float2*)&sBC[t * 2 * NS + NS + n] = q;
        }
        float h[JE][JN] = {};
#pragma unroll
        for (int e = 0; e < JE; e++)
            if (channel + e < in.E)
                read<JN>(h[e], saved + ((i64)(first_tile[s] + tile) * in.E + channel + e) * NS
                                          + nl * JN);
        __syncthreads();
        // Forward once, to know the state before every SUB rows.
#pragma unroll 1
        for (int sub = 0; sub < TILE / SUB; sub++) {
#pragma unroll
            for (int q = 0; q < Q; q++)
                sh[((sub * WARPS + warp) * Q + q) * 32 + lane] = ((float4*)&h[0][0])[q];
            if (sub == TILE / SUB - 1) break;
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const int t = sub * SUB + i;
                float d[JE], x[JE], b[JN];
                read<JE>(d, sd + t * CH + c), read<JE>(x, sx + t * CH + c);
                read<JN>(b, sBC + t * 2 * NS + nl * JN);
#pragma unroll
                for (int e = 0; e < JE; e++)
#pragma unroll
                    for (int j = 0; j < JN; j++)
                        h[e][j] = exp2_fast(d[e] * a2[e][j]) * h[e][j] + x[e] * b[j];
            }
        }
        // From the last rows to the first: forward with everything kept, then back.
#pragma unroll 1
        for (int sub = TILE / SUB - 1; sub >= 0; sub--) {
            float keep[SUB + 1][JE][JN], decay[SUB][JE][JN];
#pragma unroll
            for (int q = 0; q < Q; q++)
                ((float4*)&keep[0][0][0])[q] = sh[((sub * WARPS + warp) * Q + q) * 32 + lane];
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const int t = sub * SUB + i;
                float d[JE], x[JE], b[JN];
                read<JE>(d, sd + t * CH + c), read<JE>(x, sx + t * CH + c);
                read<JN>(b, sBC + t * 2 * NS + nl * JN);
#pragma unroll
                for (int e = 0; e < JE; e++)
#pragma unroll
                    for (int j = 0; j < JN; j++) {
                        decay[i][e][j] = exp2_fast(d[e] * a2[e][j]);
                        keep[i + 1][e][j] = decay[i][e][j] * keep[i][e][j] + x[e] * b[j];
                    }
            }
            float* sums = (float*)&sh[(sub * WARPS + warp) * Q * 32];  // [SUB][2 NS], this warp's
#pragma unroll
            for (int i = SUB - 1; i >= 0; i--) {
                const int t = sub * SUB + i;
                float dBC[2 * JN] = {}, across[4 * JE] = {};  // across: A w, g B, y, nothing
                float d[JE], x[JE], p[JE], b[JN], r[JN];
                read<JE>(d, sd + t * CH + c), read<JE>(x, sx + t * CH + c);
                read<JE>(p, sg + t * CH + c);
                read<JN>(b, sBC + t * 2 * NS + nl * JN);
                read<JN>(r, sBC + t * 2 * NS + NS + nl * JN);
#pragma unroll
                for (int e = 0; e < JE; e++)
#pragma unroll
                    for (int j = 0; j < JN; j++) {
                        float g = r[j] * p[e] + G[e][j];
                        dBC[j] += g * x[e];
                        dBC[JN + j] += p[e] * keep[i + 1][e][j];
                        across[JE + e] += g * b[j];
                        across[2 * JE + e] += r[j] * keep[i + 1][e][j];
                        G[e][j] = g * decay[i][e][j];
                        float w = G[e][j] * keep[i][e][j];  // dL / d(delta A)
                        across[e] += a2[e][j] * w;
                        dA[e][j] += d[e] * w;
                    }
                sum_lanes<2 * JN, EL, NL>(dBC, lane);
                sum_lanes<4 * JE, NL, 1>(across, lane);
                __syncwarp();
                constexpr int BCS = 2 * JN > EL ? 2 * JN / EL : 1;
#pragma unroll
                for (int k = 0; k < BCS; k++) {
                    int v = 2 * JN >= EL ? el * BCS + k : el / (EL / (2 * JN));
                    sums[i * 2 * NS + v / JN * NS + nl * JN + v % JN] = dBC[k];
                }
                constexpr int AS = 4 * JE / NL;
                static_assert(4 * JE >= NL);
#pragma unroll
                for (int k = 0; k < AS; k++) {
                    int v = nl * AS + k;
                    if (v < 3 * JE) sd[v / JE * TILE * CH + t * CH + c + v % JE] = across[k];
                }
            }
        }
        __syncthreads();
        // Elementwise, after.
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int t = row0 + k * RSTEP;
            if (!there || first + t >= rows.end) continue;
            float2 u = load(pu + k * qu, true), dt = load(pdt + k * qdt, true);
            float2 z = load(pz + k * qz, true), d = load(pdy + k * qdy, true);
            float2 aw = *(float2*)&sd[t * CH + col], gb = *(float2*)&sx[t * CH + col];
            float2 yy = *(float2*)&sg[t * CH + col];
            auto one = [](float u, float dt, float z, float d, float aw, float gb, float y, float D,
                          float& du, float& ddt, float& dz, float& dD) {
                float s = sigmoid(z), p = d * z * s, delta = softplus(dt);
                y += D * u;
                dz = d * y * s * (1.f + z * (1.f - s));
                du = delta * gb + D * p;
                ddt = (u * gb + LN2 * aw) * sigmoid(dt);
                dD += p * u;
            };
            float2 du, ddt, dz;
            one(u.x, dt.x + bias.x, z.x, d.x, aw.x, gb.x, yy.x, D.x, du.x, ddt.x, dz.x, dD.x);
            one(u.y, dt.y + bias.y, z.y, d.y, aw.y, gb.y, yy.y, D.y, du.y, ddt.y, dz.y, dD.y);
            dbias.x += ddt.x, dbias.y += ddt.y;
            put(out.du + to + k * qto, du), put(out.ddt + to + k * qto, ddt);
            put(out.dz + to + k * qto, dz);
        }
        pu -= TILE * in.su, pdt -= TILE * in.sdt, pz -= TILE * in.sz, pdy -= TILE * sdy;
        to -= TILE * in.E;
        for (int i = tid; i < TILE * 2 * NS; i += THREADS) {
            int t = i / (2 * NS), v = i % (2 * NS);
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                sum += ((float*)&sh[(t / SUB * WARPS + w) * Q * 32])[t % SUB * 2 * NS + v];
            if (first + t < rows.end)
                out.dBC[((i64)blockIdx.x * in.N + first + t) * 2 * NS + v] = sum;
        }
        __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < JE; e++) {
        if (channel + e >= in.E) continue;
        i64 at = (i64)(channel + e) * NS + nl * JN;
        write<JN>(out.dA + (i64)piece * in.E * NS + at, dA[e]);
        if (out.dstate && in_segment == 0) write<JN>(out.dstate + (i64)s * in.E * NS + at, G[e]);
    }
    // Over the rows that other threads of the same columns did.
    float4* totals = (float4*)shared;
    totals[tid] = make_float4(dD.x, dD.y, dbias.x, dbias.y);
    __syncthreads();
    if (tid < COLS && there) {
        float4 sum = totals[tid];
        for (int k = 1; k < RSTEP; k++) {
            float4 v = totals[tid + k * COLS];
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        *(float2*)&out.dD[(i64)piece * in.E + ee] = make_float2(sum.x, sum.y);
        *(float2*)&out.dbias[(i64)piece * in.E + ee] = make_float2(sum.z, sum.w);
    }
}
