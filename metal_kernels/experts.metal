// The sparse experts for up to 16 rows, by a routing: each expert's weights are read once,
// whatever number of rows it serves. Sums have a fixed order, which depends on the row alone.
// At the end: what follows MLX's own products of more rows.
//
// Quantized weights are MLX's: rows of codes of Bits bits, one behind the other from the lowest bit
// on, with a scale and a bias a group of G. Bits 16 stands for unquantized weights of type T.

// Weights [rows, columns]; biases and scales are unused where they are not quantized.
template <typename T, int Bits, int G>
struct Weights {
  const device uint* weight;
  const device T* scales;
  const device T* biases;
};

template <int Columns, typename T, int Bits, int G>
inline Weights<T, Bits, G> from_row(thread const Weights<T, Bits, G>& all, uint row) {
  const ulong values = static_cast<ulong>(row) * Columns;
  const ulong words = values * (Bits < 16 ? Bits : 8 * sizeof(T)) / 32;
  const ulong groups = Bits < 16 ? values / G : 0;
  return {all.weight + words, all.scales + groups, all.biases + groups};
}

// How one lane reads a row: V values a step, 2 Bits bytes of quantized weights.
template <int Bits>
constexpr int step_size() {
  return Bits < 8 ? 16 : 8;
}

// The place in its word, of `size` bits, where a step's code i is multiplied: masking the word
// replaces shifting it. Only a code that two words share is moved, to the lowest place.
template <int Bits>
constexpr int place_of(int i, int size = Bits % 2 == 0 ? 32 : 16) {
  return Bits == 16 || i * Bits % size + Bits > size ? 0 : i * Bits % size;
}

// One step's weights of a lane, from number `first` on. A step is a whole number of words.
template <typename T, int Bits, int V>
inline void load_weights(const device uint* weight, uint first, thread float (&values)[V]) {
  if (Bits == 16) {
    const device T* from = (const device T*)weight + first;
#pragma unroll
    for (int i = 0; i < V; i++) {
      values[i] = load(from, i);
    }
    return;
  }
  using Word = metal::conditional_t<Bits % 2 == 0, uint, ushort>;
  constexpr int size = 8 * sizeof(Word);
  const device Word* from = (const device Word*)weight + first / V * (V * Bits / size);
#pragma unroll
  for (int i = 0; i < V; i++) {
    const int at = i * Bits / size, place = i * Bits % size;
    uint word = from[at];
    if (place + Bits > size) {
      word = word >> place | from[at + 1] << (size - place);
    }
    values[i] = word & (((1u << Bits) - 1) << place_of<Bits>(i));
  }
}

// Adds to acc[o][n] a lane's part of the product of weight row o (from the middle of Outputs on,
// `jump` rows further) and the inputs at x + from[n].
template <int Columns, typename T, int Bits, int G, int Outputs, int Rows>
inline void multiply(
    thread const Weights<T, Bits, G>& own, uint jump, const device T* x,
    thread const uint (&from)[Rows], uint lane, thread float (&acc)[Outputs][Rows]) {
  constexpr int V = step_size<Bits>();
  for (uint c = lane * V; c < Columns; c += 32 * V) {
    float inputs[Rows][V];
    float sums[Rows] = {};
#pragma unroll
    for (int n = 0; n < Rows; n++) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float value = load(x, from[n] + c + i);
        sums[n] += value;
        inputs[n][i] = value * (1.0f / (1u << place_of<Bits>(i)));  // exact
      }
    }
#pragma unroll
    for (int o = 0; o < Outputs; o++) {
      const uint at = (o < Outputs / 2 ? o : o + jump) * Columns + c;
      float values[V];
      load_weights<T, Bits>(own.weight, at, values);
#pragma unroll
      for (int n = 0; n < Rows; n++) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < V; i++) {
          dot += inputs[n][i] * values[i];
        }
        if (Bits < 16) {
          dot = load(own.scales, at / G) * dot + load(own.biases, at / G) * sums[n];
        }
        acc[o][n] += dot;
      }
    }
  }
}

// A routing (router.metal) of `count` pairs, which is one array [4 count + 1].
struct Routing {
  const device uint* experts;
  const device uint* rows;
  const device float* weights;
  const device uint* starts;
  uint count;
};

// Outputs of gate and up that a simdgroup makes at once, and outputs of down.
constant constexpr int kPairs = 4;
constant constexpr int kOutputs = 4;

template <int H, int I, int Rows, typename T, typename W>
inline void gate_up_rows(
    thread const W& own, const device T* x, const device uint* rows, uint pair, uint lane,
    device T* y) {
  uint from[Rows];
#pragma unroll
  for (int n = 0; n < Rows; n++) {
    from[n] = rows[pair + n] * H;
  }
  float acc[2 * kPairs][Rows] = {};
  multiply<H>(own, I - kPairs, x, from, lane, acc);
#pragma unroll
  for (int p = 0; p < kPairs; p++) {
#pragma unroll
    for (int n = 0; n < Rows; n++) {
      const float gate = simd_sum(acc[p][n]), up = simd_sum(acc[kPairs + p][n]);
      if (lane == p * Rows + n) {
        y[(pair + n) * I + p] = static_cast<T>(silu(gate) * up);
      }
    }
  }
}

// The next kPairs outputs of one expert, one of the distinct ones, for each of its rows.
template <int H, int I, typename T, typename W>
inline void gate_up_of(
    thread const W& own, const device T* x, thread const Routing& routing, uint distinct, uint lane,
    device T* y) {
  const uint end = routing.starts[distinct + 1];
  for (uint pair = routing.starts[distinct]; pair < end; pair += 2) {
    if (pair + 1 < end) {
      gate_up_rows<H, I, 2>(own, x, routing.rows, pair, lane, y);
    } else {
      gate_up_rows<H, I, 1>(own, x, routing.rows, pair, lane, y);
    }
  }
}

// y = silu(gate x) up x for every pair of the routing. A threadgroup owns one distinct expert and
// SG kPairs of its outputs.
//
// x: [R, H]; weights: gate's I rows, then up's, of each expert, [E, 2 I, H]; shared: those of expert
// number Shared, unless that is 0; y: [N, I], in the routing's order.
template <int H, int I, int SG, int Shared, typename T, typename W, typename One>
inline void expert_gate_up(
    const device T* x, thread const W& weights, thread const One& shared,
    thread const Routing& routing, device T* y, uint block, uint distinct, uint lane,
    uint simdgroup) {
  const uint output = (block * SG + simdgroup) * kPairs;
  const uint expert = routing.experts[distinct];
  if (output >= I) {
    return;
  }
  if (Shared && expert == Shared) {
    const One own = from_row<H>(shared, output);
    gate_up_of<H, I>(own, x, routing, distinct, lane, y + output);
  } else {
    const W own = from_row<H>(weights, expert * 2 * I + output);
    gate_up_of<H, I>(own, x, routing, distinct, lane, y + output);
  }
}

template <int I, int Rows, typename T, typename W>
inline void down_rows(
    thread const W& own, const device T* x, thread const Routing& routing, uint pair, uint lane,
    thread float (&sums)[kOutputs]) {
  uint from[Rows];
#pragma unroll
  for (int n = 0; n < Rows; n++) {
    from[n] = (pair + n) * I;
  }
  float acc[kOutputs][Rows] = {};
  multiply<I>(own, 0, x, from, lane, acc);
#pragma unroll
  for (int n = 0; n < Rows; n++) {
    const uint row = routing.rows[pair + n];
    const float weight = routing.weights[pair + n];
#pragma unroll
    for (int o = 0; o < kOutputs; o++) {
      const float total = simd_sum(acc[o][n]);
      if (lane == row) {
        sums[o] += weight * total;
      }
    }
  }
}

// Adds one expert's part, of the distinct ones, to the sums of each of its rows.
template <int I, typename T, typename W>
inline void down_of(
    thread const W& own, const device T* x, thread const Routing& routing, uint distinct, uint lane,
    thread float (&sums)[kOutputs]) {
  const uint end = routing.starts[distinct + 1];
  for (uint pair = routing.starts[distinct]; pair < end; pair += 2) {
    if (pair + 1 < end) {
      down_rows<I, 2>(own, x, routing, pair, lane, sums);
    } else {
      down_rows<I, 1>(own, x, routing, pair, lane, sums);
    }
  }
}

// y = residual + the weighted sum of down x over a row's experts. A threadgroup owns SG kOutputs
// outputs of all rows; lane n keeps the sums of row n.
//
// x: [N, I], in the routing's order; weights: [E, H, I]; shared: as above; residual, y: [R, H].
template <int H, int I, int SG, int Shared, typename T, typename W, typename One>
inline void expert_down(
    const device T* x, thread const W& weights, thread const One& shared,
    thread const Routing& routing, const device T* residual, device T* y, uint R, uint block,
    uint lane, uint simdgroup) {
  const uint output = (block * SG + simdgroup) * kOutputs;
  if (output >= H) {
    return;
  }
  float sums[kOutputs] = {};
  for (uint distinct = 0; routing.starts[distinct] < routing.count; distinct++) {
    const uint expert = routing.experts[distinct];
    if (Shared && expert == Shared) {
      const One own = from_row<I>(shared, output);
      down_of<I>(own, x, routing, distinct, lane, sums);
    } else {
      const W own = from_row<I>(weights, expert * H + output);
      down_of<I>(own, x, routing, distinct, lane, sums);
    }
  }
  if (lane < R) {
#pragma unroll
    for (int o = 0; o < kOutputs; o++) {
      const uint i = lane * H + output + o;
      y[i] = static_cast<T>(load(residual, i) + sums[o]);
    }
  }
}

// Columns that a thread makes of the rows of a prompt.
constant constexpr int kColumns = 4;

// y = residual + the weighted sum of a row's K vectors of x, in their order, columns from `first`.
//
// x: [N, H]; places: [R, K], the rows of x; weights: [R, K]; residual, y: [R, H].
template <int H, int K, typename T>
inline void combine(
    const device T* x, const device uint* places, const device T* weights, const device T* residual,
    device T* y, uint first, uint row) {
  float sums[kColumns] = {};
#pragma unroll
  for (int k = 0; k < K; k++) {
    const device T* from = x + static_cast<ulong>(places[row * K + k]) * H + first;
    const float weight = load(weights, row * K + k);
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      sums[c] += weight * load(from, c);
    }
  }
  const ulong start = static_cast<ulong>(row) * H + first;
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    y[start + c] = static_cast<T>(load(residual + start, c) + sums[c]);
  }
}
