// A Gated DeltaNet layer between its two projections, for a step of a few tokens: convolution,
// SiLU, l2norm, gates, replay of the tape, delta rule and gated norm in one launch.
//
// One threadgroup a value head (and sequence); one simdgroup owns Dv / SG rows of that head's
// state, Dk / 32 elements of a row in each lane's registers, from the one read to the one write.
// Every step is computed as if it were alone, so its bits do not depend on L.
//
// Lazy commit: before are the convolution's inputs [K-1 + n], the last n of them a round's, and
// tape holds that round's writes to the state; its first keep tokens are replayed first. In a
// round (Recording) the state written is the one after that replay, and the new tape is written as
// well; else it is the state after the new tokens.

// The record of a round: [B, n, Hv] log decay, [B, n, Hk, Dk] keys, [B, n, Hv, Dv] errors.
struct Tape {
  device float* g;
  device float* k;
  device float* delta;
};

// Where this thread works.
struct Place {
  uint head;
  uint batch;
  uint thread_index;
  uint lane;
  uint simdgroup;
};

// S = gamma S + k delta^T for one row of the state, where scaled is gamma S already. Verification
// and replay both end here, on the same operands, so that they give the same bits.
template <int N>
inline void write_row(thread float (&row)[N], thread const float (&key)[N], float delta) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    row[i] = metal::fma(key[i], delta, row[i]);
  }
}

template <int N>
inline void decay_row(thread float (&row)[N], float gamma) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    row[i] = row[i] * gamma;
  }
}

// Reads or writes the simdgroup's rows of one state.
template <int Rows, int N>
inline void load_state(const device float* state, thread float (&S)[Rows][N]) {
#pragma unroll
  for (int j = 0; j < Rows; j++) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      S[j][i] = state[j * 32 * N + i];
    }
  }
}

template <int Rows, int N>
inline void store_state(thread const float (&S)[Rows][N], device float* state) {
#pragma unroll
  for (int j = 0; j < Rows; j++) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      state[j * 32 * N + i] = S[j][i];
    }
  }
}

// Advances the rows by the first keep tokens of a tape of n.
template <int Hk, int Hv, int Dk, int Dv, int Rows, typename G>
inline void replay_tape(
    G g, const device float* k, const device float* delta, uint n, uint keep, uint first_row,
    thread const Place& at, thread float (&S)[Rows][Dk / 32]) {
  constexpr int N = Dk / 32;
  const uint key_head = at.head / (Hv / Hk);
  for (uint t = 0; t < keep; t++) {
    const uint token = at.batch * n + t;
    const float gamma = metal::precise::exp(load(g, token * Hv + at.head));
    float key[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
      key[i] = k[(token * Hk + key_head) * Dk + at.lane * N + i];
    }
#pragma unroll
    for (int j = 0; j < Rows; j++) {
      decay_row(S[j], gamma);
      write_row(S[j], key, delta[(token * Hv + at.head) * Dv + first_row + j]);
    }
  }
}

// The convolution's input at channel c and time t of the new tokens, negative before them.
template <typename T, int P, int C, int K, bool Masked, typename M>
inline float conv_input(
    const device T* x, const device T* before, M mask, uint L, uint rows_before, uint keep,
    uint batch, int t, uint c) {
  if (t < 0) {
    return load(before, (batch * rows_before + keep + (K - 1 + t)) * C + c);
  }
  if (Masked && !mask[batch * L + t]) {
    return 0.0f;
  }
  return load(x, (batch * L + t) * P + c);
}

// Where a head's channels of q (part 0), k (1) or v (2) begin in the convolution.
template <int Hk, int Hv, int Dk, int Dv>
inline uint first_channel(uint part, uint head) {
  return part == 2 ? 2 * Hk * Dk + head * Dv : (part * Hk + head / (Hv / Hk)) * Dk;
}

// x: [B, L, P] rows [q | k | v | z | b | a]; before: [B, K-1 + n, C]; taps: [C, K];
// A_log, dt_bias: [Hv] float32; norm_weight: [Dv] float32; eps: [1]; mask: [B, L], false at
// padding, read if Masked; state: [B, Hv, Dv, Dk] float32; tape_*: as in Tape, read if keep > 0;
// o: [B, L, Hv Dv]; state_out as state; rows_out: [B, K-1 + L, C] if Recording, else the last K-1.
// shared: [Chunk (2 Dk + 2 Dv + 2)]: q, k, v, o, decay and write strength of Chunk tokens.
template <
    typename T, typename W, int Hk, int Hv, int Dk, int Dv, int K, int SG, int Chunk,
    bool Recording, bool Masked, typename A, typename D, typename E, typename M, typename G>
inline void gated_delta_step(
    const device T* x, const device T* before, const device W* taps, A A_log, D dt_bias,
    const device float* norm_weight, E eps, M mask, const device float* state, G tape_g,
    const device float* tape_k, const device float* tape_delta, uint L, uint rows_before,
    uint keep, device T* o, device float* state_out, device T* rows_out, thread const Tape& tape,
    threadgroup float* shared, thread const Place& at) {
  constexpr uint C = 2 * Hk * Dk + Hv * Dv;
  constexpr uint P = C + Hv * Dv + 2 * Hv;
  constexpr uint r = Hv / Hk;
  constexpr int N = Dk / 32;
  constexpr int Rows = Dv / SG;
  const uint key_head = at.head / r;
  const bool owns_key = at.head % r == 0;  // of the heads that share a key, one writes it
  const uint first_row = at.simdgroup * Rows;
  threadgroup float* q_shared = shared;
  threadgroup float* k_shared = q_shared + Chunk * Dk;
  threadgroup float* v_shared = k_shared + Chunk * Dk;
  threadgroup float* o_shared = v_shared + Chunk * Dv;
  threadgroup float* gamma_shared = o_shared + Chunk * Dv;
  threadgroup float* beta_shared = gamma_shared + Chunk;

  // The convolution's inputs that later steps need.
  const uint kept = Recording ? K - 1 + L : K - 1;
  const int first_time = Recording ? 1 - K : static_cast<int>(L) - (K - 1);
  for (uint part = owns_key ? 0 : 2; part < 3; part++) {
    const uint width = part == 2 ? Dv : Dk;
    for (uint i = at.thread_index; i < kept * width; i += 32 * SG) {
      const uint row = i / width;
      const uint c = first_channel<Hk, Hv, Dk, Dv>(part, at.head) + i % width;
      rows_out[(at.batch * kept + row) * C + c] = static_cast<T>(
          conv_input<T, P, C, K, Masked>(
              x, before, mask, L, rows_before, keep, at.batch,
              first_time + static_cast<int>(row), c));
    }
  }

  const uint own_state = ((at.batch * Hv + at.head) * Dv + first_row) * Dk + at.lane * N;
  float S[Rows][N];
  load_state(state + own_state, S);
  replay_tape<Hk, Hv, Dk, Dv>(
      tape_g, tape_k, tape_delta, rows_before - (K - 1), keep, first_row, at, S);
  if (Recording) {
    store_state(S, state_out + own_state);
  }

  for (uint start = 0; start < L; start += Chunk) {
    const uint n = metal::min(static_cast<uint>(Chunk), L - start);

    // Convolution, SiLU and l2norm: one simdgroup a token and part.
    for (uint task = at.simdgroup; task < 3 * n; task += SG) {
      const uint t = task / 3;
      const uint part = task % 3;
      const uint width = part == 2 ? Dv : Dk;
      threadgroup float* to = part == 0   ? q_shared + t * Dk
                              : part == 1 ? k_shared + t * Dk
                                          : v_shared + t * Dv;
      float squares = 0.0f;
      for (uint d = at.lane; d < width; d += 32) {
        const uint c = first_channel<Hk, Hv, Dk, Dv>(part, at.head) + d;
        float y = 0.0f;
#pragma unroll
        for (int j = 0; j < K; j++) {
          const int time = static_cast<int>(start + t) + j - (K - 1);
          y += load(taps, c * K + j) *
               conv_input<T, P, C, K, Masked>(
                   x, before, mask, L, rows_before, keep, at.batch, time, c);
        }
        y = silu(y);
        to[d] = y;
        squares += y * y;
      }
      if (part < 2) {
        float scale = metal::precise::rsqrt(simd_sum(squares) + 1e-6f);
        if (part == 0) {
          scale *= metal::precise::rsqrt(static_cast<float>(Dk));
        }
        for (uint d = at.lane; d < Dk; d += 32) {
          to[d] *= scale;
          if (Recording && part == 1 && owns_key) {
            tape.k[((at.batch * L + start + t) * Hk + key_head) * Dk + d] = to[d];
          }
        }
      }
    }

    // Gates: one thread a token. A padded token leaves the state as it is.
    for (uint t = at.thread_index; t < n; t += 32 * SG) {
      const uint token = at.batch * L + start + t;
      const bool padding = Masked && !mask[token];
      const float b = load(x, token * P + P - 2 * Hv + at.head);
      const float a = load(x, token * P + P - Hv + at.head) + load(dt_bias, at.head);
      const float g =
          padding ? 0.0f : -metal::precise::exp(load(A_log, at.head)) * softplus(a);
      gamma_shared[t] = metal::precise::exp(g);
      beta_shared[t] = padding ? 0.0f : sigmoid(b);
      if (Recording) {
        tape.g[token * Hv + at.head] = g;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // The delta rule, each simdgroup on its own rows of the state.
    for (uint t = 0; t < n; t++) {
      float key[N];
      float query[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        key[i] = k_shared[t * Dk + at.lane * N + i];
        query[i] = q_shared[t * Dk + at.lane * N + i];
      }
#pragma unroll
      for (int j = 0; j < Rows; j++) {
        const uint row = first_row + j;
        decay_row(S[j], gamma_shared[t]);
        float predicted = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
          predicted += S[j][i] * key[i];
        }
        const float delta = beta_shared[t] * (v_shared[t * Dv + row] - simd_sum(predicted));
        write_row(S[j], key, delta);
        float out = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
          out += S[j][i] * query[i];
        }
        out = simd_sum(out);
        if (at.lane == 0) {
          o_shared[t * Dv + row] = out;
          if (Recording) {
            tape.delta[((at.batch * L + start + t) * Hv + at.head) * Dv + row] = delta;
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // The gated norm: one simdgroup a token.
    for (uint t = at.simdgroup; t < n; t += SG) {
      const uint token = at.batch * L + start + t;
      float squares = 0.0f;
      for (uint d = at.lane; d < Dv; d += 32) {
        squares += o_shared[t * Dv + d] * o_shared[t * Dv + d];
      }
      const float scale = metal::precise::rsqrt(simd_sum(squares) / Dv + load(eps, 0));
      for (uint d = at.lane; d < Dv; d += 32) {
        const float z = load(x, token * P + C + at.head * Dv + d);
        const float normed = norm_weight[d] * (o_shared[t * Dv + d] * scale);
        o[(token * Hv + at.head) * Dv + d] = static_cast<T>(normed * silu(z));
      }
    }  // no barrier: the next chunk's staging leaves o_shared alone
  }

  if (!Recording) {
    store_state(S, state_out + own_state);
  }
}

// The replay alone, for whoever needs the state now.
template <int Hk, int Hv, int Dk, int Dv, int SG, typename G>
inline void gated_delta_replay(
    const device float* state, G tape_g, const device float* tape_k,
    const device float* tape_delta, uint n, uint keep, device float* state_out,
    thread const Place& at) {
  constexpr int N = Dk / 32;
  constexpr int Rows = Dv / SG;
  const uint first_row = at.simdgroup * Rows;
  const uint own_state = ((at.batch * Hv + at.head) * Dv + first_row) * Dk + at.lane * N;
  float S[Rows][N];
  load_state(state + own_state, S);
  replay_tape<Hk, Hv, Dk, Dv>(tape_g, tape_k, tape_delta, n, keep, first_row, at, S);
  store_state(S, state_out + own_state);
}
