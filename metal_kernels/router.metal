// From router logits to a routing for the expert kernels, for all of up to 16 rows in one launch:
// top-k, softmax weights, the shared expert's weight, and the pairs (row, expert) sorted by expert,
// so that each expert's weights are read once. For more rows, all but the sorting.
//
// A simdgroup a row, with E / 32 logits in each lane's registers. A routing takes one threadgroup.

// The Top largest logits of a row, ties by lowest index. Lane k gets the k-th expert and weight.
template <typename T, int E, int Top, bool Normalise>
inline void choose_experts(
    const device T* logits, uint lane, thread uint& expert, thread float& weight) {
  constexpr int V = (E + 31) / 32;
  float values[V];
  float largest = -INFINITY;
#pragma unroll
  for (int v = 0; v < V; v++) {
    const uint e = lane + 32 * v;
    values[v] = e < E ? load(logits, e) : -INFINITY;
    largest = metal::max(largest, values[v]);
  }
  largest = simd_max(largest);
  float total = 0.0f;
  if (!Normalise) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      total += metal::precise::exp(values[v] - largest);
    }
    total = simd_sum(total);
  }

  expert = 0;
  float logit = -INFINITY;
  for (uint k = 0; k < Top; k++) {
    float best = -INFINITY;
    uint index = lane % E;  // in range even where no logit is a number
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (values[v] > best) {
        best = values[v];
        index = lane + 32 * v;
      }
    }
    const float top = simd_max(best);
    const uint chosen = simd_min(best == top ? index : static_cast<uint>(E - 1));
#pragma unroll
    for (int v = 0; v < V; v++) {
      values[v] = lane + 32 * v == chosen ? -INFINITY : values[v];
    }
    if (lane == k) {
      expert = chosen;
      logit = top;
    }
  }
  weight = lane < Top ? metal::precise::exp(logit - largest) : 0.0f;
  if (Normalise) {
    total = simd_sum(weight);
  }
  weight = weight / total;
}

// logits: [R, E + Shared], the shared expert's gate last; experts, weights: [R, Top + Shared], the
// best first, the shared one, number E, last.
template <typename T, int E, int Top, bool Shared, bool Normalise>
inline void choose(
    const device T* logits, device uint* experts, device T* weights, uint lane, uint row) {
  constexpr uint S = Top + Shared;
  const device T* from = logits + row * (E + Shared);
  uint expert;
  float weight;
  choose_experts<T, E, Top, Normalise>(from, lane, expert, weight);
  if (Shared && lane == Top) {
    expert = E;
    weight = sigmoid(load(from, E));
  }
  if (lane < S) {
    experts[row * S + lane] = expert;
    weights[row * S + lane] = static_cast<T>(weight);
  }
}

// logits: [R, E + Shared], the shared expert's gate last. With S = Top + Shared and N = R S pairs,
// sorted by expert, then row: experts: [N] the distinct ones; starts: [N + 1] where each one's
// pairs begin, N after the last; rows, weights: [N], of each pair. The shared expert is number E.
// keys, sorted: [N]; pair_weights: [N]. One simdgroup a row.
template <typename T, int E, int Top, bool Shared, bool Normalise>
inline void route(
    const device T* logits, device uint* experts, device uint* starts, device uint* rows,
    device float* weights, threadgroup uint* keys, threadgroup uint* sorted,
    threadgroup float* pair_weights, uint thread_index, uint threads, uint lane, uint row) {
  constexpr uint S = Top + Shared;
  const uint R = threads / 32;
  const uint N = R * S;
  const device T* from = logits + row * (E + Shared);
  uint expert;
  float weight;
  choose_experts<T, E, Top, Normalise>(from, lane, expert, weight);
  if (lane < Top) {
    keys[row * S + lane] = expert * R + row;
    pair_weights[row * S + lane] = weight;
  }
  if (Shared && lane == 0) {
    keys[row * S + Top] = E * R + row;
    pair_weights[row * S + Top] = sigmoid(load(from, E));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = thread_index; i < N; i += threads) {
    uint rank = 0;
    for (uint j = 0; j < N; j++) {
      // The second part orders what only a row without numbers has: a pair twice.
      rank += keys[j] < keys[i] || (keys[j] == keys[i] && j < i);
    }
    sorted[rank] = keys[i];
    rows[rank] = keys[i] % R;
    weights[rank] = pair_weights[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = thread_index; i < N; i += threads) {
    uint distinct = 0;  // experts that begin at or before pair i
    uint all = 0;
    for (uint j = 0; j < N; j++) {
      const bool begins = j == 0 || sorted[j] / R != sorted[j - 1] / R;
      distinct += begins && j <= i;
      all += begins;
    }
    if (i == 0 || sorted[i] / R != sorted[i - 1] / R) {
      experts[distinct - 1] = sorted[i] / R;
      starts[distinct - 1] = i;
    }
    if (i >= all) {
      experts[i] = 0;
      starts[i] = N;
    }
  }
  if (thread_index == 0) {
    starts[N] = N;
  }
}
