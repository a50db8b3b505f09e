// A Gated DeltaNet layer between its two projections, for a step of a few tokens: convolution,
// SiLU, l2norm, gates, replay of the tape, delta rule and gated norm in one launch.
//
// One threadgroup a value head (and sequence); one simdgroup owns Dv / SG rows of that head's
// state, Dk / 32 elements of a row in each lane's registers, from the one read to the one write.
// Every token is computed as if it were alone, so its bits do not depend on L.
//
// Lazy commit: before are the convolution's inputs [K-1 + n], the last n of them a round's, and the
// tape holds that round's writes to the state: [B, n, Hv] log decay, [B, n, Hk, Dk] keys,
// [B, n, Hv, Dv] errors. Its first keep tokens are replayed first (REPLAYS). In a round (RECORDING)
// the state written is the one after that replay, and the new tape is written as well; else it is
// the state after the new tokens.

// A vector of 32 N elements, N in the registers of each lane: a row of the state, a key or a query.
template <int N>
struct Vector {
  float own[N];

  template <typename P>
  void read(P from) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      own[i] = from[i];
    }
  }

  void write(device float* to) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      to[i] = own[i];
    }
  }

  float dot(thread const Vector& other) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
      sum += own[i] * other.own[i];
    }
    return simd_sum(sum);
  }

  void decay(float gamma) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      own[i] = own[i] * gamma;
    }
  }

  // Verification and replay both end here, on the same operands, so that they give the same bits.
  void add(thread const Vector& key, float delta) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      own[i] = metal::fma(key.own[i], delta, own[i]);
    }
  }
};

// Advances the rows, S = gamma S + k delta^T, by the first keep tokens of a tape. The pointers
// are this thread's places in the first of them.
template <int Hk, int Hv, int Dv, int Rows, int N, typename G>
inline void replay_tape(
    G g, const device float* k, const device float* delta, uint keep,
    thread Vector<N> (&S)[Rows]) {
  for (uint t = 0; t < keep; t++) {
    const float gamma = metal::precise::exp(load(g, t * Hv));
    Vector<N> key;
    key.read(k + t * Hk * 32 * N);
#pragma unroll
    for (int j = 0; j < Rows; j++) {
      S[j].decay(gamma);
      S[j].add(key, delta[t * Hv * Dv + j]);
    }
  }
}

// The parts of a token that the simdgroups of a head share.
template <int Dk, int Dv>
struct Token {
  float qkv[2 * Dk + Dv];
  float o[Dv];
  float gamma;  // decay
  float beta;   // write strength
};

// MLX declares the arguments and the template: T of x, W of taps, Hk, Hv, Dk, Dv, K, SG, Chunk (the
// tokens that are staged at a time), Masked, and EPS, the bits of the norm's eps.
//
// x: [B, L, P] rows [q | k | v | z | b | a]; before: [B, K-1 + n, C] T; taps: [C, K] W;
// vectors: [A_log | dt_bias | norm's weight], [2 Hv + Dv] float32; mask: [B, L], false at padding,
// read if Masked; state: [B, Hv, Dv, Dk] float32; tape_g, tape_k, tape_delta; keep: [1];
// o: [B, L, Hv Dv] T; state_out as state; rows_out: [B, K-1 + L, C] T if RECORDING, else the last
// K-1 of them; g_out, k_out, delta_out: the new tape.
kernel void gated_delta_step() {
  constexpr uint C = 2 * Hk * Dk + Hv * Dv;
  constexpr uint P = C + Hv * Dv + 2 * Hv;
  constexpr uint N = Dk / 32;
  constexpr uint Rows = Dv / SG;
  const uint head = threadgroup_position_in_grid.y;
  const uint batch = threadgroup_position_in_grid.z;
  const uint lane = thread_index_in_simdgroup;
  const uint simdgroup = simdgroup_index_in_threadgroup;
  const uint key_head = head / (Hv / Hk);
  const bool owns_key = head % (Hv / Hk) == 0;  // of the heads that share a key, one writes it
  const uint first_row = simdgroup * Rows;
  const uint own_state = ((batch * Hv + head) * Dv + first_row) * Dk + lane * N;
  const uint L = x_shape[1];
  threadgroup Token<Dk, Dv> shared[Chunk];

  Vector<N> S[Rows];
#pragma unroll
  for (uint j = 0; j < Rows; j++) {
    S[j].read(state + own_state + j * Dk);
  }
  before += batch * before_shape[1] * C;
#if REPLAYS
  before += keep[0] * C;
  const uint old = batch * tape_k_shape[1];
  replay_tape<Hk, Hv, Dv>(
      tape_g + old * Hv + head, tape_k + (old * Hk + key_head) * Dk + lane * N,
      tape_delta + (old * Hv + head) * Dv + first_row, keep[0], S);
#endif
#if RECORDING
#pragma unroll
  for (uint j = 0; j < Rows; j++) {
    S[j].write(state_out + own_state + j * Dk);
  }
  const uint first_kept = 0;
#else
  const uint first_kept = L;
#endif

  for (uint start = 0; start < L; start += Chunk) {
    const uint n = metal::min(static_cast<uint>(Chunk), L - start);

    // Convolution, SiLU and l2norm: one simdgroup a token and part, q, k or v.
    for (uint task = simdgroup; task < 3 * n; task += SG) {
      const uint part = task % 3;
      const uint t = start + task / 3;
      const uint token = batch * L + t;
      threadgroup Token<Dk, Dv>& to = shared[task / 3];
      const uint first_channel = part < 2 ? (part * Hk + key_head) * Dk : 2 * Hk * Dk + head * Dv;
      float squares = 0.0f;
      for (uint d = lane; d < (part < 2 ? Dk : Dv); d += 32) {
        const uint c = first_channel + d;
        float y = 0.0f;
#pragma unroll
        for (uint j = 0; j < K; j++) {
          const uint row = t + j;  // of the K-1 inputs before and the new ones
          const uint at = token + j - (K - 1);
          const float input = row < K - 1           ? load(before, row * C + c)
                              : Masked && !mask[at] ? 0.0f
                                                    : load(x, at * P + c);
          y += load(taps, c * K + j) * input;
          // A row that later steps need is written by its own token, or by the first.
          if (row >= first_kept && (j == K - 1 || t == 0) && (part == 2 || owns_key)) {
            const uint kept = batch * (K - 1 + L - first_kept) + row - first_kept;
            rows_out[kept * C + c] = static_cast<T>(input);
          }
        }
        y = silu(y);
        to.qkv[part * Dk + d] = y;
        squares += y * y;
      }
      if (part < 2) {
        float scale = metal::precise::rsqrt(simd_sum(squares) + 1e-6f);
        if (part == 0) {
          scale *= metal::precise::rsqrt(static_cast<float>(Dk));
        }
        for (uint d = lane; d < Dk; d += 32) {
          const float y = to.qkv[part * Dk + d] * scale;
          to.qkv[part * Dk + d] = y;
#if RECORDING
          if (part == 1 && owns_key) {
            k_out[(token * Hk + key_head) * Dk + d] = y;
          }
#endif
        }
      } else if (lane == 0) {
        // The gates. A padded token leaves the state as it is.
        const bool padding = Masked && !mask[token];
        const float b = load(x, token * P + P - 2 * Hv + head);
        const float a = load(x, token * P + P - Hv + head) + vectors[Hv + head];
        const float g = padding ? 0.0f : -metal::precise::exp(vectors[head]) * softplus(a);
        to.gamma = metal::precise::exp(g);
        to.beta = padding ? 0.0f : sigmoid(b);
#if RECORDING
        g_out[token * Hv + head] = g;
#endif
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // The delta rule, each simdgroup on its own rows of the state.
    for (uint t = 0; t < n; t++) {
      threadgroup Token<Dk, Dv>& at = shared[t];
      Vector<N> query;
      Vector<N> key;
      query.read(at.qkv + lane * N);
      key.read(at.qkv + Dk + lane * N);
#pragma unroll
      for (uint j = 0; j < Rows; j++) {
        const uint row = first_row + j;
        S[j].decay(at.gamma);
        const float delta = at.beta * (at.qkv[2 * Dk + row] - S[j].dot(key));
        S[j].add(key, delta);
        const float out = S[j].dot(query);
        if (lane == 0) {
          at.o[row] = out;
#if RECORDING
          delta_out[((batch * L + start + t) * Hv + head) * Dv + row] = delta;
#endif
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // The gated norm: one simdgroup a token.
    for (uint t = simdgroup; t < n; t += SG) {
      threadgroup float* from = shared[t].o;
      const uint token = batch * L + start + t;
      float squares = 0.0f;
      for (uint d = lane; d < Dv; d += 32) {
        squares += from[d] * from[d];
      }
      const float scale = metal::precise::rsqrt(simd_sum(squares) / Dv + as_type<float>(EPS));
      for (uint d = lane; d < Dv; d += 32) {
        const float z = load(x, token * P + C + head * Dv + d);
        const float normed = vectors[2 * Hv + d] * (from[d] * scale);
        o[(token * Hv + head) * Dv + d] = static_cast<T>(normed * silu(z));
      }
    }  // no barrier: the next chunk's staging leaves o alone
  }
#if !RECORDING
#pragma unroll
  for (uint j = 0; j < Rows; j++) {
    S[j].write(state_out + own_state + j * Dk);
  }
#endif
}

// The replay alone, for whoever needs the state now.
kernel void gated_delta_replay() {
  constexpr uint N = Dk / 32;
  constexpr uint Rows = Dv / SG;
  const uint head = threadgroup_position_in_grid.y;
  const uint batch = threadgroup_position_in_grid.z;
  const uint lane = thread_index_in_simdgroup;
  const uint first_row = simdgroup_index_in_threadgroup * Rows;
  const uint own_state = ((batch * Hv + head) * Dv + first_row) * Dk + lane * N;
  const uint old = batch * tape_k_shape[1];
  Vector<N> S[Rows];
#pragma unroll
  for (uint j = 0; j < Rows; j++) {
    S[j].read(state + own_state + j * Dk);
  }
  replay_tape<Hk, Hv, Dv>(
      tape_g + old * Hv + head, tape_k + (old * Hk + head / (Hv / Hk)) * Dk + lane * N,
      tape_delta + (old * Hv + head) * Dv + first_row, keep[0], S);
#pragma unroll
  for (uint j = 0; j < Rows; j++) {
    S[j].write(state_out + own_state + j * Dk);
  }
}
