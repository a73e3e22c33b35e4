// The selective scan, forward; scan.cuh says what bounds it.

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
            if (i >= W::PAIRS) break;
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
#pragma unroll 2
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
