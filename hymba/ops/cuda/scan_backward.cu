// The selective scan, backward: a walk that finds what enters each piece from behind, and backward
// itself; scan.cuh says what bounds them.

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
            C_next[k] = fetch(in.C + r * in.sC + n, i < W::PAIRS && r < rows.end);
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
            if (tid + k * W::THREADS < W::PAIRS)
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
