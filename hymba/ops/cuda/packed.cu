// A few rows times a matrix in few bits, for NVIDIA GPUs from Ampere on, compiled at run time
// (packed_cuda.py). `hymba/ops/packed.py` has the layout of the matrix, which was made for this too:
//
//     a warp reads of a group of columns   16 rows, in whole pieces of 64 bytes
//     of which lane 4 i + t has            rows 2 i and 2 i + 1, and of their columns the quarter t
//     and that is, made into bfloat16,     its part of the left side of mma.m16n8k16
//     16 bytes of row i of x are           its part of the right side
//
// so that nothing moves between lanes: which column is which k is free as long as both sides agree,
// and so is which row is which m.
//
// What bounds it. The bytes of the matrix, read once; and nearly as much the instructions: 22 to make
// 16 codes of 4 bits into numbers, two by two, and as many for all else, whether x has one row or
// eight. So there are few:
//
//  * Codes are exact in bfloat16, so products are. Only a group's sum meets its scale, in float32.
//  * A norm costs no pass of its own: x times the norm's weights goes into the product, the root of
//    the mean square is a factor of the result; and the squares are summed by the tensor cores,
//    as the diagonal of x times x transposed.
//  * Nor does the mean of two normed inputs: two sums, each with its own factor in the end.
//
// A block has 16 rows of the matrix (of gate and up 16 each) with all their columns; its warps share
// the groups of columns, their sums are added in one order in the end. No sum is shared between
// blocks, and rows of x do not meet: a row's result does not depend on those beside it. The first
// groups are asked for before the kernel in front has ended (chain_triton.py).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
enum Kind { INT4, INT8, FP8 };

// How a product is cut, and what belongs to it.
template <int KIND_, int GROUP_, bool EVEN_, int INPUTS_, bool NORM_, bool GATED_, bool ADDED_,
          bool CHAINED_, int EIGHTS_, int WARPS_, int AHEAD_>
struct Shape {
    static constexpr int KIND = KIND_, GROUP = GROUP_;
    static constexpr bool EVEN = EVEN_;                        // the last group is full
    static constexpr int INPUTS = INPUTS_;                     // 2: the mean of both, normed
    static constexpr bool NORM = NORM_;                        // before the product
    static constexpr bool GATED = GATED_, ADDED = ADDED_;      // behind it
    static constexpr bool CHAINED = CHAINED_;
    static constexpr int EIGHTS = EIGHTS_;                     // rows of x, 8 at a time
    static constexpr int WARPS = WARPS_;
    static constexpr int AHEAD = AHEAD_;                       // groups of a warp on their way at once
    static constexpr int BITS = KIND == INT4 ? 4 : 8, HALVES = GATED ? 2 : 1;
    static constexpr int VECTORS = GROUP / 32;                 // of 8 columns: a lane's of a group
    static constexpr int WORDS = BITS / 4;                     // of codes, for a vector
    static constexpr int HALF = 2 * GROUP * BITS;              // bytes of a group's 16 rows
    static constexpr int STRIDE = 2 * HALF + 64;               // of its 32 rows, with their scales
    static constexpr int TURN = AHEAD * WARPS;
};

// Loads; nothing is loaded, and what is returned is anything, where it is not there. They are
// volatile: none may go in front of the wait for the kernel before, or behind it.
__device__ __forceinline__ u32 load4(const u8* at, int there) {
    u32 y;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0;"
                 "@p ld.global.nc.L1::no_allocate.b32 %0, [%1];}"
                 : "=r"(y) : "l"(at), "r"(there));
    return y;
}
__device__ __forceinline__ uint2 load8(const u8* at, int there) {
    uint2 y;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0;"
                 "@p ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];}"
                 : "=r"(y.x), "=r"(y.y) : "l"(at), "r"(there));
    return y;
}
__device__ __forceinline__ uint4 load16(const u16* at, int there) {
    uint4 y;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0;"
                 "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w) : "l"(at), "r"(there));
    return y;
}

// Pairs of bfloat16 in a word, and single ones.
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
__device__ __forceinline__ u32 times(u32 a, u32 b) { return fma2(a, b, 0x80008000u); }
__device__ __forceinline__ float wide(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ u16 narrow(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rounded(float x) { return wide(narrow(x)); }
__device__ __forceinline__ float2 scales_of(u32 two) {
    float2 y;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(y.x), "=f"(y.y) : "r"(two));
    return y;
}
// (a & mask) | bits, one instruction
__device__ __forceinline__ u32 masked(u32 a, u32 mask, u32 bits) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(mask), "r"(bits));
    return y;
}

// Codes of 8 columns as pairs. A code of 4 bits in the last bits of 0x4300 is 128 more than it was
// when packed, which was 8 more than it is. Of 8 bits the last 7 go the same way, and the first says
// whether 128 or 256 has to go. Bits of e4m3 in those of a bfloat16 are a number 2^120 too small.
template <int KIND> __device__ __forceinline__ u32 numbers(u32 two) {
    if constexpr (KIND == INT8) {
        u32 over = (two & 0x00800080u) ^ 0x43804380u;
        return fma2(over, 0xbf80bf80u, masked(two, 0x007f007fu, 0x43004300u));
    }
    return times(masked(two << 4, 0x07f007f0u, two << 8 & 0x80008000u), 0x7b807b80u);
}
// -> columns (0, 2), (4, 6), (1, 3), (5, 7) with 4 bits, else (0, 2), (1, 3), (4, 6), (5, 7)
template <int KIND> __device__ __forceinline__ void codes(u32 a, u32 b, u32* pairs) {
    if constexpr (KIND == INT4) {
#pragma unroll
        for (int k = 0; k < 4; k++)
            pairs[k] = fma2(masked(a >> 4 * k, 0x000f000fu, 0x43004300u), 0x3f803f80u, 0xc308c308u);
    } else {
        pairs[0] = numbers<KIND>(a), pairs[1] = numbers<KIND>(a >> 8);
        pairs[2] = numbers<KIND>(b), pairs[3] = numbers<KIND>(b >> 8);
    }
}
// 8 columns of x, as they lie, in the same order
template <int KIND> __device__ __forceinline__ void arrange(uint4 x, u32* pairs) {
    constexpr int second = KIND == INT4 ? 2 : 1;
    pairs[0] = __byte_perm(x.x, x.y, 0x5410), pairs[second] = __byte_perm(x.x, x.y, 0x7632);
    pairs[3 - second] = __byte_perm(x.z, x.w, 0x5410), pairs[3] = __byte_perm(x.z, x.w, 0x7632);
}

// d (16, 8) = c + left (16, 16) right (16, 8). A lane has d[0], d[1] of row i, columns 2 t and
// 2 t + 1, d[2], d[3] of row i + 8; of the left side a and b of row i, a8 and b8 of row i + 8.
__device__ __forceinline__ void multiply(
    float* d, const float* c, u32 a, u32 a8, u32 b, u32 b8, u32 x, u32 y) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a), "r"(a8), "r"(b), "r"(b8), "r"(x), "r"(y),
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// The same with 8 columns on the left.
__device__ __forceinline__ void multiply(float* d, u32 a, u32 a8, u32 x) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "r"(a8), "r"(x));
}

// Sums of squares of rows of x: a pair on both sides gives all products of rows, of which the
// diagonal is wanted. Operands of the instruction are neighbours in registers, so two pairs are its
// rows i and i + 8; of the first only the diagonal of the upper half means something, of the second
// that of the lower.
struct Squares {
    float upper[4] = {}, lower[4] = {};

    __device__ __forceinline__ void add(const u32* pairs) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            multiply(upper, pairs[k], pairs[k + 1], pairs[k]);
            multiply(lower, pairs[k], pairs[k + 1], pairs[k + 1]);
        }
    }
    __device__ __forceinline__ float of_row(int i) {  // in the lane with t = i / 2
        return i % 2 ? upper[1] + lower[3] : upper[0] + lower[2];
    }
};

// A group's codes and scales of rows 2 i and 2 i + 1, of both halves where there are two.
template <class S> struct Held {
    uint2 words[S::HALVES][S::VECTORS][S::WORDS];
    u32 scales[S::HALVES];

    __device__ __forceinline__ void fetch(const u8* const* at, const u8* const* ends, int there) {
#pragma unroll
        for (int h = 0; h < S::HALVES; h++) {
#pragma unroll
            for (int v = 0; v < S::VECTORS; v++)
#pragma unroll
                for (int m = 0; m < S::WORDS; m++)
                    words[h][v][m] = load8(at[h] + 64 * (v * S::WORDS + m), there);
            scales[h] = load4(ends[h], there);
        }
    }
};

// The first of a warp's next groups, and the way on.
template <class S> struct Stream {
    const u8 *at[S::HALVES], *ends[S::HALVES];

    __device__ __forceinline__ void fetch(Held<S>* held, int first, int groups) {
#pragma unroll
        for (int u = 0; u < S::AHEAD; u++) {
            held[u].fetch(at, ends, first + u * S::WARPS < groups);
#pragma unroll
            for (int h = 0; h < S::HALVES; h++)
                at[h] += S::WARPS * S::STRIDE, ends[h] += S::WARPS * S::STRIDE;
        }
    }
};

template <class S> __global__ void __launch_bounds__(32 * S::WARPS) packed_product(
    const u16* x, const u16* norm, i64 stride, const u16* x2, const u16* norm2, i64 stride2,
    const u8* tiles, const u16* residual, i64 stride_r, u16* out,
    int count, int rows, int columns, int groups, float eps) {
    constexpr int HALVES = S::HALVES, INPUTS = S::INPUTS, EIGHTS = S::EIGHTS, WARPS = S::WARPS;
    constexpr int AHEAD = S::AHEAD, VECTORS = S::VECTORS;
    __shared__ __align__(16) float sums[WARPS][HALVES][INPUTS][EIGHTS][8][16];
    __shared__ float squares[WARPS][INPUTS][EIGHTS][8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = lane / 4, t = lane % 4;
    const int tile = blockIdx.x / 2, half = blockIdx.x % 2, first_row = blockIdx.y * 8 * EIGHTS;

    // The first groups of the matrix, which no kernel writes.
    Stream<S> stream;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const u8* mine = tiles + ((i64)(tile + h * (rows / 32)) * groups + warp) * S::STRIDE;
        stream.at[h] = mine + half * S::HALF + t * VECTORS * S::WORDS * 64 + 8 * i;
        stream.ends[h] = mine + 2 * S::HALF + 32 * half + 4 * i;
    }
    Held<S> next[AHEAD];
    stream.fetch(next, warp, groups);
    if constexpr (S::CHAINED)
        asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");

    // Where the lane's columns of x begin.
    const int start = warp * S::GROUP + t * VECTORS * 8;
    const u16 *from[INPUTS][EIGHTS], *weights[INPUTS];
#pragma unroll
    for (int j = 0; j < INPUTS; j++) {
        weights[j] = (j ? norm2 : norm) + start;
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            i64 row = min(first_row + 8 * n + i, count - 1);  // where there is none, some other
            from[j][n] = (j ? x2 + row * stride2 : x + row * stride) + start;
        }
    }
    const float zeros[4] = {};
    float acc[HALVES][INPUTS][EIGHTS][4] = {};
    Squares square[INPUTS][EIGHTS];

    for (int first = warp; first < groups; first += S::TURN) {
        // What meets in this turn.
        Held<S> now[AHEAD];
        uint4 xs[AHEAD][INPUTS][EIGHTS][VECTORS], ws[AHEAD][INPUTS][VECTORS];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            now[u] = next[u];
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                int column = u * WARPS * S::GROUP + 8 * v;
                int there = first + u * WARPS < groups;
                if (!S::EVEN) there = first * S::GROUP + t * VECTORS * 8 + column < columns;
#pragma unroll
                for (int j = 0; j < INPUTS; j++) {
                    if constexpr (S::NORM) {
                        ws[u][j][v] = load16(weights[j] + column, there);
                        if (!S::EVEN && !there) ws[u][j][v] = {0, 0, 0, 0};
                    }
#pragma unroll
                    for (int n = 0; n < EIGHTS; n++) {
                        xs[u][j][n][v] = load16(from[j][n] + column, there);
                        if (!S::EVEN && !there) xs[u][j][n][v] = {0, 0, 0, 0};
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < INPUTS; j++) {
            weights[j] += S::TURN * S::GROUP;
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) from[j][n] += S::TURN * S::GROUP;
        }
        // The matrix for the next turn, on its way while this one is multiplied.
        if (first + S::TURN < groups) stream.fetch(next, first + S::TURN, groups);
        auto meet = [&](int u) {
            float d[HALVES][INPUTS][EIGHTS][4];
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                u32 a[HALVES][2][4];
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    uint2 one = now[u].words[h][v][0], two = now[u].words[h][v][S::WORDS - 1];
                    codes<S::KIND>(one.x, two.x, a[h][0]);
                    codes<S::KIND>(one.y, two.y, a[h][1]);
                }
#pragma unroll
                for (int j = 0; j < INPUTS; j++) {
                    u32 w[4];
                    if constexpr (S::NORM) arrange<S::KIND>(ws[u][j][v], w);
#pragma unroll
                    for (int n = 0; n < EIGHTS; n++) {
                        u32 b[4];
                        arrange<S::KIND>(xs[u][j][n][v], b);
                        if constexpr (S::NORM) {
                            square[j][n].add(b);
#pragma unroll
                            for (int k = 0; k < 4; k++) b[k] = times(b[k], w[k]);
                        }
#pragma unroll
                        for (int h = 0; h < HALVES; h++) {
                            u32(*l)[4] = a[h];
                            float* y = d[h][j][n];
                            multiply(y, v ? y : zeros, l[0][0], l[1][0], l[0][1], l[1][1], b[0], b[1]);
                            multiply(y, y, l[0][2], l[1][2], l[0][3], l[1][3], b[2], b[3]);
                        }
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                float2 s = scales_of(now[u].scales[h]);
#pragma unroll
                for (int j = 0; j < INPUTS; j++)
#pragma unroll
                    for (int n = 0; n < EIGHTS; n++)
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            acc[h][j][n][k] += d[h][j][n][k] * (k < 2 ? s.x : s.y);
            }
        };
        if (first + (AHEAD - 1) * WARPS < groups) {
#pragma unroll
            for (int u = 0; u < AHEAD; u++) meet(u);
        } else {
#pragma unroll
            for (int u = 0; u < AHEAD - 1; u++)
                if (first + u * WARPS < groups) meet(u);
        }
    }

    // The warps' sums, one after the other.
#pragma unroll
    for (int j = 0; j < INPUTS; j++)
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    float2 both = {acc[h][j][n][k], acc[h][j][n][2 + k]};
                    *(float2*)&sums[warp][h][j][n][2 * t + k][2 * i] = both;
                }
            if (S::NORM && t == i / 2) squares[warp][j][n][i] = square[j][n].of_row(i);
        }
    __syncthreads();

    for (int e = threadIdx.x; e < 128 * EIGHTS; e += 32 * WARPS) {
        int n = e / 128, b = e / 16 % 8, r = e % 16;
        int row = first_row + 8 * n + b, output = blockIdx.x * 16 + r;
        if (row >= count || output >= rows) continue;
        float y[HALVES] = {};
#pragma unroll
        for (int j = 0; j < INPUTS; j++) {
            float total = 0, sum[HALVES] = {};
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                if constexpr (S::NORM) total += squares[w][j][n][b];
#pragma unroll
                for (int h = 0; h < HALVES; h++) sum[h] += sums[w][h][j][n][b][r];
            }
            float factor = S::NORM ? rsqrtf(total / columns + eps) / INPUTS : 1.f;
#pragma unroll
            for (int h = 0; h < HALVES; h++) y[h] += factor * sum[h];
        }
        float result = y[0];
        if constexpr (S::GATED) {
            float gate = rounded(y[0]);
            result = gate / (1.f + __expf(-gate)) * rounded(y[HALVES - 1]);
        }
        if constexpr (S::ADDED) result = rounded(result) + wide(residual[row * stride_r + output]);
        out[(i64)row * rows + output] = narrow(result);
    }
}
